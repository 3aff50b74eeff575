"""The objectives of a Boltzmann generator's two stages: maximum likelihood, and refinement on its own samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...transforms.merging import MergingObjective
from ..compiled_functions import CompiledSampling
from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates
from .compiled_gradients import GradientEvaluator, with_gradients
from .configuration import LikelihoodStage, RefinementStage
from .objectives import (
    effective_sample_fraction,
    force_matching_gradients,
    likelihood_gradients,
    path_gradients,
    reverse_kl,
)
from .target import TargetDensity

_MOST_HELD_OUT = 1024  # frames: the error of their mean is far below what over-training costs
_NORMALISER_MEMORY = 0.95
_LIKELIHOOD_OFFSET = 500_000_009  # separates the random streams of data batches and latent batches


class FlowTraining(MergingObjective):
    """What the stages of a Boltzmann generator share: besides schedule and average, gradients of its likelihood."""

    module: CoordinateFlow

    def __init__(
        self,
        flow: CoordinateFlow,
        stage: LikelihoodStage | RefinementStage,
        seed: int,
        log_interval: int,
        compilation: str,
    ) -> None:
        super().__init__(flow, stage, seed, log_interval)
        self.likelihood = GradientEvaluator(flow, likelihood_gradients, compilation)


class LikelihoodTraining(FlowTraining):
    """Maximum likelihood on frames, with force matching where its weight is positive.

    Args:
        flow: trained in place.
        stage: schedule and weights.
        data: coordinates of the frames, in the flow's dtype.
        gradient: gradients of the target's log-density there; needed for force matching only.
        seed: of the batches.
        log_interval: steps between points of the training curve.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
        held_out: frames that decide when to stop and which parameters to keep; None trains to the end.
    """

    stage: LikelihoodStage
    held_out_name = "held_out_nll"
    loss_name = "likelihood"
    loss_advice = "lower learning_rate in [model.training.likelihood], take fewer steps, or give more frames"

    def __init__(
        self,
        flow: CoordinateFlow,
        stage: LikelihoodStage,
        data: Coordinates,
        gradient: Coordinates,
        seed: int,
        log_interval: int,
        compilation: str = "never",
        held_out: Coordinates | None = None,
    ) -> None:
        super().__init__(flow, stage, seed, log_interval, compilation)
        self.matching = GradientEvaluator(flow, force_matching_gradients, compilation)
        self.data, self.gradient = data, gradient
        self.held_out: Coordinates | None = None
        if held_out is not None:
            # An even choice of them where there are many.
            chosen = torch.linspace(0, len(held_out.stiff) - 1, min(len(held_out.stiff), _MOST_HELD_OUT)).round().long()
            self.held_out = Coordinates(held_out.circular[chosen], held_out.stiff[chosen])

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return ``-mean log q`` of the held-out frames."""
        if self.held_out is None:
            return None
        if not isinstance(module, CoordinateFlow):
            raise TypeError(f"expected a CoordinateFlow, got a {type(module).__name__}")
        with torch.no_grad():
            return float(-module.log_prob(self.held_out).double().mean())

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch."""
        chosen = self.processes.share(torch.randint(len(self.data.stiff), (self.stage.batch,), generator=generator))
        data = Coordinates(self.data.circular[chosen], self.data.stiff[chosen])
        if self.stage.force_weight == 0.0:
            (loss,), slopes = self.likelihood(*data)
            self.record(nll=float(loss))
            return with_gradients(loss, self.module, slopes)
        gradient = (self.gradient.circular[chosen], self.gradient.stiff[chosen])
        weight = data.stiff.new_tensor(self.stage.force_weight)
        (likelihood, force), slopes = self.matching(*data, *gradient, weight)
        self.record(nll=float(likelihood), force=float(force))
        return with_gradients(likelihood + weight * force, self.module, slopes)


class RefinementTraining(FlowTraining):
    """Energy-based refinement on the flow's own samples (and, where weighted, on frames).

    Args:
        flow: trained in place.
        stage: schedule and weights.
        target: the density to match, biases included.
        data: frames for the likelihood term.
        seed: of the batches.
        log_interval: steps between points of the training curve.
        compilation: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    stage: RefinementStage

    def __init__(
        self,
        flow: CoordinateFlow,
        stage: RefinementStage,
        target: TargetDensity,
        data: Coordinates,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(flow, stage, seed, log_interval, compilation)
        self.sampling = CompiledSampling(flow, compilation)
        self.path = GradientEvaluator(flow, path_gradients, compilation)
        self.target, self.data = target, data
        self.log_normaliser: float | None = None

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the (surrogate) loss of one batch."""
        stage, progress = self.stage, self.step / self.stage.steps
        late = stage.final_batch is not None and progress >= 1.0 - stage.final_share
        count = stage.final_batch if late and stage.final_batch else stage.batch
        latent = Coordinates(*map(self.processes.share, self.module.sample_latent(count, generator)))
        total = latent.stiff.new_zeros(())
        if stage.path_weight > 0.0:
            # Reverse and forward Kullback-Leibler first; the chi-squared term, which is what the effective sample size
            # measures, once the weights are tame enough for it.
            powers = (0.5, 0.5, 0.0) if progress < 0.5 else (1 / 3, 1 / 3, 1 / 3)
            samples = self.sampling(latent).coordinates
            log_density, gradient = self.target(samples)
            normaliser = math.nan if self.log_normaliser is None else self.log_normaliser
            (log_weights,), slopes = self.path(
                *samples, log_density, *gradient, log_density.new_tensor(normaliser), log_density.new_tensor(powers)
            )
            log_weights = self.processes.whole(log_weights)
            self.record(effective_sample_fraction=float(effective_sample_fraction(log_weights)))
            self._follow(log_weights)
            total = total + stage.path_weight * with_gradients(total.detach(), self.module, slopes)
        if stage.reverse_kl_weight > 0.0:
            total = total + stage.reverse_kl_weight * reverse_kl(self.module, latent, self.target)
        if stage.likelihood_weight > 0.0:
            drawn = torch.randint(len(self.data.stiff), (count,), generator=self.stream(_LIKELIHOOD_OFFSET))
            chosen = self.processes.share(drawn)
            data = Coordinates(self.data.circular[chosen], self.data.stiff[chosen])
            (loss,), slopes = self.likelihood(*data)
            total = total + stage.likelihood_weight * with_gradients(loss, self.module, slopes)
        return total

    def _follow(self, log_weights: Tensor) -> None:
        """Update the running estimate of log Z."""
        usable = log_weights[torch.isfinite(log_weights)]
        estimate = float(torch.logsumexp(usable, 0)) - math.log(len(log_weights))
        old = self.log_normaliser
        memory = _NORMALISER_MEMORY
        self.log_normaliser = estimate if old is None else memory * old + (1.0 - memory) * estimate

    def state_dict(self) -> dict[str, Any]:
        """Return the running normaliser besides."""
        return {**super().state_dict(), "log_normaliser": self.log_normaliser}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.log_normaliser = state["log_normaliser"]
