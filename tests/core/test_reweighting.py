"""Weights of draws, against integrals that are known, and what becomes of draws without an energy."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.energy import BatchedEnergy, PotentialEnergy, as_batched_energy, differentiable_energies
from flowbridge.core.errors import ConfigurationError, NonFiniteEnergyError
from flowbridge.core.generator import Generator, GeneratorPotential
from flowbridge.core.potential import Particles, PotentialMetadata
from flowbridge.core.reweighting import Draws, reweight
from flowbridge.core.units import thermal_energy

ATOMS = Particles(("A", "B"), (6, 8), (12.0, 16.0))
KT = thermal_energy(300.0)


class Gaussian(GeneratorPotential):
    """Independent normal coordinates of two atoms."""

    def __init__(self, width: float = 0.1) -> None:
        super().__init__()
        self.metadata = PotentialMetadata(ATOMS, temperature=300.0)
        self.width = width

    def log_prob(self, positions):
        scaled = positions.double() / self.width
        return -0.5 * scaled.square().sum((1, 2)) - 6 * math.log(self.width * math.sqrt(2 * math.pi))

    def sample_positions(self, count, generator):
        positions = self.width * torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)
        return Draws(positions, self.log_prob(positions))


class Wells:
    """``U = k |x|^2 / 2``, which counts what it is asked for, and has no energy where it is told so."""

    def __init__(self, stiffness: float, failures: dict[int, float] | None = None) -> None:
        self.stiffness, self.failures, self.asked = stiffness, failures or {}, []

    def energies(self, positions):
        self.asked.append("energies")
        values = 0.5 * self.stiffness * (positions**2).sum((1, 2))
        for index, value in self.failures.items():
            values[index] = value
        return values

    def energies_and_forces(self, positions):
        values = self.energies(positions)
        self.asked[-1] = "forces"
        return values, np.where(np.isfinite(values)[:, None, None], -self.stiffness * positions, np.nan)


class OnlyTogether:
    """A target of before: energies with forces."""

    def __init__(self, wells: Wells) -> None:
        self.wells = wells

    def energies_and_forces(self, positions):
        return self.wells.energies_and_forces(positions)


def test_the_mean_weight_is_the_partition_function():
    generator, wells = Gaussian(0.12), Wells(KT / 0.1**2)
    samples = generator.sample(20_000, wells, seed=3)
    weights = np.exp(samples.log_weights)
    exact = (0.1 * math.sqrt(2 * math.pi)) ** 6
    assert abs(weights.mean() - exact) < 4 * weights.std() / math.sqrt(len(weights))
    estimate = samples.average(lambda x: (x**2).sum((1, 2)))
    assert abs(estimate.value - 6 * 0.1**2) < 4 * estimate.error
    np.testing.assert_allclose(
        samples.log_weights, samples.reduced_potentials["generator"] - samples.reduced_potentials["target"], rtol=1e-12
    )
    assert {"seed", "model_digest", "count", "without_finite_energy", "target", "versions"} <= set(samples.provenance)
    assert wells.asked == ["energies"]


def test_a_generator_has_the_energy_of_its_density():
    generator = Gaussian()
    assert isinstance(generator, Generator)
    assert generator.sample(100, generator).effective_sample_size() == pytest.approx(100)
    with pytest.raises(ConfigurationError, match="neither a cell"):
        generator(torch.zeros(1, 2, 3), torch.eye(3)[None])
    generator.metadata = PotentialMetadata(ATOMS)
    with pytest.raises(ConfigurationError, match="without a temperature"):
        generator.sample(10, Wells(1.0))


def test_draws_without_an_energy_or_a_density_stay_with_weight_zero():
    draws = Gaussian().sample_positions(10, torch.Generator().manual_seed(0))
    draws.log_prob[5] = torch.inf
    wells = Wells(10.0, {1: np.nan, 2: np.inf, 3: -np.inf})
    samples = reweight(draws, wells, ATOMS, 300.0)
    assert np.flatnonzero(np.isneginf(samples.log_weights)).tolist() == [1, 2, 3, 5]
    assert samples.provenance["without_finite_energy"] == 4
    assert np.flatnonzero(np.isposinf(samples.reduced_potentials["target"])).tolist() == [1, 2, 3]
    equal = reweight(draws._replace(log_prob=torch.zeros(10)), Wells(0.0, {0: np.nan}), ATOMS, 300.0)
    assert equal.effective_sample_size() == pytest.approx(9.0)
    assert equal.effective_sample_percent() == pytest.approx(90.0)  # of all, the lost one included


def test_nothing_left_says_why():
    draws = Gaussian().sample_positions(4, torch.Generator().manual_seed(0))
    draws.log_prob[0] = torch.nan
    with pytest.raises(
        NonFiniteEnergyError, match=r"all 4 samples have weight zero: 3 have no finite energy .*, 1 are no"
    ):
        reweight(draws, Wells(1.0, dict.fromkeys((1, 2, 3), np.nan)), ATOMS, 300.0)


def test_weights_of_before_multiply_and_paths_have_no_density():
    draws = Gaussian().sample_positions(6, torch.Generator().manual_seed(0))
    own = np.array([0.0, 1.0, -np.inf, 2.0, 0.0, 0.0])
    plain = reweight(draws, Wells(10.0), ATOMS, 300.0)
    weighted = reweight(draws, Wells(10.0), ATOMS, 300.0, log_weights=own, paths=True, provenance={"what": "paths"})
    assert np.array_equal(weighted.log_weights, plain.log_weights + own)
    assert set(weighted.reduced_potentials) == {"target"}
    assert weighted.provenance["what"] == "paths"


def test_a_target_that_gives_energies_with_forces_only_still_works():
    draws = Gaussian().sample_positions(6, torch.Generator().manual_seed(0))
    wells = Wells(10.0)
    expected = reweight(draws, Wells(10.0), ATOMS, 300.0)
    found = reweight(draws, OnlyTogether(wells), ATOMS, 300.0)
    assert np.array_equal(found.log_weights, expected.log_weights)
    assert wells.asked == ["forces"]
    assert isinstance(as_batched_energy(OnlyTogether(wells)), BatchedEnergy)
    with pytest.raises(ConfigurationError, match=r"cannot evaluate energies of builtins\.dict"):
        as_batched_energy({})


def test_energies_of_a_potential_without_forces():
    energy = PotentialEnergy(Gaussian(), chunk=3)
    positions = Gaussian().sample_positions(10, torch.Generator().manual_seed(0)).positions.numpy()
    assert np.array_equal(energy.energies(positions), energy.energies_and_forces(positions)[0])
    assert not Gaussian().energies(torch.as_tensor(positions).requires_grad_(True)).requires_grad


class TestDifferentiableEnergies:
    def positions(self, count=4):
        return Gaussian().sample_positions(count, torch.Generator().manual_seed(0)).positions

    def test_forces_are_evaluated_only_where_they_are_wanted(self):
        wells, positions = Wells(10.0), self.positions()
        differentiable_energies(wells, positions)
        assert wells.asked == ["energies"]
        leaf = positions.clone().requires_grad_(True)
        assert torch.autograd.gradcheck(lambda x: differentiable_energies(wells, x), (leaf,))
        assert "energies" not in wells.asked[1:]

    def test_what_is_not_used_has_no_gradient(self):
        leaf = self.positions().requires_grad_(True)
        energies = differentiable_energies(Wells(10.0, {1: np.nan}), leaf)
        torch.where(torch.isfinite(energies), energies, torch.zeros_like(energies)).sum().backward()
        assert torch.equal(leaf.grad[1], torch.zeros(2, 3, dtype=torch.float64))
        assert torch.allclose(leaf.grad[0], 10.0 * leaf.detach()[0])
        leaf.grad = None
        differentiable_energies(Wells(10.0, {1: np.nan}), leaf).sum().backward()
        assert bool(torch.isnan(leaf.grad[1]).all())

    def test_there_is_no_second_derivative(self):
        leaf = self.positions().requires_grad_(True)
        (gradient,) = torch.autograd.grad(differentiable_energies(Wells(1.0), leaf).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="not second derivatives"):
            gradient.square().sum().backward()
