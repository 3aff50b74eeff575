"""The objectives of coarse graining: maximum likelihood of the teacher, force matching of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...core.units import thermal_energy
from ...flows.boltzmann.compiled_functions import CompiledFlowFunction
from ...flows.boltzmann.molecule_coordinates import Coordinates
from ...flows.boltzmann.training.compiled_gradients import with_gradients
from ...flows.transforms.merging import MergingObjective
from ..coarse_grained_force_field import CoarseGrainedForceField
from ..networks.lipschitz import SpectralBound, project_exactly
from .augmented_flow import FlowTeacher
from .configuration import NoiseConfiguration, Stage
from .gradients import augmented_likelihood_gradients, network_force_gradients

MOST_HELD_OUT = 4096


class CoarseObjective(MergingObjective):
    """What teacher and student share."""

    stage: Stage
    recorded = "loss"
    loss_advice = "lower its learning_rate, or look for frames with broken molecules or enormous forces"


class TeacherTraining(CoarseObjective):
    """Maximum likelihood of an augmented flow; auxiliary variables are redrawn for every batch.

    Args:
        teacher: trained in place.
        stage: schedule.
        positions: frames ``(F, n, 3)`` nm.
        weights: of the frames ``(F,)``; None for equal ones.
        held_out: frames to evaluate on.
        held_out_weights: their weights.
        seed: of batches and auxiliary variables.
        log_interval: steps between points of the curve.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(
        self,
        teacher: FlowTeacher,
        stage: Stage,
        positions: Tensor,
        weights: Tensor | None,
        held_out: Tensor | None,
        held_out_weights: Tensor | None,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(teacher.flow, stage, seed, log_interval)
        self.evaluate = CompiledFlowFunction(teacher.flow, augmented_likelihood_gradients, compilation)
        dtype = teacher.flow.dtype
        self.auxiliary = teacher.flow.configuration.auxiliary
        self.data = _coordinates(teacher, positions, dtype)
        self.weights = weights
        self.held_out = None
        if held_out is not None and len(held_out):
            chosen = torch.linspace(0, len(held_out) - 1, min(len(held_out), MOST_HELD_OUT)).round().long()
            generator = torch.Generator().manual_seed(seed)
            auxiliary = torch.randn(len(chosen), self.auxiliary, generator=generator, dtype=dtype)
            share = None if held_out_weights is None else held_out_weights[chosen]
            self.held_out = (_coordinates(teacher, held_out[chosen], dtype), auxiliary, share)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch."""
        chosen = drawn(len(self.data.stiff), self.weights, self.stage.batch, generator)
        auxiliary = torch.randn(len(chosen), self.auxiliary, generator=generator, dtype=self.data.stiff.dtype)
        loss, *gradients = self.evaluate(self.data.circular[chosen], self.data.stiff[chosen], auxiliary)
        return with_gradients(loss, self.module, tuple(gradients))

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return the loss of held-out frames; None where there are none."""
        if self.held_out is None:
            return None
        data, auxiliary, share = self.held_out
        with torch.no_grad():
            values = -module.log_prob(data, auxiliary).double()  # type: ignore[operator]
        return float(values.mean() if share is None else (values * share).sum() / share.sum())


def _coordinates(teacher: FlowTeacher, positions: Tensor, dtype: torch.dtype) -> Coordinates:
    with torch.no_grad():
        coordinates, _ = teacher.coordinates.inverse(positions)
    return Coordinates(*(part.to(dtype) for part in coordinates))


class StudentTraining(CoarseObjective):
    """Force matching of the network on what the prior leaves of the forces.

    The loss is the mean square of a component of the force error in units of kT/nm, over its size in the data: 1 for a network
    without forces. Its least value is the noise of the labels.

    Args:
        force_field: its network is trained in place.
        stage: schedule.
        positions: frames ``(F, n, 3)`` nm.
        forces: labels ``(F, n, 3)`` kJ/mol/nm, prior included.
        weights: of the frames ``(F,)``; None for equal ones.
        held_out: positions, forces and weights to evaluate on; None for none.
        seed: of the batches.
        log_interval: steps between points of the curve.
        noise: for noised force matching.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(
        self,
        force_field: CoarseGrainedForceField,
        stage: Stage,
        positions: Tensor,
        forces: Tensor | None,
        weights: Tensor | None,
        held_out: tuple[Tensor, Tensor | None, Tensor | None] | None,
        seed: int,
        log_interval: int,
        noise: NoiseConfiguration | None = None,
        compilation: str = "never",
    ) -> None:
        if force_field.network is None or force_field.metadata.temperature is None:
            raise ConfigurationError("only a force field with a network and a temperature can be trained")
        super().__init__(force_field.network, stage, seed, log_interval)
        self.evaluate = CompiledFlowFunction(force_field.network, network_force_gradients, compilation)
        self.dtype_of_network = next(force_field.network.parameters()).dtype
        self.kt = thermal_energy(force_field.metadata.temperature)
        self.force_field, self.noise = force_field, noise
        self.positions, self.forces, self.weights = positions, forces, weights
        self.residual = self._residual(positions, forces) if noise is None else positions.new_empty(0)
        self.held_out = held_out if held_out is not None and len(held_out[0]) else None
        self.scale = 1.0
        self.scale = float(self._sample_scale(seed))
        self.bound = SpectralBound(force_field.bounded_layers, force_field.lipschitz)

    def _residual(self, positions: Tensor, forces: Tensor | None) -> Tensor:
        """Return what the prior leaves of forces, in kT/nm."""
        if forces is None:
            raise ConfigurationError(
                "force matching needs the forces on the atoms of every frame, and there are none: simulate with forces saved, "
                "give the System that they can be computed with, or take method = 'flow_matching', which needs none"
            )
        parts = [self.force_field.prior.energy_and_forces(part).forces for part in positions.double().split(8192)]
        return ((forces.double() - torch.cat(parts)) / self.kt).to(self.dtype_of_network)

    def _sample_scale(self, seed: int) -> Tensor:
        """Return the mean square of a component of the labels over a sample of the frames."""
        generator = torch.Generator().manual_seed(seed)
        _, labels = self._batch(MOST_HELD_OUT, generator)
        return labels.double().square().mean().clamp_min(1e-12)

    def _batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = drawn(len(self.positions), self.weights, count, generator)
        if self.noise is None:
            return self.positions[chosen].to(self.dtype_of_network), self.residual[chosen]
        return self._noised(self.positions[chosen], None if self.forces is None else self.forces[chosen], generator)

    def _noised(self, positions: Tensor, forces: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return noised positions and labels whose average there is the force of the smeared density."""
        noise = self.noise or NoiseConfiguration()
        shift = noise.width * torch.randn(positions.shape, generator=generator, dtype=torch.float64)
        moved = positions.double() + shift
        label = -(1.0 - noise.force_share) * self.kt * shift / noise.width**2
        if noise.force_share > 0.0 and forces is not None:
            label = label + noise.force_share * forces.double()
        return moved.to(self.dtype_of_network), self._residual(moved, label)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch."""
        positions, labels = self._batch(self.stage.batch, generator)
        loss, *gradients = self.evaluate(positions, labels, *self.force_field.standardisation)
        return with_gradients(loss, self.module, tuple(gradients)) / self.scale

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return the loss of held-out frames; None where there are none."""
        if self.held_out is None:
            return None
        positions, forces, weights = self.held_out
        generator = torch.Generator().manual_seed(self.seed)
        chosen = drawn(len(positions), weights, min(MOST_HELD_OUT, len(positions)), generator)
        if self.noise is None:
            moved = positions[chosen].to(self.dtype_of_network)
            labels = self._residual(positions[chosen], None if forces is None else forces[chosen])
        else:
            moved, labels = self._noised(positions[chosen], None if forces is None else forces[chosen], generator)
        found = network_forces(module, moved)
        return float((found - labels).double().square().mean() / self.scale)

    def held_out_force_error(self) -> float | None:
        """Return the force error of what was trained on held-out frames; None where there are none."""
        return self.held_out_loss(self.module)

    def after_update(self) -> None:
        """Keep the Lipschitz bound."""
        if math.isfinite(self.bound.bound):
            self.bound.project()

    def finish(self) -> None:
        """See :meth:`Objective.finish`; afterwards the bound holds exactly."""
        super().finish()
        if math.isfinite(self.bound.bound):
            project_exactly(self.bound.layers, self.bound.bound)

    def state_dict(self) -> dict[str, Any]:
        """Return the power iteration besides."""
        return {**super().state_dict(), "bound": self.bound.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.bound.load_state_dict(state["bound"])


def drawn(frames: int, weights: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """Return indices of frames, drawn with replacement in proportion to their weights."""
    if weights is None:
        return torch.randint(frames, (count,), generator=generator)
    # Inversion of the cumulative sum: torch.multinomial has no room for more than 2^24 frames.
    cumulative = weights.double().cumsum(0)
    points = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=frames - 1)


def network_forces(network: nn.Module, positions: Tensor) -> Tensor:
    """Return the network's forces ``(B, n, 3)`` in kT/nm."""
    with torch.enable_grad():
        leaf = positions.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(leaf).sum(), leaf)
    return -gradient
