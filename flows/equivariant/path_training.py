"""Path gradients of a continuous flow on samples of its target: likelihood training without noise at the optimum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ...core.errors import ConvergenceError
from ...core.training.objective import CosineStage, StageObjective
from .continuous_flow import ContinuousFlow
from .fields.compiled_field import compiled
from .ordinary_equations import carried, carried_with_gradient, displaced_times

ReducedEnergy = Callable[[Tensor], Tensor]
"""Energies ``(B,)`` in kT of reduced positions ``(B, N, D)``, differentiable: minus the logarithm of the target density."""


class PathGradientStage(CosineStage):
    """Path gradients of the divergence of the flow from the target, on samples of the target.

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: samples a step.
        solver_steps: of the Runge-Kutta rule to the prior; one of them is cut in two at random.
        outlier: longest pull on a sample, in medians of the batch.
    """

    steps: PositiveInt = 500
    batch: PositiveInt = 128
    solver_steps: PositiveInt = 6
    outlier: PositiveFloat = 5.0
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate: PositiveFloat = 1e-5
    average: float = Field(default=0.98, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 20.0


class PathGradientTraining(StageObjective):
    """Minimises ``KL(target | flow)`` by its path gradient (L. Vaitl et al., ICLR 2024, arXiv 2403.15881).

    The divergence is that of samples x carried back to ``z = T^-1(x)`` from the prior. With ``delta = grad_z [log p(z) -
    log prior(z)]``, where ``log p(z) = -u(T(z)) + integral of the divergence`` is the target carried back, parameters held,
    its gradient is the mean of ``delta . dz/dtheta``. Where the flow is right delta vanishes, sample by sample: nothing is left
    that a finite set of samples could be overfitted by, and forces say more about each than its place alone.

    The gradient of ``log p`` is carried along with the samples, which costs less than to carry them forth again and is no less
    exact at the same steps. They have to be short: an error of delta that all samples share moves the flow, and their mean,
    which is all that it has to be small next to, is a few hundredths of each (measured for LJ13 in docs/results.md).

    Args:
        flow: trained in place.
        stage: schedule.
        samples: ``(S, N, D)`` of the target in reduced lengths, without their centres, in the flow's dtype.
        energy: of the target.
        seed: of batches.
        log_interval: steps between points of the training curve.
        compilation: of the field.
    """

    stage: PathGradientStage
    module: ContinuousFlow

    def __init__(
        self,
        flow: ContinuousFlow,
        stage: PathGradientStage,
        samples: Tensor,
        energy: ReducedEnergy,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(flow, stage, seed, log_interval)
        self.samples, self.energy = samples, energy
        self.field = compiled(flow.field, compilation)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return a number whose gradient is the path gradient of one batch; ConvergenceError where it is not finite."""
        chosen = self.processes.share(torch.randint(len(self.samples), (self.stage.batch,), generator=generator))
        times = displaced_times(self.stage.solver_steps, generator)
        latent = carried(self.field, self.samples[chosen], times[::-1])
        delta = self._delta(self.samples[chosen], times)
        size = delta.square().sum((1, 2)).sqrt()
        sizes = self.processes.whole(size)
        if not torch.isfinite(sizes).all():
            raise ConvergenceError(
                f"step {self.step}: samples that were carried to the prior and back have no finite force. Lower the "
                "learning rate, train longer by likelihood first, or take more solver steps"
            )
        limit = self.stage.outlier * sizes.median()
        delta = delta * (limit / size.clamp_min(1e-30)).clamp(max=1.0)[:, None, None]
        self.record(pull=float(sizes.median()))
        return (delta * latent).sum((1, 2)).mean()

    def _delta(self, samples: Tensor, times: list[float]) -> Tensor:
        """Return the gradient ``(B, N, D)`` of the log-ratio of the target carried back and the prior."""
        pull = _gradient(lambda x: -self.energy(x), samples)
        latent, carried_back = carried_with_gradient(self.field, samples, pull, times[::-1])
        delta = carried_back - _gradient(self.module.prior.log_prob, latent)
        return delta - delta.mean(1, keepdim=True)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return gradient
