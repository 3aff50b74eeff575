"""Wave functions: every derivative in closed form against finite differences, expansions against explicit determinants."""

import itertools

import numpy as np
import pytest
import torch

from flowbridge.calculators.qmc.electronic_structure import pyscf_molecule
from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.wave_function.atomic_functions import (
    RADIAL_FAMILIES,
    AtomicFunctions,
    Shell,
)
from flowbridge.calculators.qmc.wave_function.determinants import Excitations
from flowbridge.calculators.qmc.wave_function.sampling import (
    LangevinSampler,
    SamplingSettings,
    initial_positions,
    sample,
)
from flowbridge.calculators.qmc.wave_function.trial_functions import TrialSettings, trial_wave_function
from flowbridge.core.errors import ConfigurationError


@pytest.mark.parametrize("family", sorted(RADIAL_FAMILIES))
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_atomic_functions_against_finite_differences(family, degree):
    centers = torch.tensor([[0.1, -0.2, 0.3], [1.0, 0.4, -0.5]], dtype=torch.float64)
    shells = [Shell(center, degree, family, p) for p in (1.0, 2.0) for center in (0, 1)]
    functions = AtomicFunctions(centers, shells)
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = functions.evaluate(points, derivatives=2)
    step = 1e-4
    laplacian = torch.zeros_like(found.values)
    for axis in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[axis] = step
        above, below = functions.evaluate(points + shift).values, functions.evaluate(points - shift).values
        torch.testing.assert_close(found.gradients[axis], (above - below) / (2 * step), rtol=1e-6, atol=1e-7)
        laplacian += (above + below - 2 * found.values) / step**2
    torch.testing.assert_close(found.laplacians, laplacian, rtol=1e-5, atol=1e-5)


def test_combinations_follow_the_order_of_the_shells():
    centers = torch.zeros(2, 3, dtype=torch.float64)
    centers[1, 2] = 1.0
    shells = [Shell(0, 1, "gaussian", 0.5), Shell(1, 0, "slater", 1.0), Shell(0, 1, "gaussian", 2.0)]
    functions = AtomicFunctions(centers, shells)
    point = torch.tensor([[0.3, -0.2, 0.4]], dtype=torch.float64)
    values = functions.evaluate(point).values[:, 0]
    expected = [*(point[0] * np.exp(-0.5 * 0.29)), np.exp(-((0.13 + 0.36) ** 0.5)), *(point[0] * np.exp(-2.0 * 0.29))]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    matrix = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(functions.evaluate(point, matrix).values[:, 0], matrix.T @ values)
    with pytest.raises(ConfigurationError, match="2 nuclei"):
        AtomicFunctions(centers, [Shell(2, 0, "slater", 1.0)])


def differences(wave_function, positions, step=1e-4):
    """Gradient and Laplacian of ln|Psi| by finite differences."""
    here = wave_function.evaluate(positions).log_absolute
    gradient, laplacian = torch.zeros_like(positions), torch.zeros_like(here)
    for electron, axis in itertools.product(range(positions.shape[1]), range(3)):
        above, below = positions.clone(), positions.clone()
        above[:, electron, axis] += step
        below[:, electron, axis] -= step
        up, down = wave_function.evaluate(above).log_absolute, wave_function.evaluate(below).log_absolute
        gradient[:, electron, axis] = (up - down) / (2 * step)
        laplacian += (up + down - 2 * here) / step**2
    return gradient, laplacian


CASES = {
    "closed shell": (Molecule.build([3, 1], [[0, 0, 0], [0, 0, 3.015]]), {}),
    "expansion": (Molecule.build([1, 1, 1, 1], [[0, 0, 2.0 * i - 3.0] for i in range(4)]), {"active_space": (4, 4)}),
    "open-shell expansion": (Molecule.build([3], [[0, 0, 0]], spin=1), {"active_space": (3, 5)}),
    "mixed orbitals": (Molecule.build([3], [[0, 0, 0]], spin=1), {"virtual": 4}),
    "bent, charged": (
        Molecule.build([8, 1, 1], [[0, 0, 0.2], [0, 1.4, -0.8], [0, -1.4, -0.8]], 1, 1),
        {"orbitals": "hartree-fock"},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    molecule, keywords = CASES[request.param]
    settings = TrialSettings(basis="cc-pvdz", grid_level=1, **keywords)
    return molecule, trial_wave_function(molecule, settings).wave_function


def test_gradient_and_local_energy_against_finite_differences(case, shake, electrons):
    _, wave_function = case
    wave_function = shake(wave_function)
    positions = electrons(wave_function)
    gradient, laplacian = differences(wave_function, positions)
    found = wave_function.local_energy(positions)
    values = wave_function.evaluate(positions)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(values.gradient, gradient, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(found.gradient, values.gradient, rtol=1e-9, atol=1e-9)
    kinetic = -0.5 * (laplacian + gradient.square().sum((1, 2)))
    torch.testing.assert_close(found.kinetic, kinetic, rtol=1e-4, atol=1e-3)


def test_parameter_derivatives_against_finite_differences(case, shake, electrons):
    _, wave_function = case
    wave_function = shake(wave_function)
    positions = electrons(wave_function)
    found = wave_function.parameter_derivatives(positions)
    counts = wave_function.parameter_counts
    random = np.random.default_rng(0)
    # All of the few orbital and expansion parameters, and a fifth of the Jastrow factor's.
    chosen = [*random.choice(counts[0], counts[0] // 5, replace=False), *range(counts[0], sum(counts))]
    for index in chosen:
        step = torch.zeros(sum(counts), dtype=torch.float64)
        step[index] = 1e-5
        above, below = (wave_function.stepped(s).local_energy(positions) for s in (step, -step))
        torch.testing.assert_close(
            found.logarithms[:, index], (above.log_absolute - below.log_absolute) / 2e-5, rtol=1e-4, atol=1e-5
        )
        numerical = (above.total - below.total) / 2e-5
        torch.testing.assert_close(
            found.energies[:, index], numerical, rtol=1e-4, atol=1e-5 * (1.0 + float(numerical.abs().max()))
        )


def test_exchange_of_equal_spins_leaves_the_absolute_value(case, shake, electrons):
    _, wave_function = case
    wave_function = shake(wave_function)
    positions = electrons(wave_function)
    swapped = positions.clone()
    swapped[:, [0, 1]] = positions[:, [1, 0]]
    torch.testing.assert_close(
        wave_function.evaluate(swapped).log_absolute, wave_function.evaluate(positions).log_absolute
    )


def explicit_expansion(wave_function, strings, positions):
    """The sum over all pairs of determinants, each computed on its own."""
    orbitals, up = wave_function.orbitals, wave_function.molecule.spin_up
    determinants = []
    for part, spin in zip((positions[:, :up], positions[:, up:]), strings, strict=True):
        values = orbitals.functions.evaluate(part.reshape(-1, 3), orbitals.up).values.T.reshape(*part.shape[:2], -1)
        determinants.append(torch.stack([torch.linalg.det(values[:, :, list(string)]) for string in spin], 1))
    return torch.einsum("wi,ij,wj->w", determinants[0], wave_function.expansion.coefficients, determinants[1])


@pytest.mark.parametrize("name", ["expansion", "open-shell expansion"])
def test_expansion_is_the_sum_of_its_determinants(name, electrons):
    molecule, keywords = CASES[name]
    trial = trial_wave_function(molecule, TrialSettings(basis="cc-pvdz", grid_level=1, jastrow=False, **keywords))
    positions = electrons(trial.wave_function, 6)
    expected = explicit_expansion(trial.wave_function, trial.orbitals.strings, positions).abs().log()
    assert max(map(len, trial.orbitals.strings)) > 3
    torch.testing.assert_close(trial.wave_function.evaluate(positions).log_absolute, expected, rtol=1e-9, atol=1e-9)


def test_excitations_of_any_order_against_explicit_determinants():
    generator = torch.Generator().manual_seed(4)
    strings = list(itertools.combinations(range(7), 3))
    excitations = Excitations.of_strings(strings, 7)
    assert {len(holes) for holes in excitations.holes} == {0, 1, 2, 3}
    orbitals = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    matrix = torch.linalg.solve(orbitals[:, :, :3], orbitals[:, :, 3:])
    explicit = torch.stack([torch.linalg.det(orbitals[:, :, list(string)]) for string in strings], 1)
    torch.testing.assert_close(excitations.ratios(matrix), explicit / explicit[:, :1], rtol=1e-9, atol=1e-9)
    direction = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    numerical = (excitations.ratios(matrix + 1e-6 * direction) - excitations.ratios(matrix - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(excitations.ratio_derivatives(matrix, direction), numerical, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigurationError, match="lowest orbitals"):
        Excitations.of_strings([(0, 1, 3), (0, 1, 2)], 5)


def test_open_shell_expansion_has_the_energy_of_casscf():
    molecule, keywords = CASES["open-shell expansion"]
    trial = trial_wave_function(molecule, TrialSettings(basis="cc-pvtz", grid_level=2, jastrow=False, **keywords))
    generator = torch.Generator().manual_seed(3)
    sampler = LangevinSampler(trial.wave_function, generator, initial_positions(molecule, 512, generator))
    sampler.equilibrate(150)
    found = sample(sampler, SamplingSettings(walkers=512, sweeps=40, interval=3)).energy
    assert trial.orbitals.energy < trial.orbitals.hartree_fock_energy - 5e-3
    # The tolerance is for what the refit of the orbitals changes.
    assert found.value == pytest.approx(trial.orbitals.energy, abs=3 * found.error + 5e-3)


def test_cusps_of_electrons_and_nuclei(lih, shake):
    wave_function = shake(trial_wave_function(lih, TrialSettings(basis="cc-pvdz", grid_level=2)).wave_function)
    directions = torch.randn(400, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    directions = torch.cat([directions, -directions])
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    rest = torch.tensor([[0.0, 0, 0], [0.3, 0.5, 1.0], [-0.9, 0.2, 0.7], [0.4, -0.3, 2.2]], dtype=torch.float64)

    def mean(electron, near, distance):
        positions = rest.repeat(800, 1, 1)
        positions[:, electron] = near + distance * directions
        found = wave_function.evaluate(positions).log_absolute
        return float((found - found.mean()).exp().mean().log() + found.mean())

    for nucleus, charge in ((0, 3.0), (1, 1.0)):
        slope = (mean(0, lih.centers[nucleus], 2e-4) - mean(0, lih.centers[nucleus], 1e-4)) / 1e-4
        assert slope == pytest.approx(-charge, rel=0.02)
    opposite = (mean(0, rest[2], 2e-4) - mean(0, rest[2], 1e-4)) / 1e-4
    assert opposite == pytest.approx(0.5, rel=0.02)


def test_orbitals_are_those_of_pyscf(lih_determinant, lih):
    orbitals = lih_determinant.wave_function.orbitals
    mole = pyscf_molecule(lih, "cc-pvdz")
    points = lih_determinant.grid.points[::50]
    expected = torch.as_tensor(mole.eval_gto("GTOval_sph", points.numpy()) @ lih_determinant.orbitals.up)
    found = orbitals.functions.evaluate(points, orbitals.up).values.T
    weights = lih_determinant.grid.weights[::50]
    away = torch.linalg.vector_norm(points - lih.centers[0], dim=1) > 0.5  # not where Gaussians have no cusp
    missed = (weights[away] * (found - expected)[away].square().sum(1)).sum() / weights[away].sum() * len(weights)
    assert orbitals.misfit < 1e-3
    assert float((weights[away] * (found - expected)[away].square().T).sum()) < 2e-3 * 50, missed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([18], [[0, 0, 0]]), "beyond what was tested"),
        (([1, 1], [[0, 0, 0], [0, 0, 0.1]]), "on top of each other"),
        (([1, 1], [[0, 0, 0], [0, 0, 1.4]], 0, 1), "cannot have 1 more"),
        (([1], [[0, 0, 0]], 1), "leaves 0 electrons"),
        (([2], [[0, 0, float("nan")]]), "finite triples"),
        (([2], [[0, 0, 0]], 0, 4), "cannot have 4 more"),
        (([2, 1], [[0, 0, 0]]), "as many positions"),
        (([2], [[0, 0, 0]], 0, 0.5), "whole numbers"),
    ],
)
def test_impossible_molecules_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Molecule.build(*arguments)


def test_trial_functions_that_make_no_sense_are_refused(h2, lih):
    for settings, message in (
        ({"orbitals": "pbe"}, "must be one of"),
        ({"virtual": 3, "active_space": (2, 2)}, "single determinant"),
        ({"virtual": 3, "jastrow": False}, "single determinant"),
        ({"grid_level": 12}, "from 0 to 9"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            TrialSettings(**settings)
    with pytest.raises(ConfigurationError, match="does not fit 2 electrons"):
        trial_wave_function(h2, TrialSettings(active_space=(4, 4)))
    with pytest.raises(ConfigurationError, match="must be active"):
        trial_wave_function(lih, TrialSettings(active_space=(3, 5)))
    with pytest.raises(ConfigurationError, match="no more than one determinant"):
        trial_wave_function(h2, TrialSettings(active_space=(2, 1)))
    with pytest.raises(ConfigurationError, match="are small"):
        trial_wave_function(lih, TrialSettings(active_space=(4, 30)))
    with pytest.raises(ConfigurationError, match="no basis"):
        trial_wave_function(lih, TrialSettings(basis="no-such-basis"))


@pytest.mark.parametrize(
    ("numbers", "positions", "axis"),
    [
        ([1, 1], [[0, 0, -0.7], [0, 0, 0.7]], 2),
        ([9, 1], [[0, 0, 0], [0, 0, 1.7]], 0),
        ([8, 1, 1], [[0, 0, 0.2], [0, 1.4, -0.8], [0, -1.4, -0.8]], 1),
        ([6, 1, 1, 1, 1], [[0, 0, 0], [1.2, 1.2, 1.2], [-1.2, -1.2, 1.2], [1.2, -1.2, -1.2], [-1.2, 1.2, -1.2]], None),
    ],
)
def test_the_jastrow_factor_has_the_symmetry_of_the_molecule(numbers, positions, axis, shake, electrons):
    molecule = Molecule.build(numbers, positions)
    settings = TrialSettings(basis="cc-pvdz", grid_level=2, orbitals="hartree-fock")
    wave_function = shake(trial_wave_function(molecule, settings).wave_function, 0.3)
    places = electrons(wave_function)
    if axis is None:
        turned = places[..., [1, 2, 0]]  # about a threefold axis
    else:
        turned = places.clone()
        turned[..., axis] *= -1.0
    here, there = (wave_function.jastrow.evaluate(r, wave_function.jastrow_parameters).value for r in (places, turned))
    assert float(here.std()) > 0.05
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)
