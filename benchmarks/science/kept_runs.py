"""Runs of a benchmark that are done once: each has a file of its own, and time may run out between two."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowbridge.workflows.stages import write_json


class OutOfTime(Exception):
    """The minutes asked for are over; the same command continues."""


def kept(file: Path, work: Callable[[], Any], deadline: float) -> Any:
    """Return what ``work`` gave when the file was written, which is now if there is none.

    Raises:
        OutOfTime: when there is none, and ``time.monotonic()`` is past the deadline.
    """
    if not file.is_file():
        if time.monotonic() > deadline:
            raise OutOfTime
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"value": work()})
    return json.loads(file.read_text())["value"]


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
