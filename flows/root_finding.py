"""Roots of increasing functions, many at once, with derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import ConvergenceError
from .bijection import Transformed

MonotoneFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x (M,), parameters (M, P)) -> (f (M,), df/dx (M,))``, strictly increasing in x."""

_ITERATIONS = (
    200  # bisection alone ends after 54 halvings in float64; the Newton rule at least halves every second step
)


def solve_increasing(
    function: MonotoneFunction, target: Tensor, parameters: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Solve ``f(x; parameters) = target`` for x in ``[low, high]`` without recording gradients.

    Newton's method, replaced by bisection whenever the step leaves the bracket or does not halve the last one
    (Press et al., Numerical Recipes, section 9.4, ``rtsafe``); elements that have converged leave the batch, so that a
    few slow ones do not make all pay.

    Args:
        function: increasing function and its derivative.
        target: ``(M,)``.
        parameters: ``(M, P)``.
        low: ``(M,)`` lower ends of the brackets.
        high: ``(M,)`` upper ends.

    Returns:
        Roots ``(M,)`` to a few units in the last place of x, or of f where f' is small; never outside the brackets.

    Raises:
        ConvergenceError: when an element does not converge, or is NaN; no unconverged value is ever returned.
    """
    with torch.no_grad():
        epsilon = 4.0 * torch.finfo(target.dtype).eps
        root = torch.empty_like(target)
        if not len(target):
            return root
        active = torch.arange(len(target), device=target.device)
        x = 0.5 * (low + high)
        first, last = low, high
        step = high - low
        for _ in range(_ITERATIONS):
            value, slope = function(x, parameters)
            excess = value - target
            above = excess > 0
            high = torch.where(above, x, high)
            low = torch.where(above, low, x)
            newton = excess / slope
            proposal = x - newton
            bisect = ~((proposal > low) & (proposal < high) & (newton.abs() <= 0.5 * step.abs()))
            middle = 0.5 * (low + high)
            step = torch.where(bisect, middle - x, newton)
            moved = torch.where(bisect, middle, proposal)
            done = (high - low <= epsilon * (1.0 + x.abs())) | (newton.abs() <= 0.5 * epsilon * (1.0 + x.abs()))
            done &= ~excess.isnan()  # every comparison with NaN fails, which would close the bracket on its upper end
            if bool(done.any()):
                finished = torch.where(newton.abs() <= high - low, proposal, middle).clamp(first, last)
                root[active[done]] = finished[done]
                keep = ~done
                if not bool(keep.any()):
                    return root
                active, target, parameters = active[keep], target[keep], parameters[keep]
                low, high, moved, step = low[keep], high[keep], moved[keep], step[keep]
                first, last = first[keep], last[keep]
            x = moved
    raise ConvergenceError(
        f"{len(active)} of {len(root)} roots did not converge in {_ITERATIONS} iterations "
        f"(first: target {target[0].item():.6g} in [{low[0].item():.6g}, {high[0].item():.6g}]); "
        "check the inputs and parameters for NaN"
    )


def invert_increasing(
    function: MonotoneFunction, target: Tensor, parameters: Tensor, low: Tensor, high: Tensor
) -> Transformed:
    """Return ``x = f^-1(target; parameters)`` and ``log dx/dtarget``, differentiable twice in both arguments.

    The root is found without gradients; two differentiable Newton steps from it leave the value unchanged to rounding
    and give exact first and second derivatives with respect to target and parameters: Newton's method doubles the
    order to which the implicit function is matched (papers: implicit differentiation, arXiv 2110.00351 section 3.3).
    Where no gradient is asked for, the steps are left out. Arguments as in :func:`solve_increasing`.
    """
    x = solve_increasing(function, target.detach(), parameters.detach(), low.detach(), high.detach())
    if torch.is_grad_enabled() and (target.requires_grad or parameters.requires_grad):
        for _ in range(2):
            value, slope = function(x, parameters)
            x = x - (value - target) / slope
    _, slope = function(x, parameters)
    return Transformed(x, -slope.log())
