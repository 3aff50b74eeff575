"""What the tests of several engines ask of an OpenMM Context."""

import numpy as np
import openmm
from openmm import unit


def context_of(system, platform="Reference", step=0.0005):
    """A Context with a Verlet integrator; step in ps."""
    return openmm.Context(system, openmm.VerletIntegrator(step), openmm.Platform.getPlatformByName(platform))


def evaluate(context, positions, groups=-1):
    """Energy in kJ/mol and forces ``(N, 3)`` in kJ/mol/nm at positions in nm."""
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True, groups=groups)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return energy, np.array(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
