"""Progress of long work: bars on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
console = Console(stderr=True)
_logger = logging.getLogger("flowbridge")
_SECONDS = 60.0  # between lines in the log


class ProgressBar:
    """A bar on the terminal; where there is none, a line in the log (of ``flowbridge``, level INFO) now and then.

    Args:
        progress: that shows it; None for lines in the log.
        description: what is done.
        total: how much there is to do.
        quiet: whether there are no lines in the log either.
    """

    def __init__(self, progress: Progress | None, description: str, total: float, quiet: bool = False) -> None:
        self._progress, self._description, self._total = progress, description, total
        self._task = None if progress is None else progress.add_task(description, total=total, text="")
        self._said = math.inf if quiet else time.monotonic()

    def update(
        self, done: float, text: str = "", *, description: str | None = None, total: float | None = None
    ) -> None:
        """Say how much is done, and something about it."""
        self._description, self._total = description or self._description, total or self._total
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=done, total=self._total, description=self._description, text=text
            )
        elif time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            _logger.info("%s: %g of %g%s", self._description, done, self._total, text and f", {text}")


@contextmanager
def progress_bar(description: str, total: float, shown: bool = True) -> Iterator[ProgressBar]:
    """Show a bar while the block runs.

    Args:
        description: what is done.
        total: how much there is to do.
        shown: whether there is a bar or a log at all.
    """
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    if not (shown and console.is_terminal):
        yield ProgressBar(None, description, total, quiet=not shown)
        return
    with Progress(*columns, console=console) as progress:
        yield ProgressBar(progress, description, total)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield ``items`` while a bar counts them."""
    with progress_bar(description, total) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)
