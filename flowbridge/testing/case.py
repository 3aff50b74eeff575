"""A potential with configurations to test it at, and its evaluation there."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.potential import EnergyAndForces, Potential


@dataclass(frozen=True)
class Case:
    """What all checks share.

    Attributes:
        potential: what is tested.
        positions: ``(B, N, 3)`` nm, float64.
        cell: ``(B, 3, 3)`` nm for a periodic potential, None for another.
        reference: energies and forces there.
        seed: of random directions and rotations.
    """

    potential: Potential
    positions: Tensor
    cell: Tensor | None
    reference: EnergyAndForces
    seed: int

    @property
    def largest_force(self) -> float:
        """Of all components, kJ/mol/nm; at least one, so that it can be divided by."""
        return max(float(self.reference.forces.abs().max()), 1.0)

    @property
    def energy_scale(self) -> float:
        """The size of energies whose rounding matters, kJ/mol, at least one."""
        return max(float(self.reference.energy.abs().max()), 1.0)

    @property
    def single(self) -> bool:
        """Whether the potential computes with parameters of less than double precision."""
        tensors = (*self.potential.parameters(), *self.potential.buffers())
        return any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors)

    def allowed(self, double: float) -> float:
        """Return a relative tolerance: ``double``, or what single precision inside leaves of it."""
        return max(double, 1e-4) if self.single else double

    def in_double(self) -> Case:
        """Return the case of the same potential with parameters in double precision."""
        if not self.single:
            return self
        potential = copy.deepcopy(self.potential).double()
        energy, forces = potential.energy_and_forces(self.positions.clone(), self.cell)
        return replace(self, potential=potential, reference=EnergyAndForces(energy.double(), forces.double()))

    def generator(self) -> torch.Generator:
        """Return random numbers, the same for each check."""
        return torch.Generator().manual_seed(self.seed)

    def evaluate(self, positions: Tensor, cell: Tensor | None = None) -> EnergyAndForces:
        """Return energies and forces elsewhere; the case's own cell where none is given."""
        return self.potential.energy_and_forces(positions, self.cell if cell is None else cell)


def case_of(potential: Potential, positions: Tensor | None, cell: Tensor | None, count: int, seed: int) -> Case:
    """Return the case of a potential, with positions of its own where none are given.

    Raises ConfigurationError where the potential has no finite energy there.
    """
    metadata = potential.metadata
    expected = (len(metadata.particles), 3)
    if positions is None:
        positions = potential.example_positions(count, torch.Generator().manual_seed(seed))
    positions = torch.as_tensor(positions, dtype=torch.float64).detach().clone()
    positions = positions[None] if positions.ndim == 2 else positions
    if positions.ndim != 3 or positions.shape[1:] != expected:
        raise ConfigurationError(
            f"positions must be (configurations, particles, 3) = (B, {expected[0]}, 3) nm, got {tuple(positions.shape)}"
        )
    if metadata.periodic:
        if cell is None:
            edge = 1.5 * float(positions.amax() - positions.amin()) + 0.5
            cell = edge * torch.eye(3, dtype=torch.float64)
        cell = torch.as_tensor(cell, dtype=torch.float64).expand(len(positions), 3, 3).clone()
    elif cell is not None:
        raise ConfigurationError("a cell was given, but the potential's metadata say that it is not periodic")
    reference = potential.energy_and_forces(positions.clone(), cell)
    if not (torch.isfinite(reference.energy).all() and torch.isfinite(reference.forces).all()):
        raise ConfigurationError(
            "the potential has no finite energy and forces at the configurations to test it at: give positions that are "
            "typical of it, or write its example_positions"
        )
    return Case(
        potential,
        positions,
        cell,
        EnergyAndForces(reference.energy.detach().double(), reference.forces.detach().double()),
        seed,
    )
