"""What a method brings to the training loop: what is trained, its loss, its schedule, and what else belongs to its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..configuration import StrictModel
from .processes import Processes
from .streams import random_stream


@dataclass(frozen=True)
class Plan:
    """How long and by which numbers of Adam a module is trained.

    Attributes:
        steps: of the training.
        learning_rate: largest.
        betas: of Adam.
        fused: whether Adam is the fused one, which rounds differently.
        schedule: factor of the learning rates, by the number of the step.
        gradient_clip: largest norm of the gradient of a parameter group, by the number of the step.
        restarts: steps before which Adam forgets what it knows.
        decay: of the averaged parameters, by the number of their updates so far; None where there are none. The averages start
            from the parameters as they are.
        patience: see :class:`~flowbridge.core.training.held_out.HeldOutTracker`.
    """

    steps: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = False
    schedule: Callable[[int], float] = lambda step: 1.0
    gradient_clip: Callable[[int], float] = lambda step: math.inf
    restarts: frozenset[int] = frozenset()
    decay: Callable[[int], float] | None = None
    patience: int = 0


class Objective:
    """What a method brings to :class:`~flowbridge.core.training.trainer.Trainer`: functions, or a subclass with methods.

    Args:
        module: trained in place.
        plan: steps, learning rates, averages.
        seed: random seed; the stream of a step depends on it and the step's number alone.
        log_interval: steps between points of the training curve.
        evaluation_interval: steps between evaluations on held-out data, ``log_interval`` where None.
        loss: ``(step, generator) -> loss``, where a subclass has no method for it.
        held_out_loss: of a copy of the module, likewise.
        parameters: groups for Adam, where not all that require gradients are one.
        settings: plain data that must not change between the beginning and the end of a training.
        name: in messages; that of the class where None.
        processes: that train together; None where each trains for itself.

    Attributes:
        step: number of steps done, which is the number of the current one.
        curve: points ``{"step": ..., name: value, ...}`` of :meth:`record` and of evaluations on held-out data.
        latest: the values recorded last, for the progress bar.
        evaluates_start: whether the parameters are evaluated on held-out data before the first step, too.
        held_out_name: of these evaluations in the curve.
        recorded: name under which losses are recorded; None where the objective records values itself.
        loss_name: of the loss, in messages.
        loss_advice: what to do when a loss is not finite; None where it is the gradient alone that tells.
        advice: what to do when a gradient is not finite.
    """

    evaluates_start = False
    held_out_name = "held_out"
    recorded: str | None = None
    loss_name = "loss"
    loss_advice: str | None = None
    advice = "Lower the learning rates"

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        seed: int = 0,
        log_interval: int = 1,
        *,
        evaluation_interval: int | None = None,
        loss: Callable[[int, torch.Generator], Tensor] | None = None,
        held_out_loss: Callable[[Any], float | Tensor] | None = None,
        parameters: Sequence[Any] | None = None,
        settings: Any = None,
        name: str | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.module, self.plan, self.seed, self.log_interval = module, plan, seed, log_interval
        self.evaluation_interval = evaluation_interval or log_interval
        self._loss_function, self._held_out_function = loss, held_out_loss
        if loss is not None:
            self.recorded = "loss"
        self.parameters = parameters or [one for one in module.parameters() if one.requires_grad]
        self._settings, self.name = settings, name or type(self).__name__
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
        if self._loss_function is None:
            raise NotImplementedError(f"{self.name} has no loss")
        return self._loss_function(self.step, generator)

    def losses(self, generator: torch.Generator) -> Iterator[Tensor | None]:
        """Yield the losses of the current step, one as a rule; an optimiser step follows each before the next is asked for.

        Where the parameters have their gradients already, None is yielded instead.
        """
        yield self.loss(generator)

    def begin(self, optimiser: torch.optim.Optimizer) -> None:
        """Do what has to be done with a new optimiser, before states are restored."""

    def after_update(self) -> None:
        """Change the parameters as each optimiser step requires."""

    def after_average(self, averaged: nn.Module) -> None:
        """Change the averaged parameters as each of their updates requires."""

    def held_out_loss(self, module: nn.Module) -> float | None:
        """Return the loss of held-out data under a copy of the module; None where there are no such data."""
        if self._held_out_function is None:
            return None
        with torch.no_grad():
            return float(self._held_out_function(module))

    def finish(self) -> None:
        """Complete the training: the module holds the parameters that are kept."""

    def record(self, **values: float) -> None:
        """Give values of the current step to the progress bar, and every ``log_interval`` steps to the curve."""
        self.latest = values
        if self.step % self.log_interval == 0:
            self.curve.append({"step": float(self.step), **values})

    def identity(self) -> dict[str, Any]:
        """Return, as plain data, what must not change between the beginning and the end of a training."""
        return {"training": self.name, "seed": self.seed, "settings": self._settings}

    def refusal(self, changes: str) -> str:
        """Return what is wrong with a checkpoint of another identity, and what to do."""
        return (
            f"is the checkpoint of a training with other settings ({changes}): continue it with those, choose another folder, "
            "or remove it to start again"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides step, curve, module, averages and optimiser: tensors and plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class CosineStage(StrictModel):
    """One stage of training, with a cosine schedule.

    Attributes:
        steps: optimiser steps.
        batch: samples a step.
        learning_rate: peak of the cosine schedule.
        final_learning_rate: its end.
        average: decay of the exponential moving average of the parameters.
        gradient_clip: largest norm of the gradient.
    """

    steps: NonNegativeInt
    batch: PositiveInt
    learning_rate: PositiveFloat
    final_learning_rate: PositiveFloat
    average: float = Field(ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat


class StageObjective(Objective):
    """A stage with a cosine schedule, averaged parameters, and shares of its batches for each process.

    Args:
        module: trained in place.
        stage: its schedule; its ``patience`` is used where it has one.
        seed: random seed of the batches.
        log_interval: steps between points of the training curve.
    """

    advice = "Lower the learning rate of this stage, train longer by likelihood first, or give more frames"

    def __init__(self, module: nn.Module, stage: CosineStage, seed: int, log_interval: int) -> None:
        peak, end = stage.learning_rate, stage.final_learning_rate
        plan = Plan(
            stage.steps, peak, (0.9, 0.99), True, lambda step: cosine(peak, end, step, stage.steps) / peak,
            lambda step: stage.gradient_clip, decay=warming_up(stage.average), patience=getattr(stage, "patience", 0),
        )  # fmt: skip
        settings, processes = stage.model_dump(mode="json"), Processes.of_this_training()
        super().__init__(module, plan, seed, log_interval, settings=settings, processes=processes)
        self.stage = stage


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Return the value of a cosine schedule from ``start`` at step 0 to ``end`` at ``steps``."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def warming_up(decay: float) -> Callable[[int], float]:
    """Return the decay of an exponential moving average that starts fast: the first steps are forgotten early."""
    return lambda count: min(decay, (1.0 + count) / (10.0 + count)) if count else 0.0
