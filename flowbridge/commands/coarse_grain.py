"""The command ``flowbridge coarse-grain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Output, Skip, Until, Workers, end, readable_errors, selection


def coarse_grain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to coarse-grain, and how.")],
    output: Output = None,
    workers: Workers = None,
    until: Until = None,
    skip: Skip = None,
    debug: Debug = False,
) -> None:
    """Make a coarse-grained force field, simulate and report it.

    Finished stages are kept: after an interruption the same command continues. Stages: reference, beads, train, dynamics,
    analysis.
    """
    with readable_errors(debug, resumable=True):
        from ..workflows.coarse_graining.pipeline import run_coarse_graining_file

        end(run_coarse_graining_file(config, output, workers, selection(until, skip)))
