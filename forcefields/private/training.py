"""Private training: the same loop for DP-MAC and DP-SGD, with noise for the budget and a ledger for the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...core.model import Model
from ...flows.boltzmann.training.checkpoint_files import load_checkpoint, save_checkpoint
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
    progress: Callable[[range], Any] = iter,
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
        progress: wraps the range of steps to show a bar.

    Raises:
        ConfigurationError: for budgets that are used up or do not fit, too few units, layers that mix samples, another
            configuration than the checkpoint's.
    """
    trainer = PrivateTrainer(model, data, budget, settings, learner, before, noise_source(seed, "training"))
    if checkpoint is not None and checkpoint.is_file():
        trainer.resume(checkpoint)
    for _ in progress(range(trainer.step, settings.steps)):
        trainer.advance()
        if checkpoint is not None and trainer.step % checkpoint_interval == 0 and trainer.step < settings.steps:
            trainer.save(checkpoint)
    result = trainer.finish()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


class PrivateTrainer:
    """The loop of :func:`train_privately`, step by step; arguments as there.

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
        self._model, self._data, self._budget, self._settings = model, data, budget, settings
        self.learner = learner if learner is not None else learner_of(model, data, settings)
        if self.learner.method != settings.method:
            raise ConfigurationError(
                f"the settings, and so the ledger, say {settings.method}, but the learner trains by "
                f"{self.learner.method}: make them agree"
            )
        self.noise = noise
        self._observer = observer
        self._before = earlier_releases(ledger_of(model), before, data.unit, data.units, budget)
        self._rate = settings.batch / data.units if sampling_rate is None else sampling_rate
        self.multiplier = noise_multiplier(budget, self._rate, settings.steps, self._before, settings.method)
        self.thresholds = _thresholds(settings.clip, self.learner.blocks)
        self._shares = noise_shares(len(self.learner.blocks), settings.adaptive_quantile is not None)
        self._optimiser = torch.optim.Adam(self.learner.parameters, lr=settings.learning_rate)
        self._offset = sum(release.steps for release in self._before)
        self._average = [p.detach().clone() for p in self.learner.parameters] if settings.average else []
        self.step, self._non_finite, self._smallest = 0, 0, data.units

    def advance(self) -> None:
        """Draw units, release one noisy answer, and learn from it."""
        settings = self._settings
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
        for group in self._optimiser.param_groups:
            group["lr"] = settings.learning_rate * self._fade()
        self._optimiser.step()
        self.step += 1
        for kept, parameter in zip(self._average, self.learner.parameters, strict=False):
            kept.lerp_(parameter.detach(), 1.0 - min(settings.average, self.step / (self.step + 10.0)))

    def finish(self) -> PrivateResult:
        """Leave the trained parameters and the ledger in the model."""
        if self.step != self._settings.steps:
            raise ConfigurationError(f"training is at step {self.step} of {self._settings.steps}: it is not finished")
        with torch.no_grad():
            for kept, parameter in zip(self._average, self.learner.parameters, strict=False):
                parameter.copy_(kept)
        for parameter in self.learner.parameters:
            parameter.grad = None
        ledger = PrivacyLedger.of([*self._before, self._release()], self._budget, self._data.unit, self._data.units)
        ledger.attach(self._model)
        return PrivateResult(ledger, self._non_finite, self._smallest, self.thresholds)

    def save(self, path: Path) -> None:
        """Write a checkpoint. It belongs to the owner of the data: a model for others comes from :meth:`finish`."""
        state = {
            "identity": self._identity(), "step": self.step, "thresholds": self.thresholds, "non_finite": self._non_finite,
            "smallest": self._smallest,
        }  # fmt: skip
        save_checkpoint(path, _Trained(self.learner.parameters, self._average), self._optimiser, state)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same training.

        Raises:
            ConfigurationError: when budget, settings, units, noise or earlier releases are others.
        """
        trained = _Trained(self.learner.parameters, self._average)
        state = load_checkpoint(path, trained, self._optimiser)
        theirs, ours = json.loads(state["identity"]), json.loads(self._identity())
        changed = [
            f"{name} {theirs.get(name)} there, {ours[name]} now" for name in ours if theirs.get(name) != ours[name]
        ]
        if changed:
            raise ConfigurationError(
                f"{path}: holds a training with another guarantee ({'; '.join(changed)}). What was spent cannot be taken back: "
                "continue it as it was, or remove the file to start anew, and count its steps if anybody saw its model"
            )
        with torch.no_grad():
            for kept, stored in zip(self._average, trained.averages, strict=False):
                kept.copy_(stored)
        self.step, self.thresholds = int(state["step"]), [float(value) for value in state["thresholds"]]
        self._non_finite, self._smallest = int(state["non_finite"]), int(state["smallest"])

    def _fade(self) -> float:
        done = self.step / max(self._settings.steps - 1, 1)
        final = self._settings.final_learning_rate
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    def _release(self) -> Release:
        adaptive = self._settings.adaptive_quantile
        blocks = self.learner.blocks
        clipping: dict[str, Any] = dict(zip(blocks, _thresholds(self._settings.clip, blocks), strict=True))
        if adaptive is not None:
            clipping = {"start": clipping, "adaptive_quantile": adaptive}
        return Release(
            mechanism=self._settings.method, noise_multiplier=self.multiplier, sampling_rate=self._rate,
            steps=self._settings.steps, clipping=clipping, noise=self.noise.kind,
        )  # fmt: skip

    def _identity(self) -> str:
        """Return what must not change between the beginning and the end of a training."""
        return json.dumps(
            {
                "budget": self._budget.model_dump(mode="json"),
                "settings": self._settings.model_dump(mode="json"),
                "units": [self._data.unit, self._data.units],
                "noise": self.noise.kind,
                "seed": getattr(self.noise, "seed", None),
                "before": [release.model_dump(mode="json") for release in self._before],
            }
        )


class _Trained(nn.Module):
    """Parameters and their averages under plain names, for checkpoints."""

    def __init__(self, parameters: list[nn.Parameter], averages: list[Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList(parameters)
        self._count = len(averages)
        for number, average in enumerate(averages):
            self.register_buffer(f"average_{number}", average)

    @property
    def averages(self) -> list[Tensor]:
        """In the order of the parameters."""
        return [getattr(self, f"average_{number}") for number in range(self._count)]


def _thresholds(clip: float | tuple[float, ...], blocks: Sequence[str]) -> list[float]:
    if isinstance(clip, tuple):
        if len(clip) != len(blocks):
            raise ConfigurationError(f"clip has {len(clip)} norms for the {len(blocks)} blocks {', '.join(blocks)}")
        return list(clip)
    return [clip] * len(blocks)
