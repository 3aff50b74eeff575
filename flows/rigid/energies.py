"""Batched energies of an engine as a torch function of positions and orientations of rigid bodies."""

from __future__ import annotations

from torch import Tensor

from ...core.energy import EnergiesWithForces, as_batched_energy, differentiable_energies
from ...core.units import thermal_energy
from .bodies import BodyConfiguration, RigidBodies


class BodyEnergy:
    """The energy of rigid bodies, whose gradient is the engine's forces and torques.

    Args:
        bodies: the bodies.
        energy: energy of their sites.
    """

    def __init__(self, bodies: RigidBodies, energy: EnergiesWithForces) -> None:
        self.bodies = bodies
        self.energy = as_batched_energy(energy)

    def energy_of(self, configuration: BodyConfiguration) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol, float64, differentiable once; NaN in value and gradient where there is none."""
        return differentiable_energies(self.energy, self.bodies.places(configuration))

    def reduced(self, configuration: BodyConfiguration, temperature: float) -> Tensor:
        """Return ``U / kT`` ``(B,)``; see :meth:`energy_of`.

        Args:
            configuration: positions and orientations of the bodies.
            temperature: K.
        """
        return self.energy_of(configuration) / thermal_energy(temperature)
