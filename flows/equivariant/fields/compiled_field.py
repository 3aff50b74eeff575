"""A velocity field and its derivatives as compiled programs, for trainings that evaluate it some 100 000 times."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ....core.compilation.programs import resolved
from ...boltzmann.compiled_functions import CompiledFlowFunction, FlowFunction
from .vector_fields import Pulled, VectorField, Velocities, Velocity


class CompiledField:
    """Evaluates a field by compiled code, differentiable once, by positions and parameters alike.

    Derivatives evaluate the field again, so that nothing but positions is kept of a solver's steps. Each batch size and each
    shape of the time has programs of its own; see
    :class:`~flowbridge.flows.boltzmann.compiled_functions.CompiledFlowFunction`. One particle system gains by it when a
    batch is more work than the calls of torch: LJ13, not DW4.

    Args:
        field: its parameters are read at every call.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(self, field: VectorField, mode: str) -> None:
        self.field = field
        self._velocity = CompiledFlowFunction(field, velocity, mode)
        self._divergence = CompiledFlowFunction(field, velocity_and_divergence, mode)
        self._pulled = CompiledFlowFunction(field, velocity_and_gradient, mode)
        self._slopes = {
            key: CompiledFlowFunction(field, _derivative(*key), mode)
            for key in itertools.product((False, True), repeat=2)
        }

    def __call__(self, time: Tensor, x: Tensor) -> Tensor:
        """Return velocities; see :meth:`VectorField.forward`."""
        (value,) = self._evaluated(False, time, x)
        return value

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """Return velocities with their divergence; see :meth:`VectorField.with_divergence`."""
        return Velocity(*self._evaluated(True, time, x))

    def pulled(self, time: Tensor, x: Tensor, pull: Tensor) -> Pulled:
        """Return velocities and the gradient of what they are pulled by; see :meth:`Velocities.pulled`."""
        return Pulled(*self._pulled(x, time, pull))

    def values(self, with_divergence: bool, time: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return velocities, and divergences where asked for, without a record for derivatives."""
        return (self._divergence if with_divergence else self._velocity)(x, time)

    def slopes(
        self, with_divergence: bool, of_parameters: bool, time: Tensor, x: Tensor, pulls: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return derivatives of ``sum(value pull)`` by the positions and, where asked for, by each parameter."""
        return self._slopes[with_divergence, of_parameters](x, time, *pulls)

    def _evaluated(self, with_divergence: bool, time: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self.values(with_divergence, time, x)
        result: tuple[Tensor, ...] = _Evaluated.apply(self, with_divergence, time, x, *self.field.parameters())
        return result


class _Evaluated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compiled: CompiledField, with_divergence: bool, time: Tensor, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.compiled, ctx.with_divergence = compiled, with_divergence
        ctx.save_for_backward(time, x)
        return compiled.values(with_divergence, time, x)

    @staticmethod
    def backward(ctx: Any, *pulls: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        slopes = ctx.compiled.slopes(ctx.with_divergence, any(wanted), *ctx.saved_tensors, pulls)
        return (None, None, None, slopes[0], *(slopes[1:] or (None,) * len(wanted)))


def compiled(field: VectorField, mode: str) -> Velocities:
    """Return a field in compiled form, or as it is where nothing is to be compiled."""
    return field if resolved(mode) == "never" else CompiledField(field, mode)


def velocity(field: VectorField, x: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """Return the velocity."""
    with torch.no_grad():
        return (field(time, x),)


def velocity_and_divergence(field: VectorField, x: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """Return the velocity and its divergence."""
    with torch.no_grad():
        return tuple(field.with_divergence(time, x))


def velocity_and_gradient(field: VectorField, x: Tensor, time: Tensor, pull: Tensor) -> tuple[Tensor, ...]:
    """Return the velocity and the gradient of ``sum(velocity pull) + sum(divergence)`` by positions."""
    return tuple(field.pulled(time, x, pull))


def _derivative(with_divergence: bool, of_parameters: bool) -> FlowFunction:
    """Return the derivative of ``sum(value pull)`` by positions and, where asked, parameters, as a function to compile."""

    def derivative(field: VectorField, x: Tensor, time: Tensor, *pulls: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            values = tuple(field.with_divergence(time, leaf)) if with_divergence else (field(time, leaf),)
            parameters = list(field.parameters()) if of_parameters else []
            return torch.autograd.grad(values, [leaf, *parameters], pulls, materialize_grads=True)

    value, variables = "divergence" if with_divergence else "velocity", "all" if of_parameters else "positions"
    derivative.__name__ = f"{value}_by_{variables}"
    return derivative
