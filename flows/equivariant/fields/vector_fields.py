"""The contract of velocity fields, and the exact divergence of any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Velocity(NamedTuple):
    """Velocities ``(B, N, D)`` and their divergences ``(B,)``."""

    value: Tensor
    divergence: Tensor


class Pulled(NamedTuple):
    """Velocities ``(B, N, D)``, and gradients ``(B, N, D)`` of their products with a pull and of their divergences."""

    value: Tensor
    gradient: Tensor


class Velocities(Protocol):
    """The interface that solvers use: a :class:`VectorField`, or its compiled form."""

    def __call__(self, time: Tensor, x: Tensor) -> Tensor:
        """Return velocities ``(B, N, D)``."""
        ...

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """Return velocities and their divergences."""
        ...

    def pulled(self, time: Tensor, x: Tensor, pull: Tensor) -> Pulled:
        """Return velocities, and the gradient of ``sum(velocity pull) + sum(divergence)`` by positions; no record is kept."""
        ...


class VectorField(nn.Module):
    """A velocity of each particle as a function of time and of all positions.

    A subclass writes :meth:`forward`; where its divergence has a closed form it overrides :meth:`with_divergence` too.
    """

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """Return velocities ``(B, N, D)``.

        Args:
            time: ``()`` or ``(B,)``, from 0 (prior) to 1 (data).
            x: ``(B, N, D)`` in reduced lengths.
        """
        raise TypeError(f"{type(self).__name__} defines no velocity: write its forward(time, x)")

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """Return velocities with their divergence in all ``N D`` coordinates; exact, differentiable.

        A velocity that leaves the centre where it is, and does not depend on it, has the same divergence within the
        mean-free subspace.
        """
        return exact_divergence(self, time, x)

    def pulled(self, time: Tensor, x: Tensor, pull: Tensor) -> Pulled:
        """See :meth:`Velocities.pulled`; ``pull`` is ``(B, N, D)``."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value, divergence = self.with_divergence(time, leaf)
            (gradient,) = torch.autograd.grad(
                (value, divergence), leaf, (pull, torch.ones_like(divergence)), materialize_grads=True
            )
        return Pulled(value.detach(), gradient)


def exact_divergence(field: Callable[[Tensor, Tensor], Tensor], time: Tensor, x: Tensor) -> Velocity:
    """Return the velocity and its divergence by ``N D`` derivatives in reverse mode, one a coordinate.

    Differentiable where gradients are enabled; otherwise no graph is kept.
    """
    differentiable = torch.is_grad_enabled()
    size = x[0].numel()
    units = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    with torch.enable_grad():
        leaf = x if differentiable and x.requires_grad else x.detach().requires_grad_(True)
        value = field(time, leaf)
        (rows,) = torch.autograd.grad(
            value, leaf, units, create_graph=differentiable, is_grads_batched=True, materialize_grads=True
        )
        divergence = (rows * units).sum((0, 2, 3))
    return Velocity(value, divergence) if differentiable else Velocity(value.detach(), divergence.detach())
