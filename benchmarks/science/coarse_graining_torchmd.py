"""The same coarse-grained force field through TorchMD, where it is installed.

Doerr et al., J. Chem. Theory Comput. 17, 2355 (2021). ``pip install --no-deps torchmd`` is enough: parameter files, which want
more packages, are not needed, since the whole force field is what TorchMD calls an external potential.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from ase import units
from torch import Tensor

from flowbridge.core.potential import Potential

_ANGSTROM = units.nm / units.Angstrom  # of a nanometre
_KCAL = (units.kJ / units.mol) / (units.kcal / units.mol)  # of a kJ/mol


def torchmd_is_installed() -> bool:
    """Return whether TorchMD can be imported."""
    return find_spec("torchmd") is not None


class ExternalPotential:
    """A Potential as TorchMD's Forces wants an external one: angstrom, kcal/mol."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    def calculate(self, positions: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies ``(R,)`` and forces ``(R, n, 3)`` of positions ``(R, n, 3)``; the box is not used."""
        found = self.potential.energy_and_forces(positions / _ANGSTROM)
        return found.energy.detach() * _KCAL, found.forces.detach() * (_KCAL / _ANGSTROM)


def torchmd_stepper(
    potential: Potential, start: Tensor, temperature: float, step_ps: float, friction_per_ps: float, steps: int
) -> Callable[[], Any]:
    """Return a function that does so many of TorchMD's Langevin steps.

    Args:
        potential: eager or compiled.
        start: ``(R, n, 3)`` nm.
        temperature: K.
        step_ps: time step.
        friction_per_ps: friction of the thermostat.
        steps: steps of one call.
    """
    from torchmd.forces import Forces
    from torchmd.integrator import Integrator, maxwell_boltzmann
    from torchmd.systems import System

    masses = torch.tensor(potential.metadata.particles.masses, dtype=torch.float64)
    replicas, beads = start.shape[:2]
    torch.manual_seed(1)  # TorchMD draws from the global generator
    system = System(beads, replicas, torch.float64, "cpu")
    system.set_masses(masses)
    system.set_positions((start * _ANGSTROM).permute(1, 2, 0))
    system.set_velocities(maxwell_boltzmann(masses[:, None], temperature, replicas))
    bare = SimpleNamespace(masses=masses, nonbonded_params=None)
    forces = Forces(bare, terms=[], external=ExternalPotential(potential))
    forces.compute(system.pos, system.box, system.forces)
    integrator = Integrator(system, forces, 1000.0 * step_ps, "cpu", gamma=friction_per_ps, T=temperature)
    return lambda: integrator.step(steps)
