"""Solvers of the ordinary differential equation of a flow and of its density."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ...core.configuration import StrictModel
from ...core.errors import ConvergenceError, MissingDependencyError
from .fields.vector_fields import Velocities

Tensors: TypeAlias = tuple[Tensor, ...]


class Solver(StrictModel):
    """Settings of the solver of an ordinary differential equation.

    Attributes:
        method: ``rk4``, the classical Runge-Kutta rule of order 4 with equal steps, whose result is an exact function of its
            input that can be differentiated and compiled; ``dopri5``, steps adapted to tolerances by torchdiffeq.
        steps: number of steps of ``rk4`` from time 0 to 1.
        rtol: relative tolerance of ``dopri5``.
        atol: absolute tolerance of ``dopri5``.
    """

    method: Literal["rk4", "dopri5"] = "rk4"
    steps: int = Field(default=20, ge=1)
    rtol: float = Field(default=1e-5, gt=0.0)
    atol: float = Field(default=1e-6, gt=0.0)


class Solution(NamedTuple):
    """Positions ``(B, N, D)`` at the end, and the integral of the divergence along the way there ``(B,)``."""

    value: Tensor
    divergence: Tensor


class Steps(NamedTuple):
    """Result of :func:`runge_kutta`: a :class:`Solution` and the defect ``(B,)`` of its steps.

    ``defect`` sums, over steps h, ``h^2`` times the squared change of velocity and divergence between the two evaluations in
    the middle of a step.
    """

    value: Tensor
    divergence: Tensor
    defect: Tensor


def transport(field: Velocities, x: Tensor, solver: Solver, *, backward: bool = False) -> Solution:
    """Transport configurations along a field from time 0 to 1, or from 1 to 0 where ``backward``; differentiable.

    The integral is that of the direction taken, so ``log p(end) = log p(start) - divergence``.

    Raises:
        ConvergenceError: where adaptive steps become too small.
    """
    begin, end = (1.0, 0.0) if backward else (0.0, 1.0)
    if solver.method == "dopri5":
        return _adaptive(field, x, begin, end, solver)
    times = [begin + (end - begin) * number / solver.steps for number in range(solver.steps + 1)]
    return Solution(*runge_kutta(field, x, times)[:2])


def runge_kutta(field: Velocities, x: Tensor, times: Sequence[float]) -> Steps:
    """Transport configurations from the first to the last of ``times``, one step of the classical rule between neighbours."""
    divergence = defect = x.new_zeros(len(x))
    for time, following in itertools.pairwise(times):
        (x, divergence), first, second = _step(
            lambda time, x, _: field.with_divergence(time, x), (x, divergence), time, following
        )
        change = (second[0] - first[0]).square().sum((1, 2)) + (second[1] - first[1]).square()
        defect = defect + (following - time) ** 2 * change
    return Steps(x, divergence, defect)


def _step(rates: Callable[..., Tensors], state: Tensors, time: float, following: float) -> tuple[Tensors, ...]:
    """Return the state after one step of the classical rule, and both rates of change in the middle of the step."""
    step = following - time
    begin, middle, end = (state[0].new_tensor(at) for at in (time, time + 0.5 * step, following))
    a = rates(begin, *state)
    b = rates(middle, *_moved(state, 0.5 * step, a))
    c = rates(middle, *_moved(state, 0.5 * step, b))
    d = rates(end, *_moved(state, step, c))
    sums = tuple(p + 2.0 * (q + r) + s for p, q, r, s in zip(a, b, c, d, strict=True))
    return _moved(state, step / 6.0, sums), b, c


def _moved(state: Tensors, step: float, rates: Tensors) -> Tensors:
    return tuple(value + step * rate for value, rate in zip(state, rates, strict=True))


def displaced_times(steps: int, generator: torch.Generator) -> list[float]:
    """Return ``steps + 2`` times from 0 to 1 with equal distances, displaced at random, so that the ends are shorter.

    At times that are always the same, a field can learn a divergence between them that the solver does not see, and the
    likelihood rises above that of any density.
    """
    shift = float(torch.rand(1, generator=generator))
    return [0.0, *((number + shift) / steps for number in range(steps)), 1.0]


def carried(field: Velocities, x: Tensor, times: Sequence[float]) -> Tensor:
    """Return the positions at the end of :func:`runge_kutta`, without any divergence."""
    for time, following in itertools.pairwise(times):
        (x,), *_ = _step(lambda time, x: (field(time, x),), (x,), time, following)
    return x


class CarriedGradient(NamedTuple):
    """Positions ``(B, N, D)`` at the end of a path, and the gradient ``(B, N, D)`` of the log-density there."""

    value: Tensor
    gradient: Tensor


def carried_with_gradient(field: Velocities, x: Tensor, gradient: Tensor, times: Sequence[float]) -> CarriedGradient:
    """Transport configurations together with the gradient of a log-density that changes as the flow's density does.

    Where ``dx/dt = v``, ``log p`` falls by the divergence, and its gradient a obeys ``da/dt = -(dv/dx)^T a - grad div v``.
    The Runge-Kutta rule solves both together, at the cost of one derivative of the divergence an evaluation; no record is
    kept.

    Args:
        field: the velocity v.
        x: configurations ``(B, N, D)`` at the first of ``times``.
        gradient: gradient of the log-density there ``(B, N, D)``.
        times: one step of the rule between neighbours.
    """

    def rates(time: Tensor, x: Tensor, gradient: Tensor) -> Tensors:
        velocity, change = field.pulled(time, x, gradient)
        return velocity, -change

    for time, following in itertools.pairwise(times):
        (x, gradient), *_ = _step(rates, (x, gradient), time, following)
    return CarriedGradient(x, gradient)


def _adaptive(field: Velocities, x: Tensor, begin: float, end: float, solver: Solver) -> Solution:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise MissingDependencyError(
            "adaptive steps need torchdiffeq: pip install 'flowbridge[flow-families]'. Fixed steps, method='rk4', do not"
        ) from error

    def slope(time: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        velocity = field.with_divergence(time, state[0])
        return velocity.value, velocity.divergence

    options: dict[str, Any] = {"rtol": solver.rtol, "atol": solver.atol, "method": solver.method}
    try:
        values, divergences = odeint(slope, (x, x.new_zeros(len(x))), x.new_tensor([begin, end]), **options)
    except AssertionError as error:  # torchdiffeq asserts that its steps do not vanish
        raise ConvergenceError(
            f"the equation of the flow cannot be solved to rtol {solver.rtol:g}, atol {solver.atol:g}: {error}. Raise the "
            "tolerances, or take fixed steps"
        ) from error
    return Solution(values[-1], divergences[-1])
