"""Spin densities at nuclei: spins given to electrons in any way, exact values, and the response to parameters."""

import numpy as np
import pytest
import torch

from flowbridge.calculators.qmc.density.densities import base_density
from flowbridge.calculators.qmc.density.parameter_response import ParameterSteps
from flowbridge.calculators.qmc.density_run import DensityRun, RunSettings
from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.properties import spin_contact
from flowbridge.calculators.qmc.wave_function.sampling import (
    LangevinSampler,
    SamplingSettings,
    initial_positions,
    sample,
)
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings, trial_wave_function
from flowbridge.core.errors import ConfigurationError

LITHIUM = Molecule.build([3], [[0.2, 0.0, -0.1]], spin=1)


def samples_of(wave_function, sweeps=20, walkers=256):
    generator = torch.Generator().manual_seed(7)
    sampler = LangevinSampler(wave_function, generator, initial_positions(wave_function.molecule, walkers, generator))
    sampler.equilibrate(200)
    return sample(sampler, SamplingSettings(walkers=walkers, sweeps=sweeps, interval=4))


@pytest.mark.parametrize("space", [None, (3, 5)], ids=["determinant", "expansion"])
def test_spins_can_be_given_in_any_order(space, shake, electrons):
    settings = TrialSettings(basis="cc-pvdz", grid_level=1, active_space=space)
    wave_function = shake(trial_wave_function(LITHIUM, settings).wave_function)
    assert wave_function.jastrow.polarising is not None
    positions = electrons(wave_function, 6)
    down = torch.tensor([[False, False, True], [True, False, False], [False, True, False]]).expand(6, -1, -1)
    found = wave_function.spin_logarithms(positions, down)
    for way, order in enumerate(([0, 1, 2], [1, 2, 0], [0, 2, 1])):
        torch.testing.assert_close(found[:, way], wave_function.evaluate(positions[:, order]).log_absolute)
    assert float((found[:, 0] - found[:, 1]).abs().min()) > 1e-6


def test_hydrogen_has_all_of_its_density_in_one_spin():
    molecule = Molecule.build([1], [[0.3, 0.1, 0.0]], spin=1)
    settings = TrialSettings(orbitals="hartree-fock", basis="cc-pvqz", jastrow=False, grid_level=2)
    wave_function = trial_wave_function(molecule, settings).wave_function
    found = spin_contact.spin_contact_densities(samples_of(wave_function), wave_function)
    assert found.value[0] == pytest.approx(1 / np.pi, abs=2e-3)
    assert found.error[0] < 1e-3  # chi is all but the density itself


@pytest.mark.parametrize(("molecule", "most"), [
    (LITHIUM, 0.02),
    (Molecule.build([5, 1], [[0, 0, 0], [0, 0, 2.3]], charge=1, spin=1), 0.15),
], ids=["atom", "ion of a molecule"])  # fmt: skip
def test_determinants_have_the_spin_density_of_their_orbitals(molecule, most):
    settings = TrialSettings(orbitals="hartree-fock", basis="cc-pvdz", jastrow=False, grid_level=2)
    trial = trial_wave_function(molecule, settings)
    up, down = (base_density(trial.wave_function, trial.grid, spin).rho(molecule.centers) for spin in ("up", "down"))
    samples = samples_of(trial.wave_function)
    found = spin_contact.spin_contact_densities(samples, trial.wave_function)
    assert (np.abs(found.value - (up - down).numpy()) < 3.5 * found.error).all()
    assert found.error[0] < most
    # A count of electrons near the nucleus is far noisier, if right.
    near = (torch.linalg.vector_norm(samples.positions - molecule.centers[0], dim=3) < 0.15).double()
    signs = torch.where(torch.arange(molecule.electrons) < molecule.spin_up, 1.0, -1.0).double()
    counted = samples.average(near @ signs / (4 / 3 * np.pi * 0.15**3))
    assert counted.error > 5 * found.error[0]


def test_response_to_parameters_against_reweighted_samples(shake):
    wave_function = shake(
        trial_wave_function(LITHIUM, TrialSettings(basis="cc-pvdz", grid_level=1)).wave_function, 0.02
    )
    samples = samples_of(wave_function, 8)
    count = sum(wave_function.parameter_counts)
    step = torch.zeros(count, dtype=torch.float64)
    step[wave_function.jastrow.count - 4] = 1e-3
    values = []
    for sign in (1, -1):
        changed = wave_function.stepped(sign * step)
        weights = torch.stack([
            2.0 * (changed.evaluate(part).log_absolute - wave_function.evaluate(part).log_absolute)
            for part in samples.positions
        ]).exp()  # fmt: skip
        odd = spin_contact._odd_terms(changed)
        found = torch.stack(
            [spin_contact._moved_there(changed, odd, part, LITHIUM.centers[0], 3.0)[0] for part in samples.positions]
        )
        values.append(float((weights * found).mean() / weights.mean()))
    steps = ParameterSteps(step.expand(17, -1), torch.zeros(17), torch.zeros(8, 256, count))
    change = (
        spin_contact.spin_contact_densities(samples, wave_function, steps).value
        - spin_contact.spin_contact_densities(samples, wave_function).value
    )
    assert change[0] == pytest.approx((values[0] - values[1]) / 2, rel=1e-3)
    assert abs(change[0]) > 1e-4


def test_samples_without_a_wave_function_are_refused():
    trial = trial_wave_function(LITHIUM, TrialSettings(basis="cc-pvdz", grid_level=1)).wave_function
    settings = RunSettings(TrialSettings(basis="cc-pvdz", grid_level=1))
    run = DensityRun(LITHIUM, settings, samples=samples_of(trial, 3, 64))
    with pytest.raises(ConfigurationError, match="need the wave function"):
        _ = run.spin_contact_densities
