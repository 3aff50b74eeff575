"""Private training: the same loop for DP-MAC and DP-SGD, with noise for the budget and a ledger for the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...core.execution.progress import progress_bar
from ...core.model import Model
from ...core.training.objective import Objective, Plan, cosine
from ...core.training.trainer import Trainer
from .budget import PrivacyBudget, Release, noise_multiplier
from .configuration import PrivateTraining
from .learning.clipping import adapted_thresholds, noise_shares, noisy_sums
from .learning.learners import Learner, learner_of
from .ledger import PrivacyLedger, earlier_releases, ledger_of
from .noise import NoiseSource, noise_source
from .units import UnitData, draw_units

Observer = Callable[[int, list[Tensor]], None]
"""Sees the number of a step and its noisy mean contributions: what the guarantee is about."""


@dataclass(frozen=True)
class PrivateResult:
    """The ledger, and what the owner of the data may want to know but should not publish.

    Attributes:
        ledger: also attached to the model.
        non_finite: contributions that were NaN or infinite and counted as zero.
        smallest_batch: units drawn in the smallest batch.
        thresholds: clipping norms at the end.
    """

    ledger: PrivacyLedger
    non_finite: int
    smallest_batch: int
    thresholds: list[float]


def train_privately(
    model: Model,
    data: UnitData,
    budget: PrivacyBudget,
    settings: PrivateTraining,
    *,
    learner: Learner | None = None,
    before: Sequence[Release] = (),
    seed: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_interval: int = 100,
    show_progress: bool = False,
) -> PrivateResult:
    """Train a model within a budget, and attach the ledger to it.

    Everything on the model's ledger so far, and ``before``, counts against the budget too. Initial parameters and settings are
    not covered: choose them on public data. No loss is computed, since it would be one more answer about the data.

    Args:
        model: a :class:`.FeedForwardNetwork`, or any potential with a ``learner``; changed in place.
        data: with its units.
        budget: for all releases together.
        settings: method and schedule.
        learner: how units contribute; by default that of a feed-forward network or a force field.
        before: releases of private statistics of the same data.
        seed: None for cryptographic sampling and noise; a number for repeatable ones, which the ledger tells.
        checkpoint: file to continue from, written every ``checkpoint_interval`` steps and removed at the end. Steps that were
            lost with an interruption are not on the ledger: nobody saw them.
        checkpoint_interval: in steps.
        show_progress: show a bar on a terminal.

    Raises:
        ConfigurationError: for budgets that are used up or do not fit, too few units, layers that mix samples, another
            configuration than the checkpoint's.
    """
    objective = PrivateObjective(model, data, budget, settings, learner, before, noise_source(seed, "training"))
    trainer = Trainer(objective)
    with progress_bar("private training", settings.steps, show_progress) as bar:
        for done in trainer.steps(checkpoint, checkpoint_interval):
            bar.update(done)
    trainer.finish()
    result = objective.result()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


class PrivateObjective(Objective):
    """Noisy gradients of one training of :func:`train_privately`.

    Args:
        model: to train.
        data: with its units.
        budget: for all releases together.
        settings: method and schedule.
        learner: how units contribute; None for that of a feed-forward network or a force field.
        before: earlier releases.
        noise: source of randomness.
        observer: sees every noisy answer; for audits.
        sampling_rate: of units; ``batch / units`` by default.
    """

    def __init__(
        self,
        model: Model,
        data: UnitData,
        budget: PrivacyBudget,
        settings: PrivateTraining,
        learner: Learner | None,
        before: Sequence[Release],
        noise: NoiseSource,
        observer: Observer | None = None,
        sampling_rate: float | None = None,
    ) -> None:
        if settings.batch > data.units:
            raise ConfigurationError(
                f"batches of {settings.batch} units cannot be drawn from {data.units} ({data.unit}): take a smaller batch"
            )
        self._model, self._data, self._budget, self._training = model, data, budget, settings
        self.learner = learner if learner is not None else learner_of(model, data, settings)
        if self.learner.method != settings.method:
            raise ConfigurationError(
                f"the settings, and so the ledger, say {settings.method}, but the learner trains by "
                f"{self.learner.method}: make them agree"
            )
        # Processes of torchrun train for themselves: a mean of their answers would have less noise than the ledger says.
        steps, parameters = settings.steps, self.learner.parameters
        plan = Plan(
            steps, settings.learning_rate,
            schedule=lambda step: cosine(1.0, settings.final_learning_rate, step, steps - 1),
            decay=(lambda count: min(settings.average, (count + 1.0) / (count + 11.0))) if settings.average else None,
        )  # fmt: skip
        super().__init__(nn.ParameterList(parameters), plan, parameters=parameters)
        self.noise = noise
        self._observer = observer
        self._before = earlier_releases(ledger_of(model), before, data.unit, data.units, budget)
        self._rate = settings.batch / data.units if sampling_rate is None else sampling_rate
        self.multiplier = noise_multiplier(budget, self._rate, settings.steps, self._before, settings.method)
        self.thresholds = _thresholds(settings.clip, self.learner.blocks)
        self._shares = noise_shares(len(self.learner.blocks), settings.adaptive_quantile is not None)
        self._offset = sum(release.steps for release in self._before)
        self._non_finite, self._smallest = 0, data.units

    def losses(self, generator: torch.Generator) -> Iterator[None]:
        """Draw units, release one noisy answer, and leave it as the gradient; the noise has a source of its own."""
        settings = self._training
        self.noise.begin(self._offset + self.step)
        batch = self._data.batch(draw_units(self._data.units, self._rate, self.noise), self.noise)
        contributions = self.learner.contributions(batch, self.thresholds)
        self._non_finite += contributions.non_finite
        self._smallest = min(self._smallest, batch.units)
        share, count_share = self._shares
        noisy = noisy_sums(contributions, self.thresholds, share, self.multiplier, self.noise)
        means = [total / settings.batch for total in noisy]
        if settings.adaptive_quantile is not None:
            self.thresholds = adapted_thresholds(
                contributions, self.thresholds, batch.units, settings.batch, settings.adaptive_quantile,
                settings.adaptive_rate, count_share, self.multiplier, self.noise,
            )  # fmt: skip
        if self._observer is not None:
            self._observer(self.step, means)
        self.learner.assign(means, settings.damping)
        yield None

    def result(self) -> PrivateResult:
        """Attach the ledger to the model."""
        if self.step != self.plan.steps:
            raise ConfigurationError(f"training is at step {self.step} of {self.plan.steps}: it is not finished")
        for parameter in self.learner.parameters:
            parameter.grad = None
        ledger = PrivacyLedger.of([*self._before, self._release()], self._budget, self._data.unit, self._data.units)
        ledger.attach(self._model)
        return PrivateResult(ledger, self._non_finite, self._smallest, self.thresholds)

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds and what is counted."""
        return {"thresholds": self.thresholds, "non_finite": self._non_finite, "smallest": self._smallest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.thresholds = [float(value) for value in state["thresholds"]]
        self._non_finite, self._smallest = int(state["non_finite"]), int(state["smallest"])

    def identity(self) -> dict[str, Any]:
        """Return what the guarantee depends on."""
        return {
            "budget": self._budget.model_dump(mode="json"),
            "settings": self._training.model_dump(mode="json"),
            "units": [self._data.unit, self._data.units],
            "noise": self.noise.kind,
            "seed": getattr(self.noise, "seed", None),
            "before": [release.model_dump(mode="json") for release in self._before],
        }

    def refusal(self, changes: str) -> str:
        """Say that steps which somebody saw stay spent."""
        return (
            f"holds a training with another guarantee ({changes}). What was spent cannot be taken back: continue it as it was, "
            "or remove the file to start again, and count its steps if anybody saw its model"
        )

    def _release(self) -> Release:
        adaptive = self._training.adaptive_quantile
        blocks = self.learner.blocks
        clipping: dict[str, Any] = dict(zip(blocks, _thresholds(self._training.clip, blocks), strict=True))
        if adaptive is not None:
            clipping = {"start": clipping, "adaptive_quantile": adaptive}
        return Release(
            mechanism=self._training.method, noise_multiplier=self.multiplier, sampling_rate=self._rate,
            steps=self._training.steps, clipping=clipping, noise=self.noise.kind,
        )  # fmt: skip


def _thresholds(clip: float | tuple[float, ...], blocks: Sequence[str]) -> list[float]:
    if isinstance(clip, tuple):
        if len(clip) != len(blocks):
            raise ConfigurationError(f"clip has {len(clip)} norms for the {len(blocks)} blocks {', '.join(blocks)}")
        return list(clip)
    return [clip] * len(blocks)
