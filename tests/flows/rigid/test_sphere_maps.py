"""Maps of circles and spheres: volumes against autograd, inverses, oddness, densities by quadrature."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from flowbridge.core.errors import ConvergenceError
from flowbridge.flows.rigid.maps.convex_gradient import ProjectiveConvexGradient, QuadraticMixture
from flowbridge.flows.rigid.maps.moebius import CircleMoebius, SymmetrisedMoebius, in_ball
from flowbridge.flows.rigid.maps.quaternions import chart_log_volume, from_chart


def points(count, dimension, seed=0):
    return normalize(
        torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def centres(count, dimension, seed=1):
    return in_ball(
        2 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


def mixture(shape, seed=2, size=1.0, power=3.0):
    generator = torch.Generator().manual_seed(seed)
    factors = size * torch.randn(*shape, 5, 4, 4, generator=generator, dtype=torch.float64)
    return QuadraticMixture(
        factors, torch.full(shape, power, dtype=torch.float64), torch.full((*shape, 5), 0.05, dtype=torch.float64)
    )


def log_area_change(function, x):
    """Return log-volumes of a map of the sphere by its Jacobian between tangent spaces."""
    jacobians = torch.func.vmap(torch.func.jacrev(function))(x)
    images = function(x)

    def tangents(p):
        return torch.linalg.svd(p.unsqueeze(1), full_matrices=True).Vh[:, 1:].mT

    return torch.linalg.slogdet(tangents(images).mT @ jacobians @ tangents(x)).logabsdet


def published_moebius(p, q):
    """The formulas of arXiv 2301.11355: the sum of two reflections, normalised."""

    def moebius(p, q):
        r = q - p
        return -(p - 2 * (p * r).sum(-1, keepdim=True) / (r * r).sum(-1, keepdim=True) * r)

    d = p.shape[-1]
    squares = (q * q).sum(-1)
    volume = (1 - squares) * (1 + squares) ** (d - 1) / ((1 + squares) ** 2 - 4 * (q * p).sum(-1) ** 2) ** (d / 2)
    return normalize(moebius(p, q) + moebius(p, -q), dim=-1), volume.log()


@pytest.mark.parametrize("dimension", [2, 3, 4])
class TestSymmetrisedMoebius:
    def test_is_the_published_layer(self, dimension):
        p, q = points(200, dimension), centres(200, dimension)
        value, log_det = SymmetrisedMoebius.forward(p, q)
        expected, volume = published_moebius(p, q)
        assert torch.allclose(value, expected, atol=1e-12)
        assert torch.allclose(log_det, volume, atol=1e-11)

    def test_inverse_undoes_it_also_near_the_edge_of_the_ball(self, dimension):
        p, q = points(200, dimension), 0.95 * points(200, dimension, 3)
        value, log_det = SymmetrisedMoebius.forward(p, q)
        back, other = SymmetrisedMoebius.inverse(value, q)
        assert torch.allclose(back, p, atol=1e-11)
        assert torch.allclose(log_det + other, torch.zeros(200, dtype=torch.float64), atol=1e-10)

    def test_is_smooth_at_the_centre(self, dimension):
        p = points(3, dimension)
        q = torch.zeros(3, dimension, dtype=torch.float64, requires_grad=True)
        value, log_det = SymmetrisedMoebius.forward(p, q)
        assert torch.allclose(value, p)
        gradient = torch.autograd.grad(value.sum() + log_det.sum(), q)[0]
        assert torch.isfinite(gradient).all()

    def test_volume(self, dimension):
        p, q = points(50, dimension), centres(1, dimension)[0]
        numeric = log_area_change(lambda x: SymmetrisedMoebius.forward(x, q.expand_as(x)).value, p)
        assert torch.allclose(SymmetrisedMoebius.forward(p, q.expand_as(p)).log_det, numeric, atol=1e-10)


class TestCircle:
    def test_is_the_complex_moebius_map(self):
        angles = torch.linspace(-3.0, 3.0, 41, dtype=torch.float64)
        w = centres(41, 2)
        value, _ = CircleMoebius.forward(angles, w)
        z, c = torch.exp(1j * angles), torch.complex(w[:, 0], w[:, 1])
        assert torch.allclose(torch.exp(1j * value), (z - c) / (1 - c.conj() * z), atol=1e-13)

    def test_inverse_and_slope(self):
        angles = torch.linspace(-3.0, 3.0, 41, dtype=torch.float64)
        w = centres(41, 2)
        value, log_slope = CircleMoebius.forward(angles, w)
        back, other = CircleMoebius.inverse(value, w)
        assert torch.allclose(back, angles, atol=1e-12)
        assert torch.allclose(log_slope, -other, atol=1e-11)
        numeric = torch.func.vmap(torch.func.grad(lambda a, c: CircleMoebius.forward(a, c).value))(angles, w)
        assert torch.allclose(log_slope, numeric.log(), atol=1e-11)


class TestConvexGradient:
    @pytest.mark.parametrize(
        ("size", "power"), [(0.01, 1.0), (1.0, 3.0), (5.0, 20.0), (30.0, 50.0), (1.0, 0.5), (5.0, 0.6)]
    )
    def test_is_undone_for_any_parameters(self, size, power):
        p = points(300, 4)
        parameters = mixture((300,), size=size, power=power)
        value, log_det = ProjectiveConvexGradient.forward(p, parameters)
        back, other = ProjectiveConvexGradient.inverse(value, parameters)
        assert torch.allclose(back, p, atol=1e-9)
        assert torch.allclose(log_det + other, torch.zeros(300, dtype=torch.float64), atol=1e-6)

    def test_is_odd(self):
        p, parameters = points(20, 4), mixture((20,))
        assert torch.equal(
            ProjectiveConvexGradient.forward(-p, parameters).value,
            -ProjectiveConvexGradient.forward(p, parameters).value,
        )

    def test_volume(self):
        p, one = points(50, 4), mixture(())

        def function(x):
            return ProjectiveConvexGradient.forward(x, one).value

        assert torch.allclose(ProjectiveConvexGradient.forward(p, one).log_det, log_area_change(function, p), atol=1e-9)

    def test_power_one_is_the_projective_linear_map(self):
        p, parameters = points(20, 4), mixture((20,), power=1.0)
        factors, _, floor = parameters
        matrix = (factors.mT @ factors).sum(-3) + floor.sum(-1)[..., None, None] * torch.eye(4, dtype=torch.float64)
        expected = normalize((matrix @ p.unsqueeze(-1)).squeeze(-1), dim=-1)
        assert torch.allclose(ProjectiveConvexGradient.forward(p, parameters).value, expected, atol=1e-12)

    def test_implicit_derivatives_are_those_of_finite_differences_twice(self):
        p, (factors, power, floor) = points(1, 4), mixture((1,))
        parameters = QuadraticMixture(factors[:, :2], power, floor[:, :2])

        def function(x, factors, power):
            unit = x / x.norm(dim=-1, keepdim=True)
            value, log_det = ProjectiveConvexGradient.inverse(unit, QuadraticMixture(factors, power, parameters.floor))
            return value[..., :3], log_det

        inputs = (p.requires_grad_(), parameters.factors.requires_grad_(), parameters.power.requires_grad_())
        assert torch.autograd.gradcheck(function, inputs, atol=1e-6)
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5)

    def test_nan_is_not_returned(self):
        broken = torch.full((2, 4), math.nan, dtype=torch.float64)
        with pytest.raises(ConvergenceError, match="did not converge"):
            ProjectiveConvexGradient.inverse(broken, mixture((2,)))

    def test_the_published_function_is_not_always_invertible(self):
        """The reason for another convex function: x . H^-1 grad phi changes its sign for sums of log(b + cosh(c . x))."""
        generator = torch.Generator().manual_seed(0)
        c = 10.0 * torch.randn(4, 4, generator=generator, dtype=torch.float64)

        def phi(x):
            return torch.log(1.0 + torch.cosh(c @ x)).mean() + 1e-3 * x @ x

        x = points(2000, 4)
        gradients = torch.func.vmap(torch.func.grad(phi))(x)
        hessians = torch.func.vmap(torch.func.hessian(phi))(x)
        assert torch.linalg.eigvalsh(hessians).min() > 0
        condition = (x * torch.linalg.solve(hessians, gradients)).sum(-1)
        assert (condition > 0).any()
        assert (condition < 0).any()


@pytest.mark.parametrize("kind", ["moebius", "convex gradient"])
def test_densities_of_orientations_integrate_to_one(kind):
    """By quadrature over the chart of SO(3): angle and axis of each rotation."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(60))
    half_angle = (nodes + 1) * math.pi / 4  # of the rotation, 0 to pi / 2
    cosines, azimuths = nodes, (torch.arange(60, dtype=torch.float64)) * math.pi / 30
    h, z, f = torch.meshgrid(half_angle, cosines, azimuths, indexing="ij")
    s = (1 - z**2).sqrt()
    chart = h.tan().unsqueeze(-1) * torch.stack([s * f.cos(), s * f.sin(), z], dim=-1)
    # d chart = tan^2 h / cos^2 h dh dz df
    log_weight = chart_log_volume(chart) + 2 * h.tan().log() - 2 * h.cos().log()
    share = log_weight.exp() * (weights[:, None, None] * math.pi / 4) * weights[None, :, None] * math.pi / 30
    assert float(share.sum()) == pytest.approx(1.0, abs=1e-10)
    orientations = from_chart(chart).reshape(-1, 4)
    if kind == "moebius":
        q = 0.6 * points(1, 4, 5)
        log_density = SymmetrisedMoebius.inverse(orientations, q.expand_as(orientations)).log_det
    else:
        # In the closed direction: the density that a uniform base has after the implicit map.
        log_density = ProjectiveConvexGradient.forward(orientations, mixture((), size=0.5)).log_det
    assert float((share.reshape(-1) * log_density.exp()).sum()) == pytest.approx(1.0, abs=1e-4)
