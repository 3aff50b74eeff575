"""All pairs of particles at once, as products with small constant matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SOFTENING = 1e-6
"""Squared reduced length added to squared distances, which keeps directions finite where two particles meet."""

FARTHEST = 40.0
"""Largest exponent of Gaussians: denormal numbers take processors ten times the time."""


class PairGeometry(nn.Module):
    """Differences of pairs, and sums over the pairs of each particle.

    Inside a field particles and pairs come first, ``(N, B, ..)`` and ``(P, B, ..)`` with ``P = N (N - 1) / 2``: each of these
    maps then is one matrix product, with another one as its derivative.
    """

    signed: Tensor
    unsigned: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(count, count, 1)
        rows = torch.arange(len(first))
        signed = torch.zeros(len(first), count)
        signed[rows, first], signed[rows, second] = 1.0, -1.0
        self.count, self.pairs = count, len(first)
        self.register_buffer("signed", signed, persistent=False)
        self.register_buffer("unsigned", signed.abs(), persistent=False)

    def differences(self, of_particles: Tensor) -> Tensor:
        """Return ``(P, ..)``, the value of the first of each pair minus that of the second, of ``(N, ..)``."""
        return _product(self.signed.to(of_particles.dtype), of_particles)

    def separations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return differences ``(P, B, D)`` and softened distances ``(P, B, 1)`` of positions ``(B, N, D)``."""
        difference = self.differences(x.transpose(0, 1))
        return difference, (difference.square().sum(-1, keepdim=True) + SOFTENING).sqrt()

    def sums(self, of_particles: Tensor) -> Tensor:
        """Return ``(P, ..)``, the sum of the values of both of each pair."""
        return _product(self.unsigned.to(of_particles.dtype), of_particles)

    def gather(self, of_pairs: Tensor) -> Tensor:
        """Return ``(N, ..)``, for each particle the sum over its pairs of ``(P, ..)``."""
        return _product(self.unsigned.to(of_pairs.dtype).T, of_pairs)

    def gather_signed(self, of_pairs: Tensor) -> Tensor:
        """Return ``(N, ..)``, the sum over pairs in which a particle is the first minus that in which it is the second."""
        return _product(self.signed.to(of_pairs.dtype).T, of_pairs)


def _product(matrix: Tensor, values: Tensor) -> Tensor:
    return (matrix @ values.reshape(len(values), -1)).view(len(matrix), *values.shape[1:])
