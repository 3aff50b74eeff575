"""The commands ``flowbridge build``, ``teach`` and ``isomers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Scheduler, readable_errors


def build(
    formula: Annotated[str, typer.Argument(help="Such as C3H5NO2: neutral, closed shell, of H, C, N, O and F.")],
    calculator: Annotated[str, typer.Option(help="gfn2, gfn1, a model file, or module:function.")] = "gfn2",
    n: Annotated[int, typer.Option("--n", min=1, help="Molecules to build.")] = 200,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Of energies at most.  [default: what all isomers take]")
    ] = None,
    starts: Annotated[int, typer.Option(min=1, help="Geometries that each isomer is relaxed from at most.")] = 1,
    ranked: Annotated[
        bool, typer.Option("--ranked/--unranked", help="Relax first what should be low by its graph.")
    ] = True,
    model: Annotated[
        Path | None, typer.Option(help="A builder.  [default: the one that comes with flowbridge]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/FORMULA]")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="ProcessExecutor that evaluate energies.")] = 1,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Build low-energy isomers of a formula, relaxed and ranked: ASE database, SDF, and a page with pictures.

    Of each isomer among the molecules that are built one is relaxed, with MMFF94 before the calculator.
    After an interruption the same command continues, and evaluates nothing twice.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.molecules.building import BuildRequest, build_and_print
        from ..workflows.molecules.executors import executor_for

        with executor_for(workers, scheduler) as executor:
            folder = output or Path("runs") / formula
            request = BuildRequest(formula, folder, n, model, calculator, seed, evaluations, starts, ranked)
            build_and_print(request, executor)


def teach(
    database: Annotated[Path | None, typer.Argument(help="ASE database of relaxed molecules to imitate.")] = None,
    output: Annotated[Path, typer.Option(help="Model file to write.")] = Path("builder.flow"),
    steps: Annotated[int, typer.Option(min=1, help="Of imitation.")] = 6000,
    width: Annotated[int, typer.Option(min=1, help="Features of an atom in the network.")] = 96,
    energy_scale: Annotated[
        float | None,
        typer.Option(
            min=1e-3,
            help="eV; molecules so far above their formula's lowest are shown 1/e as often.  [default: alike]",
        ),
    ] = None,
    reinforce: Annotated[
        list[str] | None, typer.Option(help="Formula to reach low energies for; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of reinforcement.")] = 40,
    molecules: Annotated[int, typer.Option(min=2, help="Built in each round.")] = 128,
    novelty: Annotated[
        float, typer.Option(min=0.0, help="Bonus in reinforcement for isomers that were seldom built, as a share.")
    ] = 0.0,
    model: Annotated[
        Path | None, typer.Option(help="Builder to reinforce without a database.  [default: flowbridge's]")
    ] = None,
    calculator: Annotated[str, typer.Option(help="gfn2, gfn1, a model file, or module:function.")] = "gfn2",
    relax: Annotated[
        bool,
        typer.Option(
            "--relax",
            help="Reward energies after relaxation, on a scale of 1 eV: dearer than single points (2 eV), which lower "
            "strain and teach validity, but not which isomers are low.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="ProcessExecutor that evaluate energies.")] = 1,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Teach a builder of molecules: imitation of a database, reinforcement by energies, or one after the other.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..flows.molecules.configuration import BuilderConfiguration
        from ..flows.molecules.formulas import Formula
        from ..flows.molecules.training.imitation import ImitationStage
        from ..flows.molecules.training.reinforcement import ReinforcementStage
        from ..workflows.molecules.executors import executor_for
        from ..workflows.molecules.teaching import ImitationRequest, ReinforcementRequest, teach_and_print

        imitation = strengthening = None
        taught = output if not reinforce else output.with_suffix(".imitation.flow")
        if database is not None:
            stage = ImitationStage(steps=steps)
            imitation = ImitationRequest(database, taught, stage, BuilderConfiguration(width=width), energy_scale, seed)
        if reinforce:
            formulas = tuple(Formula.parse(text) for text in reinforce)
            begin = model if database is None else taught
            scale = 1.0 if relax else 2.0  # strain, which relaxation takes out, makes energies differ by more
            policy = ReinforcementStage(iterations=rounds, molecules=molecules, novelty=novelty, energy_scale=scale)
            strengthening = ReinforcementRequest(begin, output, formulas, calculator, relax, policy, seed)
        with executor_for(workers, scheduler) as executor:
            teach_and_print(imitation, strengthening, executor)


def isomers(
    formulas: Annotated[list[str] | None, typer.Argument(metavar="[FORMULA]...", help="Such as C4H8O.")] = None,
    output: Annotated[Path, typer.Option(help="ASE database to write or to go on with.")] = Path("isomers.db"),
    heavy_atoms: Annotated[
        tuple[int, int] | None, typer.Option(help="Instead of formulas: all with so many atoms besides hydrogen.")
    ] = None,
    most: Annotated[str, typer.Option(help="Of these at most so many N, O, F.")] = "N2O2F2",
    unsaturation: Annotated[int, typer.Option(min=0, help="Of these at most so many rings and double bonds.")] = 4,
    exclude: Annotated[list[str] | None, typer.Option(help="A formula to leave out; may be repeated.")] = None,
    per_formula: Annotated[int | None, typer.Option(min=1, help="A sample of each formula.  [default: all]")] = None,
    calculator: Annotated[str, typer.Option(help="gfn2, gfn1, a model file, or module:function.")] = "gfn2",
    vibrations: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share whose vibrations are checked.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of samples and embeddings.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="ProcessExecutor.")] = 1,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Enumerate constitutional isomers, relax them, and keep those whose bonds hold in an ASE database.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.molecules.executors import executor_for
        from ..workflows.molecules.isomer_database import IsomerRequest, chosen_formulas, make_and_print

        chosen = chosen_formulas(formulas or [], heavy_atoms, most, unsaturation, exclude or [])
        with executor_for(workers, scheduler) as executor:
            make_and_print(IsomerRequest(chosen, per_formula, calculator, vibrations, seed), output, executor)
