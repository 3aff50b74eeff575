"""The sampler against distributions that are known, its diagnostics, and the optimiser against exact energies."""

import math

import pytest
import torch

from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.wave_function.linear_method import (
    OptimisationSettings,
    linear_step,
    optimise,
    start_optimisation,
)
from flowbridge.calculators.qmc.wave_function.sampling import (
    LangevinSampler,
    SamplingSettings,
    initial_positions,
    sample,
)
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings, trial_wave_function
from flowbridge.core.errors import ConfigurationError, ConvergenceError


@pytest.fixture(scope="module")
def hydrogen():
    return trial_wave_function(
        Molecule.build([1], [[0, 0, 0]]), TrialSettings("hartree-fock", "cc-pvqz", jastrow=False, grid_level=3)
    ).wave_function


def equilibrated(wave_function, walkers=512, seed=1, moves=120):
    generator = torch.Generator().manual_seed(seed)
    sampler = LangevinSampler(wave_function, generator, initial_positions(wave_function.molecule, walkers, generator))
    sampler.equilibrate(moves)
    return sampler


def test_hydrogen_atom_has_the_moments_of_its_exact_density(hydrogen):
    samples = sample(equilibrated(hydrogen), SamplingSettings(walkers=512, sweeps=40, interval=3))
    assert samples.energy.value == pytest.approx(-0.5, abs=2e-3)
    assert samples.variance < 1e-3
    radius = torch.linalg.vector_norm(samples.positions[:, :, 0], dim=2)
    for power, exact in ((1, 1.5), (2, 3.0), (-1, 1.0)):
        found = samples.average(radius**power)
        assert abs(found.value - exact) < 4 * found.error + 2e-3
        assert found.error < 0.05 * exact
    # The whole distribution: P(r < x) = 1 - exp(-2x)(1 + 2x + 2x^2).
    for x in (0.3, 1.0, 2.5):
        found = samples.average((radius < x).double())
        exact = 1.0 - math.exp(-2 * x) * (1 + 2 * x + 2 * x * x)
        assert abs(found.value - exact) < 4 * found.error + 2e-3


def test_long_and_short_steps_sample_the_same(h2_determinant):
    """Where Metropolis' correction were wrong, averages would depend on the step."""
    found = []
    for step in (0.05, 0.8):
        sampler = equilibrated(h2_determinant.wave_function, 256, seed=2, moves=80)
        sampler.step = step
        for _ in range(60):
            sampler.move()
        samples = sample(sampler, SamplingSettings(walkers=256, sweeps=24, interval=3))
        assert 0.2 < samples.acceptance < 1.0
        found.append(samples.average(samples.potential))
    difference = found[0].value - found[1].value
    assert abs(difference) < 4 * math.hypot(found[0].error, found[1].error)


def test_energy_of_a_determinant_is_hartree_focks(h2_determinant):
    samples = sample(equilibrated(h2_determinant.wave_function), SamplingSettings(walkers=512, sweeps=40, interval=4))
    energy = samples.energy
    assert abs(energy.value - h2_determinant.orbitals.hartree_fock_energy) < 3 * energy.error + 5e-3
    # The virial theorem holds for the limit of Hartree-Fock near the equilibrium distance.
    kinetic = samples.average(samples.kinetic + energy.value)
    assert abs(kinetic.value) < 5 * kinetic.error + 0.02


def test_a_seed_gives_the_same_numbers_and_an_interrupted_run_too(h2_determinant):
    settings = SamplingSettings(walkers=64, sweeps=32, interval=1)
    whole = sample(equilibrated(h2_determinant.wave_function, 64, moves=20), settings)
    again = sample(equilibrated(h2_determinant.wave_function, 64, moves=20), settings)
    assert torch.equal(whole.positions, again.positions)
    kept = []

    def interrupted(done):
        if done == 30:
            raise KeyboardInterrupt

    def checkpoint(so_far, state):
        kept.append((so_far, state))

    sampler = equilibrated(h2_determinant.wave_function, 64, moves=20)
    with pytest.raises(KeyboardInterrupt):
        sample(sampler, settings, checkpoint=checkpoint, progress=interrupted)
    recorded, state = kept[-1]
    assert len(recorded.positions) == 20
    resumed = sample(LangevinSampler.resumed(h2_determinant.wave_function, state), settings, recorded=recorded)
    assert torch.equal(resumed.positions, whole.positions)
    assert torch.equal(resumed.scores, whole.scores)


def test_walkers_out_of_equilibrium_are_noticed_and_kept(h2_determinant):
    generator = torch.Generator().manual_seed(0)
    far = initial_positions(h2_determinant.wave_function.molecule, 64, generator) + 4.0
    sampler = LangevinSampler(h2_determinant.wave_function, generator, far, step=0.02)
    with pytest.raises(ConvergenceError, match=r"not in equilibrium.*Equilibrate longer") as caught:
        sample(sampler, SamplingSettings(walkers=64, sweeps=30, interval=3))
    assert caught.value.samples.positions.shape == (30, 64, 2, 3)
    for bad in ({"walkers": 8}, {"sweeps": 1}, {"interval": 0}):
        with pytest.raises(ConfigurationError, match="at least 32 walkers"):
            SamplingSettings(**bad)


def test_electrons_start_on_their_atoms():
    molecule = Molecule.build([3, 9], [[0, 0, 0], [0, 0, 30.0]], charge=1, spin=1)
    positions = initial_positions(molecule, 200, torch.Generator().manual_seed(0))
    assert positions.shape == (200, 11, 3)
    near_fluorine = (positions[..., 2] > 15.0).double().mean(0)
    assert 8 <= int(near_fluorine[:6].sum() + near_fluorine[6:].sum()) <= 10
    assert abs(int(near_fluorine[:6].sum()) - int(near_fluorine[6:].sum())) <= 1


def test_linear_method_finds_the_lowest_state_of_a_small_space():
    """With derivatives that are exact functions, one step is the diagonalisation of a matrix."""
    random = torch.Generator().manual_seed(3)
    matrix = torch.randn(5, 5, generator=random, dtype=torch.float64) * 0.1
    matrix = 0.5 * (matrix + matrix.T) + torch.diag(torch.arange(5.0, dtype=torch.float64))
    present = torch.zeros(5, dtype=torch.float64)
    present[0] = 1.0
    # Orthonormal functions on 200 000 points drawn from psi_0^2 = 1: Hermite-like columns.
    functions = torch.randn(200_000, 4, generator=random, dtype=torch.float64)
    values = torch.cat([torch.ones(200_000, 1, dtype=torch.float64), functions], 1)
    acted = values @ matrix
    local = acted[:, 0]
    step, _ = linear_step(functions, acted[:, 1:] - local[:, None] * functions, local)
    exact = torch.linalg.eigh(matrix)[1][:, 0]
    torch.testing.assert_close(step, (exact / exact[0])[1:], atol=0.03, rtol=0.1)


def test_optimised_helium_is_close_to_the_exact_energy():
    trial = trial_wave_function(Molecule.build([2], [[0, 0, 0]]), TrialSettings(grid_level=2)).wave_function
    settings = OptimisationSettings(iterations=2, sweeps=8, equilibration=80)
    state = start_optimisation(trial, 384, settings, torch.Generator().manual_seed(4))
    reached = list(optimise(state, settings))
    assert [len(part.history) for part in reached] == [1, 2]
    sampler = LangevinSampler.resumed(reached[-1].wave_function, reached[-1].sampler)
    samples = sample(sampler, SamplingSettings(walkers=384, sweeps=25, interval=4))
    assert abs(samples.energy.value + 2.903724) < 3e-3 + 3 * samples.energy.error
    assert samples.variance < 0.1 * reached[0].history[0].variance + 0.01
    # From the state after the first iteration it goes on to the same function.
    continued = list(optimise(reached[0], settings))
    torch.testing.assert_close(
        continued[-1].wave_function.jastrow_parameters, reached[-1].wave_function.jastrow_parameters
    )
