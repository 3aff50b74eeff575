"""A Boltzmann generator as a density, as a sampler and as an energy: the three must be one and the same."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.model_files.files import load, save
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.internal_coordinates import InternalCoordinates, InternalPoint

DESIGNS = {
    "fast": {},
    "affine": {"stiff": {"transform": "affine", "couplings": 3}},
    "paper": {
        "circular": "all",
        "torsions": {"couplings": 4, "components": 6, "learn_steepness": True},
        "stiff": {"map": "interval", "transform": "bumps", "split": "angles_then_bonds", "couplings": 5},
    },
}
every_design = pytest.mark.parametrize("design", DESIGNS)


@pytest.fixture(scope="module")
def model_of(generator_of):
    models = {}

    def make(smiles: str, design: str, dtype: torch.dtype = torch.float64) -> BoltzmannGenerator:
        key = (smiles, design, dtype)
        if key not in models:
            models[key] = generator_of(smiles, FlowConfiguration.model_validate(DESIGNS[design]), dtype)
        return models[key]

    return make


def draws(model: BoltzmannGenerator, count: int, seed: int = 0):
    return model.sample_positions(count, torch.Generator().manual_seed(seed))


@every_design
@pytest.mark.parametrize("smiles", ["O", "OO", "CCO", "CCCCO", "CC(O)CCO", "C1CC1"])
def test_every_molecule_and_design_gives_a_density_and_samples(model_of, smiles, design):
    """From no torsion at all over one, two and three free chain torsions to a ring."""
    model = model_of(smiles, design)
    samples = draws(model, 40)
    assert samples.positions.shape == (40, len(model.metadata.particles), 3)
    assert samples.positions.dtype == samples.log_prob.dtype == torch.float64
    assert torch.isfinite(samples.log_prob).all()
    latent, _ = model.flow.inverse(model.coordinates.inverse(samples.positions)[0])
    coordinates, down = model.flow(latent)
    again, up = model.coordinates(coordinates)
    assert torch.allclose(model.log_prob(again), samples.log_prob, atol=1e-7)
    assert torch.allclose(model.flow.base_log_prob(latent) - down - up, samples.log_prob, atol=1e-7)


@every_design
def test_density_of_samples_is_base_density_over_volume(model_of, design):
    """The sampler's own latent variables, not those found by the inverse."""
    model = model_of("CCCO", design)
    with torch.no_grad():
        latent = model.flow.sample_latent(50, torch.Generator().manual_seed(4))
        coordinates, first = model.flow(latent)
        positions, second = model.coordinates(coordinates)
        expected = model.flow.base_log_prob(latent) - first - second
        assert torch.allclose(model.log_prob(positions), expected, atol=1e-8)
        samples = draws(model, 50, seed=4)
    assert torch.allclose(samples.log_prob, expected, atol=1e-8)
    assert torch.allclose(samples.positions.mean(1), torch.zeros(50, 3, dtype=torch.float64), atol=1e-14)


@every_design
def test_density_is_invariant_under_rigid_motion_but_not_in_the_mirror(model_of, design):
    model = model_of("CC(O)CCO", design)
    x = draws(model, 8).positions
    log_prob = model.log_prob(x)
    for seed in range(3):
        rotation = torch.as_tensor(Rotation.random(random_state=seed).as_matrix())
        moved = x @ rotation.T + torch.tensor([3.0, -2.0, 5.0])
        assert torch.allclose(model.log_prob(moved), log_prob, atol=1e-10, rtol=0)
    mirrored = model.log_prob(x * torch.tensor([-1.0, 1.0, 1.0]))
    assert float((mirrored - log_prob).detach().abs().min()) > 1e-3


@every_design
def test_forces_are_the_slope_of_the_energy_and_move_nothing_as_a_whole(model_of, design):
    model = model_of("CCCO", design)
    x = draws(model, 2).positions
    energy, forces = model.energy_and_forces(x)
    assert energy.dtype == forces.dtype == torch.float64
    assert torch.allclose(energy, -thermal_energy(300.0) * model.log_prob(x), rtol=1e-14)
    with torch.no_grad():
        for atom, axis in ((0, 0), (3, 1), (5, 2), (11, 0)):
            step = torch.zeros_like(x)
            step[:, atom, axis] = 1e-6
            slope = (model(x + step) - model(x - step)) / 2e-6
            assert torch.allclose(-slope, forces[:, atom, axis], rtol=1e-5, atol=1e-4)
    size = float(forces.abs().max())
    assert float(forces.sum(1).abs().max()) < 1e-9 * size
    assert float(torch.linalg.cross(x, forces).sum(1).abs().max()) < 1e-9 * size


@every_design
def test_forces_are_continuous_where_torsions_are_cut(model_of, design):
    """Turn every torsion through both places where it could jump: 0 and half a turn."""
    model = model_of("CCCO", design)
    internal = model.coordinates.internal
    point, _ = internal.inverse(draws(model, 1).positions)
    for index in range(point.torsions.shape[1]):
        if index in model.coordinates.layout.stiff:
            continue
        for cut in (0.0, math.pi):
            torsions = point.torsions.repeat(2, 1)
            torsions[:, index] = torch.tensor([cut - 1e-9, cut + 1e-9])
            x, _ = internal(InternalPoint(point.bonds.repeat(2, 1), point.angles.repeat(2, 1), torsions))
            energy, forces = model.energy_and_forces(x)
            assert float((energy[0] - energy[1]).abs()) < 1e-5
            # the two configurations differ by 1e-10 nm, over which forces change by curvature times that
            assert float((forces[0] - forces[1]).abs().max()) < 1e-4 * float(forces.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_design
def test_single_precision_networks_agree_with_double(model_of, design, dtype):
    model = model_of("CCCO", design, dtype)
    assert model.flow.dtype == dtype
    x = draws(model_of("CCCO", design), 20).positions
    log_prob, reference = model.log_prob(x), model_of("CCCO", design).log_prob(x)
    assert log_prob.dtype == torch.float64
    assert torch.allclose(log_prob, reference, atol=2e-3)
    _, forces = model.energy_and_forces(x)
    _, exact = model_of("CCCO", design).energy_and_forces(x)
    assert float((forces - exact).norm() / exact.norm()) < 1e-3


@every_design
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_file_gives_the_same_bits(model_of, tmp_path, design, dtype):
    model = model_of("CCCO", design, dtype)
    samples = draws(model, 16)
    save(model, tmp_path / "propanol.flow")
    loaded = load(tmp_path / "propanol.flow")
    assert isinstance(loaded, BoltzmannGenerator)
    assert loaded.metadata == model.metadata
    assert loaded.flow_configuration == model.flow_configuration
    assert loaded.coordinates.layout == model.coordinates.layout
    assert torch.equal(loaded.log_prob(samples.positions), model.log_prob(samples.positions))
    assert torch.equal(draws(loaded, 16).positions, samples.positions)
    assert torch.equal(
        loaded.energy_and_forces(samples.positions).forces, model.energy_and_forces(samples.positions).forces
    )


def test_a_cell_is_refused(model_of):
    model = model_of("OO", "fast")
    x = draws(model, 1).positions
    with pytest.raises(ConfigurationError, match="neither a cell nor global parameters"):
        model(x, cell=torch.eye(3)[None])
    with pytest.raises(ConfigurationError, match="neither a cell nor global parameters"):
        model(x, scale=2.0)


def test_no_samples_at_all_are_refused(model_of):
    with pytest.raises(ConfigurationError, match="must be positive, got 0"):
        draws(model_of("OO", "fast"), 0)


@every_design
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_towards_itself_are_all_equal(model_of, design, dtype):
    model = model_of("CCCO", design, dtype)
    samples = model.sample(200, target=model, seed=5)
    assert len(samples) == 200
    spread = 1e-10 if dtype == torch.float64 else 1e-3
    assert np.ptp(samples.log_weights) < spread
    assert samples.effective_sample_size() == pytest.approx(200, rel=spread**2)
    assert np.array_equal(samples.positions, model.sample(200, target=model, seed=5).positions)
    assert not np.array_equal(samples.positions, model.sample(200, target=model, seed=6).positions)


def test_weights_towards_another_density_give_its_averages(model_of, springs_of, from_smiles):
    """The mean of a bond under springs: reweighted samples of the flow against quadrature."""
    model = model_of("O", "affine")  # the one whose random networks have tails that are lighter than the springs'
    particles, positions = from_smiles("O")
    springs = springs_of(particles, positions)
    samples = model.sample(20_000, target=springs, seed=1)
    bonds = np.linalg.norm(samples.positions[:, 0] - samples.positions[:, 1], axis=1)
    mean = np.average(bonds, weights=np.exp(samples.log_weights - samples.log_weights.max()))
    # quadrature in b1, b2 and the angle, with the volume b1^2 b2^2 sin a
    b = np.linspace(0.07, 0.13, 121)
    a = np.linspace(0.9, 2.6, 161)
    b1, b2, angle = np.meshgrid(b, b, a, indexing="ij")
    x = np.zeros((b1.size, 3, 3))
    x[:, 1, 0] = b1.ravel()
    x[:, 2, 0], x[:, 2, 1] = (b2 * np.cos(angle)).ravel(), (b2 * np.sin(angle)).ravel()
    energy = springs(torch.as_tensor(x)).numpy()
    density = np.exp(-energy / thermal_energy(300.0)) * (b1**2 * b2**2 * np.sin(angle)).ravel()
    expected = (density * b1.ravel()).sum() / density.sum()
    assert samples.effective_sample_size() > 2000
    assert mean == pytest.approx(expected, abs=5 * bonds.std() / math.sqrt(samples.effective_sample_size()))


def test_draws_that_are_no_configuration_have_no_weight(springs_of, from_smiles):
    """Coordinates standardised so widely that bonds come out negative: the normaliser of the springs all the same."""
    particles, positions = from_smiles("O")
    random = np.random.default_rng(0)
    widely = positions + 0.03 * random.standard_normal((4000, 3, 3))
    model = BoltzmannGenerator.untrained(particles, 300.0, widely, FlowConfiguration())
    soft = springs_of(particles, positions)
    soft.constants = soft.constants * 0.01
    samples = model.sample(50_000, target=soft, seed=2)
    impossible = np.isneginf(samples.log_weights)
    assert 50 < impossible.sum() < 5000
    drawn = draws(model, 50_000, seed=2)
    assert np.array_equal(np.isposinf(drawn.log_prob.numpy()), impossible)
    assert samples.provenance["without_finite_energy"] == impossible.sum()
    b, a = np.linspace(1e-4, 0.35, 120), np.linspace(1e-4, np.pi - 1e-4, 120)
    b1, b2, angle = np.meshgrid(b, b, a, indexing="ij")
    x = np.zeros((b1.size, 3, 3))
    x[:, 1, 0] = b1.ravel()
    x[:, 2, 0], x[:, 2, 1] = (b2 * np.cos(angle)).ravel(), (b2 * np.sin(angle)).ravel()
    density = (
        np.exp(-soft(torch.as_tensor(x)).numpy() / thermal_energy(300.0)) * (b1**2 * b2**2 * np.sin(angle)).ravel()
    )
    exact = density.sum() * (b[1] - b[0]) ** 2 * (a[1] - a[0])
    weights = np.exp(samples.log_weights)
    error = weights.std() / len(weights) ** 0.5
    assert error < 0.03 * exact
    assert abs(weights.mean() - exact) < 4.0 * error


class Overlapping:
    """An energy that has no value for some configurations."""

    def __init__(self, model: BoltzmannGenerator) -> None:
        self.model = model

    def energies_and_forces(self, positions):
        energy, forces = self.model.energy_and_forces(torch.as_tensor(positions))
        energy[3], energy[7] = torch.nan, torch.inf
        return energy.numpy(), forces.numpy()


def test_samples_without_an_energy_get_no_weight_and_are_counted(model_of):
    model = model_of("OO", "fast")
    samples = model.sample(50, target=Overlapping(model))
    assert np.flatnonzero(np.isneginf(samples.log_weights)).tolist() == [3, 7]
    assert samples.provenance["without_finite_energy"] == 2
    assert samples.effective_sample_size() == pytest.approx(48, rel=1e-6)


def test_the_target_may_be_a_model_file(model_of, tmp_path, monkeypatch):
    """A generator reweighted to itself has equal weights; the file is compiled for batches where a compiler is asked for."""
    model = model_of("OO", "fast")
    file = tmp_path / "itself.flow"
    save(model, file)
    samples = model.sample(100, target=file)
    assert samples.effective_sample_size() == pytest.approx(100, rel=1e-9)
    assert samples.provenance["target"] == str(file)
    monkeypatch.setenv("FLOWBRIDGE_COMPILE", "auto")
    monkeypatch.setattr("flowbridge.core.compilation.programs.compiler", lambda: None)
    with pytest.warns(UserWarning, match="at a fraction of the speed"):
        again = model.sample(100, target=file)
    assert again.log_weights == pytest.approx(samples.log_weights)


@pytest.mark.parametrize("smiles", ["O", "OO"])
@every_design
def test_the_density_of_positions_integrates_to_one(model_of, smiles, design):
    """Importance sampling from an unrelated density: Student's t in bonds and angles, uniform torsions."""
    model = model_of(smiles, design)
    internal: InternalCoordinates = model.coordinates.internal
    count = 40_000
    centre, _ = internal.inverse(draws(model, 500, seed=9).positions)
    generator = np.random.default_rng(0)
    parts, log_proposal = [], np.zeros(count)
    degrees = 4.0
    for values in (centre.bonds, centre.angles):
        mean, deviation = values.mean(0).numpy(), 1.2 * values.std(0).numpy()
        t = generator.standard_t(degrees, (count, len(mean)))
        parts.append(torch.as_tensor(mean + deviation * t))
        constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
        log_density = constant - 0.5 * (degrees + 1) * np.log1p(t**2 / degrees) - np.log(deviation)
        log_proposal += log_density.sum(1)
    turns = centre.torsions.shape[1]
    parts.append(torch.as_tensor(generator.uniform(-math.pi, math.pi, (count, turns))))
    log_proposal -= turns * math.log(2 * math.pi)
    possible = (parts[0] > 0).all(1) & (parts[1] > 0).all(1) & (parts[1] < math.pi).all(1)
    point = InternalPoint(*(part[possible] for part in parts))
    with torch.no_grad():
        x, log_volume = internal(point)
        ratio = torch.exp(model.log_prob(x) + log_volume - torch.as_tensor(log_proposal)[possible]).numpy()
    integral = ratio.sum() / count
    error = math.sqrt((ratio**2).sum() / count - integral**2) / math.sqrt(count)
    assert error < 0.02
    assert integral == pytest.approx(1.0, abs=4 * error)
