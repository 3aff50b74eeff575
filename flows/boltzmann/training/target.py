"""The Boltzmann distribution that a flow is trained towards, in the coordinates of the flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.energy import BatchedEnergy
from ....core.units import thermal_energy
from ..molecule_coordinates import Coordinates, MoleculeCoordinates


class TargetValue(NamedTuple):
    """Unnormalised log-density ``(B,)`` and its gradient in coordinates, float64; NaN where the energy is."""

    log_density: Tensor
    gradient: Coordinates


@dataclass(frozen=True)
class CoverageBias:
    """A smooth bump that makes the neighbourhood of one torsion value more likely.

    Adds ``height * exp(concentration * (cos 2 pi (t - centre) - 1))`` to the log-density, t in turns.

    Attributes:
        circular: index of the circular coordinate.
        centre: turns.
        concentration: concentration of the von Mises shape.
        height: kT.
    """

    circular: int
    centre: float
    concentration: float
    height: float

    def log_factor(self, circular: Tensor) -> Tensor:
        """Return what the bias adds to the log-density, ``(B,)``."""
        phase = 2.0 * math.pi * (circular[:, self.circular] - self.centre)
        return self.height * torch.exp(self.concentration * (phase.cos() - 1.0))


class TargetDensity:
    """``log pi = -U/kT + log |dx/dy| + biases`` over coordinates y, with gradients from analytic forces.

    Args:
        coordinates: the fixed map from coordinates to positions.
        energy: batched energies and forces.
        temperature: K.
        biases: added to the log-density; the importance weights of samples never contain them.
    """

    def __init__(
        self,
        coordinates: MoleculeCoordinates,
        energy: BatchedEnergy,
        temperature: float,
        biases: tuple[CoverageBias, ...] = (),
    ) -> None:
        self.coordinates = coordinates
        self.energy = energy
        self.beta = 1.0 / thermal_energy(temperature)
        self.biases = biases

    def __call__(self, coordinates: Coordinates) -> TargetValue:
        """Evaluate at coordinates (any floating dtype; detached)."""
        leaves = Coordinates(*(part.detach().double().requires_grad_(True) for part in coordinates))
        with torch.enable_grad():
            positions, log_volume = self.coordinates(leaves)
            energies, forces = self.energy.energies_and_forces(positions.detach().numpy())
            return self._assemble(leaves, positions, log_volume, energies, forces)

    def from_forces(self, positions: Tensor, energies: Tensor, forces: Tensor) -> tuple[Coordinates, TargetValue]:
        """Return coordinates and target values of frames whose energies and forces are known (MD frames).

        Args:
            positions: ``(B, N, 3)`` nm.
            energies: ``(B,)`` kJ/mol.
            forces: ``(B, N, 3)`` kJ/mol/nm. They act at ``positions``; the map back gives another orientation, so they
                are turned with it.
        """
        with torch.no_grad():
            coordinates, _ = self.coordinates.inverse(positions)
        leaves = Coordinates(*(part.detach().requires_grad_(True) for part in coordinates))
        with torch.enable_grad():
            rebuilt, log_volume = self.coordinates(leaves)
            rotation = _rotation(positions.double(), rebuilt.detach())
            turned = torch.einsum("bij,bnj->bni", rotation, forces.double())
            value = self._assemble(leaves, rebuilt, log_volume, energies.numpy(), turned.numpy())
        return coordinates, value

    def _assemble(
        self, leaves: Coordinates, positions: Tensor, log_volume: Tensor, energies: object, forces: object
    ) -> TargetValue:
        extra = log_volume
        for bias in self.biases:
            extra = extra + bias.log_factor(leaves.circular)
        # The gradient of -U/kT through positions is beta F . dx/dy: F . x stands in for -U.
        surrogate = (self.beta * torch.as_tensor(forces) * positions).sum() + extra.sum()
        circular, stiff = torch.autograd.grad(surrogate, leaves, materialize_grads=True)
        log_density = -self.beta * torch.as_tensor(energies) + extra.detach()
        return TargetValue(log_density, Coordinates(circular, stiff))


def _rotation(source: Tensor, reference: Tensor) -> Tensor:
    """Return rotations ``(B, 3, 3)`` that bring centred ``source`` onto ``reference`` (Kabsch 1976)."""
    a = source - source.mean(1, keepdim=True)
    b = reference - reference.mean(1, keepdim=True)
    u, _, v = torch.linalg.svd(torch.einsum("bni,bnj->bij", b, a))
    sign = torch.linalg.det(u @ v).sign()
    flip = torch.ones(len(source), 3, dtype=source.dtype)
    flip[:, 2] = sign
    return (u * flip.unsqueeze(1)) @ v
