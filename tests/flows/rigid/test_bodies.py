"""Bodies between sites and positions with orientations."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError, CoordinateError
from flowbridge.flows.rigid.bodies import BodyConfiguration, RigidBodies
from flowbridge.flows.rigid.crystal import Crystal, at_rest, from_flat, to_flat
from flowbridge.flows.rigid.energies import BodyEnergy
from flowbridge.flows.rigid.maps.quaternions import random_orientations

WATER = torch.tensor([[0, 0, 0], [0, 0.0757, 0.0586], [0, -0.0757, 0.0586], [0, 0, 0.0125]], dtype=torch.float64)
MASSES = torch.tensor([15.999, 1.008, 1.008, 0.0], dtype=torch.float64)


@pytest.fixture
def water():
    return RigidBodies.centred(WATER, MASSES, 3)


def configurations(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BodyConfiguration(
        torch.randn(count, 3, 3, generator=generator, dtype=torch.float64), random_orientations((count, 3), generator)
    )


def test_back_and_forth(water):
    start = configurations(20)
    back = water.configuration(water.places(start))
    assert torch.allclose(back.positions, start.positions, atol=1e-13)
    assert torch.allclose(
        (back.orientations * start.orientations).sum(-1).abs(), torch.ones(20, 3).double(), atol=1e-13
    )


def test_positions_are_centres_of_mass(water):
    start = configurations(5)
    places = water.places(start).unflatten(1, (3, 4))
    centres = torch.einsum("bmsi,s->bmi", places, MASSES / MASSES.sum())
    assert torch.allclose(centres, start.positions, atol=1e-14)


def test_cut_molecules_are_made_whole(water):
    start = configurations(10)
    box = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    wrapped = torch.remainder(water.places(start), box)
    with pytest.raises(CoordinateError, match=r"is not rigid.*Make molecules whole"):
        water.configuration(wrapped)
    back = water.configuration(wrapped, box)
    shift = (back.positions - start.positions) / box
    assert torch.allclose(shift, shift.round(), atol=1e-12)


def test_collapsed_and_bent_molecules_are_named(water):
    places = water.places(configurations(4))
    places[2, 4:8] = places[2, 4]
    with pytest.raises(CoordinateError, match="body 1 of configuration 2 is not rigid"):
        water.configuration(places)
    with pytest.raises(CoordinateError, match=r"expected \(B, 12, 3\)"):
        water.configuration(places[:, :8])
    broken = configurations(2)
    with pytest.raises(CoordinateError, match="unit length"):
        water.places(broken._replace(orientations=2 * broken.orientations))
    with pytest.raises(CoordinateError, match="do not describe 3 bodies"):
        water.places(broken._replace(orientations=broken.orientations[:, :2]))


def test_templates_that_show_no_orientation_are_refused():
    with pytest.raises(ConfigurationError, match="one line"):
        RigidBodies(torch.tensor([[0.0, 0.0, -0.1], [0.0, 0.0, 0.1]]), 1)
    with pytest.raises(ConfigurationError, match="positive"):
        RigidBodies(WATER, 0)


def test_gradient_by_quaternions_is_the_one_of_finite_differences(three_bodies):
    energy = BodyEnergy(three_bodies.bodies, three_bodies.energy)
    flat = 0.1 * torch.randn(2, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def function(x):
        return energy.reduced(three_bodies.crystal.configuration(from_flat(x, 3)), 300.0)

    assert torch.autograd.gradcheck(function, (flat.requires_grad_(),), atol=1e-5)


def test_crystal_coordinates(three_bodies):
    crystal = three_bodies.crystal
    rest = crystal.coordinates(crystal.configuration(at_rest(3)))
    assert torch.allclose(to_flat(rest), torch.zeros(1, 15, dtype=torch.float64), atol=1e-14)
    flat = 0.1 * torch.randn(4, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    placed = crystal.configuration(from_flat(flat, 3))
    # Moved as a whole, into other periodic images, and with other signs, it is the same.
    images = torch.tensor([[0, 0, 0], [1, -2, 0], [0, 3, 1]], dtype=torch.float64) * crystal.box
    moved = BodyConfiguration(placed.positions + 0.3 + images, -placed.orientations)
    assert torch.allclose(to_flat(crystal.coordinates(moved)), flat, atol=1e-12)


def test_boxes_of_other_shapes_are_refused():
    sites, orientations = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for box in (torch.eye(3), torch.tensor([1.0, 1.0, 0.0])):
        with pytest.raises(ConfigurationError, match="three positive lengths"):
            Crystal(sites, orientations, box)
