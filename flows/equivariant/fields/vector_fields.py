"""The contract of velocities that move configurations, and the divergence of any of them."""

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
    """What solvers ask of a field: a :class:`VectorField`, or one in compiled form."""

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


class HutchinsonField(VectorField):
    """A field whose divergence is estimated from random directions, ``mean of e . d(v . e)/dx`` (arXiv 1810.01367).

    Unbiased, at the price of noise. The directions stay the same until :meth:`draw` is called, so that the steps of one
    solution belong to one ordinary differential equation.

    Args:
        field: the field itself.
        probes: directions, whose estimates are averaged.
    """

    def __init__(self, field: VectorField, probes: int = 1) -> None:
        super().__init__()
        if probes < 1:
            raise ValueError(f"the number of random directions must be positive, got {probes}")
        self.field, self.probes = field, probes
        self._directions: Tensor | None = None

    def draw(self, x: Tensor, generator: torch.Generator) -> None:
        """Draw new directions of independent signs for configurations of the shape of ``x`` ``(B, N, D)``."""
        signs = torch.randint(0, 2, (self.probes, *x.shape), generator=generator)
        self._directions = (2 * signs - 1).to(x)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """See :meth:`VectorField.forward`."""
        velocity: Tensor = self.field(time, x)
        return velocity

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """See :meth:`VectorField.with_divergence`; an estimate. Raises ValueError before :meth:`draw`."""
        if self._directions is None or self._directions.shape[1:] != x.shape:
            raise ValueError(f"draw(x, generator) directions for configurations of shape {tuple(x.shape)} first")
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if differentiable and x.requires_grad else x.detach().requires_grad_(True)
            value = self.field(time, leaf)
            (rows,) = torch.autograd.grad(
                value,
                leaf,
                self._directions,
                create_graph=differentiable,
                is_grads_batched=True,
                materialize_grads=True,
            )
            divergence = (rows * self._directions).sum((2, 3)).mean(0)
        return Velocity(value, divergence) if differentiable else Velocity(value.detach(), divergence.detach())
