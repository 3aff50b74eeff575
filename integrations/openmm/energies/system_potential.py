"""An OpenMM System as a potential: energies in torch, with OpenMM's analytic forces as their gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor

from ....core.errors import ConfigurationError
from ....core.potential import EnergyAndForces, Potential, PotentialMetadata
from ..forces.particles import particles_from_topology
from .batched import OpenMMEnergy


class SystemPotential(Potential):
    """A force field of OpenMM as a :class:`~flowbridge.core.potential.Potential`.

    Energies can be differentiated once, with respect to positions: OpenMM gives forces and no second derivatives. A
    configuration for which OpenMM has no energy gives NaN in energy and gradient.

    Args:
        system: the System; later changes to it are not seen.
        topology: topology of the same particles.
        energy: evaluator of the same System, to share its workers; a new one where None.

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
            ConfigurationError: for global parameters, or a cell that requires a gradient: OpenMM computes no virial.
            RuntimeError: when the gradient is differentiated again.
        """
        _refuse(global_parameters)
        if cell is not None and cell.requires_grad:
            raise ConfigurationError("OpenMM gives no derivative with respect to the cell: pass cell.detach()")
        result: Tensor = _EnergyFunction.apply(positions, cell, self.energy)
        return result

    def energy_and_forces(
        self, positions: Tensor, cell: Tensor | None = None, **global_parameters: float
    ) -> EnergyAndForces:
        """See :meth:`Potential.energy_and_forces`; computed without autograd."""
        _refuse(global_parameters)
        return _evaluate(positions, cell, self.energy)


class _EnergyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, cell: Tensor | None, energy: OpenMMEnergy) -> Tensor:
        values = _evaluate(positions, cell, energy)
        ctx.save_for_backward(positions, values.forces.to(positions.dtype))
        return values.energy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        positions, forces = ctx.saved_tensors
        return _GradientFunction.apply(gradients[0], positions, forces), None, None


class _GradientFunction(torch.autograd.Function):
    """The gradient of the energy, which cannot be differentiated.

    torch's ``once_differentiable`` only complains where the gradient from above is differentiable, and lets a constant one
    through with a derivative of zero.
    """

    @staticmethod
    def forward(ctx: Any, above: Tensor, positions: Tensor, forces: Tensor) -> Tensor:
        return -forces * above.to(forces.dtype)[:, None, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "OpenMM gives energies and forces, not second derivatives: leave the gradient of a SystemPotential out of "
            "what is differentiated (detach it), or differentiate without create_graph"
        )


def _evaluate(positions: Tensor, cell: Tensor | None, energy: OpenMMEnergy) -> EnergyAndForces:
    box = None if cell is None else np.asarray(cell.detach().double().cpu())
    energies, forces = energy.energies_and_forces(np.asarray(positions.detach().double().cpu()), box)
    return EnergyAndForces(*(torch.from_numpy(values).to(positions.device) for values in (energies, forces)))


def _refuse(global_parameters: dict[str, float]) -> None:
    if global_parameters:
        raise ConfigurationError(
            f"this potential has no global parameters, got {', '.join(global_parameters)}: set them in the System"
        )
