"""A batch of configurations with room for its results, and its evaluation in one Context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
from openmm import unit

from ....core.errors import ConfigurationError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_FORCE_UNIT = unit.kilojoule_per_mole / unit.nanometer


@dataclass(frozen=True)
class ConfigurationBatch:
    """Configurations and the arrays that receive their results.

    Attributes:
        positions: ``(B, N, 3)`` nm, contiguous.
        cells: ``(B, 3, 3)`` nm, row vectors in OpenMM's reduced form; None for the System's own.
        energies: ``(B,)`` kJ/mol; NaN where there is no result.
        forces: ``(B, N, 3)`` kJ/mol/nm; NaN where there is no result. None for energies alone.
        failures: reasons for missing results, by index.
    """

    positions: FloatArray
    cells: FloatArray | None
    energies: FloatArray
    forces: FloatArray | None
    failures: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def finite(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Configurations that have a result, ``(B,)``."""
        usable: np.ndarray[Any, np.dtype[np.bool_]] = np.isfinite(self.energies)
        return usable if self.forces is None else usable & np.isfinite(self.forces).all((1, 2))

    @classmethod
    def empty(cls, positions: FloatArray, cells: FloatArray | None, forces: bool = True) -> ConfigurationBatch:
        """Return a batch without results, for energies and forces or energies alone."""
        results = np.full(positions.shape, np.nan) if forces else None
        return cls(positions, cells, np.full(len(positions), np.nan), results)

    @classmethod
    def checked(
        cls, positions: FloatArray, cell: FloatArray | None, particles: int, periodic: bool, forces: bool = True
    ) -> ConfigurationBatch:
        """Return a batch of a System's configurations.

        Args:
            positions: ``(B, N, 3)`` nm.
            cell: ``(B, 3, 3)`` or ``(3, 3)`` nm, or None.
            particles: number of particles N of the System.
            periodic: whether the System has a cell.
            forces: whether to evaluate forces as well as energies.

        Raises:
            ConfigurationError: for other shapes, or a cell for a System without one.
        """
        given = np.ascontiguousarray(positions, dtype=np.float64)
        if given.ndim != 3 or given.shape[1:] != (particles, 3):
            raise ConfigurationError(f"positions have shape {given.shape}, expected (configurations, {particles}, 3)")
        if cell is None:
            return cls.empty(given, None, forces)
        if not periodic:
            raise ConfigurationError("a cell was given for a System that is not periodic: leave it out")
        vectors = np.asarray(cell, dtype=np.float64)
        if vectors.shape not in ((3, 3), (len(given), 3, 3)):
            raise ConfigurationError(
                f"the cell has shape {vectors.shape}, expected (3, 3) or ({len(given)}, 3, 3): row vectors in nm"
            )
        return cls.empty(given, np.ascontiguousarray(np.broadcast_to(vectors, (len(given), 3, 3))), forces)

    def usable_sample(self, count: int) -> ConfigurationBatch:
        """Return the first ``count`` configurations with finite positions, without results."""
        usable = np.flatnonzero(np.isfinite(self.positions).all((1, 2)))[:count]
        return self.selected(usable)

    def selected(self, indices: np.ndarray[Any, Any]) -> ConfigurationBatch:
        """Return copies of some configurations, without results."""
        cells = None if self.cells is None else self.cells[indices]
        return ConfigurationBatch.empty(self.positions[indices], cells, self.forces is not None)

    def part(self, start: int, stop: int) -> ConfigurationBatch:
        """Return a view of some configurations, with failures of its own, counted from ``start``."""
        piece = slice(start, stop)
        cells = None if self.cells is None else self.cells[piece]
        forces = None if self.forces is None else self.forces[piece]
        return ConfigurationBatch(self.positions[piece], cells, self.energies[piece], forces)

    def take(self, start: int, energies: FloatArray, forces: FloatArray | None) -> None:
        """Copy results of the configurations from ``start`` on."""
        self.energies[start : start + len(energies)] = energies
        if self.forces is not None:
            self.forces[start : start + len(energies)] = forces

    def fail(self, index: int, reason: str) -> None:
        """Set the results at ``index`` to NaN and record the reason."""
        self.energies[index] = np.nan
        if self.forces is not None:
            self.forces[index] = np.nan
        self.failures[index] = reason


def make_context(system: openmm.System, platform: str) -> openmm.Context:
    """Return a Context on the named platform; the CPU platform gets one thread, since there are many Contexts."""
    properties = {"Threads": "1"} if platform == "CPU" else {}
    integrator = openmm.VerletIntegrator(0.001)
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)


def evaluate_batch(context: openmm.Context, batch: ConfigurationBatch, current: FloatArray | None = None) -> None:
    """Fill in energies and forces; a result that is not finite becomes NaN, with its reason in ``failures``.

    Args:
        context: Context of the System.
        batch: configurations of the System's particles.
        current: ``(1,)``, receives the index of the configuration in progress, so that a crash can be explained.
    """
    batch.energies[:] = np.nan  # the memory may hold results of other configurations
    if batch.forces is not None:
        batch.forces[:] = np.nan
    kind = openmm.State.Forces
    system = context.getSystem()
    if batch.cells is None and system.usesPeriodicBoundaryConditions():
        context.setPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())  # not the last ones of an earlier call
    # Platforms sort particles by their positions, and their behaviour with NaN is undefined.
    for index in np.flatnonzero(np.isfinite(batch.positions).all((1, 2))):
        if current is not None:
            current[0] = index
        try:
            if batch.cells is not None:
                context.setPeriodicBoxVectors(*batch.cells[index])
            context.setPositions(batch.positions[index])
            state = context.getState(getForces=batch.forces is not None, getEnergy=True)
            if batch.forces is not None:
                try:
                    # The route of OpenMM's Python layer that makes neither unit objects nor lists of Vec3.
                    state._getVectorAsNumpy(kind, batch.forces[index])
                except AttributeError:
                    batch.forces[index] = state.getForces(asNumpy=True).value_in_unit(_FORCE_UNIT)
            batch.energies[index] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        except Exception as error:  # a force written in Python may raise anything
            batch.fail(int(index), f"{type(error).__name__}: {error}")
    for index in np.flatnonzero(~batch.finite):
        if index not in batch.failures:
            batch.fail(int(index), _reason(batch, int(index)))


def _reason(batch: ConfigurationBatch, index: int) -> str:
    """Return why a configuration has no finite result."""
    wrong = np.argwhere(~np.isfinite(batch.positions[index]))
    if len(wrong):
        particle, axis = wrong[0]
        return f"the position of particle {particle} is {batch.positions[index, particle, axis]}"
    if batch.forces is None or not np.isfinite(batch.energies[index]):
        return f"the energy is {batch.energies[index]}; do particles overlap?"
    particle = np.flatnonzero(~np.isfinite(batch.forces[index]).all(1))[0]
    return f"the force on particle {particle} is {batch.forces[index, particle].tolist()}"
