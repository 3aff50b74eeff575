"""Steering a molecule to given torsions by a growing restraint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm

from .dynamics import copy_vectors, reference_context

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Torsion = tuple[int, int, int, int]

_STRENGTHS = (20.0, 100.0, 300.0)  # kJ/mol
_STEPS = 2000
_STEP_PS = 0.001
_FRICTION = 10.0


def torsion_restraint(torsions: tuple[Torsion, ...], angles: tuple[float, ...]) -> openmm.CustomTorsionForce:
    """Return ``pull (1 - cos(theta - angle))`` over torsions, angles in radians; global parameter ``pull`` in kJ/mol."""
    force = openmm.CustomTorsionForce("pull*(1-cos(theta-angle))")
    force.addGlobalParameter("pull", 0.0)
    force.addPerTorsionParameter("angle")
    for torsion, angle in zip(torsions, angles, strict=True):
        force.addTorsion(*torsion, [angle])
    return force


@dataclass(frozen=True)
class SteeringRun:
    """A structure to steer to ``angles`` (radians), complete enough for another process.

    ``number`` identifies the result. With ``minimise``, the restraint is released at the end and the energy minimised.
    """

    number: int
    system_xml: str
    positions: FloatArray
    torsions: tuple[Torsion, ...]
    angles: tuple[float, ...]
    temperature: float
    seed: int
    minimise: bool = False


def run_steering(run: SteeringRun) -> tuple[int, FloatArray]:
    """Return the run's number and positions ``(N, 3)`` nm near its torsions, by Langevin dynamics under a restraint."""
    system = openmm.XmlSerializer.deserialize(run.system_xml)
    system.addForce(torsion_restraint(run.torsions, run.angles))
    integrator = openmm.LangevinMiddleIntegrator(run.temperature, _FRICTION, _STEP_PS)
    integrator.setRandomNumberSeed(run.seed)
    context = reference_context(system, integrator)
    context.setPositions(run.positions)
    context.setVelocitiesToTemperature(run.temperature, run.seed)
    for strength in _STRENGTHS:
        context.setParameter("pull", strength)
        integrator.step(_STEPS)
    if run.minimise:
        context.setParameter("pull", 0.0)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0)
    steered = np.empty_like(run.positions)
    copy_vectors(context.getState(getPositions=True), steered)
    return run.number, steered
