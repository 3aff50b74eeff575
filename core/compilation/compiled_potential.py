"""Compiled potentials: made once for a model and a machine, kept in the user's cache, checked whenever they are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from ..errors import CompilationError, ConfigurationError
from ..potential import EnergyAndForces, Potential
from .cache import Cache, key_of
from .identity import compiler, describe, program_digest
from .tracing import trace

CompilationMode = Literal["auto", "always", "cached", "never"]
"""``always`` compiles or fails, ``cached`` uses what is there and compiles nothing, ``never`` evaluates with torch.

``auto`` is what ``$FLOWBRIDGE_COMPILE`` says; without it, potentials are compiled, and evaluated with torch, with a
warning that gives the reason, where that does not work.
"""

_PACKAGE, _CHECK, _FAILURE = "program.pt2", "check.safetensors", "failure.json"
_CHECKED = 4  # configurations compared with torch, besides the one that the program was traced at
_STACK_BATCH = 8  # up to this batch size temporary arrays live on the stack
_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
"""Of energies and forces relative to the largest of the check; rounding, magnified in strained configurations."""


class CompiledPotential(Potential):
    """A potential whose energies and forces are computed by compiled code.

    ``forward`` stays that of the original, for whoever differentiates. Values belong to the parameters at the time of
    compilation. A call with another number of configurations than the program's ``batch`` is cut into pieces, the last one
    filled up with copies of its last configuration, whose results are dropped.

    Attributes:
        potential: the original.
        batch: configurations of one call of the program.
        dtype: of the positions that it takes.
        device: on which it runs.
        folder: where the program is.
    """

    def __init__(
        self, potential: Potential, folder: Path, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.potential = potential
        self.facts = potential.facts
        self.model_file = potential.model_file
        self.batch = batch
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._names = tuple(potential.facts.global_parameters)
        self._programs = _loaded_once(folder / _PACKAGE, -1 if device.index is None else device.index)

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` of the original, differentiable; see :meth:`Potential.forward`."""
        energy: Tensor = self.potential(positions, cell, **global_parameters)
        return energy

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """Return energies ``(B,)`` and forces ``(B, N, 3)``, float64; see :meth:`Potential.energy_and_forces`."""
        if positions.shape[1:] != (len(self.facts.particles), 3) or (cell is None) == self.facts.periodic:
            # The program reads memory as it was told to: what does not fit is left to the original, and to its errors.
            return self.potential.energy_and_forces(positions, cell, **global_parameters)
        values = {**self.facts.global_parameters, **global_parameters}
        rest = [torch.tensor(values[name], dtype=torch.float64) for name in self._names]
        positions = positions.detach().to(self.dtype).contiguous()
        cell = None if cell is None else cell.detach().to(self.dtype)
        if len(positions) == self.batch:
            return self._run(positions, cell, rest)
        parts = []
        for start in range(0, len(positions), self.batch):
            piece = slice(start, start + self.batch)
            part = _filled(positions[piece], self.batch)
            result = self._run(part, None if cell is None else _filled(cell[piece], self.batch), rest)
            count = min(self.batch, len(positions) - start)
            parts.append(EnergyAndForces(result.energy[:count], result.forces[:count]))
        return EnergyAndForces(torch.cat([part.energy for part in parts]), torch.cat([part.forces for part in parts]))

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Call the program itself: for adapters that count microseconds.

        Args:
            inputs: positions ``(batch, N, 3)``, contiguous and in the program's dtype, on its device; the cell
                ``(batch, 3, 3)`` of a periodic potential, likewise; global parameters in the order of the facts, each a
                0-dimensional float64 tensor. None of this is checked.

        Returns:
            Energies ``(batch,)`` and forces ``(batch, N, 3)``, float64, in memory that the next call in this thread may
            write to.
        """
        results: list[Tensor] = self._programs.run(inputs)
        return results

    def _run(self, positions: Tensor, cell: Tensor | None, rest: list[Tensor]) -> EnergyAndForces:
        box = [] if cell is None else [cell.contiguous()]
        energy, forces = self.run([positions, *box, *rest])
        return EnergyAndForces(energy.clone(), forces.clone())


Program = Callable[[list[Tensor]], list[Tensor]]


def direct_program(potential: Potential, batch: int, dtype: torch.dtype) -> Program | None:
    """Return :meth:`CompiledPotential.run` for an adapter that will give it exactly this, on the CPU; else None."""
    if not isinstance(potential, CompiledPotential):
        return None
    same = potential.batch == batch and potential.dtype == dtype and potential.device.type == "cpu"
    return potential.run if same else None


class _Programs(threading.local):
    """The loaded program, one for each thread: what it computes lies in memory of its own, and nothing has to be locked."""

    def __init__(self, package: Path, index: int) -> None:
        # What torch._inductor.aoti_load_package wraps, without importing the compiler, which takes a second, and without
        # reading the description of inputs and outputs anew at every call.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, index)
        self.run: Program = loader.boxed_run


_in_use: weakref.WeakValueDictionary[tuple[object, ...], _Programs] = weakref.WeakValueDictionary()


def _loaded_once(package: Path, index: int) -> _Programs:
    """Return the program of a package; all that use it in this process share its constants, and find them in the cache."""
    status = package.stat()
    key = (str(package), status.st_ino, status.st_mtime_ns, index)
    programs = _in_use.get(key)
    if programs is None:
        programs = _in_use[key] = _Programs(package, index)
    return programs


def _filled(part: Tensor, count: int) -> Tensor:
    missing = count - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


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
        if mode == "always":
            raise
        warnings.warn(f"running without compiled code, at a fraction of the speed: {error}", stacklevel=3)
        return potential


def _resolved(mode: str) -> str:
    known = get_args(CompilationMode)
    if mode not in known:
        raise ConfigurationError(f"compile must be one of {', '.join(map(repr, known))}, got {mode!r}")
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
        CompilationError: when the potential cannot be recorded, the compiler fails, or its code gives other results.
    """
    if batch < 1:
        raise ConfigurationError(f"batch must be at least 1, got {batch}")
    cache = cache or Cache()
    device = _device(potential)
    program = None
    if digest is None:
        program = _traced(potential, batch, dtype, device)
        digest = program_digest(program)
    description = describe(potential, digest, batch, dtype, device)

    def found() -> CompiledPotential | None:
        folder = None if anew else cache.find(description)
        return None if folder is None else _loaded(potential, folder, batch, dtype, device)

    ready = found()
    if ready is not None or not build:
        return ready
    with cache.locked(key_of(description)):
        ready = found()  # another process may have made it while this one waited
        if ready is not None:
            return ready
        present = compiler()
        if present is None:
            raise CompilationError(
                "there is no C++ compiler here: install g++ (or set CXX to one), or compile the model with "
                "'flowbridge compile' on a machine like this one and share the cache folder (FLOWBRIDGE_CACHE)"
            )
        attempt = {**description, "failed with": present}
        _raise_known_failure(cache, attempt, anew)
        program = program or _traced(potential, batch, dtype, device)
        try:
            with _told(potential, batch, dtype), cache.making(description) as folder:
                _compile(program, folder / _PACKAGE, batch, device)
                _check(potential, folder, batch, dtype, device)
            return CompiledPotential(potential, cache.folder / key_of(description), batch, dtype, device)
        except CompilationError as error:
            with cache.making(attempt) as folder:
                (folder / _FAILURE).write_text(json.dumps({"reason": str(error)}))
            raise


def _device(potential: Potential) -> torch.device:
    tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _example(
    potential: Potential, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return ``count`` configurations to trace or check with, and cells for a periodic potential."""
    generator = torch.Generator().manual_seed(20_260)
    positions = potential.example_positions(count, generator).to(device=device, dtype=dtype).contiguous()
    if not potential.facts.periodic:
        return positions, None
    edge = 2.0 * float((positions.amax((0, 1)) - positions.amin((0, 1))).max())
    return positions, (edge * torch.eye(3, dtype=dtype, device=device)).expand(count, 3, 3).contiguous()


def _traced(potential: Potential, batch: int, dtype: torch.dtype, device: torch.device) -> torch.export.ExportedProgram:
    positions, cell = _example(potential, batch, dtype, device)
    return trace(potential, positions, cell, tuple(potential.facts.global_parameters))


def _raise_known_failure(cache: Cache, attempt: dict[str, Any], anew: bool) -> None:
    """Raise what the same attempt failed with before, so that a script does not wait for it at every start."""
    folder = None if anew else cache.find(attempt)
    if folder is not None:
        reason = json.loads((folder / _FAILURE).read_text())["reason"]
        raise CompilationError(f"{reason} (as when it was tried before; 'flowbridge compile --anew' tries again)")


class _told:
    """Say on the terminal that a compilation goes on, and how long it took."""

    def __init__(self, potential: Potential, batch: int, dtype: torch.dtype) -> None:
        name = potential.model_file.path.name if potential.model_file else type(potential).__name__
        kind = str(dtype).removeprefix("torch.")
        self.what = f"{name} (batch {batch}, {kind} positions)"

    def __enter__(self) -> None:
        self.begin = time.monotonic()
        print(f"flowbridge: compiling {self.what} for this machine, once; a minute or two", file=sys.stderr, flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        ending = "compiled" if kind is None else "could not compile"
        seconds = time.monotonic() - self.begin
        print(f"flowbridge: {ending} {self.what} in {seconds:.0f} s", file=sys.stderr, flush=True)


def _compile(program: torch.export.ExportedProgram, package: Path, batch: int, device: torch.device) -> None:
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


def _check(potential: Potential, folder: Path, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compare fresh code with torch, at configurations other than the traced one too, and keep them for later loads."""
    count = max(batch, 1) + _CHECKED
    positions, cell = _example(potential, count, dtype, device)
    made = CompiledPotential(potential, folder, batch, dtype, device)
    expected = potential.energy_and_forces(positions, cell)
    found = made.energy_and_forces(positions, cell)
    again = made.energy_and_forces(positions.flip(0), None if cell is None else cell.flip(0))
    repeated = EnergyAndForces(*(value.flip(0) for value in again))  # results must not be those of an earlier call
    if not (_agree(potential, found, expected) and _agree(potential, repeated, expected)):
        raise CompilationError(
            f"compiled and interpreted results differ: energies {_largest(found.energy, expected.energy):.1e}, forces "
            f"{_largest(found.forces, expected.forces):.1e} relative to the largest"
        )
    kept = {"positions": positions, "energy": expected.energy, "forces": expected.forces}
    if cell is not None:
        kept["cell"] = cell
    tensors = {name: tensor[:batch].detach().cpu().contiguous() for name, tensor in kept.items()}
    safetensors.torch.save_file(tensors, folder / _CHECK)


def _loaded(
    potential: Potential, folder: Path, batch: int, dtype: torch.dtype, device: torch.device
) -> CompiledPotential | None:
    """Load a program and run it once on what it was checked with; None if it fails or gives anything else."""
    try:
        check = safetensors.torch.load_file(folder / _CHECK, device=str(device))
        made = CompiledPotential(potential, folder, batch, dtype, device)
        found = made.energy_and_forces(check["positions"], check.get("cell"))
    except Exception as error:
        warnings.warn(f"the compiled program in {folder} cannot be used and is made anew: {error}", stacklevel=2)
        return None
    return made if _agree(potential, found, EnergyAndForces(check["energy"], check["forces"])) else None


def _agree(potential: Potential, found: EnergyAndForces, expected: EnergyAndForces) -> bool:
    single = any(tensor.dtype == torch.float32 for tensor in potential.parameters())
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
