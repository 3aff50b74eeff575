"""Symmetries and divergences of velocity fields."""

import pytest
import torch

from flowbridge.flows.equivariant.fields.graph_field import GraphField, GraphFieldSettings
from flowbridge.flows.equivariant.fields.kernel_field import KernelField, KernelFieldSettings
from flowbridge.flows.equivariant.fields.network_field import NetworkField, NetworkFieldSettings
from flowbridge.flows.equivariant.fields.vector_fields import exact_divergence

FIELDS = {
    "graph": (GraphField, GraphFieldSettings(hidden=8, radial=8, longest=4.0)),
    "kernel": (KernelField, KernelFieldSettings(distances=9, times=4, longest=4.0)),
}


def field_of(name: str, count: int = 5, dimension: int = 3, dtype: torch.dtype = torch.float64):
    """Return a field whose parameters are random, none of them zero."""
    cls, settings = FIELDS[name]
    generator = torch.Generator().manual_seed(3)
    field = cls(count, dimension, settings, generator).to(dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return field


def points(count: int = 5, dimension: int = 3, batch: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, count, dimension, generator=generator, dtype=torch.float64)
    return torch.rand(batch, generator=generator, dtype=torch.float64).to(dtype), x.to(dtype)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("name", FIELDS)
def test_closed_form_divergence_is_the_trace_of_the_jacobian(name, dimension):
    field = field_of(name, dimension=dimension)
    time, x = points(dimension=dimension)
    found = field.with_divergence(time, x)
    expected = exact_divergence(field, time, x)
    torch.testing.assert_close(found.value, field(time, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-10, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda x: field(time[:1], x), x[:1])
    torch.testing.assert_close(jacobian.reshape(5 * dimension, -1).trace(), found.divergence[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_of_the_divergence(name):
    """Maximum likelihood differentiates it by the parameters, forces by the positions."""
    field = field_of(name, count=3)
    time, x = points(count=3, batch=2)

    def divergence(x, *parameters):
        names = [name for name, _ in field.named_parameters()]
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Diverging(field), {f"field.{n}": p for n, p in named.items()}, (time, x))

    inputs = (x.requires_grad_(True), *(p.detach().requires_grad_(True) for p in field.parameters()))
    assert torch.autograd.gradcheck(divergence, inputs, atol=1e-5, fast_mode=True)


class _Diverging(torch.nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, time, x):
        return self.field.with_divergence(time, x).divergence


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", FIELDS)
def test_equivariance(name, dtype, tolerance):
    """Under rotations, reflections, permutations and translations; the centre stays where it is."""
    field = field_of(name, dtype=dtype)
    time, x = points(dtype=dtype)
    velocity, divergence = field.with_divergence(time, x)
    size = velocity.abs().max()
    generator = torch.Generator().manual_seed(5)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    order = torch.randperm(5, generator=generator)
    for matrix in (rotation.to(dtype), (rotation @ torch.diag(torch.tensor([1.0, 1.0, -1.0]).double())).to(dtype)):
        turned = field.with_divergence(time, x[:, order] @ matrix.T + 1.5)
        assert (turned.value - velocity[:, order] @ matrix.T).abs().max() < tolerance * size
        assert (turned.divergence - divergence).abs().max() < tolerance * divergence.abs().max()
    assert velocity.sum(1).abs().max() < tolerance * size


def test_the_network_without_symmetry_has_none():
    generator = torch.Generator().manual_seed(0)
    field = NetworkField(5, 3, NetworkFieldSettings(hidden=16), generator).double()
    with torch.no_grad():
        field.network[-1].weight.normal_(generator=generator)
    time, x = points()
    velocity = field(time, x)
    assert (field(time, x[:, [1, 0, 2, 3, 4]]) - velocity[:, [1, 0, 2, 3, 4]]).abs().max() > 0.1 * velocity.abs().max()
    torch.testing.assert_close(field(time, x + 2.0), velocity)
    assert velocity.sum(1).abs().max() < 1e-12


def test_particles_that_meet_have_finite_velocities():
    for name in FIELDS:
        field = field_of(name)
        time, x = points()
        x[:, 1] = x[:, 0]
        assert all(torch.isfinite(part).all() for part in field.with_divergence(time, x))
