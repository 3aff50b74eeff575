"""Options that several commands share, and how errors are shown to a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import FlowbridgeError

INTERRUPTED = 130  # the shells' code for a command ended by Ctrl-C

ConfigurationFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The workflow to run.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that simulate at the same time; default: as in CONFIG.toml."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Dask cluster for simulations, energies and samples: address, scheduler file (.json), or 'local'.",
        show_default=False,
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def readable_errors(debug: bool, *, resumable: bool = False) -> Iterator[None]:
    """Turn flowbridge's own errors into one readable message and exit code 1."""
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        yield
    except FlowbridgeError as error:
        if debug:
            raise
        stderr.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        if debug:
            raise
        hint = ": repeat the same command to continue where it stopped" if resumable else ""
        stderr.print(f"interrupted{hint}", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
