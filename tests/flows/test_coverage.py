"""Wells of torsions and the biases that keep rare ones learned, on mixtures whose populations are known."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.energy import PotentialEnergy
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training.coverage import coverage_biases, find_basins
from flowbridge.flows.boltzmann.training.target import TargetDensity

TURN = 2.0 * math.pi


def mixture(parts, count: int, seed: int = 0) -> np.ndarray:
    """Return ``(count,)`` turns from von Mises parts (population, centre in turns, concentration)."""
    random = np.random.default_rng(seed)
    populations = np.array([part[0] for part in parts])
    chosen = random.choice(len(parts), count, p=populations / populations.sum())
    centres, concentrations = np.array([part[1:] for part in parts]).T
    return (random.vonmises(TURN * centres[chosen], concentrations[chosen]) / TURN) % 1.0


def density(parts, turns: np.ndarray) -> np.ndarray:
    populations = np.array([part[0] for part in parts])
    each = [
        p * np.exp(k * np.cos(TURN * (turns - c))) / np.i0(k) for p, (_, c, k) in zip(populations, parts, strict=True)
    ]
    return np.sum(each, 0) / populations.sum()


THREE = [(0.6, 0.17, 30.0), (0.3, 0.5, 30.0), (0.1, 0.83, 30.0)]
SHIFTS = pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.33, 0.49, 0.75])


@SHIFTS
def test_wells_are_where_the_parts_are_wherever_the_circle_is_cut(shift):
    parts = [(p, (c + shift) % 1.0, k) for p, c, k in THREE]
    data = np.stack([mixture(parts, 20_000), mixture([(1.0, shift, 3.0)], 20_000)], 1)
    basins = find_basins(data, 2)
    assert len(basins) == 3  # the second coordinate has one basin, which is none
    assert all(basin.circular == 0 for basin in basins)
    for population, centre, _ in parts:
        (basin,) = [w for w in basins if abs((w.centre - centre + 0.5) % 1.0 - 0.5) < 0.02]
        assert basin.holds(data).mean() == pytest.approx(population, abs=0.01)
    held = np.stack([basin.holds(data) for basin in basins])
    assert np.all(held.sum(0) == 1)  # the basins divide the circle
    assert sum(basin.high - basin.low for basin in basins) == pytest.approx(1.0)


@SHIFTS
def test_a_rare_well_is_found(shift):
    parts = [(0.99, (0.2 + shift) % 1.0, 25.0), (0.01, (0.7 + shift) % 1.0, 25.0)]
    basins = find_basins(mixture(parts, 20_000)[:, None], 1)
    assert len(basins) == 2


@pytest.mark.parametrize(
    "parts",
    [
        [(1.0, 0.3, 0.0)],  # turns freely
        [(1.0, 0.3, 100.0)],
        [(0.5, 0.3, 20.0), (0.5, 0.4, 20.0)],  # two shoulders
        [(0.9995, 0.2, 25.0), (0.0005, 0.7, 25.0)],  # ten frames are no basin
    ],
)
def test_what_is_no_separate_well_is_not_taken_for_one(parts):
    assert len(find_basins(mixture(parts, 20_000)[:, None], 1)) < 2


def test_only_the_first_coordinates_are_searched():
    data = np.stack([mixture([(1.0, 0.3, 3.0)], 5000), mixture(THREE, 5000)], 1)
    assert find_basins(data, 1) == []
    assert len(find_basins(data, 2)) == 3


@SHIFTS
@pytest.mark.parametrize("rare", [0.002, 0.0005])
def test_a_bias_raises_a_rare_well_towards_the_population_aimed_at(shift, rare):
    parts = [(1 - rare, (0.2 + shift) % 1.0, 25.0), (rare, (0.65 + shift) % 1.0, 25.0)]
    trained_on = [(0.5, *parts[0][1:]), (0.5, *parts[1][1:])]  # populations of the frames are not those of the target
    basins = find_basins(mixture(trained_on, 5000)[:, None], 1)
    assert len(basins) == 2
    samples = mixture(trained_on, 20_000, seed=1)[:, None]
    weights = density(parts, samples[:, 0]) / density(trained_on, samples[:, 0])
    least, limit = 0.007, 8.0
    (bias,) = coverage_biases(basins, samples, weights, least, limit)
    assert bias.height == pytest.approx(math.log(min(least / rare, limit)), abs=0.1)

    grid = (np.arange(7200) + 0.5) / 7200
    plain = density(parts, grid)
    raised = plain * np.exp(bias.log_factor(torch.as_tensor(grid)[:, None]).numpy())
    (rare_well,) = [w for w in basins if abs((w.centre - parts[1][1] + 0.5) % 1.0 - 0.5) < 0.05]
    inside = rare_well.holds(grid[:, None])
    population = raised[inside].sum() / raised.sum()
    aim = min(least, limit * rare)
    assert 0.6 * aim < population < 1.1 * aim
    # and the common basin keeps its shape: the bump is low there
    outside = raised[~inside] / raised[~inside].sum()
    assert np.abs(outside - plain[~inside] / plain[~inside].sum()).sum() < 0.2


def test_no_bias_where_none_is_asked_for_or_needed():
    data = mixture(THREE, 5000)[:, None]
    basins = find_basins(data, 1)
    assert coverage_biases(basins, data, np.ones(5000), 0.0, 8.0) == ()
    assert coverage_biases(basins, data, np.ones(5000), 0.05, 8.0) == ()
    assert len(coverage_biases(basins, data, np.ones(5000), 0.2, 8.0)) == 1


def test_a_well_without_any_sample_is_raised_to_the_limit():
    data = mixture(THREE, 5000)[:, None]
    basins = find_basins(data, 1)
    rare = next(basin for basin in basins if abs(basin.centre - 0.83) < 0.02)
    others = data[~rare.holds(data)]
    (bias,) = coverage_biases(basins, others, np.ones(len(others)), 0.01, 8.0)
    assert bias.height == pytest.approx(math.log(8.0))


def test_importance_weights_do_not_contain_the_bias(generator_of, from_smiles, springs_of):
    """The bias changes what training sees, never what a sample weighs."""
    model = generator_of("CCCO")
    springs = springs_of(*from_smiles("CCCO"))
    samples = model.sample(30, target=springs, seed=3)
    coordinates, _ = model.coordinates.inverse(torch.as_tensor(samples.positions))
    basins = find_basins(np.stack([mixture(THREE, 5000)] * coordinates.circular.shape[1], 1), 1)
    biases = coverage_biases(basins, coordinates.circular.numpy(), np.ones(30), 0.45, 8.0)
    assert biases
    plain = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0)
    biased = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0, biases)
    with torch.no_grad():
        log_q = model.flow.log_prob(Coordinates(*coordinates)).double()
    expected = (plain(coordinates).log_density - log_q).numpy()
    assert np.ptp(samples.log_weights - expected) < 1e-8
    assert np.ptp(samples.log_weights - (biased(coordinates).log_density - log_q).numpy()) > 0.1
