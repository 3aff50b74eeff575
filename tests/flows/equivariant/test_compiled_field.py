"""A field in compiled form: the same values and derivatives."""

import itertools

import pytest
import torch

from flowbridge.flows.equivariant.fields.compiled_field import CompiledField, compiled
from flowbridge.flows.equivariant.fields.graph_field import GraphField, GraphFieldSettings
from flowbridge.flows.equivariant.fields.kernel_field import KernelField, KernelFieldSettings
from flowbridge.flows.equivariant.ordinary_equations import carried_with_gradient, displaced_times, runge_kutta


def fields(mode: str):
    generator = torch.Generator().manual_seed(1)
    field = GraphField(3, 2, GraphFieldSettings(hidden=6, features=4, triangles=3, radial=6, longest=4.0), generator)
    with torch.no_grad():
        field.weight += 0.3
    return field.double(), CompiledField(field, mode)


def gradients(field, parameters, x, times):
    end, divergence, _ = runge_kutta(field, x, times)
    loss = (end * torch.arange(6.0).view(3, 2)).sum() + divergence.square().sum()
    return torch.autograd.grad(loss, [x, *parameters], allow_unused=True, materialize_grads=True)


def test_derivatives_through_a_solver():
    """Of positions and of parameters, against torch's own record of all steps."""
    field, by_programs = fields("never")
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    times = displaced_times(2, torch.Generator().manual_seed(3))
    expected = gradients(field, field.parameters(), x, times)
    found = gradients(by_programs, field.parameters(), x, times)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_take_no_derivatives():
    field, by_programs = fields("never")
    field.requires_grad_(False)
    asked = []
    slopes = by_programs.slopes
    by_programs.slopes = lambda *arguments: asked.append(arguments[1]) or slopes(*arguments)
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    expected = gradients(field, [], x, [0.0, 0.5, 1.0])
    torch.testing.assert_close(gradients(by_programs, [], x, [0.0, 0.5, 1.0]), expected, rtol=1e-10, atol=1e-12)
    assert asked
    assert not any(asked)


def test_a_carried_gradient_is_that_of_the_density_carried_back():
    """To the order of the rule, against torch's derivative of a fine solution; by the field and by its programs."""
    field, by_programs = fields("never")
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fine = [number / 80 for number in range(81)]
    with torch.no_grad():
        latent, _, _ = runge_kutta(field, x, fine[::-1])
    latent.requires_grad_(True)
    end, divergence, _ = runge_kutta(field, latent, fine)
    (expected,) = torch.autograd.grad((divergence - end.pow(4).sum((1, 2))).sum(), latent)
    errors = []
    for steps in (10, 20):
        times = [number / steps for number in range(steps + 1)]
        found = carried_with_gradient(field, x, -4.0 * x**3, times[::-1])
        assert not found.gradient.requires_grad
        errors.append((found.gradient - expected).norm() / expected.norm())
        same = carried_with_gradient(by_programs, x, -4.0 * x**3, times[::-1])
        torch.testing.assert_close(same, found, rtol=1e-12, atol=1e-12)
    assert errors[1] < 1e-4
    assert 8.0 < errors[0] / errors[1] < 32.0  # sixteen for half the step


def test_programs_give_the_same_numbers():
    field = KernelField(3, 2, KernelFieldSettings(distances=5, times=3), torch.Generator().manual_seed(1))
    x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(2))
    time = torch.tensor(0.4)
    made = compiled(field, "always")
    assert isinstance(made, CompiledField)
    with torch.no_grad():
        torch.testing.assert_close(made(time, x), field(time, x), rtol=1e-5, atol=1e-6)
    assert compiled(field, "never") is field


@pytest.mark.parametrize("steps", [1, 4])
def test_displaced_times(steps):
    times = displaced_times(steps, torch.Generator().manual_seed(1))
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert all(0.0 <= b - a <= 1.0 / steps + 1e-12 for a, b in itertools.pairwise(times))
