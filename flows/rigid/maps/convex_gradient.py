"""Gradients of convex functions as maps of the sphere: more flexible than a Moebius map, invertible for any parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConvergenceError
from ...transforms.bijection import Transformed

MAXIMUM_ITERATIONS = 100
_SUFFICIENT = 1e-4  # Armijo's constant
_STEP_LIMIT = 40  # halvings of a step


class QuadraticMixture(NamedTuple):
    """Parameters of ``phi(x) = 1/2 (sum_k (x . M_k x)^power)^(1/power)``, ``M_k = C_k^T C_k + floor I``.

    Attributes:
        factors: ``C`` ``(..., K, d, d)``.
        power: ``(...)`` at least 1/2, where phi is half the square of a sum of K norms; 1 is a quadratic form, hence a linear
            map; infinity the largest of K quadratic forms.
        floor: ``(..., K)`` positive.
    """

    factors: Tensor
    power: Tensor
    floor: Tensor


class _Derivatives(NamedTuple):
    value: Tensor
    gradient: Tensor
    hessian: Tensor


class ProjectiveConvexGradient:
    """``p -> unit(grad phi(p))`` on the unit sphere, phi half the square of a norm that is the same for p and -p.

    arXiv 2301.11355 takes phi to be a sum of ``log(b + cosh(c . x))``. A convex function alone does not make this map
    invertible: that asks for ``x . H^-1 grad phi > 0`` with H the matrix of second derivatives, and we found it
    violated for up to a fifth of random points where c is large. For phi homogeneous of degree 2, ``H x = grad phi``,
    so the condition is ``|x|^2 > 0``, always true: grad phi is a bijection of space that maps rays to rays (Legendre's
    duality of norms). Hence this phi, a power mean of quadratic forms, which has the projective linear maps as a
    special case. ``log|det| = log det H(p) - d log |grad phi(p)|``, as for a linear map.

    ``forward`` is closed form. ``inverse`` minimises the strictly convex ``phi(x) - y . x`` by Newton's method with a
    line search, which converges from anywhere, and is differentiable twice by implicit derivatives.
    """

    @staticmethod
    def forward(points: Tensor, parameters: QuadraticMixture) -> Transformed:
        """Map points ``(..., d)`` of the unit sphere; returns log-dets ``(...)``."""
        _, gradient, hessian = _derivatives(points, parameters)
        norm = gradient.norm(dim=-1, keepdim=True)
        return Transformed(gradient / norm, _log_volume(hessian, norm))

    @staticmethod
    def inverse(points: Tensor, parameters: QuadraticMixture) -> Transformed:
        """Undo :meth:`forward`.

        Raises:
            ConvergenceError: when a minimum is not found: a point or parameter is NaN, or quadratic forms are nearly
            singular.
        """
        fixed = QuadraticMixture(*(part.detach() for part in parameters))
        root = _minimiser(points.detach(), fixed)
        if torch.is_grad_enabled() and (points.requires_grad or any(part.requires_grad for part in parameters)):
            # Newton's steps from the root change nothing, and carry first and second derivatives by target and parameters.
            for _ in range(2):
                _, gradient, hessian = _derivatives(root, parameters)
                root = root - torch.linalg.solve(hessian, gradient - points)
        value = root / root.norm(dim=-1, keepdim=True)
        _, gradient, hessian = _derivatives(value, parameters)
        return Transformed(value, -_log_volume(hessian, gradient.norm(dim=-1, keepdim=True)))


def _log_volume(hessian: Tensor, norm: Tensor) -> Tensor:
    return torch.linalg.slogdet(hessian).logabsdet - hessian.shape[-1] * norm.squeeze(-1).log()


def _derivatives(x: Tensor, parameters: QuadraticMixture) -> _Derivatives:
    """Return phi ``(...)``, its gradient ``(..., d)`` and second derivatives ``(..., d, d)`` at ``x`` (..., d)."""
    factors, power, floor = parameters
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    forms = factors.mT @ factors + floor[..., None, None] * identity
    products = (forms @ x[..., None, :, None]).squeeze(-1)  # M_k x: (..., K, d)
    values = (products * x.unsqueeze(-2)).sum(-1)  # (..., K)
    # With s_k = (v_k / norm)^power, which sum up to one, nothing overflows, whatever the power.
    logarithms = power.unsqueeze(-1) * values.log()
    total = torch.logsumexp(logarithms, dim=-1, keepdim=True)
    shares = torch.exp(logarithms - total)
    square = torch.exp(total / power.unsqueeze(-1))  # twice phi, (..., 1)
    weights = square * shares / values  # d(2 phi)/dv_k = (..., K)
    gradient = (weights.unsqueeze(-1) * products).sum(-2)
    outer = products.unsqueeze(-1) * products.unsqueeze(-2)
    excess = (power - 1.0)[..., None, None]
    hessian = (
        (weights[..., None, None] * forms).sum(-3)
        + 2.0 * excess * ((weights / values)[..., None, None] * outer).sum(-3)
        - 2.0 * excess / square.unsqueeze(-1) * gradient.unsqueeze(-1) * gradient.unsqueeze(-2)
    )
    return _Derivatives(0.5 * square.squeeze(-1), gradient, hessian)


def _minimiser(targets: Tensor, parameters: QuadraticMixture) -> Tensor:
    """Return the minima ``(..., d)`` of ``phi(x) - y . x``, without recording gradients."""
    with torch.no_grad():
        # The minimum along the ray of y is a start of the right length.
        start = _derivatives(targets, parameters).value.unsqueeze(-1)
        x = targets * targets.square().sum(-1, keepdim=True) / (2.0 * start)
        tolerance = 64.0 * torch.finfo(targets.dtype).eps
        for _ in range(MAXIMUM_ITERATIONS):
            value, gradient, hessian = _derivatives(x, parameters)
            residual = gradient - targets
            step = torch.linalg.solve(hessian, residual)
            decrement = (step * residual).sum(-1)
            # Newton's decrement squared is twice what is left to gain.
            done = decrement <= tolerance**2 * (1.0 + value.abs())
            if bool((done | (step.norm(dim=-1) <= tolerance * x.norm(dim=-1))).all()):
                return x
            x = x - _line_search(x, step, value - (targets * x).sum(-1), decrement, targets, parameters) * step
    raise ConvergenceError(
        f"the inverse of a convex gradient map did not converge in {MAXIMUM_ITERATIONS} iterations for "
        f"{int((~done).sum())} of {done.numel()} points: check the points and the parameters for NaN"
    )


def _line_search(
    x: Tensor, step: Tensor, value: Tensor, decrement: Tensor, targets: Tensor, parameters: QuadraticMixture
) -> Tensor:
    """Return lengths ``(..., 1)`` of Newton steps that lower the function enough (Armijo's rule); halves of one."""
    length = torch.ones_like(value)
    for _ in range(_STEP_LIMIT):
        trial = x - length.unsqueeze(-1) * step
        reached = _derivatives(trial, parameters).value - (targets * trial).sum(-1)
        # Rounding of the values must not stop the last steps.
        slack = 8.0 * torch.finfo(x.dtype).eps * (1.0 + value.abs())
        poor = reached > value - _SUFFICIENT * length * decrement + slack
        if not bool(poor.any()):
            break
        length = torch.where(poor, 0.5 * length, length)
    return length.unsqueeze(-1)
