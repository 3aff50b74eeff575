"""The command ``flowbridge socket``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, readable_errors


def socket(
    model: Annotated[Path, typer.Argument(metavar="MODEL.flow", help="A model file.")],
    structure: Annotated[Path, typer.Option(help="Structure with the atoms in the driver's order; any format of ASE.")],
    unix: Annotated[str | None, typer.Option(help="Name of the driver's UNIX socket.")] = None,
    host: Annotated[str, typer.Option(help="Host of the driver.")] = "localhost",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Its port, instead of a UNIX socket.")] = None,
    debug: Debug = False,
) -> None:
    """Serve energies and forces to i-PI and drivers like it."""
    with readable_errors(debug):
        from ..integrations.socket import serve

        serve(model, structure, unix=unix, host=host, port=port)
