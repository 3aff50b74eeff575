"""Options that several commands share, how a run ends, and how errors are shown to a user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import FlowbridgeError

if TYPE_CHECKING:
    from ..workflows.runner import Selection

INTERRUPTED = 130  # the shells' code for a command ended by Ctrl-C

ConfigurationFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The workflow to run.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the results; default: as in CONFIG.toml.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes at the same time; default: as in CONFIG.toml."),
]
EvaluationWorkers = Annotated[int, typer.Option(min=1, help="Number of processes that evaluate energies.")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Dask cluster for simulations, energies and samples: address, scheduler file (.json), or 'local'.",
        show_default=False,
    ),
]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.", show_default=False)]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STAGE", help="Leave out a stage that no other one needs; may be repeated.", show_default=False
    ),
]
Calculator = Annotated[str, typer.Option(help="Source of energies: gfn2, gfn1, a model file, or module:function.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def selection(until: str | None, skip: list[str] | None) -> Selection:
    """Return the stages that the options ask for."""
    from ..workflows.runner import Selection

    return Selection(until, tuple(skip or ()))


def end(results: Mapping[str, Any]) -> None:
    """Leave with exit code 1 where a stage failed; the runner has said why."""
    if results.get("failed"):
        raise typer.Exit(1)


@contextmanager
def readable_errors(debug: bool, *, resumable: bool = False) -> Iterator[None]:
    """Turn flowbridge's own errors into one readable message and exit code 1."""
    try:
        yield
    except FlowbridgeError as error:
        if debug:
            raise
        _show(f"error: {error}", "red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        if debug:
            raise
        _show(f"interrupted{': repeat the same command to continue where it stopped' if resumable else ''}", "yellow")
        raise typer.Exit(INTERRUPTED) from None


def _show(text: str, style: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
