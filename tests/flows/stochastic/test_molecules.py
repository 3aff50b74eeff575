"""Stochastic flows over the coordinates of molecules."""

import math

import numpy as np
import pytest
import torch

from flowbridge.core.energy import PotentialEnergy
from flowbridge.core.errors import ConfigurationError, MoleculeMismatchError, NonFiniteEnergyError
from flowbridge.core.potential import Particles
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.molecule_coordinates import MoleculeCoordinates
from flowbridge.flows.stochastic.distributions import StandardNormal
from flowbridge.flows.stochastic.langevin import LangevinKernel
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.molecules import (
    FlatCoordinates,
    GeneratorPrior,
    MoleculeEnergy,
    PositionEnergy,
    sample_molecules,
)
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow, path_likelihood

TEMPERATURE = 300.0


@pytest.fixture(scope="module")
def ethanol(from_smiles, frames_of, springs_of):
    """Particles, frames, coordinates and the energy of springs."""
    particles, positions = from_smiles("CCO")
    frames = torch.as_tensor(frames_of(particles, positions, 600))
    coordinates = MoleculeCoordinates.fit(particles, frames.numpy(), FlowConfiguration())
    return (
        particles,
        frames,
        FlatCoordinates.fit(coordinates, frames),
        PotentialEnergy(springs_of(particles, positions)),
    )


def energy_of(ethanol, **settings) -> MoleculeEnergy:
    return MoleculeEnergy(ethanol[2], ethanol[3], TEMPERATURE, reference=0.0, **settings)


def test_flat_coordinates_are_positions_with_a_volume(ethanol):
    _, frames, flat, _ = ethanol
    value, log_det = flat.inverse(frames[:20])
    assert value.shape == (20, 3 * 9 - 6)
    assert float(value[:, : flat.circular].abs().max()) <= math.sqrt(3.0)
    positions, back = flat(value)
    again, _ = flat.inverse(positions)
    torch.testing.assert_close(again, value, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(back, -log_det)
    # a turn further it is the same molecule
    shifted = value.clone()
    shifted[:, 0] += math.sqrt(12.0)
    torch.testing.assert_close(flat(shifted)[0], positions, rtol=0.0, atol=1e-9)
    assert float(flat.overhang(value).max()) == 0.0
    assert float(flat.overhang(shifted)[:, 0].min()) > 0.0
    # against the density of the unflattened coordinates: a turn is stretched to the square root of twelve
    _, plain = flat.coordinates.inverse(frames[:20])
    torch.testing.assert_close(log_det, plain + flat.circular * 0.5 * math.log(12.0))


def test_torsions_are_cut_where_data_are_least(ethanol):
    particles, frames, flat, _ = ethanol
    turns = flat.coordinates.inverse(frames)[0].circular
    narrowed = MoleculeCoordinates.fit(particles, frames[(turns[:, 0] - 0.3).abs() < 0.2].numpy(), FlowConfiguration())
    kept = frames[(turns[:, 0] - 0.3).abs() < 0.2]
    cut = float(FlatCoordinates.fit(narrowed, kept).cuts[0])
    assert abs((cut - 0.8 + 0.5) % 1.0 - 0.5) < 0.3


def test_energy_is_that_of_the_engine_and_so_is_its_gradient(ethanol):
    _, frames, flat, springs = ethanol
    energy = energy_of(ethanol)
    value = flat.inverse(frames[:5])[0].requires_grad_(True)
    positions, log_volume = flat(value)
    expected = springs.potential(positions) / thermal_energy(TEMPERATURE) - log_volume
    torch.testing.assert_close(energy(value), expected)
    (gradient,) = torch.autograd.grad(energy(value).sum(), value)
    (direct,) = torch.autograd.grad(expected.sum(), value)
    torch.testing.assert_close(gradient, direct)


def test_energy_is_tamed_above_its_limit_and_finite_everywhere(ethanol):
    _, frames, flat, _ = ethanol
    value = flat.inverse(frames[:50])[0]
    strained = value + 30.0
    tamed = energy_of(ethanol, soft_limit=50.0, hard_limit=1000.0)
    free = energy_of(ethanol, soft_limit=1e8, hard_limit=1e9)
    strained.requires_grad_(True)
    result = tamed(strained)
    assert bool(torch.isfinite(result).all())
    (gradient,) = torch.autograd.grad(result.sum(), strained)
    assert bool(torch.isfinite(gradient).all())
    with torch.no_grad():
        height = free(value) + flat(value)[1]
        assert torch.equal(tamed(value)[height < 50.0], free(value)[height < 50.0])
    with pytest.raises(ConfigurationError, match="soft < hard"):
        energy_of(ethanol, soft_limit=10.0, hard_limit=1.0)


def test_configurations_without_an_energy_have_the_highest(ethanol):
    class Failing:
        def energies_and_forces(self, positions):
            return np.full(len(positions), np.nan), np.full(positions.shape, np.nan)

    _, frames, flat, _ = ethanol
    value = flat.inverse(frames[:3])[0].requires_grad_(True)
    energy = MoleculeEnergy(flat, Failing(), TEMPERATURE, 0.0)
    result = energy(value)
    assert bool(torch.isfinite(result).all())
    assert bool((result > 400.0).all())
    assert bool(torch.isfinite(torch.autograd.grad(result.sum(), value)[0]).all())
    flow = StochasticFlow(StandardNormal(flat.dimension, torch.float64), energy, [])
    with pytest.raises(NonFiniteEnergyError, match="weight zero"):
        sample_molecules(flow, ethanol[0], 5, Failing())


def test_paths_and_plain_samples_agree_on_the_partition_function(from_smiles, frames_of, springs_of):
    """Two estimates of one number, from a normal distribution with and without kernels behind it."""
    particles, relaxed = from_smiles("O")
    frames = torch.as_tensor(frames_of(particles, relaxed, 600))
    coordinates = MoleculeCoordinates.fit(particles, frames.numpy(), FlowConfiguration())
    flat, springs = FlatCoordinates.fit(coordinates, frames), PotentialEnergy(springs_of(particles, relaxed))
    energy = MoleculeEnergy(flat, springs, TEMPERATURE, reference=0.0)
    estimates = []
    for steps, count in (([], 20_000), ([MetropolisKernel(0.15, 5), MetropolisKernel(0.15, 5)], 2000)):
        flow = StochasticFlow(StandardNormal(flat.dimension, torch.float64), energy, steps)
        samples = sample_molecules(flow, particles, count, springs.potential, seed=2)
        weights = np.exp(samples.log_weights + 20.0)
        estimates.append((weights.mean(), weights.std() / math.sqrt(count)))
        assert len(samples) == count
        assert samples.effective_sample_size() > 20.0
    (first, first_error), (second, second_error) = estimates
    assert abs(first - second) < 4.0 * math.hypot(first_error, second_error)
    assert samples.provenance["acceptance"][0] > 0.1
    assert set(samples.reduced_potentials) == {"target"}


def test_kernels_make_more_of_the_same_samples(ethanol):
    particles, _, flat, springs = ethanol
    shares = []
    for steps in ([], [MetropolisKernel(0.15, 10) for _ in range(4)]):
        flow = StochasticFlow(StandardNormal(flat.dimension, torch.float64), energy_of(ethanol), steps)
        shares.append(sample_molecules(flow, particles, 1500, springs.potential, seed=3).effective_sample_percent())
    assert shares[1] > 1.5 * shares[0]


def test_kernels_that_follow_forces_sample_and_refuse_to_be_trained(ethanol):
    particles, frames, flat, springs = ethanol
    kernel = LangevinKernel(0.05, 5, friction=1.0)
    flow = StochasticFlow(StandardNormal(flat.dimension, torch.float64), energy_of(ethanol), [kernel])
    assert len(sample_molecules(flow, particles, 50, springs.potential)) == 50
    data = flat.inverse(frames[:10])[0]
    with pytest.raises(RuntimeError, match="MetropolisKernel"):
        path_likelihood(flow, data, torch.Generator().manual_seed(0)).backward()


def test_generators_begin_paths_over_positions(generator_of, springs_of):
    model = generator_of("O")
    prior = GeneratorPrior(model)
    value = prior.sample(20, torch.Generator().manual_seed(1))
    assert value.shape == (20, 9)
    torch.testing.assert_close(prior.log_prob(value), model.log_prob(value.unflatten(1, (3, 3))))
    springs = springs_of(model.metadata.particles, value[0].unflatten(0, (3, 3)).numpy())
    energy = PositionEnergy(PotentialEnergy(springs), TEMPERATURE)
    torch.testing.assert_close(energy(value), springs(value.unflatten(1, (3, 3))) / thermal_energy(TEMPERATURE))


def test_what_does_not_fit_is_refused(ethanol):
    particles, _, flat, springs = ethanol
    prior = StandardNormal(flat.dimension, torch.float64)
    elsewhere, one = StochasticFlow(prior, lambda x: x.sum(-1), []), Particles(("H",), (1,), (1.0,))
    with pytest.raises(ConfigurationError, match="expected a MoleculeEnergy"):
        sample_molecules(elsewhere, particles, 5, springs.potential)
    with pytest.raises(MoleculeMismatchError, match="1 particles"):
        sample_molecules(StochasticFlow(prior, energy_of(ethanol), []), one, 5, springs.potential)
    with pytest.raises(ConfigurationError, match="as many cuts"):
        FlatCoordinates(flat.coordinates, torch.zeros(9))
