"""Statistics of weighted samples against known truths, and error bars by their coverage."""

import time

import numpy as np
import pytest

from flowbridge.core.errors import OverlapError
from flowbridge.core.statistics.bootstrap import block_starts, bootstrap_factors
from flowbridge.core.statistics.estimates import (
    block_bootstrap,
    effective_sample_percent,
    effective_sample_size,
    free_energy_difference,
    free_energy_profile,
    jensen_shannon_divergence,
    jensen_shannon_noise,
    largest_weight_ratio,
    mean_with_error,
    weighted_mean,
)

DATA_SETS = 400


def gaussian_importance_samples(rng, samples, width=1.3):
    """Samples of N(0, width^2) with log-weights to the standard normal, off by a constant."""
    x = width * rng.standard_normal(samples)
    return x, -0.5 * x**2 + 0.5 * (x / width) ** 2 + 1234.5


def normal_cdf(x):
    from scipy.stats import norm

    return norm.cdf(x)


class TestEffectiveSampleSize:
    def test_equal_weights_count_fully(self):
        assert effective_sample_size(np.full(50, -3e5)) == pytest.approx(50)
        assert effective_sample_percent(np.full(50, 7e4)) == pytest.approx(100)

    def test_some_zero_weights(self):
        log_weights = np.full(100, -np.inf)
        log_weights[:25] = 2.0
        assert effective_sample_size(log_weights) == pytest.approx(25)
        assert largest_weight_ratio(log_weights) == pytest.approx(4)

    def test_matches_direct_formula_and_ignores_constant(self):
        log_weights = np.random.default_rng(1).normal(size=200)
        w = np.exp(log_weights)
        expected = w.sum() ** 2 / (w**2).sum()
        assert effective_sample_size(log_weights) == pytest.approx(expected)
        assert effective_sample_size(log_weights + 5000.0) == pytest.approx(expected, rel=1e-9)
        assert largest_weight_ratio(log_weights) == pytest.approx(w.max() / w.mean())

    def test_one_dominating_weight_is_not_clipped(self):
        log_weights = np.zeros(1000)
        log_weights[3] = 800.0
        assert effective_sample_size(log_weights) == pytest.approx(1.0)
        assert largest_weight_ratio(log_weights) == pytest.approx(1000.0)

    def test_gaussian_against_integral(self):
        """ESS/S = 1/E_q[w^2], known in closed form for two Gaussians."""
        rng = np.random.default_rng(2)
        width = 1.3
        _, log_weights = gaussian_importance_samples(rng, 200_000, width)
        # int p^2/q for p = N(0,1), q = N(0, s^2): s^2 / sqrt(2 s^2 - 1)
        expected = 100.0 * np.sqrt(2 * width**2 - 1) / width**2
        assert effective_sample_percent(log_weights) == pytest.approx(expected, rel=0.005)

    @pytest.mark.parametrize(
        ("log_weights", "message"),
        [
            ([], "non-empty"),
            (np.zeros((3, 2)), r"\(3, 2\)"),
            ([0.0, np.nan, np.nan], "2 of 3.*index 1"),
            ([0.0, 1.0, np.inf], "1 of 3.*index 2"),
            ([-np.inf, -np.inf], "no sample has any weight"),
        ],
    )
    def test_refusals(self, log_weights, message):
        for function in (effective_sample_size, largest_weight_ratio, effective_sample_percent):
            with pytest.raises(ValueError, match=message):
                function(log_weights)


class TestCoverage:
    """Nominal one-sigma intervals must hold the truth in about 68 % of many independent data sets."""

    def covered(self, estimates, truth):
        inside = [abs(e.value - truth) < e.error for e in estimates]
        return 100.0 * np.mean(inside)

    def test_mean(self):
        rng = np.random.default_rng(3)
        sets = [gaussian_importance_samples(rng, 1000) for _ in range(DATA_SETS)]
        estimates = [mean_with_error(x**2, log_w) for x, log_w in sets]
        assert 60 < self.covered(estimates, 1.0) < 76

    def test_free_energy_difference(self):
        rng = np.random.default_rng(4)
        truth = np.log(normal_cdf(0.5) / (1 - normal_cdf(0.5)))
        estimates = []
        for _ in range(DATA_SETS):
            x, log_w = gaussian_importance_samples(rng, 1000)
            estimates.append(free_energy_difference(x < 0.5, x >= 0.5, log_w))
        assert 60 < self.covered(estimates, truth) < 76

    def test_rare_basin(self):
        """About ten samples in the rare basin: a bootstrap by drawing would sometimes find none."""
        rng = np.random.default_rng(5)
        truth = np.log(normal_cdf(2.3) / (1 - normal_cdf(2.3)))
        estimates = []
        for _ in range(DATA_SETS):
            x = rng.standard_normal(1000)
            estimates.append(free_energy_difference(x < 2.3, x >= 2.3, np.zeros(1000)))
        assert all(np.isfinite(e.error) for e in estimates)
        assert 60 < self.covered(estimates, truth) < 76

    def test_profile_bins(self):
        rng = np.random.default_rng(6)
        edges = np.array([-8.0, -1.0, 0.0, 0.7, 8.0])
        truth = -np.log(np.diff(normal_cdf(edges)))
        inside = np.zeros(4)
        for _ in range(DATA_SETS):
            x, log_w = gaussian_importance_samples(rng, 1000)
            profile = free_energy_profile(x, log_w, edges)
            probability = np.exp(-profile.free_energy) * np.diff(edges)
            inside += np.abs(-np.log(probability / probability.sum()) - truth) < profile.error
        assert (100 * inside / DATA_SETS > 60).all()
        assert (100 * inside / DATA_SETS < 76).all()

    def test_correlated_samples_need_blocks(self):
        """An autoregressive chain: blocks longer than its memory are honest, blocks of one too sure."""
        rng = np.random.default_rng(7)
        memory, length = 0.9, 4000
        noise = rng.standard_normal((DATA_SETS, length)) * np.sqrt(1 - memory**2)
        chain = np.empty_like(noise)
        chain[:, 0] = rng.standard_normal(DATA_SETS)
        for t in range(1, length):
            chain[:, t] = memory * chain[:, t - 1] + noise[:, t]
        blocked = [mean_with_error(x, np.zeros(length), blocks=40) for x in chain]
        single = [mean_with_error(x, np.zeros(length), blocks=length, replicas=20) for x in chain[:100]]
        assert 60 < self.covered(blocked, 0.0) < 76
        assert self.covered(single, 0.0) < 35


class TestBootstrap:
    def test_any_estimator_agrees_with_the_fast_path(self):
        rng = np.random.default_rng(8)
        x, log_w = gaussian_importance_samples(rng, 3000)
        slow = block_bootstrap(x, log_w, weighted_mean, blocks=60, seed=5)
        fast = mean_with_error(x, log_w, blocks=60, seed=5)
        assert slow.value == pytest.approx(fast.value)
        assert slow.error == pytest.approx(fast.error, rel=1e-9)

    def test_error_of_the_mean_of_independent_samples(self):
        x = np.random.default_rng(9).normal(scale=3.0, size=(20_000, 2)) + 1e6
        estimate = mean_with_error(x, np.zeros(20_000), replicas=4000)
        assert estimate.value.shape == estimate.error.shape == (2,)
        assert estimate.error == pytest.approx(x.std(axis=0) / np.sqrt(20_000), rel=0.2)

    def test_factors_have_mean_one_and_the_variance_of_a_dirichlet(self):
        factors = bootstrap_factors(50, 4000, seed=1)
        assert factors.mean(axis=1) == pytest.approx(1.0)
        assert factors.var() == pytest.approx(49 / 51, rel=0.05)

    def test_a_few_blocks_are_unbiased(self):
        """With five blocks the variance must still be right on average."""
        rng = np.random.default_rng(10)
        variances = [
            mean_with_error(rng.standard_normal(50), np.zeros(50), blocks=5, seed=i).error ** 2 for i in range(400)
        ]
        assert np.mean(variances) == pytest.approx(1 / 50, rel=0.15)

    def test_seed_decides(self):
        x = np.random.default_rng(11).normal(size=300)
        errors = [mean_with_error(x, np.zeros(300), seed=seed).error for seed in (1, 1, 2)]
        assert errors[0] == errors[1] != errors[2]

    def test_blocks_cover_all_samples_evenly(self):
        starts = block_starts(1003, 100)
        lengths = np.diff(starts, append=1003)
        assert starts[0] == 0
        assert set(lengths) == {10, 11}
        assert len(block_starts(17)) == 17

    @pytest.mark.parametrize("blocks", [1, 0, -3, 11])
    def test_impossible_blocks_are_refused(self, blocks):
        with pytest.raises(ValueError, match="blocks for 10 samples"):
            mean_with_error(np.arange(10.0), np.zeros(10), blocks=blocks)

    def test_values_must_match_and_be_finite(self):
        with pytest.raises(ValueError, match="one entry a sample"):
            mean_with_error(np.zeros(5), np.zeros(6))
        with pytest.raises(ValueError, match="1 of 6 values"):
            weighted_mean([0, 0, np.nan, 0, 0, 0], np.zeros(6))
        with pytest.raises(ValueError, match="do not match"):
            block_bootstrap(np.zeros(5), np.zeros(6), weighted_mean)

    def test_speed(self):
        rng = np.random.default_rng(12)
        x = rng.uniform(-np.pi, np.pi, 100_000)
        log_w = rng.normal(size=100_000)
        start = time.perf_counter()
        free_energy_profile(x, log_w, 72, 2 * np.pi, replicas=200)
        assert time.perf_counter() - start < 1.0


class TestFreeEnergies:
    def test_difference_of_counted_samples(self):
        in_a = np.arange(1000) % 4 == 0
        estimate = free_energy_difference(in_a, ~in_a, np.zeros(1000))
        assert estimate.value == pytest.approx(-np.log(3))
        swapped = free_energy_difference(~in_a, in_a, np.zeros(1000))
        assert swapped.value == pytest.approx(-estimate.value)

    def test_empty_region_is_refused_with_numbers(self):
        in_a = np.ones(20, dtype=bool)
        with pytest.raises(OverlapError, match="region B holds 0 of 20"):
            free_energy_difference(in_a, ~in_a, np.zeros(20))
        log_weights = np.where(np.arange(20) < 5, -np.inf, 0.0)
        with pytest.raises(OverlapError, match="region A holds 5 of 20 samples and none of the weight"):
            free_energy_difference(np.arange(20) < 5, np.arange(20) >= 5, log_weights)

    def test_integer_masks_are_refused(self):
        with pytest.raises(ValueError, match="boolean mask"):
            free_energy_difference(np.arange(5), np.arange(5), np.zeros(5))

    def test_periodic_profile_recovers_the_potential(self):
        """Uniform samples weighted by exp(-u) must give u back, whichever copy of the period they lie in."""
        rng = np.random.default_rng(13)
        angle = rng.uniform(-np.pi, np.pi, 400_000)
        u = 2.0 * np.cos(angle - 0.3)
        shifted = angle + 2 * np.pi * rng.integers(-3, 4, angle.size)
        profile = free_energy_profile(shifted, -u, 72, 2 * np.pi)
        expected = 2.0 * np.cos(profile.centers - 0.3)
        difference = profile.free_energy - expected
        pull = (difference - difference.mean()) / profile.error
        assert np.abs(difference - difference.mean()).max() < 0.06
        assert 0.75 < np.sqrt(np.mean(pull**2)) < 1.25
        assert profile.counts.sum() == 400_000
        assert profile.free_energy.min() == 0.0

    def test_empty_bins_are_infinite(self):
        values = np.concatenate([np.full(50, -0.5), np.full(50, 2.5)])
        profile = free_energy_profile(values, np.zeros(100), [-1, 0, 1, 2, 3])
        assert profile.free_energy.tolist() == [0.0, np.inf, np.inf, 0.0]
        assert np.isinf(profile.error[1:3]).all()
        assert profile.counts.tolist() == [50, 0, 0, 50]

    def test_uneven_bins_use_the_density(self):
        values = np.random.default_rng(14).uniform(0, 4, 100_000)
        profile = free_energy_profile(values, np.zeros(100_000), [0, 1, 4])
        assert profile.free_energy == pytest.approx([0, 0], abs=0.03)

    def test_bad_profiles_are_refused(self):
        with pytest.raises(ValueError, match="2 of 3 values lie outside"):
            free_energy_profile([0.0, 5.0, -5.0], np.zeros(3), [-1, 0, 1])
        with pytest.raises(ValueError, match="not the period"):
            free_energy_profile([0.0, 0.1], np.zeros(2), [-1, 0, 1], period=np.pi)
        with pytest.raises(ValueError, match="increasing"):
            free_energy_profile([0.0, 0.1], np.zeros(2), [1, 0])
        with pytest.raises(ValueError, match="give bin edges"):
            free_energy_profile([1.0, 1.0], np.zeros(2), 5)
        with pytest.raises(ValueError, match="at least one bin"):
            free_energy_profile([1.0, 2.0], np.zeros(2), 0)


class TestJensenShannon:
    def test_limits(self):
        p = np.array([[1.0, 2.0], [3.0, 0.0]])
        assert jensen_shannon_divergence(p, 10 * p) == pytest.approx(0.0, abs=1e-15)
        assert jensen_shannon_divergence([1, 0], [0, 5]) == pytest.approx(np.log(2))

    def test_against_scipy(self):
        from scipy.spatial.distance import jensenshannon

        rng = np.random.default_rng(15)
        p, q = rng.random(30), rng.random(30)
        assert jensen_shannon_divergence(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
        assert jensen_shannon_divergence(p, q) == pytest.approx(jensen_shannon_divergence(q, p))

    def test_noise_predicts_the_divergence_of_equal_distributions(self):
        rng = np.random.default_rng(16)
        shape = rng.dirichlet(np.full(40, 2.0))
        measured, expected = [], []
        for _ in range(400):
            p, q = rng.multinomial(100, shape, size=50), rng.multinomial(50, shape, size=40)
            measured.append(jensen_shannon_divergence(p.sum(0), q.sum(0)))
            expected.append(jensen_shannon_noise(p, q, splits=4).value)
        assert np.mean(measured) == pytest.approx(np.mean(expected), rel=0.06)
        assert np.mean(expected) == pytest.approx(39 / 8 * (1 / 5000 + 1 / 2000), rel=0.1)

    def test_noise_counts_correlated_samples_once(self):
        """Each block repeats every one of its samples ten times: the noise is that of the independent ones."""
        rng = np.random.default_rng(19)
        shape = rng.dirichlet(np.full(40, 2.0))
        measured, expected = [], []
        for _ in range(400):
            p, q = 10 * rng.multinomial(50, shape, size=40), rng.multinomial(500, shape, size=40)
            measured.append(jensen_shannon_divergence(p.sum(0), q.sum(0)))
            expected.append(jensen_shannon_noise(p, q, splits=4).value)
        assert np.mean(measured) == pytest.approx(np.mean(expected), rel=0.06)

    def test_a_real_difference_stands_out_of_the_noise(self):
        rng = np.random.default_rng(17)
        p = [np.histogram(rng.normal(0, 1, 500), 40, (-4, 4))[0] for _ in range(10)]
        q = [np.histogram(rng.normal(0.2, 1, 500), 40, (-4, 4))[0] for _ in range(10)]
        noise = jensen_shannon_noise(p, q)
        assert jensen_shannon_divergence(np.sum(p, axis=0), np.sum(q, axis=0)) > noise.value + 5 * noise.error

    @pytest.mark.parametrize(("p", "q"), [([0, 0], [1, 1]), ([1, -1], [1, 1]), ([1, 1], [1, 1, 1]), ([], [])])
    def test_bad_histograms_are_refused(self, p, q):
        with pytest.raises(ValueError, match="histogram"):
            jensen_shannon_divergence(p, q)

    def test_noise_needs_blocks(self):
        with pytest.raises(ValueError, match=r"q_blocks must hold at least four histograms.*\(2, 2\)"):
            jensen_shannon_noise(np.ones((4, 2)), np.ones((2, 2)))
