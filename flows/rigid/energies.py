"""Batched energies of an engine as a torch function of positions and orientations of rigid bodies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.energy import BatchedEnergy
from ...core.units import thermal_energy
from .bodies import BodyConfiguration, RigidBodies


class BodyEnergy:
    """The energy of rigid bodies, whose gradient is the engine's forces and torques.

    Args:
        bodies: the bodies.
        energy: energy of their sites.
    """

    def __init__(self, bodies: RigidBodies, energy: BatchedEnergy) -> None:
        self.bodies = bodies
        self.energy = energy

    def energy_of(self, configuration: BodyConfiguration) -> Tensor:
        """Return energies ``(B,)`` in kJ/mol, float64, differentiable once; NaN in value and gradient where there is none."""
        result: Tensor = _Energy.apply(self.bodies.places(configuration), self.energy)
        return result

    def reduced(self, configuration: BodyConfiguration, temperature: float) -> Tensor:
        """Return ``U / kT`` ``(B,)``; see :meth:`energy_of`.

        Args:
            configuration: positions and orientations of the bodies.
            temperature: K.
        """
        return self.energy_of(configuration) / thermal_energy(temperature)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, energy: BatchedEnergy) -> Tensor:
        energies, forces = energy.energies_and_forces(places.detach().double().cpu().numpy())
        ctx.save_for_backward(torch.as_tensor(forces, dtype=places.dtype))
        return torch.as_tensor(energies, dtype=torch.float64)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -forces * gradients[0].to(forces.dtype)[:, None, None], None
