"""The density that a flow is trained towards: gradients, forces of frames, biases."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flowbridge.core.energy import PotentialEnergy
from flowbridge.core.units import thermal_energy
from flowbridge.flows.boltzmann.configuration import FlowConfiguration
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training.target import CoverageBias, TargetDensity, _rotation

SMILES = "CCCO"
BIASES = (CoverageBias(0, 0.3, 2.0, 1.5), CoverageBias(1, 0.9, 4.0, -0.7))


@pytest.fixture(scope="module", params=["fast", "paper"])
def model(request, generator_of, paper_design):
    return generator_of(SMILES, FlowConfiguration() if request.param == "fast" else paper_design)


@pytest.fixture(scope="module")
def springs(from_smiles, springs_of):
    return springs_of(*from_smiles(SMILES))


@pytest.fixture(scope="module")
def frames(from_smiles, frames_of):
    return torch.as_tensor(frames_of(*from_smiles(SMILES), 6, seed=11))


@pytest.mark.parametrize("biases", [(), BIASES], ids=["plain", "biased"])
def test_gradient_is_the_slope_of_the_density(model, springs, frames, biases):
    target = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0, biases)
    coordinates, _ = model.coordinates.inverse(frames)
    value = target(coordinates)
    assert value.log_density.dtype == torch.float64
    flat, gradient = torch.cat(coordinates, 1), torch.cat(value.gradient, 1)
    circles, h = coordinates.circular.shape[1], 1e-6
    for column in range(flat.shape[1]):
        step = torch.zeros_like(flat)
        step[:, column] = h
        up, down = (
            target(Coordinates(point[:, :circles], point[:, circles:])).log_density
            for point in (flat + step, flat - step)
        )
        slope = (up - down) / (2 * h)
        assert torch.allclose(slope, gradient[:, column], rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_density_is_the_boltzmann_factor_times_the_volume(model, springs, frames):
    target = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0)
    coordinates, down = model.coordinates.inverse(frames)
    expected = -springs(frames) / thermal_energy(300.0) - down
    assert torch.allclose(target(coordinates).log_density, expected, atol=1e-8)


@pytest.mark.parametrize("biases", [(), BIASES], ids=["plain", "biased"])
def test_known_forces_give_the_same_as_an_evaluation(model, springs, frames, biases):
    """In whatever orientation the frames come."""
    target = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0, biases)
    turned = torch.stack(
        [x @ torch.as_tensor(Rotation.random(random_state=seed).as_matrix()).T + seed for seed, x in enumerate(frames)]
    )
    energy, forces = springs.energy_and_forces(turned)
    coordinates, value = target.from_forces(turned, energy, forces)
    expected = target(coordinates)
    assert torch.allclose(value.log_density, expected.log_density, atol=1e-7)
    for found, reference in zip(value.gradient, expected.gradient, strict=True):
        assert torch.allclose(found, reference, rtol=1e-7, atol=1e-8 * float(reference.abs().max()))


def test_forces_of_a_planar_molecule_are_turned_not_mirrored(generator_of, from_smiles, frames_of, springs_of):
    """Three atoms fit their mirror image just as well, but forces across the plane would change their sign."""
    model, springs = generator_of("O"), springs_of(*from_smiles("O"))
    x = torch.as_tensor(frames_of(*from_smiles("O"), 20))
    x = x @ torch.as_tensor(Rotation.random(20, random_state=0).as_matrix()).transpose(1, 2)
    rotation = _rotation(x, model.coordinates(model.coordinates.inverse(x)[0]).value)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(20).double())
    energy, forces = springs.energy_and_forces(x)
    target = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0)
    coordinates, value = target.from_forces(x, energy, forces)
    assert torch.allclose(value.gradient.stiff, target(coordinates).gradient.stiff, rtol=1e-6, atol=1e-6)


class Broken:
    """Energies and forces that are NaN for one configuration."""

    def __init__(self, potential) -> None:
        self.energy = PotentialEnergy(potential)

    def energies_and_forces(self, positions):
        energies, forces = self.energy.energies_and_forces(positions)
        energies[2], forces[2] = np.nan, np.nan
        return energies, forces


def test_a_configuration_without_energy_spoils_no_other(model, springs, frames):
    coordinates, _ = model.coordinates.inverse(frames)
    sound = TargetDensity(model.coordinates, PotentialEnergy(springs), 300.0)(coordinates)
    broken = TargetDensity(model.coordinates, Broken(springs), 300.0)(coordinates)
    rest = [0, 1, 3, 4, 5]
    assert torch.isnan(broken.log_density[2])
    assert torch.equal(broken.log_density[rest], sound.log_density[rest])
    for found, reference in zip(broken.gradient, sound.gradient, strict=True):
        assert torch.equal(found[rest], reference[rest])


def test_bias_is_a_smooth_bump_of_the_stated_height():
    bias = CoverageBias(1, 0.25, 3.0, 2.0)
    turns = torch.stack([torch.zeros(5), torch.tensor([0.25, 1.25, 0.75, 0.26, 0.24])], 1).double()
    factor = bias.log_factor(turns)
    assert float(factor[0]) == pytest.approx(2.0)
    assert float(factor[1]) == pytest.approx(2.0)
    assert float(factor[2]) == pytest.approx(2.0 * math.exp(-6.0))
    assert float(factor[3]) == pytest.approx(float(factor[4]))
