"""Batched energies of configurations: what a Boltzmann generator is trained against and reweighted to."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigurationError
from .evaluator import EvaluationOptions, Evaluator
from .model import Model, what_is
from .potential import Potential

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

COMPILED_BATCH = 64
"""Configurations of one call of a compiled program in a batch: enough to fill vectors, few enough to share between cores."""


class EnergiesWithForces(Protocol):
    """The least that :func:`as_batched_energy` takes of an object."""

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See :meth:`BatchedEnergy.energies_and_forces`."""
        ...


@runtime_checkable
class BatchedEnergy(EnergiesWithForces, Protocol):
    """Something that evaluates many configurations of one system, with forces or without."""

    def energies(self, positions: FloatArray) -> FloatArray:
        """Return energies ``(B,)`` in kJ/mol; arguments and NaN as for :meth:`energies_and_forces`."""
        ...

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return energies ``(B,)`` in kJ/mol and forces ``(B, N, 3)`` in kJ/mol/nm.

        Args:
            positions: ``(B, N, 3)`` in nm.

        A configuration whose energy cannot be evaluated gives NaN, never a number of another configuration.
        """
        ...


class PotentialEnergy:
    """A :class:`~flowbridge.core.potential.Potential` as a :class:`BatchedEnergy`."""

    def __init__(self, potential: Potential, chunk: int = 4096) -> None:
        self.potential = potential
        self.chunk = chunk

    def energies(self, positions: FloatArray) -> FloatArray:
        """See :meth:`BatchedEnergy.energies`."""
        return _array([self.potential.energies(part) for part in self._chunks(positions)])

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See :meth:`BatchedEnergy.energies_and_forces`."""
        parts = [self.potential.energy_and_forces(part) for part in self._chunks(positions)]
        return _array([part.energy for part in parts]), _array([part.forces for part in parts])

    def _chunks(self, positions: FloatArray) -> tuple[Tensor, ...]:
        return torch.as_tensor(np.ascontiguousarray(positions)).split(self.chunk)


class _ForcesLeftOut:
    """Energies of an object that gives them with forces only."""

    def __init__(self, source: EnergiesWithForces) -> None:
        self.source = source

    def energies(self, positions: FloatArray) -> FloatArray:
        return self.source.energies_and_forces(positions)[0]

    def energies_and_forces(self, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        return self.source.energies_and_forces(positions)


def as_batched_energy(target: Any) -> BatchedEnergy:
    """Return ``target`` as a :class:`BatchedEnergy`.

    Accepts a BatchedEnergy, an object with ``energies_and_forces(positions)`` alone, a Potential, the path of a model file
    (compiled once for this machine, as for an engine: see :mod:`flowbridge.core.compilation.building`), or an object of an
    engine for which an adapter is registered in the entry point group ``flowbridge.energy_sources`` under the engine's
    top-level module name (``openmm``: a ``System``).
    """
    if isinstance(target, (str, Path)):
        return PotentialEnergy(Evaluator.of(target, EvaluationOptions(replicas=COMPILED_BATCH)).evaluated)
    if isinstance(target, Potential):
        return PotentialEnergy(target)
    if isinstance(target, BatchedEnergy):
        return target
    if callable(getattr(target, "energies_and_forces", None)):
        return _ForcesLeftOut(target)
    engine = type(target).__module__.partition(".")[0]
    for entry in entry_points(group="flowbridge.energy_sources", name=engine):
        source: BatchedEnergy = entry.load()(target)
        return source
    given = what_is(target) if isinstance(target, Model) else described(target)
    raise ConfigurationError(
        f"cannot evaluate energies of {given}: give an openmm.System, a flowbridge Potential, the path of a model file, or an "
        "object with energies_and_forces(positions)"
    )


def differentiable_energies(energy: BatchedEnergy, positions: Tensor, *arguments: Any) -> Tensor:
    """Return energies ``(B,)`` in kJ/mol, float64, as a function of positions whose gradient is minus the forces.

    Forces are evaluated only where the positions want a gradient. Energies can be differentiated once: engines give forces,
    and nothing beyond them. A configuration that has no energy gives NaN in energy and gradient; where the energy is not used
    (the gradient from above is zero) the gradient is zero.

    Args:
        energy: batched energies.
        positions: ``(B, N, 3)`` in nm, any floating dtype and device.
        arguments: further ones of the methods of ``energy``, a cell for instance.
    """
    result: Tensor = _Energy.apply(positions, energy, arguments)
    return result


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, energy: BatchedEnergy, arguments: tuple[Any, ...]) -> Tensor:
        numbers = np.ascontiguousarray(positions.detach().double().cpu())
        if not ctx.needs_input_grad[0]:
            return torch.as_tensor(energy.energies(numbers, *arguments), dtype=torch.float64, device=positions.device)
        energies, forces = energy.energies_and_forces(numbers, *arguments)
        ctx.save_for_backward(positions, torch.as_tensor(forces).to(positions))
        return torch.as_tensor(energies, dtype=torch.float64, device=positions.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        positions, forces = ctx.saved_tensors
        return _Gradient.apply(gradients[0], positions, forces), None, None


class _Gradient(torch.autograd.Function):
    """The gradient of the energy, which cannot be differentiated.

    torch's ``once_differentiable`` only complains where the gradient from above is differentiable, and lets a constant one
    through with a derivative of zero.
    """

    @staticmethod
    def forward(ctx: Any, above: Tensor, positions: Tensor, forces: Tensor) -> Tensor:
        scale = above.to(forces.dtype)[:, None, None]
        # Zero times a force that is not a number would be none.
        return torch.where(scale == 0.0, torch.zeros_like(forces), -forces * scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "engines give energies and forces, not second derivatives: leave the gradient of this energy out of what is "
            "differentiated (detach it), or differentiate without create_graph. Kernels of stochastic flows that follow forces "
            "(Langevin, Hamiltonian) cannot be trained with it: train with MetropolisKernel, or sample with torch.no_grad()"
        )


def described(target: object) -> str:
    """Return what an object is that energies were asked of: a path, or the name of its type."""
    return str(target) if isinstance(target, (str, Path)) else f"{type(target).__module__}.{type(target).__qualname__}"


def _array(parts: list[Tensor]) -> FloatArray:
    numbers: FloatArray = torch.cat(parts).double().cpu().numpy()
    return numbers
