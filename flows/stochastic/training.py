"""Training of stochastic flows by their path losses, in stages, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.training.objective import Objective
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
    objective = PathObjective(flow, data, stages, seed)
    trainer = Trainer(objective)
    for done in trainer.steps(checkpoint, checkpoint_interval):
        if report is not None:
            report(done - 1, objective.curve[-1]["loss"])
    trainer.finish()
    return [point["loss"] for point in objective.curve]


class PathObjective(Objective):
    """The path losses of several stages; each begins with a fresh Adam. Arguments as for :func:`train_paths`."""

    module: StochasticFlow

    def __init__(self, flow: StochasticFlow, data: Tensor | None, stages: Sequence[PathStage], seed: int) -> None:
        self.data, self.stages = data, tuple(stages)
        self._ends = list(accumulate(stage.steps for stage in self.stages))
        super().__init__(flow, self._ends[-1] if self._ends else 0, seed)

    def _stage(self, step: int) -> PathStage:
        return next(stage for stage, end in zip(self.stages, self._ends, strict=True) if step < end)

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam, whose learning rates come from the schedule."""
        return torch.optim.Adam(self.module.parameters(), lr=1.0)

    def schedule(self, step: int) -> float:
        """Return the learning rate of the step's stage."""
        return self._stage(step).learning_rate

    def gradient_clip(self) -> float:
        """Return that of the current stage."""
        limit = self._stage(self.step).gradient_norm
        return math.inf if limit is None else limit

    def begin_step(self, optimiser: torch.optim.Optimizer) -> None:
        """Let the optimiser forget at the beginning of a stage what it learned in the one before."""
        if self.step in self._ends:
            optimiser.state.clear()

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the weighted sum of the losses of the current stage."""
        stage, total = self._stage(self.step), torch.zeros(())
        if stage.likelihood_weight and self.data is not None:
            chosen = torch.randint(len(self.data), (stage.batch,), generator=generator)
            total = total + stage.likelihood_weight * path_likelihood(self.module, self.data[chosen], generator)
        if stage.kullback_leibler_weight:
            total = total + stage.kullback_leibler_weight * path_kullback_leibler(self.module, stage.batch, generator)
        self.record(loss=float(total.detach()))
        return total

    def identity(self) -> dict[str, Any]:
        """Return the stages besides."""
        return {**super().identity(), "stages": [asdict(stage) for stage in self.stages]}
