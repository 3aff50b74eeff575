"""What a batch of configurations goes through: one Context, raw buffers, and a reason for every number that is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
from openmm import unit

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_FORCE_UNIT = unit.kilojoule_per_mole / unit.nanometer


@dataclass(frozen=True)
class Frames:
    """Configurations and the arrays that their results are written to.

    Attributes:
        positions: ``(B, N, 3)`` nm, contiguous.
        cells: ``(B, 3, 3)`` nm, row vectors in OpenMM's reduced form, or None to keep the System's.
        energies: ``(B,)`` kJ/mol; NaN where there is no result.
        forces: ``(B, N, 3)`` kJ/mol/nm; NaN where there is no result. None where energies are enough.
        failures: why there is none, by index.
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
        """Which configurations have a result, ``(B,)``."""
        usable: np.ndarray[Any, np.dtype[np.bool_]] = np.isfinite(self.energies)
        return usable if self.forces is None else usable & np.isfinite(self.forces).all((1, 2))

    @classmethod
    def waiting(cls, positions: FloatArray, cells: FloatArray | None, *, forces: bool = True) -> Frames:
        """Return frames without results, which want forces or energies alone."""
        room = np.full(positions.shape, np.nan) if forces else None
        return cls(positions, cells, np.full(len(positions), np.nan), room)

    def part(self, start: int, stop: int) -> Frames:
        """Return a view of some frames, with failures of its own, counted from ``start``."""
        piece = slice(start, stop)
        cells = None if self.cells is None else self.cells[piece]
        forces = None if self.forces is None else self.forces[piece]
        return Frames(self.positions[piece], cells, self.energies[piece], forces)

    def take(self, start: int, energies: FloatArray, forces: FloatArray | None) -> None:
        """Copy results of the frames from ``start`` on."""
        piece = slice(start, start + len(energies))
        self.energies[piece] = energies
        if self.forces is not None:
            self.forces[piece] = forces

    def fail(self, index: int, reason: str) -> None:
        """Leave no number at ``index``, and say why."""
        self.energies[index] = np.nan
        if self.forces is not None:
            self.forces[index] = np.nan
        self.failures[index] = reason


def make_context(system: openmm.System, platform: str) -> openmm.Context:
    """Return a Context on a platform of the given name; the CPU platform gets one thread, for there are many Contexts."""
    properties = {"Threads": "1"} if platform == "CPU" else {}
    integrator = openmm.VerletIntegrator(0.001)
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)


def evaluate_frames(context: openmm.Context, frames: Frames, current: FloatArray | None = None) -> None:
    """Fill in energies and forces; whatever is not a finite number becomes NaN, with its reason in ``failures``.

    Args:
        context: of the System.
        frames: of its particles.
        current: ``(1,)`` where the index of the frame in work is written, for whoever has to explain a crash.
    """
    frames.energies[:] = np.nan  # the memory may hold results of other configurations
    if frames.forces is not None:
        frames.forces[:] = np.nan
    kind = openmm.State.Forces
    system = context.getSystem()
    if frames.cells is None and system.usesPeriodicBoundaryConditions():
        context.setPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())  # not the last ones of an earlier call
    # Platforms sort particles by their positions, and what they do with NaN is anybody's guess.
    for index in np.flatnonzero(np.isfinite(frames.positions).all((1, 2))):
        if current is not None:
            current[0] = index
        try:
            if frames.cells is not None:
                context.setPeriodicBoxVectors(*frames.cells[index])
            context.setPositions(frames.positions[index])
            state = context.getState(getForces=frames.forces is not None, getEnergy=True)
            if frames.forces is not None:
                try:
                    # The route of OpenMM's Python layer that makes neither unit objects nor lists of Vec3.
                    state._getVectorAsNumpy(kind, frames.forces[index])
                except AttributeError:
                    frames.forces[index] = state.getForces(asNumpy=True).value_in_unit(_FORCE_UNIT)
            frames.energies[index] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        except Exception as error:  # a force written in Python may raise anything
            frames.fail(int(index), f"{type(error).__name__}: {error}")
    _refuse_what_is_not_finite(frames)


def _refuse_what_is_not_finite(frames: Frames) -> None:
    for index in np.flatnonzero(~frames.finite):
        if index in frames.failures:
            continue
        wrong = np.argwhere(~np.isfinite(frames.positions[index]))
        if len(wrong):
            particle, axis = wrong[0]
            reason = f"the position of particle {particle} is {frames.positions[index, particle, axis]}"
        elif frames.forces is None or not np.isfinite(frames.energies[index]):
            reason = f"the energy is {frames.energies[index]}; do particles overlap?"
        else:
            particle = np.flatnonzero(~np.isfinite(frames.forces[index]).all(1))[0]
            reason = f"the force on particle {particle} is {frames.forces[index, particle].tolist()}"
        frames.fail(int(index), reason)
