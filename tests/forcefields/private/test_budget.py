"""Budgets and accountants: against closed forms, against each other, and refusals."""

import math

import pytest
from pydantic import ValidationError
from scipy.stats import norm

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.private.budget import PrivacyBudget, Release, noise_multiplier, spent
from flowbridge.forcefields.private.ledger import earlier_releases


def release(noise, rate=1.0, steps=1):
    return Release(mechanism="test", noise_multiplier=noise, sampling_rate=rate, steps=steps, noise="seeded")


def gaussian_delta(epsilon, noise):
    """Of one Gaussian answer of sensitivity 1 (Balle and Wang, 2018, theorem 8)."""
    return norm.cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_one_answer_costs_what_the_closed_form_says(noise):
    """The accountants are upper bounds, and that of privacy loss variables is tight."""
    delta = 1e-5
    prv = spent([release(noise)], delta, "add_remove", "prv")
    assert gaussian_delta(prv, noise) <= delta
    assert gaussian_delta(prv - 0.03, noise) > delta
    assert spent([release(noise)], delta, "add_remove", "rdp") >= prv - 0.01


def test_replacing_costs_twice_the_sensitivity():
    """Without sampling exactly that of half the noise; with sampling never less than doubling epsilon."""
    delta = 1e-5
    assert spent([release(4.0)], delta, "replace", "prv") == spent([release(2.0)], delta, "add_remove", "prv")
    sampled = [release(4.0, 0.2, 50)]
    replaced = spent(sampled, delta, "replace", "prv")
    single = spent(sampled, delta, "add_remove", "prv")
    assert 2.0 * single < replaced < 3.0 * single
    # Group privacy, checked from the other end.
    assert any((1.0 + math.exp(replaced / 2.0)) * d <= delta for d in (delta / 10.0,))
    assert spent(sampled, delta / 10.0, "add_remove", "prv") * 2.0 >= replaced - 0.05


@pytest.mark.parametrize(
    ("neighbours", "accountant"), [("add_remove", "rdp"), ("add_remove", "prv"), ("replace", "rdp")]
)
def test_noise_keeps_the_budget_and_no_more_than_that(neighbours, accountant):
    budget = PrivacyBudget(epsilon=2.0, delta=1e-5, neighbours=neighbours, accountant=accountant)
    before = [release(8.0)]
    noise = noise_multiplier(budget, 0.1, 40, before)
    cost = spent([*before, release(noise, 0.1, 40)], 1e-5, neighbours, accountant)
    assert 1.95 < cost <= 2.0
    assert noise > noise_multiplier(budget, 0.1, 40)


def test_nothing_is_left_of_a_used_budget():
    with pytest.raises(ConfigurationError, match="is used up: earlier releases cost"):
        noise_multiplier(PrivacyBudget(epsilon=1.0, delta=1e-5), 0.1, 10, [release(1.0)])


@pytest.mark.parametrize(
    "bad",
    [{"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": math.inf}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 1.0}],
)
def test_impossible_budgets(bad):
    with pytest.raises(ValidationError):
        PrivacyBudget(**({"epsilon": 1.0, "delta": 1e-5} | bad))


def test_a_delta_that_protects_nobody():
    budget = PrivacyBudget(epsilon=1.0, delta=1e-3)
    with pytest.raises(ConfigurationError, match=r"delta = 0\.001 is no guarantee for 1000 units"):
        earlier_releases(None, [], "frame", 1000, budget)
    assert earlier_releases(None, [], "frame", 999, budget) == []
