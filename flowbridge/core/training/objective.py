"""What a method brings to the training loop: a loss, what is trained by which optimiser, and what else its state consists of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .processes import Processes
from .streams import random_stream


class Objective:
    """What a method brings to :class:`~flowbridge.core.training.trainer.Trainer`.

    A subclass gives :meth:`loss` (or :meth:`losses`) and :meth:`optimiser`, and overrides what differs from the defaults.

    Args:
        module: trained in place.
        steps: of the training.
        seed: random seed; the stream of a step depends on it and the step's number alone.
        log_interval: steps between points of the training curve, and between evaluations on held-out data.

    Attributes:
        step: number of steps done, which is the number of the current one.
        curve: points ``{"step": ..., name: value, ...}`` of :meth:`record` and of evaluations on held-out data.
        latest: the values recorded last, for the progress bar.
        processes: that train together; one where each process trains for itself.
        decay: of the averaged parameters, by the number of their updates so far; None where there are none. The averages start
            from the parameters as they are.
        patience: see :class:`~flowbridge.core.training.held_out.HeldOutTracker`.
        evaluates_start: whether the parameters are evaluated on held-out data before the first step, too.
        held_out_name: of these evaluations in the curve.
        advice: what to do when the training diverges.
    """

    decay: Callable[[int], float] | None = None
    patience = 0
    evaluates_start = False
    held_out_name = "held_out"
    advice = "Lower the learning rates"

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        seed: int = 0,
        log_interval: int = 1,
        processes: Processes | None = None,
    ) -> None:
        self.module = module
        self.steps, self.seed, self.log_interval = steps, seed, log_interval
        self.processes = processes or Processes()
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}

    def stream(self, offset: int = 0) -> torch.Generator:
        """Return the random stream of the current step; offsets separate streams that are used for different things."""
        return random_stream(self.seed, self.step, offset)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of the current step, differentiable by the parameters.

        Args:
            generator: the random stream of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def losses(self, generator: torch.Generator) -> Iterator[Tensor | None]:
        """Yield the losses of the current step, one as a rule; an optimiser step follows each before the next is asked for.

        Where the parameters have their gradients already, None is yielded instead.
        """
        yield self.loss(generator)

    def optimiser(self) -> torch.optim.Optimizer:
        """Return the optimiser, with the largest learning rate of each of its groups."""
        raise NotImplementedError(f"{type(self).__name__} defines no optimiser")

    def schedule(self, step: int) -> float:
        """Return the factor of the learning rates in a step."""
        return 1.0

    def gradient_clip(self) -> float:
        """Return the largest norm of the gradient of a parameter group in the current step."""
        return math.inf

    def begin(self, optimiser: torch.optim.Optimizer) -> None:
        """Do what has to be done with a new optimiser, before states are restored."""

    def begin_step(self, optimiser: torch.optim.Optimizer) -> None:
        """Do what has to be done before the losses of the current step."""

    def after_update(self) -> None:
        """Change the parameters as each optimiser step requires."""

    def after_average(self, averaged: nn.Module) -> None:
        """Change the averaged parameters as each of their updates requires."""

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return the loss of held-out data under a copy of the module; None where there are no such data."""
        return None

    def finish(self) -> None:
        """Complete the training: the module holds the parameters that are kept."""

    def record(self, **values: float) -> None:
        """Give values of the current step to the progress bar, and every ``log_interval`` steps to the curve."""
        self.latest = values
        if self.step % self.log_interval == 0:
            self.curve.append({"step": float(self.step), **values})

    def identity(self) -> dict[str, Any]:
        """Return, as plain data, what must not change between the beginning and the end of a training."""
        return {"training": type(self).__name__, "seed": self.seed}

    def refusal(self, changes: str) -> str:
        """Return what is wrong with a checkpoint of another identity, and what to do."""
        return f"is the checkpoint of a training with other settings ({changes}): choose another folder, or remove it to begin anew"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides step, curve, module, averages and optimiser: tensors and plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class StageSchedule(Protocol):
    """Steps, learning rates, decay of the average, and the largest norm of a gradient."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""

    @property
    def learning_rate(self) -> float:
        """Peak of the cosine schedule."""

    @property
    def final_learning_rate(self) -> float:
        """Its end."""

    @property
    def average(self) -> float:
        """Decay of the exponential moving average of the parameters."""

    @property
    def gradient_clip(self) -> float:
        """Largest norm of the gradient."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the schedule as plain data."""


class StageObjective(Objective):
    """What stages of a cosine schedule share: Adam, averaged parameters, shares of a batch for each process.

    Args:
        module: trained in place.
        stage: its schedule.
        seed: random seed of the batches.
        log_interval: steps between points of the training curve.
    """

    advice = "Lower the learning rate of this stage, train longer by likelihood first, or give more frames"

    def __init__(self, module: nn.Module, stage: StageSchedule, seed: int, log_interval: int) -> None:
        super().__init__(module, stage.steps, seed, log_interval, Processes.of_this_training())
        self.stage = stage
        self.decay = warming_up(stage.average)
        self.patience = int(getattr(stage, "patience", 0))

    def optimiser(self) -> torch.optim.Optimizer:
        """Return Adam."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.stage.learning_rate, betas=(0.9, 0.99), fused=True)

    def schedule(self, step: int) -> float:
        """Return the factor of a cosine schedule."""
        peak = self.stage.learning_rate
        return cosine(peak, self.stage.final_learning_rate, step, self.steps) / peak

    def gradient_clip(self) -> float:
        """Return that of the stage."""
        return self.stage.gradient_clip

    def identity(self) -> dict[str, Any]:
        """Return the stage besides."""
        return {**super().identity(), "stage": self.stage.model_dump(mode="json")}


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Return the value of a cosine schedule from ``start`` at step 0 to ``end`` at ``steps``."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def warming_up(decay: float) -> Callable[[int], float]:
    """Return the decay of an exponential moving average that starts fast: the first steps are forgotten early."""
    return lambda count: min(decay, (1.0 + count) / (10.0 + count)) if count else 0.0
