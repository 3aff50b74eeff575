"""A potential whose energies and forces come from a compiled program."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..potential import EnergyAndForces, Potential
from .layout import SMALLEST_BATCH
from .parallel_program import LIBRARY, ParallelProgram
from .programs import PACKAGE


class CompiledPotential(Potential):
    """A potential whose energies and forces are computed by compiled code.

    ``forward`` stays that of the original, for whoever differentiates. Values belong to the parameters at the time of
    compilation. A call with another number of configurations than the program's ``batch`` is cut into pieces, the last one
    filled up with copies of its last configuration, whose results are dropped. The pieces of a program for many
    configurations are computed on as many cores as torch uses threads.

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
        self.metadata = potential.metadata
        self.model_file = potential.model_file
        self.batch = batch
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._names = tuple(potential.metadata.global_parameters)
        self._on_cores = device.type == "cpu" and batch >= SMALLEST_BATCH and ParallelProgram.possible(folder)
        self._cores: ParallelProgram | None = None

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` of the original, differentiable; see :meth:`Potential.forward`."""
        energy: Tensor = self.potential(positions, cell, **global_parameters)
        return energy

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """Return energies ``(B,)`` and forces ``(B, N, 3)``, float64; see :meth:`Potential.energy_and_forces`."""
        if not self._fits(positions, cell, global_parameters):
            # The program reads memory as it was told to: what does not fit is left to the original, and to its errors.
            return self.potential.energy_and_forces(positions, cell, **global_parameters)
        values = {**self.metadata.global_parameters, **global_parameters}
        rest = [torch.tensor(values[name], dtype=torch.float64) for name in self._names]
        positions = positions.detach().to(self.dtype).contiguous()
        cell = None if cell is None else cell.detach().to(self.dtype)
        if self._on_cores:
            return self._parallel.evaluate(positions, rest if cell is None else [cell, *rest])
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

    def energies(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """See :meth:`Potential.energies`: the program computes forces along with them, still faster than the original."""
        return self.energy_and_forces(positions, cell, **global_parameters).energy

    def describe_strain(self, positions: Tensor) -> str:
        """See :meth:`Potential.describe_strain`; of the original."""
        return self.potential.describe_strain(positions)

    def __reduce__(self) -> tuple[type[CompiledPotential], tuple[object, ...]]:
        """Copy and pickle as the original with the place of its program: a loaded program belongs to its process."""
        return type(self), (self.potential, self.folder, self.batch, self.dtype, self.device)

    def _fits(self, positions: Tensor, cell: Tensor | None, parameters: dict[str, float]) -> bool:
        count = len(positions)
        box = None if cell is None else tuple(cell.shape)
        return (
            count > 0
            and tuple(positions.shape[1:]) == (len(self.metadata.particles), 3)
            and box == ((count, 3, 3) if self.metadata.periodic else None)
            and positions.device.type == self.device.type
            and parameters.keys() <= self.metadata.global_parameters.keys()
        )

    @functools.cached_property
    def _programs(self) -> _Programs:
        index = -1 if self.device.index is None else self.device.index
        return _once((PACKAGE, index), self.folder / PACKAGE, lambda package: _Programs(package, index))

    @property
    def _parallel(self) -> ParallelProgram:
        """The program for as many cores as torch uses in this thread."""
        workers = torch.get_num_threads()
        if self._cores is None or self._cores.workers != workers:
            particles, dtype = len(self.metadata.particles), self.dtype
            self._cores = _once(
                (LIBRARY, workers),
                self.folder / LIBRARY,
                lambda library: ParallelProgram(library.parent, self.batch, particles, dtype, workers),
            )
        return self._cores

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Call the program itself: for adapters that count microseconds.

        Args:
            inputs: positions ``(batch, N, 3)``, contiguous and in the program's dtype, on its device; the cell
                ``(batch, 3, 3)`` of a periodic potential, likewise; global parameters in the order of the metadata, each a
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
        # reading the description of inputs and outputs again at every call.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, index)
        self.run: Program = loader.boxed_run


_in_use: weakref.WeakValueDictionary[tuple[object, ...], Any] = weakref.WeakValueDictionary()

Loaded = TypeVar("Loaded", bound=object)


def _once(kind: tuple[object, ...], file: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """Return what is loaded from a file; all that use it in this process share its constants, and find them in the cache."""
    status = file.stat()
    key = (str(file), status.st_ino, status.st_mtime_ns, *kind)
    loaded: Loaded | None = _in_use.get(key)
    if loaded is None:
        loaded = _in_use[key] = load(file)
    return loaded


def _filled(part: Tensor, count: int) -> Tensor:
    missing = count - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
