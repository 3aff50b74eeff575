"""Dynamics driven by a learned potential alone: replicas in one Context, constant energy or Langevin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from ....core.errors import NonFiniteEnergyError
from ..forces.add_potential import add_potential, particle_system
from .dynamics import copy_vectors, reason_of, reference_context, save_arrays

SINGLE_MOLECULE_DTYPE = "float64"
"""Precision in which one molecule is driven: energy conservation is then that of the time step, and it costs little more."""

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PotentialLangevinRun:
    """Langevin dynamics of ``replicas`` copies of a molecule under a model file, in one Context.

    Attributes:
        model: path of the model file.
        positions: ``(R, N, 3)`` nm, the starts of the replicas.
        temperature: K.
        step_ps: time step.
        friction: 1/ps.
        hydrogen_mass: amu, None to keep the masses; the distribution of positions does not depend on it.
        discarded_steps: steps before the first frame.
        steps: steps after them.
        frame_interval: steps between frames.
        seed: of velocities and noise.
        file: where frames go.
    """

    model: Path
    positions: FloatArray
    temperature: float
    step_ps: float
    friction: float
    hydrogen_mass: float | None
    discarded_steps: int
    steps: int
    frame_interval: int
    seed: int
    file: Path


def run_potential_langevin(run: PotentialLangevinRun) -> Path:
    """Run and write ``positions`` ``(F, R, N, 3)`` float32 nm and the mean kinetic temperature; return the file.

    Raises:
        NonFiniteEnergyError: when the energy is not finite; the last good frames are saved next to the file.
    """
    torch.set_num_threads(1)  # this function owns its worker process
    replicas, particles = run.positions.shape[:2]
    system = particle_system(run.model, replicas=replicas, hydrogen_mass=run.hydrogen_mass)
    add_potential(system, run.model, replicas=replicas)
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, run.friction, run.step_ps)
    integrator.setRandomNumberSeed(run.seed)
    context = reference_context(system, integrator)
    context.setPositions(run.positions.reshape(-1, 3))
    context.setVelocitiesToTemperature(run.temperature, run.seed)
    frames = run.steps // run.frame_interval
    kept = np.empty((frames, replicas, particles, 3), dtype=np.float32)
    buffer = np.empty((replicas * particles, 3))
    kinetic = np.empty(frames)
    done = 0
    try:
        integrator.step(run.discarded_steps)
        for done in range(frames):
            integrator.step(run.frame_interval)
            state = context.getState(getPositions=True, getVelocities=True)
            copy_vectors(state, buffer)
            kept[done] = buffer.reshape(kept.shape[1:])
            kinetic[done] = _kinetic_energy(state, system)
    except openmm.OpenMMException as error:
        last_good = run.file.with_suffix(".last_good.npz")
        save_arrays(last_good, positions=kept[:done].astype(np.float64))
        raise NonFiniteEnergyError(
            f"flow-driven dynamics stopped; {done} good frames are in {last_good}: {reason_of(error)}"
        ) from error
    constant = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    temperature = 2.0 * kinetic / (3 * replicas * particles * constant)
    save_arrays(run.file, positions=kept, temperature=temperature)
    return run.file


def _kinetic_energy(state: openmm.State, system: openmm.System) -> float:
    velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    return float(0.5 * np.sum(np.asarray(masses)[:, None] * velocities**2))


@dataclass(frozen=True)
class ConstantEnergyRun:
    """A short Langevin equilibration, then velocity Verlet at constant energy.

    ``source`` is the path of a model file, or a serialised System for the force field it was trained on: both are
    measured by the same code.
    """

    source: Path | str
    positions: FloatArray
    temperature: float
    step_ps: float
    equilibration_steps: int
    steps: int
    seed: int


def run_constant_energy(run: ConstantEnergyRun) -> FloatArray:
    """Return the total energy in kJ/mol after each step, ``(steps,)``, at full-step velocities.

    As in arXiv 2110.00351: equilibration at friction 10/ps, then Verlet. Energies are those of positions and velocities at
    the same time (the integrator's own half-step offset is removed by OpenMM's kinetic energy).
    """
    torch.set_num_threads(1)  # this function owns its worker process
    if isinstance(run.source, Path):
        system = particle_system(run.source)
        add_potential(system, run.source, dtype=SINGLE_MOLECULE_DTYPE)
    else:
        system = openmm.XmlSerializer.deserialize(run.source)
        for index in reversed(range(system.getNumForces())):
            if isinstance(system.getForce(index), openmm.CMMotionRemover):
                system.removeForce(index)  # taking momentum out is not constant-energy dynamics
    equilibration = openmm.LangevinMiddleIntegrator(run.temperature, 10.0, run.step_ps)
    equilibration.setRandomNumberSeed(run.seed)
    constant_energy = openmm.VerletIntegrator(run.step_ps)
    compound = openmm.CompoundIntegrator()
    compound.addIntegrator(equilibration)
    compound.addIntegrator(constant_energy)
    context = reference_context(system, compound)
    context.setPositions(run.positions)
    context.setVelocitiesToTemperature(run.temperature, run.seed)
    compound.step(run.equilibration_steps)
    compound.setCurrentIntegrator(1)
    energies = np.empty(run.steps)
    for step in range(run.steps):
        compound.step(1)
        state = context.getState(getEnergy=True)
        total = state.getKineticEnergy() + state.getPotentialEnergy()
        energies[step] = total.value_in_unit(unit.kilojoule_per_mole)
    return energies
