"""Energies and forces of many configurations of one System, at the speed of the cores."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openmm
from openmm import unit

from ...core.errors import ConfigurationError
from .dynamics import copy_vectors

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_WORTH_A_THREAD = 16  # fewer configurations than this are done before a second thread is awake


class OpenMMEnergy:
    """Batched energies of an OpenMM System: one Context a thread, raw buffers, no unit objects.

    OpenMM releases the interpreter lock while it computes, so Python threads scale. The Reference platform is the default:
    for one small molecule it is several times faster than waking the CPU platform's own threads, and it is double precision.

    Args:
        system: the System; not changed, and not kept in sync with later changes.
        platform: name of the OpenMM platform.
        workers: number of Contexts and threads; the number of cores where None.
    """

    def __init__(self, system: openmm.System, platform: str = "Reference", workers: int | None = None) -> None:
        if system.usesPeriodicBoundaryConditions():
            raise ConfigurationError(
                "the System is periodic; this evaluator is for isolated molecules: create it with NoCutoff"
            )
        count = workers or os.cpu_count() or 1
        chosen = openmm.Platform.getPlatformByName(platform)
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self.particles = system.getNumParticles()
        self._integrators = [openmm.VerletIntegrator(0.001) for _ in range(count)]
        self._contexts = [openmm.Context(system, integrator, chosen, properties) for integrator in self._integrators]
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` kJ/mol and forces ``(B, N, 3)`` kJ/mol/nm of positions ``(B, N, 3)`` nm.

        A configuration with a position that is not finite, or for which OpenMM fails, gives NaN in energy and forces.

        Raises:
            ConfigurationError: for positions of another shape.
        """
        frames = np.ascontiguousarray(positions, dtype=np.float64)
        if frames.ndim != 3 or frames.shape[1:] != (self.particles, 3):
            raise ConfigurationError(
                f"positions have shape {frames.shape}, expected (configurations, {self.particles}, 3)"
            )
        energies, forces = np.full(len(frames), np.nan), np.full(frames.shape, np.nan)
        if self._pool is None or len(frames) < _WORTH_A_THREAD:
            self._evaluate(self._contexts[0], frames, energies, forces)
            return energies, forces
        edges = np.linspace(0, len(frames), len(self._contexts) + 1).astype(int)
        tasks = [
            self._pool.submit(self._evaluate, context, frames[a:b], energies[a:b], forces[a:b])
            for context, a, b in zip(self._contexts, edges[:-1], edges[1:], strict=True)
        ]
        for task in tasks:
            task.result()
        return energies, forces

    @staticmethod
    def _evaluate(context: openmm.Context, positions: FloatArray, energies: FloatArray, forces: FloatArray) -> None:
        finite = np.isfinite(positions).all((1, 2))
        scratch = np.empty(positions.shape[1:])
        for index in np.flatnonzero(finite):
            try:
                context.setPositions(positions[index])
                state = context.getState(getForces=True, getEnergy=True, getPositions=True)
            except openmm.OpenMMException:
                continue  # stays NaN, as promised
            copy_vectors(state, scratch, forces[index])
            energies[index] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


def energy_from_openmm(target: object) -> OpenMMEnergy:
    """Return an evaluator for an ``openmm.System``; raises ConfigurationError for anything else of OpenMM."""
    if not isinstance(target, openmm.System):
        raise ConfigurationError(f"cannot evaluate energies of an openmm.{type(target).__name__}: give the System")
    return OpenMMEnergy(target)
