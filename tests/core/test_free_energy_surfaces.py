"""Surfaces and their comparison: values, errors whose coverage is counted, bad input."""

import numpy as np
import pytest

from flowbridge.core.statistics.free_energy_surfaces import Surface, compare_surfaces

EDGES = [np.linspace(-3.0, 3.0, 13)]


def normal(count, seed, shift=0.0):
    return np.clip(np.random.default_rng(seed).standard_normal((count, 1)) + shift, -2.99, 2.99)


def test_the_free_energy_is_that_of_the_density():
    surface = Surface.of(normal(400_000, 0), EDGES)
    centres = 0.5 * (EDGES[0][1:] + EDGES[0][:-1])
    inside = np.abs(centres) < 2.0
    expected = 0.5 * np.square(centres)
    found = surface.free_energy
    assert np.allclose((found - expected)[inside], (found - expected)[inside].mean(), atol=0.03)


def test_weights_turn_one_density_into_another():
    values = normal(200_000, 1)
    weighted = Surface.of(values, EDGES, 0.5 * values[:, 0])  # exp(x/2): a normal about 1/2
    compared = compare_surfaces(weighted, Surface.of(normal(400_000, 2, 0.5), EDGES))
    assert compared.divergence.value < 1e-3
    assert compared.mean_square_error.value < 0.02


def test_the_same_surface_differs_by_nothing():
    surface = Surface.of(normal(5000, 3), EDGES)
    compared = compare_surfaces(surface, surface)
    assert compared.divergence.value == pytest.approx(0.0, abs=1e-12)
    assert compared.mean_square_error.value == pytest.approx(0.0, abs=1e-12)


def test_a_shift_of_the_zero_does_not_count():
    """A density that is one in shape but lacks mass elsewhere has no error where both are compared."""
    reference = Surface.of(normal(200_000, 4), EDGES)
    values = normal(200_000, 5)
    found = Surface.of(np.concatenate([values, np.full((50_000, 1), 2.95)]), EDGES)
    assert compare_surfaces(found, reference, cutoff=2.0).mean_square_error.value < 0.01


def test_the_error_bar_of_the_divergence_covers_its_spread():
    """The spread over independent data sets is what the bootstrap says of each of them."""
    reference = Surface.of(normal(400_000, 6), EDGES)
    found = [compare_surfaces(Surface.of(normal(2000, 100 + n, 0.3), EDGES), reference).divergence for n in range(60)]
    spread = np.std([one.value for one in found], ddof=1)
    said = np.mean([one.error for one in found])
    assert 0.7 < said / spread < 1.4


def test_empty_bins_count_as_half_a_sample():
    reference = Surface.of(normal(100_000, 7), EDGES)
    few = Surface.of(normal(50, 8), EDGES)
    error = compare_surfaces(few, reference).mean_square_error.value
    assert np.isfinite(error)
    assert error > 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, 2)), r"must be \(samples, 1\)"),
        (np.array([[np.nan], [0.0]]), "1 of 2 samples"),
        (np.full((5, 1), 9.0), "no sample falls into the bins"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        Surface.of(values, EDGES)


def test_other_bins():
    with pytest.raises(ValueError, match="different bins"):
        compare_surfaces(
            Surface.of(normal(100, 1), EDGES), Surface.of(normal(100, 1), [np.linspace(-3.0, 3.0, 13) * 1.5])
        )
