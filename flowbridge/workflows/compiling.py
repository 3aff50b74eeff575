"""``flowbridge compile``: make the compiled programs of a model file before they are needed, and say what they gain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..core.cache import Cache, cache_folder
from ..core.compilation.building import compiled
from ..core.compilation.compiled_potential import CompiledPotential
from ..core.compilation.programs import PROGRAMS
from ..core.errors import CompilationError, ConfigurationError
from ..core.potential import Potential

_REPEATS = 7
_LEAST_SECONDS = 0.05  # of one timing


@dataclass(frozen=True)
class CompiledProgram:
    """One compiled program and the time of one call, in microseconds, next to that of torch."""

    batch: int
    folder: Path
    compiled_microseconds: float
    torch_microseconds: float


def compile_model(file: Path, batches: Sequence[int], dtype: str | None, rebuild: bool) -> list[CompiledProgram]:
    """Compile a model file for each batch size, as ``add_potential`` and ``PotentialCalculator`` look for it.

    Args:
        file: the model file.
        batches: numbers of configurations of one call; 1 for a molecule in OpenMM or ASE, else the replicas.
        dtype: as for ``add_potential``.
        rebuild: compile also what the cache has.

    Raises:
        ModelFileError: when the file cannot be read.
        CompilationError: when the model cannot be compiled here.
    """
    if dtype not in (None, "float32", "float64"):
        raise ConfigurationError(f"--dtype must be float32 or float64, got {dtype!r}")
    potential = Potential.load(file).requires_grad_(False)
    digest = None if potential.model_file is None else potential.model_file.digest
    if dtype is not None:
        potential = potential.to(getattr(torch, dtype))
    positions = torch.float64 if dtype is None else getattr(torch, dtype)
    made = []
    for batch in batches:
        program = compiled(potential, digest=digest, batch=batch, dtype=positions, rebuild=rebuild)
        if program is None:
            raise CompilationError("nothing was compiled")
        made.append(_timed(program, potential, batch, positions))
    return made


def print_programs(programs: Sequence[CompiledProgram], console: Console) -> None:
    """Print a table of programs and the folder they are in."""
    table = Table("batch", "compiled (µs)", "torch (µs)", "ratio", box=None)
    for column in table.columns:
        column.justify = "right"
    for program in programs:
        ratio = program.torch_microseconds / program.compiled_microseconds
        table.add_row(
            str(program.batch),
            f"{program.compiled_microseconds:.0f}",
            f"{program.torch_microseconds:.0f}",
            f"{ratio:.1f}",
        )
    console.print("energy and forces, one call, this machine, one thread")
    console.print(table)
    cache = Cache(cache_folder(PROGRAMS))
    size = sum(entry.bytes for entry in cache.entries())
    console.print(f"kept in {cache.folder} ({size / 1024**2:.0f} of {cache.limit / 1024**2:.0f} MiB)", soft_wrap=True)


def _timed(program: CompiledPotential, potential: Potential, batch: int, dtype: torch.dtype) -> CompiledProgram:
    positions = potential.example_positions(batch, torch.Generator().manual_seed(1)).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fast = microseconds(lambda: program.energy_and_forces(positions))
        slow = microseconds(lambda: potential.energy_and_forces(positions))
    finally:
        torch.set_num_threads(threads)
    return CompiledProgram(batch, program.folder, fast, slow)


def microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call over repeats of at least 50 ms each."""
    call()
    count, elapsed = 1, 0.0
    while elapsed < _LEAST_SECONDS:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        elapsed = time.perf_counter() - begin
        if elapsed < _LEAST_SECONDS:
            count = max(count + 1, int(1.2 * count * _LEAST_SECONDS / max(elapsed, 1e-7)))
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - begin) / count)
    return 1e6 * statistics.median(times)
