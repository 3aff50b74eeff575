"""What the noise of optimised parameters does to a density: steps from sums, first-order response, honest error bars."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowbridge.calculators.qmc.density.convex_fit import DensityFitSettings
from flowbridge.calculators.qmc.density.densities import base_density
from flowbridge.calculators.qmc.density.linear_log_density import fit_linear_log_density
from flowbridge.calculators.qmc.density.parameter_response import ParameterSteps, parameter_steps, with_response
from flowbridge.calculators.qmc.density_run import DensityRun, RunSettings
from flowbridge.calculators.qmc.properties.properties import DensityProperties
from flowbridge.calculators.qmc.wave_function.linear_method import (
    OptimisationSettings,
    StepMoments,
    StepReference,
    linear_step,
)
from flowbridge.calculators.qmc.wave_function.sampling import (
    LangevinSampler,
    SamplingSettings,
    initial_positions,
    sample,
)
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings
from flowbridge.core.errors import ConfigurationError


def samples_of(wave_function, sweeps=30, walkers=384):
    generator = torch.Generator().manual_seed(11)
    sampler = LangevinSampler(wave_function, generator, initial_positions(wave_function.molecule, walkers, generator))
    sampler.equilibrate(150)
    return sample(sampler, SamplingSettings(walkers=walkers, sweeps=sweeps, interval=4))


@pytest.fixture(scope="module")
def hydrogen(h2_trial):
    """A function of H2 with parameters that are not at their optimum, its samples, and the density fitted to them."""
    generator = torch.Generator().manual_seed(2)
    step = 0.02 * torch.randn(sum(h2_trial.wave_function.parameter_counts), generator=generator, dtype=torch.float64)
    wave_function = h2_trial.wave_function.stepped(step)
    samples = samples_of(wave_function)
    base = base_density(wave_function, h2_trial.grid)
    return (
        wave_function,
        samples,
        fit_linear_log_density(samples, base, h2_trial.grid, DensityFitSettings(groups=8)),
        h2_trial.grid,
    )


def test_sums_of_parts_give_the_step_of_the_whole(hydrogen):
    wave_function, samples, _, _ = hydrogen
    found = wave_function.parameter_derivatives(samples.positions[:8].flatten(0, 1))
    expected, length = linear_step(*(found.logarithms, found.energies, found.local_energy))
    reference = StepReference(-1.0, found.logarithms[0])  # any other reference than its own
    parts = [
        StepMoments.of(found.logarithms[rows], found.energies[rows], found.local_energy[rows], reference)
        for rows in torch.arange(len(found.local_energy)).split(1000)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.plus(part)
    step, again = whole.step()
    torch.testing.assert_close(step, expected, rtol=1e-6, atol=1e-8)
    assert again == pytest.approx(length, rel=1e-6)
    rest, _ = whole.plus(parts[0], -1).step()
    kept = slice(1000, None)
    torch.testing.assert_close(
        rest,
        linear_step(found.logarithms[kept], found.energies[kept], found.local_energy[kept])[0],
        rtol=1e-5,
        atol=1e-7,
    )


def test_response_is_that_of_reweighted_samples(hydrogen):
    """A density after a step has the moments that samples have with the weight of the changed wave function."""
    wave_function, samples, density, grid = hydrogen
    generator = torch.Generator().manual_seed(5)
    step = 2e-3 * torch.randn(sum(wave_function.parameter_counts), generator=generator, dtype=torch.float64)
    found = parameter_steps(samples, wave_function, 8)
    given = ParameterSteps(step.expand(9, -1), found.lengths, found.logarithms)
    before = DensityProperties(density, grid)
    after = DensityProperties(with_response(density, samples, given, grid), grid)
    changed = wave_function.stepped(step)
    weights = torch.stack([2.0 * changed.evaluate(part).log_absolute for part in samples.positions])
    weights = (
        weights - 2.0 * torch.stack([wave_function.evaluate(part).log_absolute for part in samples.positions])
    ).exp()
    square = (samples.positions - wave_function.molecule.centers.mean(0)).square().sum((2, 3))
    along = samples.positions[..., 2].sum(2)
    for values, name, sign in ((square, "second_moment", 1.0), (along, "dipole", -1.0)):
        expected = float((weights * values).mean() / weights.mean() - values.mean())
        change = getattr(after, name)().value - getattr(before, name)().value
        change = float(change if name == "second_moment" else change[2])
        if name == "dipole":  # zero by the symmetry of the molecule, as the Jastrow factor keeps it
            assert abs(change) < 1e-6
        else:
            assert change == pytest.approx(sign * expected, rel=0.08)
            assert abs(expected) > 0.01
    assert float(after.electrons().value) == pytest.approx(2.0, abs=1e-9)


def test_errors_hold_the_noise_of_parameters(h2):
    """Over seeds, what is optimised on few samples scatters by what the errors say, and by more than they say without it."""
    settings = RunSettings(
        TrialSettings(basis="cc-pvdz", grid_level=2),
        OptimisationSettings(iterations=2, sweeps=3, equilibration=100),
        SamplingSettings(walkers=256, equilibration=60, sweeps=20, interval=4),
        fit=DensityFitSettings(groups=16),
    )
    values: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for seed in range(6):
        run = DensityRun(h2, replace(settings, seed=seed))
        without = DensityRun(h2, replace(settings, seed=seed, response=False))
        without.__dict__.update(optimisation=run.optimisation, samples=run.samples)
        for key, one in ((True, run), (False, without)):
            found = one.properties.second_moment()
            values[key].append((float(found.value), float(found.error)))
    ratios = {}
    for key, pairs in values.items():
        found, errors = np.array(pairs).T
        ratios[key] = found.std(ddof=1) / np.sqrt(np.square(errors).mean())
    assert 0.4 < ratios[True] < 1.7, ratios
    assert ratios[False] > 2.5, ratios


def test_too_few_samples_for_the_parameters_are_said(h2):
    settings = RunSettings(
        TrialSettings(basis="cc-pvdz", grid_level=1),
        OptimisationSettings(iterations=1, sweeps=4, equilibration=40),
        SamplingSettings(walkers=64, equilibration=30, sweeps=6, interval=2),
    )
    run = DensityRun(h2, settings)
    with pytest.warns(UserWarning, match=r"too few to tell how noisy .* parameters are.*more sweeps"):
        assert run.parameter_steps is None
    assert DensityRun(h2, replace(settings, response=False), wave_function=run.wave_function).parameter_steps is None
    with pytest.raises(ConfigurationError, match="as many walkers as groups"):
        parameter_steps(run.samples, run.wave_function, 65)
    steps = ParameterSteps(torch.zeros(5, 1), torch.zeros(5), torch.zeros(6, 64, 1))
    with pytest.raises(ConfigurationError, match="has 32 replicas, and the steps have 4"):
        with_response(run.density, run.samples, steps, run.grid)
