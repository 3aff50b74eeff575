"""Bring a molecule to given torsions by a growing restraint."""

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


def torsion_restraint(torsions: tuple[Torsion, ...], targets: tuple[float, ...]) -> openmm.CustomTorsionForce:
    """Return ``pull (1 - cos(theta - target))`` over torsions, targets in radians; global parameter ``pull`` in kJ/mol."""
    force = openmm.CustomTorsionForce("pull*(1-cos(theta-target))")
    force.addGlobalParameter("pull", 0.0)
    force.addPerTorsionParameter("target")
    for torsion, angle in zip(torsions, targets, strict=True):
        force.addTorsion(*torsion, [angle])
    return force


@dataclass(frozen=True)
class SteeringRun:
    """One structure to be steered, complete enough for another process; ``number`` tells results apart."""

    number: int
    system_xml: str
    positions: FloatArray
    torsions: tuple[Torsion, ...]
    targets: tuple[float, ...]
    temperature: float
    seed: int
    minimise: bool = False


def run_steering(run: SteeringRun) -> tuple[int, FloatArray]:
    """Return the run's number and its steered positions; see :func:`steer`."""
    return run.number, steer(
        run.system_xml, run.positions, run.torsions, run.targets, run.temperature, run.seed, run.minimise
    )


def steer(
    system_xml: str,
    positions: FloatArray,
    torsions: tuple[Torsion, ...],
    targets: tuple[float, ...],
    temperature: float,
    seed: int,
    minimise: bool = False,
) -> FloatArray:
    """Return positions ``(N, 3)`` nm near the torsions ``targets`` (radians), by Langevin dynamics under a restraint.

    With ``minimise``, the restraint is let go at the end and the energy minimised.
    """
    system = openmm.XmlSerializer.deserialize(system_xml)
    system.addForce(torsion_restraint(torsions, targets))
    integrator = openmm.LangevinMiddleIntegrator(temperature, _FRICTION, _STEP_PS)
    integrator.setRandomNumberSeed(seed)
    context = reference_context(system, integrator)
    context.setPositions(positions)
    context.setVelocitiesToTemperature(temperature, seed)
    for strength in _STRENGTHS:
        context.setParameter("pull", strength)
        integrator.step(_STEPS)
    if minimise:
        context.setParameter("pull", 0.0)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0)
    steered = np.empty_like(positions)
    copy_vectors(context.getState(getPositions=True), steered)
    return steered
