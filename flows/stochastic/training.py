"""Training of stochastic flows by their path losses, in stages, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.training.objective import Objective, Plan
from ...core.training.trainer import Trainer
from .stochastic_flow import StochasticFlow, path_kullback_leibler, path_likelihood


@dataclass(frozen=True)
class PathStage:
    """One stage: ``likelihood_weight J_ML + kullback_leibler_weight J_KL``, minimised by Adam.

    Attributes:
        steps: optimiser steps.
        batch: paths a step, of each loss.
        learning_rate: of Adam.
        likelihood_weight: of the loss of data.
        kullback_leibler_weight: of the loss of the flow's own paths.
        gradient_norm: larger gradients are shortened to it; None: never.
    """

    steps: int
    batch: int
    learning_rate: float = 1e-3
    likelihood_weight: float = 1.0
    kullback_leibler_weight: float = 0.0
    gradient_norm: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.learning_rate > 0.0:
            raise ConfigurationError(f"steps, batch and learning_rate must be positive, got {self}")
        weights = (self.likelihood_weight, self.kullback_leibler_weight)
        if min(weights) < 0.0 or max(weights) == 0.0:
            raise ConfigurationError(f"the weights of the losses must not be negative or both zero, got {weights}")


def train_paths(
    flow: StochasticFlow,
    data: Tensor | None,
    stages: Sequence[PathStage],
    seed: int,
    *,
    checkpoint: Path | None = None,
    checkpoint_interval: int = 100,
    report: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train in place and return the loss of each step.

    Random numbers of a step depend on the seed and its number only, so a run that was interrupted goes on from its checkpoint
    to the same numbers.

    Args:
        flow: the flow.
        data: configurations ``(F, D)``; None where no stage has a likelihood.
        stages: one after the other; each begins with a fresh Adam.
        seed: of batches and paths.
        checkpoint: a file that is written on the way and read at the start if it is there; None for none.
        checkpoint_interval: steps between checkpoints.
        report: called after each step with its number, from 0 over all stages, and its loss.

    Raises:
        NonFiniteEnergyError: when a loss is not finite.
        ModelFileError: when the checkpoint belongs to something else.
    """
    if data is None and any(stage.likelihood_weight for stage in stages):
        raise ConfigurationError("a stage with a likelihood needs data: give some, or set its likelihood_weight to 0")
    ends = list(accumulate(stage.steps for stage in stages))

    def stage_of(step: int) -> PathStage:
        return next(stage for stage, end in zip(stages, ends, strict=True) if step < end)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        stage, total = stage_of(step), torch.zeros(())
        if stage.likelihood_weight and data is not None:
            chosen = torch.randint(len(data), (stage.batch,), generator=generator)
            total = total + stage.likelihood_weight * path_likelihood(flow, data[chosen], generator)
        if stage.kullback_leibler_weight:
            total = total + stage.kullback_leibler_weight * path_kullback_leibler(flow, stage.batch, generator)
        return total

    plan = Plan(
        max(ends, default=0), 1.0, schedule=lambda step: stage_of(step).learning_rate,
        gradient_clip=lambda step: stage_of(step).gradient_norm or math.inf, restarts=frozenset(ends),
    )  # fmt: skip
    settings = [asdict(stage) for stage in stages]
    objective = Objective(flow, plan, seed, loss=loss, settings=settings, name="paths")
    for done in Trainer(objective).steps(checkpoint, checkpoint_interval):
        if report is not None:
            report(done - 1, objective.latest["loss"])
    return [point["loss"] for point in objective.curve]
