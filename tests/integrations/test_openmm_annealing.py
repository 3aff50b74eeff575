"""OpenMM's Langevin dynamics as a kernel: weights against partition functions that are known, and hostile Systems."""

import math

import numpy as np
import openmm
import pytest
import torch

from flowbridge.core.errors import ConfigurationError, NonFiniteEnergyError
from flowbridge.core.potential import Particles, Potential, PotentialMetadata
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.stochastic.distributions import InterpolatedEnergy
from flowbridge.flows.stochastic.molecules import PositionEnergy
from flowbridge.flows.stochastic.resampling import log_mean_weight
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow
from flowbridge.integrations.openmm import OpenMMEnergy, OpenMMLangevinKernel, annealed_samples

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
MASSES = (16.0, 1.0)
STIFFNESS = (300.0, 600.0)


class Trap(Potential):
    """A normal distribution of width 0.1 nm around the origin for each particle, as a potential and as a prior."""

    def __init__(self):
        super().__init__()
        self.metadata = PotentialMetadata(Particles(("O", "H"), (8, 1), MASSES), temperature=TEMPERATURE)

    def forward(self, positions, cell=None):
        return 0.5 * KT * (positions.double() / 0.1).square().sum((1, 2))

    def log_prob(self, value):
        return -0.5 * (value / 0.1).square().sum(1) - 6 * (math.log(0.1) + 0.5 * math.log(2.0 * math.pi))

    def sample(self, count, generator):
        return 0.1 * torch.randn(count, 6, generator=generator, dtype=torch.float64)


def springs() -> openmm.System:
    """Each particle on a spring: log Z is known."""
    system = openmm.System()
    force = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addPerParticleParameter("k")
    for index, (mass, stiffness) in enumerate(zip(MASSES, STIFFNESS, strict=True)):
        system.addParticle(mass)
        force.addParticle(index, [stiffness])
    system.addForce(force)
    system.addForce(openmm.CMMotionRemover())
    return system


LOG_Z = sum(1.5 * math.log(2.0 * math.pi * KT / stiffness) for stiffness in STIFFNESS)


def paths_of(kernels, fractions, count, seed):
    target = PositionEnergy(OpenMMEnergy(springs()), TEMPERATURE)
    return StochasticFlow(Trap(), target, kernels, fractions).sample(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step_ps", [0.01, 0.06])
def test_mean_weight_is_the_partition_function_at_any_time_step(step_ps):
    kernel = OpenMMLangevinKernel(springs(), TEMPERATURE, step_ps, 15, friction=5.0)
    paths = paths_of([kernel], [1.0], 3000, seed=1)
    weights = (paths.log_weights - LOG_Z).exp()
    assert abs(float(weights.mean()) - 1.0) < 4.0 * float(weights.std()) / math.sqrt(len(weights))
    # the time step makes errors, and the weights know
    energy = PositionEnergy(OpenMMEnergy(springs()), TEMPERATURE)
    error = paths.log_weights + energy(paths.latent) + Trap().log_prob(paths.latent)
    assert float(error.std()) > (0.3 if step_ps > 0.05 else 0.003)


def test_kernel_leaves_the_target_invariant_after_reweighting():
    """From equilibrium, ``E exp(u(x) - u(x') + dS)`` is one although the time step is close to unstable."""
    kernel = OpenMMLangevinKernel(springs(), TEMPERATURE, 0.07, 10, friction=5.0)
    width = torch.tensor([math.sqrt(KT / k) for k in STIFFNESS], dtype=torch.float64).repeat_interleave(3)
    generator = torch.Generator().manual_seed(2)
    start = width * torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    energy = PositionEnergy(OpenMMEnergy(springs()), TEMPERATURE)
    moved = kernel(start, InterpolatedEnergy(Trap(), energy, 1.0), generator)
    weights = (energy(start) - energy(moved.value) + moved.log_ratio).exp()
    assert float(weights.std()) > 0.05
    assert abs(float(weights.mean()) - 1.0) < 4.0 * float(weights.std()) / math.sqrt(4000)
    square = (weights.unsqueeze(1) * (moved.value / width).square()).mean(1)
    assert abs(float(square.mean()) - 1.0) < 4.0 * float(square.std()) / math.sqrt(4000)


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
def test_forces_turn_from_the_prior_to_the_target():
    kernel = OpenMMLangevinKernel(springs(), TEMPERATURE, 0.02, 5, friction=5.0, prior=Trap())
    at_prior = paths_of([kernel], [0.0], 150, seed=3)
    # in its own equilibrium nothing but rounding of the integrator is in the ratio
    work = at_prior.log_ratio + Trap().log_prob(at_prior.value) - Trap().log_prob(at_prior.latent)
    assert float(work.abs().max()) < 0.3
    ladder = paths_of([kernel] * 4, [0.25, 0.5, 0.75, 1.0], 150, seed=4)
    weights = (ladder.log_weights - LOG_Z).exp()
    assert abs(float(weights.mean()) - 1.0) < 4.0 * float(weights.std()) / math.sqrt(150)


def test_the_seed_repeats_the_paths():
    one, two, other = (
        paths_of([OpenMMLangevinKernel(springs(), TEMPERATURE, 0.002, 5, 10.0)], [1.0], 20, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.log_weights, two.log_weights)
    assert not torch.equal(one.value, other.value)


@pytest.fixture(scope="module")
def water(tmp_path_factory):
    """A flow of a water molecule that is not quite the force field's, and the force field."""
    particles = Particles(("O", "H1", "H2"), (8, 1, 1), (15.999, 1.008, 1.008), ((0, 1), (0, 2)))
    system = openmm.System()
    for mass in particles.masses:
        system.addParticle(mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for hydrogen in (1, 2):
        bonds.addBond(0, hydrogen, 0.0957, 3.0e5)
    angles.addAngle(1, 0, 2, 1.82, 400.0)
    system.addForce(bonds)
    system.addForce(angles)
    random = np.random.default_rng(1)
    lengths = 0.0957 + 0.004 * random.standard_normal((800, 2))
    bend = 1.80 + 0.1 * random.standard_normal(800)
    zero = np.zeros(800)
    frames = np.stack(
        [
            np.stack([zero, zero, zero], 1),
            np.stack([lengths[:, 0], zero, zero], 1),
            np.stack([lengths[:, 1] * np.cos(bend), lengths[:, 1] * np.sin(bend), zero], 1),
        ],
        axis=1,
    )
    settings = {"torsions": {"couplings": 1, "hidden": [4]}, "stiff": {"couplings": 1, "hidden": [4]}}
    model = BoltzmannGenerator.untrained(particles, TEMPERATURE, frames, FlowConfiguration.model_validate(settings))
    return model, system


@pytest.mark.filterwarnings("ignore:this potential is in no model file")
def test_annealed_samples_of_a_generator_have_better_weights_and_the_same_normaliser(water):
    model, system = water
    plain = model.sample(20_000, system, seed=1)
    annealed = annealed_samples(model, system, 100, fractions=2, steps=3, step_ps=0.001, friction=50.0, seed=2)
    assert annealed.effective_sample_percent() > plain.effective_sample_percent() + 5.0
    first = float(log_mean_weight(torch.as_tensor(plain.log_weights)))
    second = float(log_mean_weight(torch.as_tensor(annealed.log_weights)))
    weights = np.exp(annealed.log_weights - second)
    assert abs(first - second) < 4.0 * weights.std() / math.sqrt(100) + 0.02
    assert annealed.provenance["annealing"]["fractions"] == [0.5, 1.0]
    assert annealed.positions.shape == (100, 3, 3)


def test_systems_that_cannot_be_weighted_are_refused():
    constrained = springs()
    constrained.addConstraint(0, 1, 0.1)
    with pytest.raises(ConfigurationError, match="constraints=None"):
        OpenMMLangevinKernel(constrained, TEMPERATURE, 0.001, 1, 1.0)
    held = springs()
    held.setParticleMass(0, 0.0)
    with pytest.raises(ConfigurationError, match="without mass"):
        OpenMMLangevinKernel(held, TEMPERATURE, 0.001, 1, 1.0)
    with pytest.raises(ConfigurationError, match="at least one step, got 0"):
        OpenMMLangevinKernel(springs(), TEMPERATURE, 0.001, 0, 1.0)
    with pytest.raises(ConfigurationError, match="friction must be positive, got 0"):
        OpenMMLangevinKernel(springs(), TEMPERATURE, 0.001, 1, 0.0)


def test_uses_that_make_no_sense_are_refused():
    kernel = OpenMMLangevinKernel(springs(), TEMPERATURE, 0.001, 1, 1.0)
    energy, generator = PositionEnergy(OpenMMEnergy(springs()), TEMPERATURE), torch.Generator()
    start = torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="no prior"):
        kernel(start, InterpolatedEnergy(Trap(), energy, 0.5), generator)
    with pytest.raises(ConfigurationError, match="differentiated"):
        kernel(start.clone().requires_grad_(True), InterpolatedEnergy(Trap(), energy, 1.0), generator)
    with pytest.raises(ConfigurationError, match="2 particles, positions 3"):
        kernel(torch.zeros(2, 9, dtype=torch.float64), InterpolatedEnergy(Trap(), energy, 1.0), generator)


def test_dynamics_that_explodes_is_an_error():
    kernel = OpenMMLangevinKernel(springs(), TEMPERATURE, 10.0, 400, 1.0)
    start = torch.full((1, 6), 0.1, dtype=torch.float64)
    energy = PositionEnergy(OpenMMEnergy(springs()), TEMPERATURE)
    with pytest.raises(NonFiniteEnergyError, match="shorten the time step"):
        kernel(start, InterpolatedEnergy(Trap(), energy, 1.0), torch.Generator().manual_seed(1))
