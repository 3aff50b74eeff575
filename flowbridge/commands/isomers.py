"""The command ``flowbridge isomers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Calculator, Debug, EvaluationWorkers, Scheduler, Seed, readable_errors


def isomers(
    formulas: Annotated[list[str] | None, typer.Argument(metavar="[FORMULA]...", help="Such as C4H8O.")] = None,
    output: Annotated[Path, typer.Option(help="ASE database to write, or to continue.")] = Path("isomers.db"),
    heavy_atoms: Annotated[
        tuple[int, int] | None, typer.Option(help="Instead of formulas: all with so many atoms besides hydrogen.")
    ] = None,
    most: Annotated[str, typer.Option(help="With --heavy-atoms: largest numbers of N, O, F.")] = "N2O2F2",
    unsaturation: Annotated[
        int, typer.Option(min=0, help="With --heavy-atoms: largest number of rings and double bonds.")
    ] = 4,
    exclude: Annotated[list[str] | None, typer.Option(help="A formula to leave out; may be repeated.")] = None,
    per_formula: Annotated[int | None, typer.Option(min=1, help="A sample of each formula.  [default: all]")] = None,
    calculator: Calculator = "gfn2",
    vibrations: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the molecules whose vibrations are checked.")
    ] = 0.0,
    seed: Seed = 1,
    workers: EvaluationWorkers = 1,
    scheduler: Scheduler = None,
    debug: Debug = False,
) -> None:
    """Enumerate and relax all constitutional isomers.

    Stores those whose bonds hold in an ASE database.

    After an interruption the same command continues.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.machines import executor_for
        from ..workflows.molecules.isomer_database import IsomerRequest, chosen_formulas, make_and_print

        chosen = chosen_formulas(formulas or [], heavy_atoms, most, unsaturation, exclude or [])
        with executor_for(workers, scheduler) as executor:
            make_and_print(IsomerRequest(chosen, per_formula, calculator, vibrations, seed), output, executor)
