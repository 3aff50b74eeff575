"""Biased sampling of torsions: metadynamics builds a bias, independent runs under the fixed bias are reweighted.

The bias makes every torsional basin equally likely, so that a run crosses between them in tens of picoseconds. The standard
deviation between runs from independent starts is a realistic error: it includes slow motions that the bias missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from ..systems.topologies import molecule_topology
from .dynamics import copy_vectors, reference_context, save_arrays
from .steering import SteeringRun, Torsion, run_steering

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_GRID = 73  # points per torsion, 5 degrees apart; the last repeats the first
_HILL_WIDTH = 0.25  # radians
_HILL_INTERVAL = 250  # steps

BIAS_GROUP = 31
"""Force group of a bias: forces and energies of all other groups are those of the unbiased System."""


@dataclass(frozen=True)
class MetadynamicsRun:
    """A well-tempered metadynamics run that shares its hills with others through ``folder``."""

    system_xml: str
    positions: FloatArray
    torsions: tuple[Torsion, ...]
    temperature: float
    step_ps: float
    friction: float
    bias_factor: float
    steps: int
    seed: int
    folder: Path


def build_bias(run: MetadynamicsRun) -> FloatArray:
    """Return the bias energy in kJ/mol on a grid of torsions, ``(73,)`` or ``(73, 73)``; the last torsion varies slowest.

    Well-tempered metadynamics of Barducci, Bussi, Parrinello, PRL 100, 020603 (2008), as in ``openmm.app``.
    """
    system = openmm.XmlSerializer.deserialize(run.system_xml)
    variables = []
    for torsion in run.torsions:
        angle = openmm.CustomTorsionForce("theta")
        angle.addTorsion(*torsion)
        variables.append(app.BiasVariable(angle, -math.pi, math.pi, _HILL_WIDTH, True, _GRID))
    run.folder.mkdir(parents=True, exist_ok=True)
    metadynamics = app.Metadynamics(
        system, variables, run.temperature, run.bias_factor, 1.0, _HILL_INTERVAL, saveFrequency=20 * _HILL_INTERVAL,
        biasDir=str(run.folder),
    )  # fmt: skip
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, run.friction, run.step_ps)
    integrator.setRandomNumberSeed(run.seed)
    topology = molecule_topology(["C"] * system.getNumParticles(), [])
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(run.positions)
    simulation.context.setVelocitiesToTemperature(run.temperature, run.seed)
    metadynamics.step(simulation, run.steps)
    energy = metadynamics.getFreeEnergy().value_in_unit(unit.kilojoule_per_mole)
    # getFreeEnergy is -(bias) times the bias factor over (bias factor - 1): the estimate of F, whose negative flattens it.
    return np.asarray(energy.max() - energy, dtype=np.float64)


@dataclass(frozen=True)
class BiasedRun:
    """A run under a fixed torsion bias, started from the torsions ``start`` (radians)."""

    system_xml: str
    positions: FloatArray
    torsions: tuple[Torsion, ...]
    bias: FloatArray
    start: tuple[float, ...]
    temperature: float
    step_ps: float
    friction: float
    discarded_steps: int
    frame_interval: int
    steps: int
    seed: int
    file: Path


def run_biased(run: BiasedRun) -> Path:
    """Run under the bias; write ``angles`` (F, torsions) in radians and ``bias`` (F,) in kJ/mol, and return the file."""
    system = openmm.XmlSerializer.deserialize(run.system_xml)
    force = _bias_force(run.bias, run.torsions)
    force.setForceGroup(BIAS_GROUP)
    system.addForce(force)
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, run.friction, run.step_ps)
    integrator.setRandomNumberSeed(run.seed)
    context = reference_context(system, integrator)
    steering = SteeringRun(0, run.system_xml, run.positions, run.torsions, run.start, run.temperature, run.seed)
    context.setPositions(run_steering(steering)[1])
    context.setVelocitiesToTemperature(run.temperature, run.seed)
    integrator.step(run.discarded_steps)
    frames = run.steps // run.frame_interval
    positions = np.empty((frames, *run.positions.shape))
    bias = np.empty(frames)
    for frame in range(frames):
        integrator.step(run.frame_interval)
        state = context.getState(getPositions=True, getEnergy=True, groups={BIAS_GROUP})
        copy_vectors(state, positions[frame])
        bias[frame] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    angles = np.stack([torsion_angles(positions, torsion) for torsion in run.torsions], axis=1)
    save_arrays(run.file, angles=angles, bias=bias)
    return run.file


def _bias_force(bias: FloatArray, torsions: tuple[Torsion, ...]) -> openmm.CustomCompoundBondForce:
    arguments = ",".join(f"dihedral(p{4 * n + 1},p{4 * n + 2},p{4 * n + 3},p{4 * n + 4})" for n in range(len(torsions)))
    force = openmm.CustomCompoundBondForce(4 * len(torsions), f"bias({arguments})")
    ends = [-math.pi, math.pi] * len(torsions)
    table = openmm.Continuous1DFunction if len(torsions) == 1 else openmm.Continuous2DFunction
    sizes = [] if len(torsions) == 1 else [_GRID, _GRID]
    force.addTabulatedFunction("bias", table(*sizes, _closed(bias).ravel(), *ends, True))
    force.addBond([atom for torsion in torsions for atom in torsion], [])
    return force


def _closed(bias: FloatArray) -> FloatArray:
    """Return the grid with its last row (and column) equal to the first, as a periodic table must be."""
    closed = bias.copy()
    for axis in range(closed.ndim):
        view = np.moveaxis(closed, axis, 0)
        view[-1] = view[0]
    return closed


def torsion_angles(positions: FloatArray, torsion: Torsion) -> FloatArray:
    """Return the torsion in radians, IUPAC sign, of ``positions`` ``(..., N, 3)``."""
    i, j, k, m = (positions[..., atom, :] for atom in torsion)
    axis = k - j
    axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    first, last = i - j, m - k
    first = first - (first * axis).sum(-1, keepdims=True) * axis
    last = last - (last * axis).sum(-1, keepdims=True) * axis
    return np.arctan2((np.cross(axis, first) * last).sum(-1), (first * last).sum(-1))
