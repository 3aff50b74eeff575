"""Quaternions as orientations, against rotation matrices, scipy and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flowbridge.core.errors import CoordinateError
from flowbridge.flows.rigid.maps.quaternions import (
    chart_log_volume,
    checked_orientations,
    conjugate,
    from_chart,
    product,
    random_orientations,
    rotation_matrices,
    superposition,
    to_chart,
)


@pytest.fixture
def orientations():
    return random_orientations((50,), torch.Generator().manual_seed(1))


def test_matrices_are_those_of_scipy(orientations):
    expected = Rotation.from_quat(orientations.numpy(), scalar_first=True).as_matrix()
    assert np.allclose(rotation_matrices(orientations).numpy(), expected, atol=1e-14)


def test_products_are_rotations_one_after_the_other(orientations):
    first, second = orientations[:25], orientations[25:]
    together = rotation_matrices(first) @ rotation_matrices(second)
    assert torch.allclose(rotation_matrices(product(first, second)), together, atol=1e-14)
    unit = product(first, conjugate(first))
    assert torch.allclose(unit, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(25, 4), atol=1e-14)


def test_superposition_finds_the_rotation_of_a_symmetric_body(orientations):
    tetrahedron = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    points = torch.einsum("bij,sj->bsi", rotation_matrices(orientations), tetrahedron)
    found = superposition(points, tetrahedron)
    assert torch.allclose((found * orientations).sum(-1).abs(), torch.ones(50, dtype=torch.float64), atol=1e-12)


def test_superposition_is_differentiable_where_eigenvalues_coincide():
    """Against finite differences; the eigensolver's own derivative is NaN for a tetrahedron."""
    tetrahedron = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    orientation = random_orientations((1,), torch.Generator().manual_seed(2))
    points = torch.einsum("bij,sj->bsi", rotation_matrices(orientation), tetrahedron)

    def matrix(x):
        return rotation_matrices(superposition(x, tetrahedron))

    assert torch.autograd.gradcheck(matrix, (points.requires_grad_(),), atol=1e-6)


def test_the_chart_does_not_see_signs(orientations):
    assert torch.equal(to_chart(orientations), to_chart(-orientations))
    back = from_chart(to_chart(orientations))
    assert torch.allclose(rotation_matrices(back), rotation_matrices(orientations), atol=1e-12)


def test_the_chart_covers_all_orientations_once():
    """The volume element integrates to one over the chart, and has the distribution of angles of uniform rotations."""
    radius = torch.tan(torch.linspace(0.0, math.pi / 2, 20_001, dtype=torch.float64)[:-1])
    chart = torch.stack([radius, torch.zeros_like(radius), torch.zeros_like(radius)], dim=-1)
    density = 4 * math.pi * radius**2 * chart_log_volume(chart).exp()
    below = torch.cumulative_trapezoid(density, radius)
    assert float(below[-1]) == pytest.approx(1.0, abs=1e-3)
    angles = 2 * torch.atan(radius[1:])
    assert torch.allclose(below, (angles - angles.sin()) / math.pi, atol=1e-3)


@pytest.mark.parametrize("wrong", [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0]])
def test_vectors_that_are_no_orientations_are_refused(wrong):
    with pytest.raises(CoordinateError, match="not of unit length"):
        checked_orientations(torch.tensor([[1.0, 0.0, 0.0, 0.0], wrong]))
    with pytest.raises(CoordinateError, match="quaternions"):
        checked_orientations(torch.ones(2, 3))
