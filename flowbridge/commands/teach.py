"""The command ``flowbridge teach``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Calculator, Debug, EvaluationWorkers, Scheduler, Seed, readable_errors


def teach(
    database: Annotated[Path | None, typer.Argument(help="ASE database of relaxed molecules to imitate.")] = None,
    output: Annotated[Path, typer.Option(help="Model file to write.")] = Path("builder.flow"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of imitation.")] = 6000,
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
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of reinforcement.")] = 40,
    molecules: Annotated[int, typer.Option(min=2, help="Molecules built in each round.")] = 128,
    novelty: Annotated[
        float, typer.Option(min=0.0, help="Bonus in reinforcement for isomers that were seldom built, as a share.")
    ] = 0.0,
    model: Annotated[
        Path | None, typer.Option(help="Builder to reinforce without a database.  [default: flowbridge's]")
    ] = None,
    calculator: Calculator = "gfn2",
    relax: Annotated[
        bool,
        typer.Option(
            "--relax",
            help="Reward energies after relaxation, on a scale of 1 eV: dearer than single points (2 eV), which lower "
            "strain and teach validity, but not which isomers are low.",
        ),
    ] = False,
    seed: Seed = 1,
    workers: EvaluationWorkers = 1,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Teach a builder of molecules, by imitation or by energies.

    Imitates a database of molecules, is reinforced by energies, or does one after the other.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..flows.molecules.configuration import BuilderConfiguration
        from ..flows.molecules.formulas import Formula
        from ..flows.molecules.training.imitation import ImitationStage
        from ..flows.molecules.training.reinforcement import ReinforcementStage
        from ..workflows.machines import executor_for
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
