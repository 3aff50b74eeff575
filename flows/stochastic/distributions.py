"""Beginnings and ends of paths: densities to draw from, reduced energies, and interpolations between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError

ReducedEnergy = Callable[[Tensor], Tensor]
"""Configurations ``(B, D)`` to ``(B,)``: minus the logarithm of a density, up to a constant; differentiable."""


@runtime_checkable
class Distribution(Protocol):
    """A normalised density that can be drawn from."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return normalised log-densities ``(B,)`` of configurations ``(B, D)``."""
        ...

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw configurations ``(count, D)``."""
        ...


class StandardNormal(nn.Module):
    """The normal distribution with unit covariance on ``dimension`` coordinates."""

    def __init__(self, dimension: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dimension = dimension
        self.dtype = dtype

    def log_prob(self, value: Tensor) -> Tensor:
        """See :meth:`Distribution.log_prob`."""
        return -0.5 * value.square().sum(-1) - 0.5 * self.dimension * math.log(2.0 * math.pi)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Distribution.sample`."""
        return torch.randn(count, self.dimension, generator=generator, dtype=self.dtype)


class InterpolatedEnergy:
    """``u = (1 - fraction) (-log p) + fraction u_target`` with ``p`` the density at which paths begin.

    Args:
        prior: the density p.
        target: reduced energy at the end of the paths.
        fraction: 0-dimensional or a number in [0, 1]; a tensor may want a gradient.
    """

    def __init__(self, prior: Distribution, target: ReducedEnergy, fraction: Tensor | float) -> None:
        self.prior = prior
        self.target = target
        self.fraction = fraction

    def __call__(self, value: Tensor) -> Tensor:
        """Return reduced energies ``(B,)`` of configurations ``(B, D)``."""
        # The ends are evaluated alone: they cost half, and an infinite energy times zero is not a number.
        if not isinstance(self.fraction, Tensor):
            if self.fraction == 0.0:
                return -self.prior.log_prob(value)
            if self.fraction == 1.0:
                return self.target(value)
        return self.fraction * self.target(value) - (1.0 - self.fraction) * self.prior.log_prob(value)


class Schedule(nn.Module):
    """The fractions of the target at which the kernels of a path work, in their order.

    Learned ones keep their order and stay between the neighbours that are fixed: what is learned is how the distance from 0 to
    1 is divided. A first fraction of 0 and a last one of 1 stay what they are.

    Args:
        fractions: ``(K,)`` in [0, 1], not decreasing.
        learned: whether training may move them.
    """

    def __init__(self, fractions: Sequence[float], *, learned: bool = False) -> None:
        super().__init__()
        given = [float(value) for value in fractions]
        if any(not 0.0 <= value <= 1.0 for value in given) or sorted(given) != given:
            raise ConfigurationError(f"fractions of a schedule must lie in [0, 1] and not decrease, got {given}")
        edges = torch.tensor([0.0, *given, 1.0], dtype=torch.float64)
        self.given = tuple(given)
        self.increments = torch.diff(edges)
        self.positive = torch.nonzero(self.increments > 0.0).squeeze(1)
        self.logits = nn.Parameter(self.increments[self.positive].log()) if learned else None

    def __len__(self) -> int:
        return len(self.given)

    def forward(self) -> list[Tensor | float]:
        """Return the K fractions: numbers where they are fixed, 0-dimensional tensors where they are learned."""
        if self.logits is None:
            return list(self.given)
        increments = torch.zeros_like(self.increments).index_put((self.positive,), torch.softmax(self.logits, 0))
        learned = torch.cumsum(increments, 0)[:-1]
        return [value if value in (0.0, 1.0) else learned[index] for index, value in enumerate(self.given)]
