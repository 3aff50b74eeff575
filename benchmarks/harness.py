"""Paired timings: cases take turns, round by round, so that a machine that changes its speed changes all of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flowbridge.workflows.stages import write_json

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("flowbridge", "torch", "openmm", "ase", "numpy", "zuko", "nflows", "normflows")


@dataclass(frozen=True)
class Timing:
    """Microseconds per unit of work of one case, one value a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over rounds."""
        return statistics.median(self.rounds)


def paired(
    cases: Mapping[str, Callable[[], object]],
    *,
    work: Mapping[str, float] | None = None,
    rounds: int = 9,
    seconds: float = 0.15,
) -> dict[str, Timing]:
    """Time every case in every round.

    Args:
        cases: functions to time.
        work: units of work of one call (steps, configurations); 1 where a case is not named.
        rounds: number of turns of each case.
        seconds: shortest turn.
    """
    counts = {name: _calls(case, seconds) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                case()
            elapsed = time.perf_counter() - begin
            times[name].append(1e6 * elapsed / counts[name] / (work or {}).get(name, 1.0))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _calls(case: Callable[[], object], seconds: float) -> int:
    case()  # the first call sets things up
    begin = time.perf_counter()
    case()
    once = time.perf_counter() - begin
    return max(1, round(seconds / max(once, 1e-7)))


def ratio(above: Timing, below: Timing) -> float:
    """Return the median over rounds of the ratio of two cases within a round."""
    return statistics.median(a / b for a, b in zip(above.rounds, below.rounds, strict=True))


def machine() -> dict[str, Any]:
    """Return what a timing depends on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its first column on the left and numbers on the right."""
    table = Table(*columns, title=title, title_justify="left", box=None)
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if number else "left"
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def report(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Mapping[str, Any],
    *,
    small: bool = False,
) -> None:
    """Print a table and write ``results`` with the machine to ``benchmarks/results/NAME.json``, small ones apart."""
    print_table(title, columns, rows)
    console, where = Console(), machine()
    console.print(
        f"{where['processor']}, {where['cores']} cores, {where['threads']} thread(s), torch {torch.__version__}",
        highlight=False,
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}{'_small' if small else ''}.json"
    file.write_text(json.dumps({"machine": where, **results}, indent=1) + "\n")
    console.print(f"written to {file}", highlight=False, soft_wrap=True)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all timings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def study(description: str | None, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all studies: ``--small`` and ``--output``, the folder of finished work."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="seconds instead of hours; the numbers mean nothing")
    parser.add_argument(
        "--output", type=Path, default=Path(output), help="folder of what is finished, and not repeated"
    )
    return parser


class OutOfTime(Exception):
    """The minutes given are over; the same command continues."""


def require_time(deadline: float) -> None:
    """Raise OutOfTime when ``time.monotonic()`` is past the deadline."""
    if time.monotonic() > deadline:
        raise OutOfTime


def done_once(file: Path, work: Callable[[], Any], deadline: float = math.inf) -> Any:
    """Return the result of ``work`` from its file; where there is none, do the work and write the file.

    Raises:
        OutOfTime: when the work is still to do and the deadline is over.
    """
    if not file.is_file():
        require_time(deadline)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"value": work()})
    content = json.loads(file.read_text())
    return content["value"] if list(content) == ["value"] else content


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
