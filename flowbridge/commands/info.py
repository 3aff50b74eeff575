"""The command ``flowbridge info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJSON, Debug, readable_errors


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model file.")],
    json: AsJSON = False,
    debug: Debug = False,
) -> None:
    """Show what a model file holds, after verifying it."""
    with readable_errors(debug):
        from rich.console import Console

        from ..core.model_files.files import read_header
        from ..workflows.information import information_as_json, print_information

        header = read_header(file)
        if json:
            typer.echo(information_as_json(header))
        else:
            print_information(header, file, Console())
