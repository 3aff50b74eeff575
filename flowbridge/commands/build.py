"""The command ``flowbridge build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Calculator, Debug, EvaluationWorkers, Scheduler, Seed, Skip, Until, end, readable_errors, selection


def build(
    formula: Annotated[str, typer.Argument(help="Such as C3H5NO2: neutral, closed shell, of H, C, N, O and F.")],
    calculator: Calculator = "gfn2",
    n: Annotated[int, typer.Option("--n", min=1, help="Molecules to build.")] = 200,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Largest number of energies.  [default: what all isomers take]")
    ] = None,
    starts: Annotated[
        int, typer.Option(min=1, help="Largest number of geometries that an isomer is relaxed from.")
    ] = 1,
    ranked: Annotated[
        bool, typer.Option("--ranked/--unranked", help="Relax first what should be low by its graph.")
    ] = True,
    model: Annotated[
        Path | None, typer.Option(help="Model file of a builder.  [default: the one that comes with flowbridge]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/FORMULA]")] = None,
    seed: Seed = 1,
    workers: EvaluationWorkers = 1,
    scheduler: Scheduler = None,
    until: Until = None,
    skip: Skip = None,
    debug: Debug = False,
) -> None:
    """Build, relax and rank low-energy isomers of a formula.

    Writes an ASE database, an SDF file and a page with pictures.

    Of each isomer among the molecules that are built one is relaxed, with MMFF94 before the calculator.
    After an interruption the same command continues, and evaluates nothing twice. Stages: relax, export.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.machines import executor_for
        from ..workflows.molecules.building import BuildRequest, build_isomers

        with executor_for(workers, scheduler) as executor:
            folder = output or Path("runs") / formula
            request = BuildRequest(formula, folder, n, model, calculator, seed, evaluations, starts, ranked)
            end(build_isomers(request, executor, selection(until, skip)))
