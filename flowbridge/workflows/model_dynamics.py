"""What ``flowbridge md`` shows while it runs and when it is done."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from ..core.execution.progress import progress_bar
from ..integrations.openmm.sampling import model_dynamics
from ..integrations.openmm.sampling.model_dynamics import ModelDynamics, run_model_dynamics


def run_and_print(run: ModelDynamics) -> None:
    """Run dynamics with a progress bar (on a terminal), and print where the results are."""
    start = time.monotonic()
    with progress_bar("dynamics", run.steps) as bar:

        def announce(progress: model_dynamics.Progress) -> None:
            nanoseconds = progress.done_now * run.step_fs * 1e-6
            speed = nanoseconds / (time.monotonic() - start) * 86_400.0
            bar.update(progress.step, f"{progress.temperature:.0f} K, {speed:.1f} ns/day")

        end = run_model_dynamics(run, announce)
    _print(run, end, time.monotonic() - start)


def _print(run: ModelDynamics, end: model_dynamics.Progress, seconds: float) -> None:
    console = Console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("steps", f"{end.step:,} ({end.step * run.step_fs * 1e-6:.4g} ns), {end.done_now:,} of them now")
    if end.done_now:
        table.add_row("speed", f"{end.done_now * run.step_fs * 1e-6 / seconds * 86_400.0:.4g} ns/day, start included")
    table.add_row("last frame", f"potential energy {end.potential_energy:.2f} kJ/mol, {end.temperature:.0f} K")
    console.print(table)
    for ending, what in ((".dcd", "trajectory"), (".csv", "energies and temperatures")):
        console.print(f"{run.file(ending)}: {what}", soft_wrap=True)  # in one piece, to be copied
