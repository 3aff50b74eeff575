"""The table that ``flowbridge run`` prints at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(results: dict[str, Any], output: Path) -> None:
    """Print the headline numbers of ``results`` and where the report is."""
    console = Console()
    table = Table(title=f"{results['molecule']}: results", title_justify="left")
    table.add_column("key")
    table.add_column("value", justify="right")
    for key, value in results.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(key, f"{value:.5g}" if isinstance(value, float) else str(value))
    for stage, seconds in results["wall_seconds"].items():
        table.add_row(f"wall_seconds.{stage}", f"{seconds:.1f}")
    console.print(table)
    console.print(f"report: {output / 'report.html'}")
