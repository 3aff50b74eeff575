"""The attack finds a mechanism that is broken, and finds nothing that the ledger denies in one that is not."""

import dataclasses
import math

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.private.audit import CanaryAttack, audit_scores, epsilon_lower_bound
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.auxiliary_coordinates import AuxiliaryCoordinates
from flowbridge.forcefields.private.learning.feed_forward import FeedForwardConfiguration, FeedForwardNetwork
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.units import UnitData

TRAININGS = 40
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-3, accountant="rdp")
SETTINGS = PrivateTraining(steps=4, batch=30, learning_rate=1e-3)


class Silent(SeededNoise):
    """Forgets the noise."""

    def normal(self, shape):
        return torch.zeros(shape, dtype=torch.float64)


class Unclipped(AuxiliaryCoordinates):
    """Forgets to clip, and adds noise as if it had."""

    def contributions(self, batch, thresholds):
        return super().contributions(batch, [1e9] * len(thresholds))


def model() -> FeedForwardNetwork:
    return FeedForwardNetwork(FeedForwardConfiguration(inputs=3, widths=(3, 2)))


def attack(method="dp_sgd", **changes) -> CanaryAttack:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    inputs[:, 2] = 0.0  # where the canary is alone
    data = UnitData(inputs, (inputs[:, 0] > 0.0).long())
    loud = torch.tensor([[0.0, 0.0, 30.0]])
    canary = UnitData(loud, model().predict(loud).argmin(1))  # mislabelled, so that it stays loud
    settings = SETTINGS.model_copy(update={"method": method})
    return dataclasses.replace(CanaryAttack(model, data, canary, BUDGET, settings), **changes)


@pytest.mark.parametrize("method", ["dp_sgd", "dp_mac"])
def test_the_real_mechanism_keeps_its_bill(method):
    assert attack(method).run(TRAININGS, seed=10).epsilon_lower <= BUDGET.epsilon


def test_missing_noise_is_caught():
    found = attack(noise=Silent).run(TRAININGS, seed=10)
    assert found.epsilon_lower > BUDGET.epsilon
    assert found.true_positives > 15


def test_missing_clipping_is_caught():
    broken = attack("dp_mac", learner=lambda network: Unclipped(network, 1, 0, 0.1))
    assert broken.run(TRAININGS, seed=10).epsilon_lower > BUDGET.epsilon


def test_half_the_noise_that_was_promised_shows_in_enough_trials():
    """Two Gaussians at the distance of their noise: the bound comes from below, and is right."""
    generator = torch.Generator().manual_seed(0)
    shift = 3.0
    without = torch.randn(2_000, generator=generator, dtype=torch.float64)
    found = audit_scores(without + shift, torch.randn(2_000, generator=generator, dtype=torch.float64), 1e-5)
    epsilon = math.log(0.9332 / 0.0668)  # at the threshold in the middle, where errors are equal
    assert epsilon - 0.7 < found.epsilon_lower


def test_bounds_hold_as_often_as_they_say():
    """Randomised response with a known epsilon: bounds exceed it in no more than 5 % of audits."""
    epsilon, trials = 1.0, 200
    truth = math.exp(epsilon) / (1.0 + math.exp(epsilon))
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(2000, trials, generator=generator) < truth).sum(1)
    slips = (torch.rand(2000, trials, generator=generator) > truth).sum(1)
    bounds = [epsilon_lower_bound(int(h), int(s), trials, 0.0) for h, s in zip(hits, slips, strict=True)]
    assert sum(bound > epsilon for bound in bounds) <= 0.06 * len(bounds)
    assert max(bounds) > 0.7  # and they are not empty


def test_limits():
    assert epsilon_lower_bound(0, 0, 50, 1e-5) == 0.0
    assert epsilon_lower_bound(50, 50, 50, 1e-5) == 0.0
    assert 2.4 < epsilon_lower_bound(50, 0, 50, 1e-5) < 2.7
    with pytest.raises(ConfigurationError, match="at least 20"):
        audit_scores(torch.zeros(10), torch.zeros(10), 1e-5)
    with pytest.raises(ConfigurationError, match="finite"):
        audit_scores(torch.full((20,), math.nan), torch.zeros(20), 1e-5)
