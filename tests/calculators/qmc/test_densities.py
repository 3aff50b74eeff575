"""Density models against densities that are known, and properties against PySCF's own integrals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowbridge.calculators.qmc.density.convex_fit import ConvexFit, DensityFitSettings
from flowbridge.calculators.qmc.density.densities import GaussianDensity, OrbitalDensity, SumDensity, base_density
from flowbridge.calculators.qmc.density.linear_log_density import fit_linear_log_density
from flowbridge.calculators.qmc.density.neural_density import NeuralDensity, NeuralFitSettings, fit_neural_density
from flowbridge.calculators.qmc.electronic_structure import Quadrature, becke_quadrature, reference_density
from flowbridge.calculators.qmc.molecule import Molecule
from flowbridge.calculators.qmc.properties.properties import DensityProperties, jackknife
from flowbridge.calculators.qmc.wave_function.atomic_functions import AtomicFunctions, Shell
from flowbridge.calculators.qmc.wave_function.sampling import (
    ElectronSamples,
    LangevinSampler,
    SamplingSettings,
    initial_positions,
    sample,
)
from flowbridge.core.errors import ConfigurationError


def samples_of(wave_function, walkers=512, sweeps=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sampler = LangevinSampler(wave_function, generator, initial_positions(wave_function.molecule, walkers, generator))
    sampler.equilibrate(100)
    return sample(sampler, SamplingSettings(walkers=walkers, sweeps=sweeps, interval=4))


@pytest.fixture(scope="module")
def hydrogen_samples():
    """Exact samples of exp(-2r)/pi with their exact scores."""
    molecule = Molecule.build([1], [[0, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(40, 512, 3, generator=generator, dtype=torch.float64)
    radius = -uniform.log().sum(2) / 2.0
    direction = torch.randn(40, 512, 3, generator=generator, dtype=torch.float64)
    direction /= torch.linalg.vector_norm(direction, dim=2, keepdim=True)
    positions = (radius[..., None] * direction)[:, :, None]
    return ElectronSamples(molecule, positions, -2.0 * direction[:, :, None], 1.0 / radius - 0.5, -1.0 / radius, 0.6)


@pytest.fixture(scope="module")
def wrong_hydrogen():
    """A density with the cusp of hydrogen and the wrong shape."""
    functions = AtomicFunctions(
        torch.zeros(1, 3, dtype=torch.float64), [Shell(0, 0, "slater", 1.0), Shell(0, 0, "gaussian", 0.3)]
    )
    coefficients = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return OrbitalDensity(Molecule.build([1], [[0, 0, 0]]), functions, coefficients, torch.ones(1, dtype=torch.float64))


@pytest.fixture(scope="module")
def h2_reference(h2):
    return reference_density(h2, "hf", "cc-pvtz")


def models(h2, h2_trial, h2_reference):
    generator = torch.Generator().manual_seed(7)
    refit = ConvexFit(0.1 * torch.randn(3, 20, generator=generator).double(), torch.zeros(3).double())
    neural = NeuralDensity(h2, 2.0, 16, refit)
    neural.network.requires_grad_(False)
    base = base_density(h2_trial.wave_function, h2_trial.grid)
    return {
        "orbitals": base,
        "gaussians": GaussianDensity.from_reference(h2, h2_reference),
        "neural": neural,
        "sum": SumDensity(base, neural),
    }


@pytest.mark.parametrize("name", ["orbitals", "gaussians", "neural", "sum"])
def test_derivatives_against_finite_differences(name, h2, h2_trial, h2_reference):
    model = models(h2, h2_trial, h2_reference)[name]
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step, laplacian, gradient = 1e-4, 0.0, []
    for axis in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[axis] = step
        above, below = model.rho(points + shift), model.rho(points - shift)
        gradient.append((above - below) / (2 * step))
        laplacian = laplacian + (above + below - 2 * model.rho(points)) / step**2
    torch.testing.assert_close(model.gradient(points), torch.stack(gradient, 1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.laplacian(points), laplacian, rtol=1e-4, atol=1e-5)


def test_linear_fit_finds_the_density_of_exact_samples(hydrogen_samples, wrong_hydrogen):
    molecule = hydrogen_samples.molecule
    grid = becke_quadrature(molecule, 4)
    # A base that is wrong: 1s with another exponent would have another cusp, so add a Gaussian to the orbital.
    base = OrbitalDensity(
        molecule,
        wrong_hydrogen.functions,
        torch.tensor([[1.0], [0.0]], dtype=torch.float64) + torch.tensor([[0.0], [0.25]], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )
    density = fit_linear_log_density(hydrogen_samples, base, grid)
    properties = DensityProperties(density, grid)
    assert float(properties.electrons().value) == pytest.approx(1.0, abs=1e-9)
    contact = properties.contact_densities()
    before = float((base.rho(molecule.centers) / (base.rho(grid.points) * grid.weights).sum())[0])
    assert abs(before - 1 / np.pi) > 0.01
    # exp(-r) has the cusp -1; the base has a weaker one by its Gaussian, which the fit must not pretend to mend.
    assert abs(contact.value[0] - 1 / np.pi) < 0.25 * abs(before - 1 / np.pi)
    exact = fit_linear_log_density(hydrogen_samples, wrong_hydrogen, grid)
    found = DensityProperties(exact, grid)
    assert found.contact_densities().value[0] == pytest.approx(1 / np.pi, abs=1e-3)
    assert float(found.second_moment().value) == pytest.approx(3.0, abs=0.02)


def test_linear_fit_to_a_determinant_has_its_density(h2_determinant, h2):
    samples = samples_of(h2_determinant.wave_function)
    exact = base_density(h2_determinant.wave_function, h2_determinant.grid)
    base = OrbitalDensity(h2, exact.functions, exact.coefficients * 1.0, exact.occupations)
    # The base is distorted smoothly: electrons are pulled to one side and outwards.
    shells = [Shell(0, 0, "gaussian", 0.3), Shell(1, 1, "gaussian", 0.5)]
    bump = AtomicFunctions(h2.centers, shells)
    wrong = _distorted(base, bump, torch.tensor([0.15, 0.0, 0.0, 0.1], dtype=torch.float64))
    grid = h2_determinant.grid
    fitted = fit_linear_log_density(samples, wrong, grid, DensityFitSettings(0.1, 16))
    truth, found = DensityProperties(exact, grid), DensityProperties(fitted, grid)
    assert DensityProperties(wrong, grid).absolute_difference(exact) > 0.02
    assert found.absolute_difference(exact) < 3e-3
    for name in ("dipole", "quadrupole", "second_moment", "contact_densities", "forces"):
        gap = np.abs(getattr(found, name)().value - getattr(truth, name)().value)
        error = getattr(found, name)().error
        assert (gap <= 4 * error + 4e-3 * np.abs(getattr(truth, name)().value).max() + 1e-6).all(), name
    raw = samples.average(samples.positions[..., 2].sum(2))
    assert found.dipole().error[2] < raw.error


class _distorted(OrbitalDensity):
    """A density times the exponential of some functions."""

    def __init__(self, base, functions, coefficients):
        super().__init__(base.molecule, base.functions, base.coefficients, base.occupations)
        self._extra, self._weights = functions, coefficients[:, None]

    def evaluate(self, points, derivatives=0):
        found, extra = super().evaluate(points, derivatives), self._extra.evaluate(points, self._weights, derivatives)
        return found._replace(
            values=found.values + extra.values[0],
            gradients=found.gradients + extra.gradients[:, 0].T if derivatives else found.gradients,
            laplacians=found.laplacians + extra.laplacians[0] if derivatives > 1 else found.laplacians,
        )


def test_neural_density_has_the_cusp_and_learns_hydrogen(hydrogen_samples):
    molecule = hydrogen_samples.molecule
    density = NeuralDensity(molecule, 1.0, 16)
    near = torch.tensor([[0, 0, 1e-4], [0, 0, -1e-4], [0, 0, 2e-4], [0, 0, -2e-4]], dtype=torch.float64)
    values = density.evaluate(near).values
    assert float((values[2:].mean() - values[:2].mean()) / 1e-4) == pytest.approx(-2.0, abs=2e-3)
    grid = becke_quadrature(molecule, 3)
    fitted = fit_neural_density(
        hydrogen_samples, grid, torch.Generator().manual_seed(0), NeuralFitSettings(200, 512, width=16)
    )
    properties = DensityProperties(fitted, grid)
    assert float(properties.electrons().value) == pytest.approx(1.0, abs=1e-9)
    assert properties.contact_densities().value[0] == pytest.approx(1 / np.pi, rel=0.06)
    assert float(properties.second_moment().value) == pytest.approx(3.0, rel=0.06)


def test_neural_density_has_error_bars_that_shrink_with_the_samples(hydrogen_samples):
    grid = becke_quadrature(hydrogen_samples.molecule, 3)
    # Noisy scores, or one electron would leave nothing uncertain: their mean at a place is what it was.
    noise = torch.randn(hydrogen_samples.scores.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    samples = replace(hydrogen_samples, scores=hydrogen_samples.scores + noise)
    few = replace(
        samples,
        **{name: getattr(samples, name)[:, :64] for name in ("positions", "scores", "kinetic", "potential")},
    )
    settings = NeuralFitSettings(80, 512, width=8)
    errors = []
    for part in (samples, few):
        density = fit_neural_density(part, grid, torch.Generator().manual_seed(0), settings)
        assert density.replicas == 32
        found = DensityProperties(density, grid).second_moment()
        errors.append(float(found.error))
        assert abs(float(found.value) - 3.0) < 5 * float(found.error) + 0.02
    assert 1.5 < errors[1] / errors[0] < 6.0  # eight times fewer walkers: the square root of eight, roughly


def test_fits_refuse_what_does_not_belong_together(hydrogen_samples, wrong_hydrogen, lih_determinant):
    other = base_density(lih_determinant.wave_function, lih_determinant.grid)
    with pytest.raises(ConfigurationError, match="another molecule"):
        fit_linear_log_density(hydrogen_samples, other, lih_determinant.grid)
    with pytest.raises(ConfigurationError, match="cannot be split into 1000 groups"):
        fit_linear_log_density(hydrogen_samples, wrong_hydrogen, lih_determinant.grid, DensityFitSettings(groups=1000))
    with pytest.raises(ConfigurationError, match="groups at least 4"):
        DensityFitSettings(groups=2)


def test_jackknife_of_a_mean_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    replicas = [(values.sum() - v) / 19 for v in values]
    found = jackknife(torch.tensor([values.mean(), *replicas], dtype=torch.float64))
    assert float(found.error) == pytest.approx(values.std(ddof=1) / 20**0.5)


@pytest.fixture(scope="module")
def water():
    molecule = Molecule.build([8, 1, 1], [[0.1, 0, 0.2217], [0.1, 1.4309, -0.8867], [0.1, -1.4309, -0.8867]])
    reference = reference_density(molecule, "hf", "cc-pvdz")
    return (
        molecule,
        reference,
        DensityProperties(GaussianDensity.from_reference(molecule, reference), becke_quadrature(molecule, 4)),
    )


def test_properties_of_a_density_matrix_are_pyscfs(water):
    _, reference, properties = water
    mole, matrix = reference.mole, reference.matrices.sum(0)
    assert float(properties.electrons().value) == pytest.approx(10.0, abs=1e-4)
    dipole = mole.atom_charges() @ mole.atom_coords() - np.einsum("xij,ji->x", mole.intor("int1e_r"), matrix)
    np.testing.assert_allclose(properties.dipole().value, dipole, atol=2e-4)
    attraction = np.einsum("ij,ji", mole.intor("int1e_nuc"), matrix)
    assert float(properties.nuclear_attraction().value) == pytest.approx(attraction, abs=5e-3)
    origin = (mole.atom_charges() @ mole.atom_coords()) / 10.0
    with mole.with_common_origin(origin):
        square = mole.intor("int1e_rr").reshape(3, 3, mole.nao, mole.nao)
    moments = np.einsum("xyij,ji->xy", square, matrix)
    away = mole.atom_coords() - origin
    second = np.einsum("a,ax,ay->xy", mole.atom_charges(), away, away) - moments
    quadrupole = 1.5 * second - 0.5 * np.trace(second) * np.eye(3)
    np.testing.assert_allclose(properties.quadrupole().value, quadrupole, atol=1e-3)
    assert float(properties.second_moment().value) == pytest.approx(np.trace(moments), abs=1e-3)
    for atom in range(3):
        with mole.with_rinv_origin(mole.atom_coord(atom)):
            derivative = mole.intor("int1e_iprinv")
        field = 2 * np.einsum("xij,ji->x", derivative, matrix)  # int rho (r - R)/|r - R|^3, by parts
        charge = mole.atom_charge(atom)
        nuclear = sum(
            charge * mole.atom_charge(b) * (away[atom] - away[b]) / np.linalg.norm(away[atom] - away[b]) ** 3
            for b in range(3)
            if b != atom
        )
        expected = nuclear + charge * field
        np.testing.assert_allclose(properties.forces().value[atom], expected, atol=0.02)


def test_potential_is_the_analytic_one_near_and_far(water):
    molecule, reference, properties = water
    points = np.array([[2.0, 1.0, 0.5], [0.6, 0.4, 0.3], [6.0, 0.0, 1.0]])
    found = properties.electrostatic_potential(points)
    integrals = reference.mole.intor("int1e_grids", grids=points)
    electrons = np.einsum("pij,ij->p", integrals, reference.matrices.sum(0))
    nuclei = (molecule.charges / torch.cdist(torch.as_tensor(points), molecule.centers)).sum(1).numpy()
    np.testing.assert_allclose(found.value, nuclei - electrons, atol=2e-3)
    with pytest.raises(ConfigurationError, match="infinite at a nucleus"):
        properties.electrostatic_potential(molecule.centers[:1].numpy())


def test_charges_add_up_and_have_the_signs_of_chemistry(water):
    _, _, properties = water
    for charges in (properties.hirshfeld_charges().value, properties.becke_charges().value):
        assert charges.sum() == pytest.approx(0.0, abs=1e-3)
        assert charges[0] < -0.1 < 0.0 < charges[1]
        assert charges[1] == pytest.approx(charges[2], abs=1e-3)


def test_turned_and_moved_molecules_have_the_same_properties(water):
    molecule, _, before = water
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    moved = Molecule.build(molecule.numbers, molecule.centers.numpy() @ turn.T + [1.0, -2.0, 0.5])
    reference = reference_density(moved, "hf", "cc-pvdz")
    after = DensityProperties(GaussianDensity.from_reference(moved, reference), becke_quadrature(moved, 4))
    np.testing.assert_allclose(after.dipole().value, turn @ before.dipole().value, atol=1e-3)
    np.testing.assert_allclose(after.quadrupole().value, turn @ before.quadrupole().value @ turn.T, atol=2e-3)
    np.testing.assert_allclose(after.hirshfeld_charges().value, before.hirshfeld_charges().value, atol=2e-3)


def test_radial_density_of_hydrogen(wrong_hydrogen):
    normalised = OrbitalDensity(
        wrong_hydrogen.molecule,
        wrong_hydrogen.functions,
        wrong_hydrogen.coefficients / np.pi**0.5,
        wrong_hydrogen.occupations,
    )
    properties = DensityProperties(
        normalised, Quadrature(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    )
    radii = np.array([0.0, 0.5, 2.0])
    np.testing.assert_allclose(properties.radial_density(0, radii).value, np.exp(-2 * radii) / np.pi, rtol=1e-8)
    with pytest.raises(ConfigurationError, match="no atom 3"):
        properties.radial_density(3, radii)
