"""Short dynamics from many structures, which relaxes frames of a constrained or rounded trajectory to a System."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from openmm import unit

from .dynamics import FloatArray, Trajectory, copy_vectors, reference_context


@dataclass(frozen=True)
class RelaxationRun:
    """Langevin dynamics from each of several structures, of which only the last frames are saved.

    Attributes:
        system_xml: serialised System.
        positions: starting structures ``(F, N, 3)`` nm.
        temperature: temperature, K.
        step_ps: time step, ps.
        friction: friction, 1/ps.
        steps: number of steps from each structure.
        seed: random seed of velocities and noise.
        file: npz file of the frames, written by the caller.
    """

    system_xml: str
    positions: FloatArray
    temperature: float
    step_ps: float
    friction: float
    steps: int
    seed: int
    file: Path


def run_relaxation(run: RelaxationRun) -> tuple[Path, Trajectory]:
    """Relax every structure; return the run's file and the frames.

    A structure from which dynamics cannot start (overlapping atoms) keeps its positions and has a NaN energy.
    """
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, run.friction, run.step_ps)
    integrator.setRandomNumberSeed(run.seed)
    context = reference_context(openmm.XmlSerializer.deserialize(run.system_xml), integrator)
    relaxed = Trajectory(np.array(run.positions), np.full(len(run.positions), np.nan), np.zeros_like(run.positions))
    for frame, positions in enumerate(run.positions):
        context.setPositions(positions)
        context.setVelocitiesToTemperature(run.temperature, run.seed + frame)
        try:
            integrator.step(run.steps)
        except openmm.OpenMMException:  # a NaN position; the frame stays marked as failed
            continue
        state = context.getState(positions=True, forces=True, energy=True)
        copy_vectors(state, relaxed.positions[frame], relaxed.forces[frame])
        relaxed.energies[frame] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return run.file, relaxed
