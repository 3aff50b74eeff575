"""The space of configurations without their centre, and the normal distribution on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError


def without_mean(x: Tensor) -> Tensor:
    """Return positions ``(B, N, D)`` with their centre at the origin."""
    return x - x.mean(1, keepdim=True)


class MeanFreeNormal(nn.Module):
    """Independent normal particles whose centre is at the origin (arXiv 2006.02425).

    A density on the ``(N - 1) D`` dimensional subspace, with its volume element there:
    ``log p = -|x|^2 / (2 s^2) - (N - 1) D / 2 log(2 pi s^2)``. Published numbers of DW4 and LJ13 often leave out
    ``(N - 1) D / 2 log(2 pi)``, which lowers a negative log-likelihood: :attr:`gaussian_constant` is that number.

    Args:
        count: particles N.
        dimension: D.
        scale: standard deviation s of each coordinate before the centre is removed.
    """

    def __init__(self, count: int, dimension: int, scale: float = 1.0) -> None:
        super().__init__()
        if count < 2 or dimension < 1 or not 0.0 < scale < math.inf:
            raise ConfigurationError(
                f"a normal of particles needs count >= 2, dimension >= 1 and scale > 0, got {count}, {dimension}, {scale}"
            )
        self.count, self.dimension, self.scale = count, dimension, scale

    @property
    def degrees_of_freedom(self) -> int:
        """``(N - 1) D``."""
        return (self.count - 1) * self.dimension

    @property
    def gaussian_constant(self) -> float:
        """``(N - 1) D / 2 log(2 pi)``: what the other convention leaves out of a negative log-likelihood, in nats."""
        return 0.5 * self.degrees_of_freedom * math.log(2.0 * math.pi)

    @property
    def log_normaliser(self) -> float:
        """``log of the integral of exp(-|x|^2 / (2 s^2))`` over the subspace."""
        return self.gaussian_constant + self.degrees_of_freedom * math.log(self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log-densities ``(B,)`` of mean-free ``x`` ``(B, N, D)``; a centre that is not at the origin is removed."""
        return -0.5 * (without_mean(x) / self.scale).square().sum((1, 2)) - self.log_normaliser

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw ``(count, N, D)``."""
        if count < 1:
            raise ConfigurationError(f"the number of samples must be positive, got {count}")
        noise = torch.randn(count, self.count, self.dimension, generator=generator, dtype=dtype)
        return self.scale * without_mean(noise)
