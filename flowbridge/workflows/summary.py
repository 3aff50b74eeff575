"""The tables that ``flowbridge run`` prints at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .boltzmann.targets import Check


def print_summary(results: dict[str, Any], checks: list[Check], output: Path) -> None:
    """Print the headline numbers of ``results``, the requirements they meet or miss, and where the report is."""
    console = Console()
    numbers = Table(title=f"{results['molecule']}: results.json", title_justify="left")
    numbers.add_column("key", overflow="fold")
    numbers.add_column("value", justify="right")
    for key, value in results.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.add_row(key, f"{value:.5g}" if isinstance(value, float) else str(value))
    for stage, seconds in results["wall_seconds"].items():
        numbers.add_row(f"wall_seconds.{stage}", f"{seconds:.1f}")
    console.print(numbers)
    asked = Table(title="requirements", title_justify="left")
    for column in ("key", "must be", "measured", "met"):
        asked.add_column(column, overflow="fold")
    for check in checks:
        asked.add_row(check.key, check.required, check.measured, {True: "yes", False: "NO", None: "-"}[check.met])
    console.print(asked)
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
