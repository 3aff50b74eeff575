"""Energies of DW4, LJ13 and LJ55, and the normal distribution that flows start from."""

import math

import numpy as np
import pytest
import torch

import flowbridge as fb
from flowbridge.core.errors import ConfigurationError
from flowbridge.core.units import thermal_energy
from flowbridge.flows.equivariant.mean_free import MeanFreeNormal, without_mean
from flowbridge.flows.equivariant.systems import DoubleWellParticles, LennardJonesCluster

SYSTEMS = {"dw4": DoubleWellParticles(), "lj13": LennardJonesCluster(), "lj55": LennardJonesCluster(55)}


def lattice(system, batch: int = 3):
    """Return particles that are apart from each other, as ``(B, N, D)`` in reduced lengths."""
    generator = torch.Generator().manual_seed(1)
    side = math.ceil(system.count ** (1 / system.dimension))
    grid = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * system.dimension)[: system.count]
    return 1.1 * grid + 0.1 * torch.randn(batch, *grid.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SYSTEMS)
def test_closed_form_gradients(name):
    system = SYSTEMS[name]
    x = lattice(system).requires_grad_(True)
    energy = system.reduced_energy(x)
    (expected,) = torch.autograd.grad(energy.sum(), x)
    found = system.reduced_energy_and_gradient(x)
    torch.testing.assert_close(found.energy, energy.detach())
    torch.testing.assert_close(found.gradient, expected)


@pytest.mark.parametrize("name", SYSTEMS)
def test_forces_are_slopes_of_the_energy_in_simulators_units(name):
    system = SYSTEMS[name]
    positions = torch.zeros(3, system.count, 3, dtype=torch.float64)
    positions[..., : system.dimension] = system.length * lattice(system)
    energy, forces = system.energy_and_forces(positions)
    assert torch.equal(energy, system(positions))
    step = 1e-6 * system.length
    for index in ((0, 0), (2, 1), (system.count - 1, 2)):
        moved = positions.clone()
        moved[:, index[0], index[1]] += step
        back = positions.clone()
        back[:, index[0], index[1]] -= step
        slope = (system(moved) - system(back)) / (2.0 * step)
        torch.testing.assert_close(forces[:, index[0], index[1]], -slope, rtol=1e-6, atol=1e-3)


def test_double_well_by_hand():
    """Four particles on a square of side 3: four sides, two diagonals, each pair once."""
    square = 3.0 * torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]]).double()
    side, diagonal = (-4.0 * s**2 + 0.9 * s**4 for s in (3.0 - 4.0, 3.0 * math.sqrt(2.0) - 4.0))
    assert SYSTEMS["dw4"].reduced_energy(square).item() == pytest.approx(4 * side + 2 * diagonal)


def test_convention_of_pairs():
    """Two particles at the minimum: the pair counts once or twice, the oscillator always once."""
    pair = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]).double()
    once = LennardJonesCluster(2, times_counted=1).reduced_energy(pair).item()
    twice = LennardJonesCluster(2).reduced_energy(pair).item()
    assert once == pytest.approx(-1.0 + 0.25)
    assert twice == pytest.approx(-2.0 + 0.25)


def test_energies_in_kj_per_mol():
    system = LennardJonesCluster(2, length=0.4, temperature=250.0)
    positions = torch.tensor([[[0.0, 0.0, 0.0], [0.4, 0.0, 0.0]]]).double()
    assert system(positions).item() == pytest.approx(thermal_energy(250.0) * (-2.0 + 0.25))


def test_systems_are_saved_and_loaded(tmp_path):
    for name, system in SYSTEMS.items():
        fb.save(system, tmp_path / f"{name}.flow")
        loaded = fb.load(tmp_path / f"{name}.flow")
        positions = system.length * torch.nn.functional.pad(lattice(system), (0, 3 - system.dimension))
        assert torch.equal(loaded(positions), system(positions))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LennardJonesCluster(1), "at least two"),
        (lambda: LennardJonesCluster(times_counted=3), "once or twice"),
        (lambda: LennardJonesCluster(oscillator=0.0), "evaporates"),
        (lambda: LennardJonesCluster(length=-1.0), "positive"),
        (lambda: DoubleWellParticles(c=0.0), "quartic"),
        (lambda: DoubleWellParticles(temperature=0.0), "kelvin"),
        (lambda: SYSTEMS["dw4"].reduced_energy(torch.zeros(2, 4, 3)), r"\(batch, 4, 2\)"),
        (lambda: SYSTEMS["lj13"](torch.zeros(1, 13, 3), cell=torch.eye(3)[None]), "cell"),
        (lambda: MeanFreeNormal(1, 3), "count"),
        (lambda: MeanFreeNormal(3, 3, 0.0), "scale"),
    ],
)
def test_hostile_input(make, message):
    with pytest.raises((ValueError, ConfigurationError), match=message):
        make()


def test_the_normaliser_by_quadrature():
    """Three particles on a line: the plane without mean, in an orthonormal basis of it."""
    prior = MeanFreeNormal(3, 1, scale=0.7)
    basis = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]).double()
    basis /= basis.norm(dim=1, keepdim=True)
    grid = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)
    plane = torch.cartesian_prod(grid, grid)
    density = prior.log_prob((plane @ basis).unsqueeze(-1)).exp()
    assert density.sum().item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1.0, abs=1e-9)


def test_samples_of_the_prior():
    prior = MeanFreeNormal(4, 2, scale=1.5)
    x = prior.sample(20_000, torch.Generator().manual_seed(2), torch.float64)
    assert without_mean(x).sub(x).abs().max() < 1e-12
    squared = x.square().sum((1, 2)).numpy() / 1.5**2
    assert squared.mean() == pytest.approx(6.0, abs=5.0 * squared.std() / math.sqrt(len(squared)))
    entropy = -prior.log_prob(x).numpy()
    expected = prior.log_normaliser + 3.0
    assert entropy.mean() == pytest.approx(expected, abs=5.0 * entropy.std() / math.sqrt(len(entropy)))


def test_both_conventions_as_numbers():
    """The constants by which published numbers differ."""
    assert MeanFreeNormal(4, 2).gaussian_constant == pytest.approx(3.0 * np.log(2.0 * np.pi))
    assert MeanFreeNormal(13, 3).gaussian_constant == pytest.approx(33.082, abs=1e-3)
    assert MeanFreeNormal(13, 3, 0.5).gaussian_constant == MeanFreeNormal(13, 3).gaussian_constant
