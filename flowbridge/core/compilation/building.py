"""Compiled potentials: energy and forces as one program, made once for a model and a machine."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..cache import Cache
from ..errors import CompilationError, ConfigurationError
from ..potential import EnergyAndForces, Potential
from .compiled_potential import CompiledPotential
from .identity import describe, program_digest
from .layout import SMALLEST_BATCH
from .parallel_program import extract_library
from .programs import PACKAGE, get_or_build, largest_difference, resolved
from .tracing import trace

_CHECK = "check.safetensors"
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
        potential: in the dtype and on the device it will be used with. One that is not ``one_program`` is compiled in the mode
            ``always`` only.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
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
    chosen = resolved(mode)
    if chosen == "never" or (chosen == "auto" and not potential.one_program):
        return potential
    try:
        return compiled(potential, digest=digest, batch=batch, dtype=dtype, build=chosen != "cached") or potential
    except CompilationError as error:
        if chosen == "always":
            raise
        warnings.warn(f"running without compiled code, at a fraction of the speed: {error}", stacklevel=3)
        return potential


def compiled(
    potential: Potential,
    *,
    digest: str | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    build: bool = True,
    rebuild: bool = False,
    cache: Cache | None = None,
) -> CompiledPotential | None:
    """Return the compiled form of a potential from the cache, compiled now if it is not there.

    Args:
        potential: in the dtype and on the device it will be used with.
        digest: as for :func:`accelerated`.
        batch: number of configurations of one call.
        dtype: of positions.
        build: whether to compile; otherwise the answer is None where the cache has nothing.
        rebuild: compile even if it is there, or failed before.
        cache: where to look and keep; the user's cache folder where None.

    Raises:
        ConfigurationError: for a batch below 1.
        CompilationError: when the potential cannot be recorded, the compiler fails or is not there, its code gives other
            results, or the cache cannot be written to.
    """
    if batch < 1:
        raise ConfigurationError(f"batch must be at least 1, got {batch}")
    return get_or_build(PotentialRecipe(potential, batch, dtype, digest), cache, build=build, rebuild=rebuild)


class PotentialRecipe:
    """How the energy and forces of a potential become a program, for ``batch`` configurations of one dtype.

    Args:
        potential: in the dtype and on the device it will be used with.
        batch: number of configurations of one call.
        dtype: of positions.
        digest: of the model file, if the potential is unchanged but for its dtype.
    """

    def __init__(self, potential: Potential, batch: int, dtype: torch.dtype, digest: str | None = None) -> None:
        self.potential, self.batch, self.dtype, self._digest = potential, batch, dtype, digest
        self.device = _device(potential)

    def __str__(self) -> str:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        file = self.potential.model_file
        name = file.path.name if file else type(self.potential).__name__
        return f"{name} (batch {self.batch}, {str(self.dtype).removeprefix('torch.')} positions)"

    def description(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return {**self.outline(), "model": self._digest or program_digest(self.exported())}

    def outline(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        known = describe(self.potential, self.batch, self.dtype, self.device)
        return known if self._digest is None else {**known, "model": self._digest}

    def options(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        on_stack = self.batch <= _STACK_BATCH and self.device.type == "cpu"
        return {"cpp.threads": 1, "aot_inductor.allow_stack_allocation": on_stack}

    def exported(self) -> ExportedProgram:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return self._traced

    @cached_property
    def _traced(self) -> ExportedProgram:
        return trace(self.potential, *self._example(self.batch), tuple(self.potential.metadata.global_parameters))

    def finish(self, folder: Path) -> None:
        """Compare fresh code with torch, at configurations other than the traced ones too; keep some for later loads."""
        if self.batch >= SMALLEST_BATCH and self.device.type == "cpu":
            extract_library(folder / PACKAGE)
        positions, cell = self._example(self.batch + _CHECKED)
        made = self._from(folder)
        expected = self.potential.energy_and_forces(positions, cell)
        found = made.energy_and_forces(positions, cell)
        again = made.energy_and_forces(positions.flip(0), None if cell is None else cell.flip(0))
        repeated = EnergyAndForces(*(value.flip(0) for value in again))  # results must not be those of an earlier call
        if not (_agree(self.potential, found, expected) and _agree(self.potential, repeated, expected)):
            raise CompilationError(
                "compiled and interpreted results differ: energies "
                f"{largest_difference(found.energy, expected.energy):.1e}, forces "
                f"{largest_difference(found.forces, expected.forces):.1e} relative to the largest"
            )
        tensors = {"positions": positions, "energy": expected.energy, "forces": expected.forces}
        if cell is not None:
            tensors["cell"] = cell
        # The last ones: not all of them are what the program was traced at.
        stored = {name: tensor[-self.batch :].detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(stored, folder / _CHECK)

    def loaded(self, folder: Path) -> CompiledPotential | None:
        """Load a program and run it once on what it was checked with; None if it fails or gives anything else."""
        check = safetensors.torch.load_file(folder / _CHECK, device=str(self.device))
        made = self._from(folder)
        found = made.energy_and_forces(check["positions"], check.get("cell"))
        return made if _agree(self.potential, found, EnergyAndForces(check["energy"], check["forces"])) else None

    def _example(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return ``count`` configurations to trace or check with, and cells for a periodic potential."""
        generator = torch.Generator().manual_seed(20_260)
        positions = self.potential.example_positions(count, generator).to(self.device, self.dtype).contiguous()
        if not self.potential.metadata.periodic:
            return positions, None
        edge = 2.0 * float((positions.amax((0, 1)) - positions.amin((0, 1))).max())
        cell = edge * torch.eye(3, dtype=self.dtype, device=self.device)
        return positions, cell.expand(count, 3, 3).contiguous()

    def _from(self, folder: Path) -> CompiledPotential:
        return CompiledPotential(self.potential, folder, self.batch, self.dtype, self.device)


def _device(potential: Potential) -> torch.device:
    tensor = next((t for t in (*potential.parameters(), *potential.buffers()) if t.is_floating_point()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _agree(potential: Potential, found: EnergyAndForces, expected: EnergyAndForces) -> bool:
    single = any(tensor.dtype == torch.float32 for tensor in (*potential.parameters(), *potential.buffers()))
    limit = _TOLERANCE[torch.float32 if single else torch.float64]
    return all(largest_difference(a, b) <= limit for a, b in zip(found, expected, strict=True))
