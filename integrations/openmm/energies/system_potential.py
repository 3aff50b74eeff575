"""An OpenMM System as a potential: its energies in torch, with the analytic forces of OpenMM as their gradient."""

from __future__ import annotations

import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor

from ....core.energy import FloatArray, differentiable_energies
from ....core.errors import ConfigurationError
from ....core.potential import EnergyAndForces, Potential, PotentialMetadata
from ..forces.particles import particles_from_topology
from .batched import OpenMMEnergy


class SystemPotential(Potential):
    """A force field of OpenMM where a :class:`~flowbridge.core.potential.Potential` is expected.

    Energies can be differentiated once, with respect to positions: OpenMM gives forces, and nothing beyond them. A
    configuration for which OpenMM has no energy gives NaN in energy and gradient.

    Args:
        system: the System; later changes to it are not seen.
        topology: of the same particles.
        energy: evaluator of the same System, to share its workers; one of its own where None.

    Raises:
        ConfigurationError: when System and topology differ in their number of particles.
    """

    def __init__(self, system: openmm.System, topology: app.Topology, energy: OpenMMEnergy | None = None) -> None:
        super().__init__()
        if topology.getNumAtoms() != system.getNumParticles():
            raise ConfigurationError(
                f"the topology has {topology.getNumAtoms()} atoms and the System {system.getNumParticles()} particles"
            )
        self.metadata = PotentialMetadata(
            particles_from_topology(topology, system), periodic=system.usesPeriodicBoundaryConditions()
        )
        self.energy = energy or OpenMMEnergy(system)

    def forward(self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float) -> Tensor:
        """Return energies ``(B,)`` kJ/mol; see :meth:`Potential.forward`.

        Raises:
            ConfigurationError: for global parameters, or a cell that wants a gradient: OpenMM computes no virial.
            RuntimeError: when the gradient is differentiated again.
        """
        _refuse(global_parameters)
        if cell is not None and cell.requires_grad:
            raise ConfigurationError("OpenMM gives no derivative with respect to the cell: pass cell.detach()")
        return differentiable_energies(self.energy, positions, _box(cell))

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """See :meth:`Potential.energy_and_forces`; without a detour through autograd."""
        _refuse(global_parameters)
        found = self.energy.energies_and_forces(np.asarray(positions.detach().double().cpu()), _box(cell))
        return EnergyAndForces(*(torch.from_numpy(values).to(positions.device) for values in found))


def _box(cell: Tensor | None) -> FloatArray | None:
    return None if cell is None else np.asarray(cell.detach().double().cpu())


def _refuse(global_parameters: dict[str, float]) -> None:
    if global_parameters:
        raise ConfigurationError(
            f"this potential has no global parameters, got {', '.join(global_parameters)}: set them in the System"
        )
