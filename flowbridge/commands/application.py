"""The ``flowbridge`` command: registers the commands, each of which imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .build import build
from .coarse_grain import coarse_grain
from .compile import compile_model_file
from .deepqmc import deepqmc
from .density import density
from .doctor import doctor
from .info import info
from .isomers import isomers
from .md import md
from .reference import reference
from .run import run
from .socket import socket
from .teach import teach
from .train import train

application = typer.Typer(
    help="Train normalizing flows on molecules and use them in OpenMM, ASE and reweighting.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"flowbridge {version('flowbridge')}")
        raise typer.Exit


@application.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train normalizing flows on molecules and use them in OpenMM, ASE and reweighting."""


for _command in (
    run,
    train,
    coarse_grain,
    reference,
    md,
    socket,
    info,
    density,
    deepqmc,
    doctor,
    build,
    teach,
    isomers,
):
    application.command()(_command)
application.command("compile")(compile_model_file)
