"""Training stages as Lightning modules: each step is a function of the seed and the step number alone.

A batch is drawn from a generator seeded with (seed, step), not from a running stream, so that a run that was killed and
resumed from a checkpoint repeats the numbers of an undisturbed one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....core.errors import ConvergenceError
from ..compiled_functions import CompiledSampling
from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates
from .compiled_gradients import GradientEvaluator, with_gradients
from .configuration import LikelihoodStage, RefinementStage
from .held_out import HeldOutLikelihood
from .objectives import (
    effective_sample_fraction,
    force_matching_gradients,
    likelihood_gradients,
    path_gradients,
    reverse_kl,
)
from .stage_training import StageTraining
from .target import TargetDensity

_NORMALISER_MEMORY = 0.95
_LIKELIHOOD_OFFSET = 500_000_009  # separates the random streams of data batches and latent batches


class FlowTraining(StageTraining):
    """What the stages of a Boltzmann generator share: besides schedule and average, gradients of its likelihood."""

    flow: CoordinateFlow

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
        self.held_out = None if held_out is None else HeldOutLikelihood(held_out, stage.patience)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; raises ConvergenceError where it is not finite."""
        if self.held_out is not None and self.global_step and self.global_step % self.log_interval == 0:
            self.curve.append(
                {"step": float(self.global_step), "held_out_nll": self.held_out.look(self.averaged.module)}
            )
            if self.held_out.finished:
                self.trainer.should_stop = True
        loss = self._loss()
        if not torch.isfinite(loss):
            raise ConvergenceError(
                f"the likelihood of step {self.global_step} is {loss.item()}: lower learning_rate in "
                "[model.training.likelihood], take fewer steps, or give more frames"
            )
        return loss

    def finish(self) -> None:
        """Leave the averaged parameters in the flow: the last ones, or those that were best on held-out frames."""
        super().finish()
        if self.held_out is not None:
            value = self.held_out.look(self.flow)
            self.curve.append({"step": float(self.global_step), "held_out_nll": value})
            self.held_out.restore(self.flow)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the held-out frames said besides the curve."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["held_out"] = None if self.held_out is None else self.held_out.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the held-out frames said besides the curve."""
        super().on_load_checkpoint(checkpoint)
        if self.held_out is not None:
            self.held_out.load_state_dict(checkpoint["held_out"])

    def _loss(self) -> Tensor:
        chosen = self.share(torch.randint(len(self.data.stiff), (self.stage.batch,), generator=self.generator()))
        data = Coordinates(self.data.circular[chosen], self.data.stiff[chosen])
        if self.stage.force_weight == 0.0:
            (loss,), slopes = self.likelihood(*data)
            self.record(nll=float(loss))
            return with_gradients(loss, self.flow, slopes)
        gradient = (self.gradient.circular[chosen], self.gradient.stiff[chosen])
        weight = data.stiff.new_tensor(self.stage.force_weight)
        (likelihood, force), slopes = self.matching(*data, *gradient, weight)
        self.record(nll=float(likelihood), force=float(force))
        return with_gradients(likelihood + weight * force, self.flow, slopes)


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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the (surrogate) loss of one batch."""
        stage, progress = self.stage, self.global_step / self.stage.steps
        late = stage.final_batch is not None and progress >= 1.0 - stage.final_share
        count = stage.final_batch if late and stage.final_batch else stage.batch
        latent = Coordinates(*map(self.share, self.flow.sample_latent(count, self.generator())))
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
            log_weights = self.whole(log_weights)
            self.record(effective_sample_fraction=float(effective_sample_fraction(log_weights)))
            self._follow(log_weights)
            total = total + stage.path_weight * with_gradients(total.detach(), self.flow, slopes)
        if stage.reverse_kl_weight > 0.0:
            total = total + stage.reverse_kl_weight * reverse_kl(self.flow, latent, self.target)
        if stage.likelihood_weight > 0.0:
            generator = self.generator(_LIKELIHOOD_OFFSET)
            chosen = self.share(torch.randint(len(self.data.stiff), (count,), generator=generator))
            data = Coordinates(self.data.circular[chosen], self.data.stiff[chosen])
            (loss,), slopes = self.likelihood(*data)
            total = total + stage.likelihood_weight * with_gradients(loss, self.flow, slopes)
        return total

    def _follow(self, log_weights: Tensor) -> None:
        """Update the running estimate of log Z."""
        usable = log_weights[torch.isfinite(log_weights)]
        estimate = float(torch.logsumexp(usable, 0)) - math.log(len(log_weights))
        old = self.log_normaliser
        memory = _NORMALISER_MEMORY
        self.log_normaliser = estimate if old is None else memory * old + (1.0 - memory) * estimate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the running normaliser besides the curve."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["log_normaliser"] = self.log_normaliser

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the running normaliser besides the curve."""
        super().on_load_checkpoint(checkpoint)
        self.log_normaliser = checkpoint["log_normaliser"]
