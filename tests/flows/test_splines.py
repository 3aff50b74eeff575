"""Splines: inverse, volume, identity outside."""

import pytest
import torch

from flowbridge.core.errors import ConfigurationError
from flowbridge.flows.transforms.splines import RationalQuadraticSpline

pytest.importorskip("zuko", reason="zuko is not installed: pip install zuko")


def parameters(spline, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(count, 2, spline.parameter_count, generator=generator, dtype=torch.float64)


def test_forward_and_inverse_undo_each_other_and_know_their_slopes():
    spline = RationalQuadraticSpline(7, 3.0)
    generator = torch.Generator().manual_seed(1)
    latent = (2.0 * torch.randn(400, 2, generator=generator, dtype=torch.float64)).requires_grad_(True)
    held = parameters(spline, 400)
    data, log_slope = spline(latent, held)
    (slope,) = torch.autograd.grad(data.sum(), latent, retain_graph=True)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-9, atol=1e-9)
    back, inverse_slope = spline.inverse(data, held)
    torch.testing.assert_close(back, latent, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_slope, -log_slope, rtol=1e-8, atol=1e-8)
    outside = latent.abs() >= 3.0
    assert 20 < int(outside.sum()) < 400
    assert torch.equal(data[outside], latent[outside])


def test_fresh_splines_are_the_identity():
    spline = RationalQuadraticSpline(5, 2.0)
    start = spline.initial_parameters(2, torch.Generator()).double().expand(50, -1, -1)
    value = torch.linspace(-2.5, 2.5, 100, dtype=torch.float64).reshape(50, 2)
    torch.testing.assert_close(spline(value, start).value, value)


def test_no_spline_without_bins():
    with pytest.raises(ConfigurationError, match="at least one bin"):
        RationalQuadraticSpline(0, 1.0)
