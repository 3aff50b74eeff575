"""The command ``flowbridge compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, readable_errors


def compile_model_file(
    file: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Configurations of one call; may be repeated.  [default: 1]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; default: as in the model.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Compile again what is compiled already, or failed.")] = False,
    debug: Debug = False,
) -> None:
    """Compile a model for this machine, and time it.

    OpenMM forces and ASE calculators do so by themselves when they first need it.
    """
    with readable_errors(debug):
        from rich.console import Console

        from ..workflows.compiling import compile_model, print_programs

        print_programs(compile_model(file, batch or [1], dtype, anew), Console())
