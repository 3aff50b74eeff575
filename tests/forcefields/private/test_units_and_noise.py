"""Units are drawn and clipped as wholes; noise has the size it says."""

import pytest
import torch
from scipy.stats import kstest

from flowbridge.core.errors import ConfigurationError
from flowbridge.forcefields.private.learning.clipping import (
    Contributions,
    adapted_thresholds,
    clipped_outer_sum,
    clipped_sum,
    noise_shares,
    noisy_sums,
)
from flowbridge.forcefields.private.noise import CryptographicNoise, SeededNoise, noise_source
from flowbridge.forcefields.private.units import UnitData, draw_units, mean_by_unit


def ragged(per_step=None) -> UnitData:
    owners = torch.tensor([7, 3, 7, 7, 3, 9])
    return UnitData(torch.arange(6.0)[:, None], torch.zeros(6), owners, "trajectory", per_step)


def test_a_drawn_unit_brings_all_its_samples():
    batch = ragged().batch(torch.tensor([0, 1]))
    assert batch.inputs[:, 0].tolist() == [1.0, 4.0, 0.0, 2.0, 3.0]
    assert batch.owners.tolist() == [0, 0, 1, 1, 1]
    assert mean_by_unit(batch.inputs, batch)[:, 0].tolist() == pytest.approx([2.5, 5.0 / 3.0])


def test_samples_of_a_unit_are_chosen_evenly():
    data, counts = ragged(per_step=2), torch.zeros(6)
    for step in range(600):
        noise = SeededNoise(step)
        batch = data.batch(torch.arange(3), noise)
        assert torch.bincount(batch.owners).tolist() == [2, 2, 1]
        counts[batch.inputs[:, 0].long()] += 1
    assert counts[[1, 4, 5]].tolist() == [600, 600, 600]
    assert torch.allclose(counts[[0, 2, 3]], torch.full((3,), 400.0), atol=60.0)


def test_units_are_drawn_independently():
    """Numbers drawn have the variance of Poisson sampling, which shuffled batches would not have."""
    noise, sizes = SeededNoise(0), []
    together = 0
    for step in range(4000):
        noise.begin(step)
        drawn = draw_units(40, 0.25, noise)
        sizes.append(len(drawn))
        together += int({0, 1} <= set(drawn.tolist()))
    sizes = torch.tensor(sizes, dtype=torch.float64)
    assert sizes.mean() == pytest.approx(10.0, abs=0.2)
    assert sizes.var() == pytest.approx(7.5, rel=0.1)
    assert together / 4000 == pytest.approx(0.0625, abs=0.012)


@pytest.mark.parametrize("noise", [CryptographicNoise(), SeededNoise(3)])
def test_noise_is_gaussian(noise):
    drawn = noise.normal(torch.Size((100, 200))).flatten().numpy()
    assert kstest(drawn, "norm").pvalue > 1e-4
    assert kstest(noise.uniform(20_000).numpy(), "uniform").pvalue > 1e-4


def test_noise_repeats_for_a_seed_only():
    def drawn(source, step):
        source.begin(step)
        return source.normal(torch.Size((4,)))

    assert torch.equal(drawn(noise_source(1, "a"), 5), drawn(noise_source(1, "a"), 5))
    others = [(2, "a", 5), (1, "a", 6), (1, "b", 5), (-1, "a", 5), (None, "a", 5)]
    assert all(not torch.equal(drawn(noise_source(1, "a"), 5), drawn(noise_source(s, t), n)) for s, t, n in others)
    assert not torch.equal(drawn(CryptographicNoise(), 1), drawn(CryptographicNoise(), 1))


@pytest.mark.parametrize("one_each", [True, False])
def test_no_unit_moves_the_sum_by_more_than_the_norm(one_each):
    """Adding a unit, however large: the definition of the sensitivity, tried."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, 4, generator=generator) * torch.logspace(-3, 6, 30)[:, None]
    right = torch.randn(30, 5, generator=generator)
    owners = torch.arange(30) if one_each else torch.arange(30) // 3
    data = UnitData(torch.cat([left, right], dim=1), torch.zeros(30), owners)

    def total(chosen):
        batch = data.batch(chosen)
        return clipped_outer_sum(batch.inputs[:, :4], batch.inputs[:, 4:], batch, 0.7)

    full, within, broken = total(torch.arange(data.units))
    assert broken == 0
    assert 0 < within < data.units
    for unit in range(data.units):
        others = torch.tensor([n for n in range(data.units) if n != unit])
        assert (full - total(others)[0]).norm() <= 0.7 * (1.0 + 1e-5)


def test_contributions_that_are_not_finite_count_as_zero():
    rows = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 0.0], [0.3, 0.4]])
    total, within, broken = clipped_sum(rows, 1.0)
    assert total.tolist() == pytest.approx([0.9, 1.2])
    assert (within, broken) == (1, 2)
    batch = UnitData(torch.zeros(4, 1), torch.zeros(4)).batch(torch.arange(4))
    total, within, broken = clipped_outer_sum(rows, torch.ones(4, 1), batch, 1.0)
    assert total[:, 0].tolist() == pytest.approx([0.9, 1.2])
    assert (within, broken) == (1, 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_all_blocks_together_are_one_mechanism(adaptive):
    """Largest move of all answers in units of their noise: one over the noise multiplier."""
    share, count_share = noise_shares(3, adaptive)
    multiplier, thresholds = 2.5, [0.1, 1.0, 30.0]
    moved = sum((t / (multiplier * t / share)) ** 2 for t in thresholds)
    moved += 3 * (count_share / multiplier) ** 2  # a count moves by 1/2 with noise of half the multiplier
    assert moved == pytest.approx(1.0 / multiplier**2)
    empty = Contributions([torch.zeros(20_000) for _ in thresholds], torch.zeros(3), 0)
    noisy = noisy_sums(empty, thresholds, share, multiplier, SeededNoise(0))
    for t, values in zip(thresholds, noisy, strict=True):
        assert values.std() == pytest.approx(multiplier * t / share, rel=0.03)


def test_clipping_adapts_to_a_quantile():
    noise, norms = SeededNoise(0), torch.linspace(0.0, 4.0, 1001)
    thresholds = [0.05]
    for step in range(200):
        noise.begin(step)
        found = Contributions([torch.zeros(1)], (norms <= thresholds[0]).sum()[None], 0)
        thresholds = adapted_thresholds(found, thresholds, 1001, 1001, 0.75, 0.2, 0.1, 1.0, noise)
    assert thresholds[0] == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(5)}, "do not belong together"),
        ({"owners": torch.zeros(4)}, "one unit number for each"),
        ({"inputs": torch.full((6, 1), float("nan"))}, "6 numbers of the inputs are NaN"),
        ({"per_step": 0}, "per_step must be at least 1"),
        ({"unit": " "}, "name the unit"),
        ({"inputs": torch.zeros(0, 1), "targets": torch.zeros(0)}, "no samples"),
    ],
)
def test_bad_data(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        UnitData(**({"inputs": torch.zeros(6, 1), "targets": torch.zeros(6)} | changes))
