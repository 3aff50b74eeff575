"""Compiled potentials: made once for a model and a machine, kept in the user's cache, checked whenever they are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..cache import Cache, cache_folder, key_of
from ..errors import CompilationError, ConfigurationError
from ..machine import compiler
from ..potential import EnergyAndForces, Potential
from .compiled_potential import PACKAGE, CompiledPotential
from .identity import describe, program_digest
from .layout import SMALLEST_BATCH
from .parallel_program import extract_library
from .tracing import trace

CompilationMode = Literal["auto", "always", "cached", "never"]
"""``always`` compiles or fails, ``cached`` uses what is there and compiles nothing, ``never`` evaluates with torch.

``auto`` is what ``$FLOWBRIDGE_COMPILE`` says; without it, potentials are compiled, and evaluated with torch, with a
warning that gives the reason, where that does not work.
"""

PROGRAMS = "compiled"
"""The kind of the cache in which programs are kept."""

_CHECK, _FAILURE = "check.safetensors", "failure.json"
_CHECKED = 4  # configurations compared with torch, besides the ones that the program was traced at
_STACK_BATCH = 8  # up to this batch size temporary arrays live on the stack
_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Of energies and forces relative to the largest of the check; rounding, magnified in strained configurations."""


def accelerated(
    potential: Potential,
    *,
    mode: str = "auto",
    digest: str | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Potential:
    """Return the compiled form of a potential, or the potential itself, as ``mode`` says.

    Args:
        potential: in the dtype and on the device it will be used with.
        mode: a :data:`CompilationMode`.
        digest: of the model file that the potential was loaded from, if it is unchanged but for its dtype; without it the
            potential is traced, for some seconds, before the cache can be asked.
        batch: number of configurations that will be evaluated at once.
        dtype: of the positions that will be given.

    Raises:
        ConfigurationError: for another mode.
        CompilationError: where ``mode`` is ``always`` and the potential cannot be compiled.

    Warns:
        UserWarning: with the reason where ``auto`` has to do without.
    """
    chosen = _resolved(mode)
    if chosen == "never":
        return potential
    try:
        return compiled(potential, digest=digest, batch=batch, dtype=dtype, build=chosen != "cached") or potential
    except CompilationError as error:
        if chosen == "always":
            raise
        warnings.warn(f"running without compiled code, at a fraction of the speed: {error}", stacklevel=3)
        return potential


def _resolved(mode: str) -> str:
    known = get_args(CompilationMode)
    if mode not in known:
        raise ConfigurationError(f"compilation must be one of {', '.join(map(repr, known))}, got {mode!r}")
    if mode != "auto":
        return mode
    chosen = os.environ.get("FLOWBRIDGE_COMPILE", "auto")
    if chosen not in known:
        raise ConfigurationError(f"FLOWBRIDGE_COMPILE must be one of {', '.join(known)}, got {chosen!r}")
    return chosen


def compiled(
    potential: Potential,
    *,
    digest: str | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    build: bool = True,
    anew: bool = False,
    cache: Cache | None = None,
) -> CompiledPotential | None:
    """Return the compiled form of a potential from the cache, compiled now if it is not there.

    Args:
        potential: in the dtype and on the device it will be used with.
        digest: as for :func:`accelerated`.
        batch: number of configurations of one call.
        dtype: of positions.
        build: whether to compile; otherwise the answer is None where the cache has nothing.
        anew: compile even if it is there, or failed before.
        cache: where to look and keep; the user's cache folder where None.

    Raises:
        ConfigurationError: for a batch below 1.
        CompilationError: when the potential cannot be recorded, the compiler fails or is not there, its code gives other
            results, or the cache cannot be written to.
    """
    if batch < 1:
        raise ConfigurationError(f"batch must be at least 1, got {batch}")
    cache = cache or Cache(cache_folder(PROGRAMS))
    wanted = _Wanted(potential, batch, dtype, _device(potential))
    program = None
    if digest is None:
        program = wanted.traced()
        digest = program_digest(program)
    description = describe(potential, digest, batch, dtype, wanted.device)

    def found() -> CompiledPotential | None:
        folder = None if anew else cache.find(description)
        return None if folder is None else _loaded(wanted, folder)

    ready = found()
    if ready is not None or not build:
        return ready
    try:
        with cache.locked(key_of(description)):
            # Another process may have made it while this one waited.
            return found() or _built(wanted, program, cache, description, anew)
    except OSError as error:
        raise CompilationError(
            f"nothing can be kept in {cache.folder} ({error}): name a folder that can be written to in FLOWBRIDGE_CACHE"
        ) from error


@dataclass(frozen=True)
class _Wanted:
    """What is to be compiled: a potential, for ``batch`` configurations of one dtype on one device."""

    potential: Potential
    batch: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        file = self.potential.model_file
        name = file.path.name if file else type(self.potential).__name__
        return f"{name} (batch {self.batch}, {str(self.dtype).removeprefix('torch.')} positions)"

    def example(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return ``count`` configurations to trace or check with, and cells for a periodic potential."""
        generator = torch.Generator().manual_seed(20_260)
        positions = self.potential.example_positions(count, generator).to(self.device, self.dtype).contiguous()
        if not self.potential.facts.periodic:
            return positions, None
        edge = 2.0 * float((positions.amax((0, 1)) - positions.amin((0, 1))).max())
        cell = edge * torch.eye(3, dtype=self.dtype, device=self.device)
        return positions, cell.expand(count, 3, 3).contiguous()

    def traced(self) -> ExportedProgram:
        """Return the program that the compiler gets."""
        return trace(self.potential, *self.example(self.batch), tuple(self.potential.facts.global_parameters))

    def loaded(self, folder: Path) -> CompiledPotential:
        """Return the potential with the program of a folder."""
        return CompiledPotential(self.potential, folder, self.batch, self.dtype, self.device)


def _device(potential: Potential) -> torch.device:
    tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _built(
    wanted: _Wanted, program: ExportedProgram | None, cache: Cache, description: dict[str, Any], anew: bool
) -> CompiledPotential:
    """Trace where that is not done yet, compile, check, keep."""
    present = compiler()
    if present is None:
        raise CompilationError(
            "there is no C++ compiler here: install g++ (or set CXX to one), or compile the model with "
            "'flowbridge compile' on a machine like this one and share the cache folder (FLOWBRIDGE_CACHE)"
        )
    attempt = {**description, "failed with": present}
    _raise_known_failure(cache, attempt, anew)
    program = program or wanted.traced()
    try:
        with _told(wanted), cache.making(description) as folder:
            _compile(program, folder / PACKAGE, wanted.batch, wanted.device)
            if wanted.batch >= SMALLEST_BATCH and wanted.device.type == "cpu":
                extract_library(folder / PACKAGE)
            _check(wanted, folder)
    except CompilationError as error:
        with cache.making(attempt) as folder:
            (folder / _FAILURE).write_text(json.dumps({"reason": str(error)}))
        raise
    return wanted.loaded(cache.folder / key_of(description))


def _raise_known_failure(cache: Cache, attempt: dict[str, Any], anew: bool) -> None:
    """Raise what the same attempt failed with before, so that a script does not wait for it at every start."""
    folder = None if anew else cache.find(attempt)
    if folder is not None:
        reason = json.loads((folder / _FAILURE).read_text())["reason"]
        raise CompilationError(f"{reason} (as when it was tried before; 'flowbridge compile --anew' tries again)")


@contextmanager
def _told(wanted: _Wanted) -> Iterator[None]:
    """Say on the terminal that a compilation goes on, and how it ended."""
    begin = time.monotonic()
    print(f"flowbridge: compiling {wanted} for this machine, once; a minute or two", file=sys.stderr, flush=True)
    ending = "could not compile"
    try:
        yield
        ending = "compiled"
    finally:
        print(f"flowbridge: {ending} {wanted} in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def _compile(program: ExportedProgram, package: Path, batch: int, device: torch.device) -> None:
    """Run the compiler in a process of its own."""
    options = {"cpp.threads": 1, "aot_inductor.allow_stack_allocation": batch <= _STACK_BATCH and device.type == "cpu"}
    with tempfile.TemporaryDirectory(prefix="flowbridge-compile-") as name:
        folder = Path(name)
        torch.export.save(program, folder / "program.pt2")
        job = {"program": str(folder / "program.pt2"), "package": str(package), "options": options}
        (folder / "job.json").write_text(json.dumps(job))
        # A cache of its own, so that nothing depends on what torch compiled before; the compiler's threads are the workers'.
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "flowbridge.core.compilation.worker", str(folder / "job.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        cause = said[-1] if said else "it said nothing"
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise CompilationError(f"the compiler {how}: {cause[:500]}")


def _check(wanted: _Wanted, folder: Path) -> None:
    """Compare fresh code with torch, at configurations other than the traced ones too, and keep some for later loads."""
    positions, cell = wanted.example(wanted.batch + _CHECKED)
    made = wanted.loaded(folder)
    expected = wanted.potential.energy_and_forces(positions, cell)
    found = made.energy_and_forces(positions, cell)
    again = made.energy_and_forces(positions.flip(0), None if cell is None else cell.flip(0))
    repeated = EnergyAndForces(*(value.flip(0) for value in again))  # results must not be those of an earlier call
    if not (_agree(wanted.potential, found, expected) and _agree(wanted.potential, repeated, expected)):
        raise CompilationError(
            f"compiled and interpreted results differ: energies {_largest(found.energy, expected.energy):.1e}, forces "
            f"{_largest(found.forces, expected.forces):.1e} relative to the largest"
        )
    kept = {"positions": positions, "energy": expected.energy, "forces": expected.forces}
    if cell is not None:
        kept["cell"] = cell
    # The last ones: not all of them are what the program was traced at.
    tensors = {name: tensor[-wanted.batch :].detach().cpu().contiguous() for name, tensor in kept.items()}
    safetensors.torch.save_file(tensors, folder / _CHECK)


def _loaded(wanted: _Wanted, folder: Path) -> CompiledPotential | None:
    """Load a program and run it once on what it was checked with; None if it fails or gives anything else."""
    try:
        check = safetensors.torch.load_file(folder / _CHECK, device=str(wanted.device))
        made = wanted.loaded(folder)
        found = made.energy_and_forces(check["positions"], check.get("cell"))
    except Exception as error:
        warnings.warn(f"the compiled program in {folder} cannot be used and is made anew: {error}", stacklevel=2)
        return None
    return made if _agree(wanted.potential, found, EnergyAndForces(check["energy"], check["forces"])) else None


def _agree(potential: Potential, found: EnergyAndForces, expected: EnergyAndForces) -> bool:
    single = any(tensor.dtype == torch.float32 for tensor in (*potential.parameters(), *potential.buffers()))
    limit = _TOLERANCE[torch.float32 if single else torch.float64]
    return all(_largest(a, b) <= limit for a, b in zip(found, expected, strict=True))


def _largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest finite expected value; NaN and infinities must coincide."""
    found, expected = found.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = expected[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found[finite] - expected[finite]).abs().max() / scale)
