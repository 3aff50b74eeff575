"""Audits: a membership-inference attack gives a lower bound of the epsilon of a training.

A canary is one unit made to stand out. Trainings with and without it are told apart by a score; by the hypothesis-testing view
of differential privacy (Kairouz, Oh and Viswanath, arXiv 1311.0776) every attack with true and false positive rates t and f has

    t <= exp(epsilon) f + delta   and   1 - f <= exp(epsilon) (1 - t) + delta,

so rates bounded by Clopper and Pearson's interval bound epsilon from below. A bound above the epsilon on the ledger proves the
ledger wrong, up to the confidence; one below proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.stats import beta
from torch import Tensor

from ...core.errors import ConfigurationError
from ...core.model import Model
from ...core.training.trainer import Trainer
from .budget import PrivacyBudget
from .configuration import PrivateTraining
from .learning.learners import Learner
from .noise import NoiseSource, SeededNoise
from .training import PrivateObjective
from .units import UnitData

_FEWEST = 20


@dataclass(frozen=True)
class AuditResult:
    """Result of an attack.

    Attributes:
        epsilon_lower: lower bound of epsilon at the confidence asked for; 0 where the attack found nothing.
        true_positives: trainings with the canary that the attack recognised, of ``trials``.
        false_positives: trainings without it that the attack mistook, of ``trials``.
        trials: trainings of each kind, without those that the threshold was chosen on.
    """

    epsilon_lower: float
    true_positives: int
    false_positives: int
    trials: int


def epsilon_lower_bound(
    true_positives: int, false_positives: int, trials: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the epsilon that rates of an attack prove, by Clopper and Pearson's bounds of both rates together.

    Args:
        true_positives: number among ``trials`` with the canary.
        false_positives: number among ``trials`` without.
        trials: trainings of each kind.
        delta: delta of the guarantee.
        confidence: probability that the bound holds.
    """
    risk = (1.0 - confidence) / 2.0  # shared by the two rates
    true_low = float(beta.ppf(risk, true_positives, trials - true_positives + 1)) if true_positives else 0.0
    missed = trials - false_positives
    false_high = float(beta.ppf(1.0 - risk, false_positives + 1, missed)) if missed else 1.0
    ratios = [(true_low - delta, false_high), (1.0 - false_high - delta, 1.0 - true_low)]
    return max(0.0, *(math.log(above / below) for above, below in ratios if above > 0.0 and below > 0.0))


def audit_scores(with_canary: Tensor, without: Tensor, delta: float, confidence: float = 0.95) -> AuditResult:
    """Return the bound from scores ``(T,)`` of independent trainings with and without the canary.

    The threshold is chosen on the first half of either and evaluated on the second, so that the choice costs no confidence.

    Raises:
        ConfigurationError: for fewer than 20 trainings of either kind, or scores that are not finite.
    """
    if min(len(with_canary), len(without)) < _FEWEST or len(with_canary) != len(without):
        raise ConfigurationError(
            f"an audit takes as many trainings with the canary as without, at least {_FEWEST}; got {len(with_canary)} and "
            f"{len(without)}"
        )
    if not bool(torch.isfinite(with_canary).all() and torch.isfinite(without).all()):
        raise ConfigurationError("scores of an audit must be finite")
    half = len(without) // 2
    chosen, best = math.inf, -1.0
    found = torch.cat([with_canary[:half], without[:half]]).unique()  # sorted; thresholds lie between
    for threshold in (0.5 * (found[1:] + found[:-1])).tolist():
        hits = int((with_canary[:half] >= threshold).sum())
        slips = int((without[:half] >= threshold).sum())
        bound = epsilon_lower_bound(hits, slips, half, delta, confidence)
        # Where nothing is proven, the better of two bad thresholds is that with the larger difference.
        quality = bound + 1e-6 * (hits - slips)
        if quality > best:
            chosen, best = threshold, quality
    hits, slips = int((with_canary[half:] >= chosen).sum()), int((without[half:] >= chosen).sum())
    trials = len(without) - half
    return AuditResult(epsilon_lower_bound(hits, slips, trials, delta, confidence), hits, slips, trials)


@dataclass(frozen=True)
class CanaryAttack:
    """White-box attack on a training, which sees everything that the guarantee covers: all noisy answers.

    The score of a training is the sum over its steps of the projection of the noisy answer on what the canary would have
    contributed at these parameters, which is the optimal test for Gaussian noise.

    Attributes:
        model: makes a fresh untrained model.
        data: without the canary.
        canary: one unit of the same kind, to be added.
        budget: stated.
        settings: settings of the training.
        learner: makes the model's learner; None for that of a feed-forward network.
        noise: makes the source of randomness of a run; another one breaks the mechanism, to see that this is noticed.
    """

    model: Callable[[], Model]
    data: UnitData
    canary: UnitData
    budget: PrivacyBudget
    settings: PrivateTraining
    learner: Callable[[Model], Learner] | None = None
    noise: Callable[[int], NoiseSource] = SeededNoise

    def run(self, trainings: int, seed: int, confidence: float = 0.95) -> AuditResult:
        """Train ``trainings`` times with and without the canary, and return the bound."""
        with_canary, without = (
            torch.tensor([self.score(included, seed + 2 * number + included) for number in range(trainings)])
            for included in (True, False)
        )
        return audit_scores(with_canary, without, self.budget.delta, confidence)

    def score(self, included: bool, seed: int) -> float:
        """Return the score of one training."""
        data = self._with_canary() if included else self.data
        # The sampling rate must not tell the data sets apart: the canary is one more unit at the same rate.
        rate = self.settings.batch / self.data.units
        model = self.model()
        learner = None if self.learner is None else self.learner(model)
        total = 0.0

        def observe(step: int, means: list[Tensor]) -> None:
            alone = objective.learner.contributions(self.canary.batch(torch.tensor([0])), objective.thresholds)
            pairs = zip(means, alone.sums, objective.thresholds, strict=True)
            nonlocal total
            total += sum(float((mean * one).sum()) / threshold**2 for mean, one, threshold in pairs)

        objective = PrivateObjective(
            model, data, self.budget, self.settings, learner, (), self.noise(seed), observe, sampling_rate=rate
        )
        for _ in Trainer(objective).steps():
            pass
        return total

    def _with_canary(self) -> UnitData:
        mine = self.data.owners if self.data.owners is not None else torch.arange(len(self.data.inputs))
        return replace(
            self.data,
            inputs=torch.cat([self.data.inputs, self.canary.inputs]),
            targets=torch.cat([self.data.targets, self.canary.targets]),
            owners=torch.cat([mine, torch.full((len(self.canary.inputs),), int(mine.max()) + 1)]),
        )
