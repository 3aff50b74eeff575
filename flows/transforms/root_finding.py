"""Roots of increasing functions, many at once, with derivatives by the implicit function theorem."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ConvergenceError
from .bijection import Transformed

MonotoneFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x (M,), parameters (M, P)) -> (f (M,), df/dx (M,))``, strictly increasing in x."""

_ITERATIONS = (
    200  # bisection alone ends after 54 halvings in float64; the Newton rule at least halves every second step
)


class BoundedIterations:
    """Root finding in a fixed number of iterations, which recording for a compiler requires.

    Within ``with bounded_iterations(count) as bounded:`` roots are refined that many times, all of them; ``bounded.converged``
    then says for each configuration whether all its roots are found. The caller has to solve the others again.

    Attributes:
        iterations: number of iterations.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self._found: list[Tensor] = []

    def add(self, found: Tensor) -> None:
        """Record which roots ``(M,)`` of a call were found."""
        self._found.append(found)

    def converged(self, count: int) -> Tensor:
        """Return which of ``count`` configurations have all their roots, ``(count,)``; the roots of one lie side by side."""
        every = torch.ones(count, dtype=torch.bool)
        for found in self._found:
            every = every & found.reshape(count, -1).all(1)
        return every


class _State(threading.local):
    bounded: BoundedIterations | None = None


_state = _State()


@contextmanager
def bounded_iterations(iterations: int) -> Iterator[BoundedIterations]:
    """Let root finding in this thread take exactly so many iterations; see :class:`BoundedIterations`."""
    before, _state.bounded = _state.bounded, BoundedIterations(iterations)
    try:
        yield _state.bounded
    finally:
        _state.bounded = before


class _Roots(NamedTuple):
    """Estimates of roots, the brackets around them, and the last steps."""

    x: Tensor
    low: Tensor
    high: Tensor
    step: Tensor


def _refined(
    function: MonotoneFunction, level: Tensor, parameters: Tensor, roots: _Roots
) -> tuple[_Roots, Tensor, Tensor]:
    """Return better estimates, which of the given ones were found already, and what these are."""
    x, low, high, step = roots
    epsilon = 4.0 * torch.finfo(level.dtype).eps
    value, slope = function(x, parameters)
    excess = value - level
    above = excess > 0
    high = torch.where(above, x, high)
    low = torch.where(above, low, x)
    newton = excess / slope
    proposal = x - newton
    bisect = ~((proposal > low) & (proposal < high) & (newton.abs() <= 0.5 * step.abs()))
    middle = 0.5 * (low + high)
    done = (high - low <= epsilon * (1.0 + x.abs())) | (newton.abs() <= 0.5 * epsilon * (1.0 + x.abs()))
    done &= ~excess.isnan()  # every comparison with NaN fails, which would close the bracket on its upper end
    moved = _Roots(torch.where(bisect, middle, proposal), low, high, torch.where(bisect, middle - x, newton))
    return moved, done, torch.where(newton.abs() <= high - low, proposal, middle)


def solve_increasing(
    function: MonotoneFunction, level: Tensor, parameters: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Solve ``f(x; parameters) = level`` for x in ``[low, high]`` without recording gradients.

    Newton's method, replaced by bisection whenever the step leaves the bracket or does not halve the last one
    (Press et al., Numerical Recipes, section 9.4, ``rtsafe``); elements that have converged leave the batch, so that a
    few slow ones do not make all pay.

    Args:
        function: increasing function and its derivative.
        level: ``(M,)``.
        parameters: ``(M, P)``.
        low: ``(M,)`` lower ends of the brackets.
        high: ``(M,)`` upper ends.

    Returns:
        Roots ``(M,)`` to a few units in the last place of x, or of f where f' is small; never outside the brackets.

    Raises:
        ConvergenceError: when an element does not converge, or is NaN; no unconverged value is ever returned, except
            within :func:`bounded_iterations`, which says which they are.
    """
    with torch.no_grad():
        if _state.bounded is not None:
            return _solve_bounded(function, level, parameters, low, high, _state.bounded)
        root = torch.empty_like(level)
        if not len(level):
            return root
        active = torch.arange(len(level), device=level.device)
        first, last = low, high
        roots = _Roots(0.5 * (low + high), low, high, high - low)
        for _ in range(_ITERATIONS):
            roots, done, finished = _refined(function, level, parameters, roots)
            if bool(done.any()):
                root[active[done]] = finished.clamp(first, last)[done]
                keep = ~done
                if not bool(keep.any()):
                    return root
                active, level, parameters = active[keep], level[keep], parameters[keep]
                roots = _Roots(*(part[keep] for part in roots))
                first, last = first[keep], last[keep]
    raise ConvergenceError(
        f"{len(active)} of {len(root)} roots did not converge in {_ITERATIONS} iterations "
        f"(first: target {level[0].item():.6g} in [{roots.low[0].item():.6g}, {roots.high[0].item():.6g}]); "
        "check the inputs and parameters for NaN"
    )


def _solve_bounded(
    function: MonotoneFunction,
    level: Tensor,
    parameters: Tensor,
    low: Tensor,
    high: Tensor,
    bounded: BoundedIterations,
) -> Tensor:
    first, last = low, high
    roots = _Roots(0.5 * (low + high), low, high, high - low)
    root, found = roots.x, torch.zeros_like(level, dtype=torch.bool)
    for _ in range(bounded.iterations):
        roots, done, finished = _refined(function, level, parameters, roots)
        root = torch.where(done & ~found, finished.clamp(first, last), root)
        found = found | done
    bounded.add(found)
    return root


def invert_increasing(
    function: MonotoneFunction, level: Tensor, parameters: Tensor, low: Tensor, high: Tensor
) -> Transformed:
    """Return ``x = f^-1(level; parameters)`` and ``log dx/dlevel``, differentiable twice in both arguments.

    The root is found without gradients; two differentiable Newton steps from it leave the value unchanged to rounding
    and give exact first and second derivatives with respect to level and parameters: Newton's method doubles the
    order to which the implicit function is matched (papers: implicit differentiation, arXiv 2110.00351 section 3.3).
    Where no gradient is asked for, the steps are left out. Arguments as in :func:`solve_increasing`.
    """
    x = solve_increasing(function, level.detach(), parameters.detach(), low.detach(), high.detach())
    if torch.is_grad_enabled() and (level.requires_grad or parameters.requires_grad):
        for _ in range(2):
            value, slope = function(x, parameters)
            x = x - (value - level) / slope
    _, slope = function(x, parameters)
    return Transformed(x, -slope.log())
