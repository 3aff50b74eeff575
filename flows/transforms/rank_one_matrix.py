"""A matrix trained by perturbations of rank one, whose inverse and determinant are always known.

Kraemer, Koehler, Noe, "Training invertible linear layers through rank-one perturbations" (P4, arXiv 2010.07033). The matrix is
``W = A + u v^T`` with A fixed and u, v trained. Products, solutions (Sherman and Morrison) and ``log |det W|`` (determinant
lemma), with their gradients, cost a few products of A or its inverse with vectors. Now and then the perturbation is merged into
A, its inverse and its determinant, u starts again at zero and v in a new random direction; the function does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError, ConvergenceError, SingularMatrixError
from ...core.training.streams import random_stream

_NEWTON_STEPS = 4  # from a residual of 0.1, three reach 1e-8 and the fourth rounding
MERGED = ("matrix", "inverse", "log_det")
"""Buffers of a :class:`RankOneMatrix` that merges change and its map depends on."""


@dataclass(frozen=True)
class MergeLimits:
    """Limits of the change of determinant and inverse by a perturbation.

    Attributes:
        log_factor: range of ``log (1 + v^T A^-1 u)`` that :meth:`RankOneMatrix.penalty` does not punish; u is held back 2 below
            it, and nothing is merged 4 below it.
        log_det: range of ``log |det W|``, likewise; u is held back at its lower end, nothing is merged more than 0.5 outside.
        condition: largest product of the Frobenius norms of W and its inverse (n for an orthogonal matrix), at most 0.05 over
            the rounding of the dtype; u is held back there. Rounding times this is what the inverse is good to.
        patience: merges that may be put off one after the other before inverse and determinant are computed directly.
    """

    log_factor: tuple[float, float] = (-2.0, 15.0)
    log_det: tuple[float, float] = (-math.inf, math.inf)
    condition: float = 1e6
    patience: int = 10

    def __post_init__(self) -> None:
        for name, (low, high) in (("log_factor", self.log_factor), ("log_det", self.log_det)):
            if not low < high:
                raise ConfigurationError(f"{name} must be a range (low, high), got ({low}, {high})")
        if not self.condition > 1.0:
            raise ConfigurationError(f"condition must be more than 1, got {self.condition}")
        if self.patience < 0:
            raise ConfigurationError(f"patience cannot be negative, got {self.patience}")

    def smallest_factor(self, log_det: float) -> float:
        """Return below what ``1 + v^T A^-1 u`` is held back where ``log |det A|`` is ``log_det``; above 0, at most 1/2."""
        return min(math.exp(max(self.log_factor[0] - 2.0, min(self.log_det[0] - log_det, 0.0))), 0.5)

    def allow(self, log_factor: float, log_det: float) -> bool:
        """Return whether a perturbation may be merged that has this factor and leads to this determinant."""
        low, high = self.log_det
        return log_factor > self.log_factor[0] - 4.0 and low - 0.5 < log_det < high + 0.5


def rank_one_matrices(module: nn.Module) -> list[RankOneMatrix]:
    """Return all matrices of this kind that a module holds."""
    return [part for part in module.modules() if isinstance(part, RankOneMatrix)]


class RankOneMatrix(nn.Module):
    """``W = A + u v^T`` with running inverse and determinant of A.

    The set of invertible matrices has two parts, one for each sign of the determinant. A long optimiser step can jump over the
    singular ones between them: :meth:`hold_back`, which a merging schedule calls after every step, keeps W in its part.

    Args:
        size: n.
        seed: random seed of the random directions v; the k-th one depends on the seed and k only.
        matrix: start ``(n, n)``; the identity where None.
        dtype: precision of all parameters and buffers; in float32 the inverse drifts by about 1e-4 between corrections.

    Raises:
        SingularMatrixError: when ``matrix`` has no inverse.
    """

    matrix: Tensor
    inverse: Tensor
    log_det: Tensor
    determinant_sign: Tensor
    merges: Tensor

    def __init__(
        self, size: int, seed: int, *, matrix: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        start = torch.eye(size, dtype=dtype) if matrix is None else matrix.detach().to(dtype).clone()
        if size < 1 or start.shape != (size, size):
            raise ConfigurationError(f"the matrix must be ({size}, {size}), got {tuple(start.shape)}")
        self.size = size
        self.seed = seed
        self.register_buffer("matrix", start)
        self.register_buffer("inverse", torch.empty_like(start))
        self.register_buffer("log_det", torch.zeros((), dtype=dtype))
        self.register_buffer("determinant_sign", torch.ones((), dtype=dtype))
        self.register_buffer("merges", torch.zeros((), dtype=torch.long))
        self.u = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.v = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.compute_directly()
        self._restart()

    def multiply(self, value: Tensor) -> Tensor:
        """Return ``W x`` of each row of ``(B, n)``."""
        return value @ self.matrix.T + torch.outer(value @ self.v, self.u)

    def multiply_transposed(self, value: Tensor) -> Tensor:
        """Return ``W^T y`` of each row of ``(B, n)``, without a gradient."""
        with torch.no_grad():
            return value @ self.matrix + torch.outer(value @ self.u, self.v)

    def solve(self, value: Tensor) -> Tensor:
        """Return ``W^-1 y`` of each row of ``(B, n)``."""
        direction, factor = self._direction_and_factor()
        solved = value @ self.inverse.T
        return solved - torch.outer((solved @ self.v) / factor, direction)

    def log_abs_det(self) -> Tensor:
        """Return ``log |det W|``, 0-dimensional."""
        _, factor = self._direction_and_factor()
        return self.log_det + factor.abs().log()

    def sign(self) -> int:
        """Return the sign of ``det W``."""
        with torch.no_grad():
            return int(self.determinant_sign * self._direction_and_factor()[1].sign())

    def dense(self) -> Tensor:
        """Return W ``(n, n)``."""
        return self.matrix + torch.outer(self.u, self.v)

    def penalty(self, limits: MergeLimits) -> Tensor:
        """Return what to add to a loss so that the perturbation stays within ``limits``; zero within, 0-dimensional."""
        _, factor = self._direction_and_factor()
        log_factor = factor.abs().log()
        total = log_factor.new_zeros(())
        for value, (low, high) in ((log_factor, limits.log_factor), (self.log_det + log_factor, limits.log_det)):
            total = total + torch.relu(low - value).square() + torch.relu(value - high).square()
        return 0.1 * total

    @torch.no_grad()
    def hold_back(self, limits: MergeLimits) -> bool:
        """Shorten u where the determinant would change its sign, or W leave ``limits``; return whether that was done.

        Along u the factor is a straight line from 1, so one division finds the length at which it is as small as it may be.
        """
        direction, factor = self._direction_and_factor()
        fraction, smallest = 1.0, limits.smallest_factor(float(self.log_det))
        if float(factor) < smallest:
            fraction = (1.0 - smallest) / (1.0 - float(factor))
        fraction = min(fraction, self._fraction_within(limits.condition, direction, float(factor)))
        if not fraction < 1.0:
            return False
        self.u.mul_(fraction)
        return True

    def _fraction_within(self, condition: float, direction: Tensor, factor: float) -> float:
        """Return the largest fraction of u, at most 1, with which the inverse is no larger than ``condition`` allows.

        With the fraction s the inverse is ``X - c d w^T``, ``d = A^-1 u``, ``w = v^T A^-1``, ``c = s / (1 + s (factor - 1))``,
        whose squared norm is a parabola in c. An inverse that is too large already may not become larger.
        """
        across = self.v @ self.inverse
        present = float(self.inverse.square().sum())
        steepness = float(direction.square().sum() * across.square().sum())
        slope = float(direction @ (self.inverse @ across))
        allowed = min(condition, 0.05 / torch.finfo(self.matrix.dtype).eps)
        largest = allowed / float(torch.linalg.vector_norm(self.matrix))
        room = max(largest**2 - present, 0.0)
        if steepness == 0.0:
            return 1.0
        bound = (slope + math.sqrt(slope**2 + steepness * room)) / steepness
        if factor > 0.0 and 1.0 / factor <= bound:
            return 1.0
        return bound / (1.0 + bound * (1.0 - factor))

    @torch.no_grad()
    def merge(self, limits: MergeLimits | None = None) -> bool:
        """Put the perturbation into A, its inverse and its determinant; return whether that was done.

        It is not where ``limits`` forbid it; the function is the same either way.

        Raises:
            ConvergenceError: when u or v is NaN or infinite.
        """
        if not bool(torch.isfinite(self.u).all() and torch.isfinite(self.v).all()):
            raise ConvergenceError(
                "a perturbation of rank one is NaN or infinite: training has diverged; go back to a checkpoint from before and "
                "lower the learning rate"
            )
        direction = self._refined_direction()
        factor = 1.0 + self.v @ direction
        log_factor = float(factor.abs().log())
        if not (limits or MergeLimits()).allow(log_factor, float(self.log_det) + log_factor):
            return False
        self.matrix.addr_(self.u, self.v)
        self.inverse.addr_(direction, self.v @ self.inverse, alpha=-1.0 / float(factor))
        self.log_det += log_factor
        self.determinant_sign *= factor.sign()
        self.merges += 1
        self._restart()
        return True

    @torch.no_grad()
    def merge_directly(self) -> None:
        """Put the perturbation into A, and compute inverse and determinant from A: n^3, but however small the factor.

        Raises:
            SingularMatrixError: when W has no inverse; nothing is changed then.
        """
        before = self.matrix.clone()
        self.matrix.addr_(self.u, self.v)
        try:
            self.compute_directly()
        except SingularMatrixError:
            self.matrix.copy_(before)
            raise
        self.merges += 1
        self._restart()

    @torch.no_grad()
    def compute_directly(self) -> None:
        """Recompute inverse and determinant of A: n^3.

        Raises:
            SingularMatrixError: when A has no inverse that its precision can hold.
        """
        sign, log_det = torch.linalg.slogdet(self.matrix)
        inverse, failed = torch.linalg.inv_ex(self.matrix)
        if int(failed) or not bool(torch.isfinite(inverse).all()) or self._residual(inverse) > 0.1:
            raise SingularMatrixError(
                f"a matrix of {self.size} rows with log |det| = {float(log_det):.4g} cannot be inverted in {inverse.dtype}: "
                "lower the learning rate, merge more often, or add the penalty of its limits to the loss"
            )
        self.inverse.copy_(inverse)
        self.log_det.copy_(log_det)
        self.determinant_sign.copy_(sign)

    @torch.no_grad()
    def correct_inverse(self) -> float:
        """Remove what rounding has put into the inverse of A; return the largest residual ``|A X - 1|`` that was there.

        Newton's iteration ``X <- X (2 - A X)`` (Schulz 1933) squares the residual with two products; where it is too large for
        that, inverse and determinant are computed directly.

        Raises:
            SingularMatrixError: see :meth:`compute_directly`.
        """
        found = self._residual(self.inverse)
        residual = found
        for _ in range(_NEWTON_STEPS):
            if not residual < 0.1:
                self.compute_directly()
                break
            refined = 2.0 * self.inverse - self.inverse @ (self.matrix @ self.inverse)
            after = self._residual(refined)
            if after >= residual:  # rounding is all that is left
                break
            self.inverse.copy_(refined)
            residual = after
        return found

    def train(self, mode: bool = True) -> RankOneMatrix:
        """Set the mode; on leaving training the perturbation is merged, where it may be."""
        if self.training and not mode:
            self.merge()
        super().train(mode)
        return self

    def _direction_and_factor(self) -> tuple[Tensor, Tensor]:
        """Return ``A^-1 u`` and ``1 + v^T A^-1 u``."""
        direction = self.inverse @ self.u
        return direction, 1.0 + self.v @ direction

    def _refined_direction(self) -> Tensor:
        """Return ``A^-1 u`` after a step of refinement; where it needed more than that, the inverse is corrected first.

        A merge with a small factor multiplies what is wrong with the inverse by the factor's reciprocal, so a few of them in a
        row can spoil it between two scheduled corrections, and with it the determinant for good. The residual ``u - A A^-1 u``
        shows that at the price of one product.
        """
        direction = self.inverse @ self.u
        residual = self.u - self.matrix @ direction
        allowed = torch.finfo(direction.dtype).eps ** 0.6 * torch.linalg.vector_norm(self.u)
        if not bool(torch.linalg.vector_norm(residual) <= allowed):
            self.correct_inverse()
            direction = self.inverse @ self.u
            residual = self.u - self.matrix @ direction
        return direction + self.inverse @ residual

    def _residual(self, inverse: Tensor) -> float:
        product = self.matrix @ inverse
        product.diagonal().sub_(1.0)
        return float(product.abs().max())

    def _restart(self) -> None:
        generator = random_stream(self.seed, int(self.merges))
        with torch.no_grad():
            self.u.zero_()
            self.v.copy_(torch.randn(self.size, generator=generator, dtype=torch.float64))
        # Gradients belong to the perturbation that is gone.
        self.u.grad = self.v.grad = None
