"""A density of particles: a normal distribution transported along a velocity field."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fields.vector_fields import VectorField
from .mean_free import MeanFreeNormal, without_mean
from .ordinary_equations import Solver, transport

_CHUNK = 64  # configurations at once: few enough that the features of all their pairs stay in cache


class Drawn(NamedTuple):
    """Samples ``(S, N, D)`` and their log-densities ``(S,)``, float64."""

    value: Tensor
    log_prob: Tensor


class ContinuousFlow(nn.Module):
    """A mean-free normal distribution transported along a field: a density of configurations without their centre.

    ``log p(x1) = log q(x0) - integral of the divergence``. Where the field is equivariant, the density is
    invariant under rotations, reflections, translations and permutations (arXiv 2006.02425, theorem 1).

    Args:
        prior: the density at time 0.
        field: the velocity.
        solver: solver of the equation, for densities and samples.
    """

    def __init__(self, prior: MeanFreeNormal, field: VectorField, solver: Solver | None = None) -> None:
        super().__init__()
        self.prior, self.field = prior, field
        self.solver = solver or Solver()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the field."""
        return next(self.field.parameters()).dtype

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log-densities ``(B,)``, float64, of ``x`` ``(B, N, D)`` in reduced lengths; differentiable.

        A density on the mean-free subspace, so a centre that is not at the origin is removed.
        """
        latent, divergence = transport(self.field, without_mean(x).to(self.dtype), self.solver, backward=True)
        return self.prior.log_prob(latent.double()) + divergence.double()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(count, N, D)``; see :meth:`draw`. Without a generator the one of seed 0 is used."""
        return self.draw(count, generator or torch.Generator().manual_seed(0)).value

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Draw ``count`` samples with their log-densities, at the price of the divergence."""
        latent = self.prior.sample(count, generator, self.dtype)
        with torch.no_grad():
            parts = [self.carried(part) for part in latent.split(_CHUNK)]
        return Drawn(torch.cat([part.value for part in parts]), torch.cat([part.log_prob for part in parts]))

    def carried(self, latent: Tensor) -> Drawn:
        """Return the images of prior points ``(B, N, D)`` and the log-densities there; differentiable."""
        value, divergence = transport(self.field, latent, self.solver)
        return Drawn(value, self.prior.log_prob(latent.double()) - divergence.double())
