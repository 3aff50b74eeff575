"""Invariant features of a chain of beads: all distances, angles along bonds, and torsions by cosine and sine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from ...core.potential import Particles
from ..beads.geometry import angles, distances, torsion_cosines
from ..beads.graphs import all_pairs, bonded_angles, bonded_torsions

_SMALLEST_SPREAD = 1e-6


class InvariantFeatures(nn.Module):
    """Features that rotations and translations do not change, each with zero mean and unit variance over training frames.

    Wang et al., ACS Cent. Sci. 5, 755 (2019). Mirror images differ by the sines of torsions.
    """

    pairs: Tensor
    triplets: Tensor
    quadruplets: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, beads: Particles) -> None:
        super().__init__()
        if len(beads) < 2:
            raise ConfigurationError(f"features need at least two beads, got {len(beads)}")
        self.register_buffer("pairs", torch.from_numpy(all_pairs(len(beads))), persistent=False)
        for name, found, width in (
            ("triplets", bonded_angles(beads), 3),
            ("quadruplets", bonded_torsions(beads), 4),
        ):
            self.register_buffer(name, torch.tensor(found, dtype=torch.long).reshape(-1, width), persistent=False)
        self.count = len(self.pairs) + len(self.triplets) + 2 * len(self.quadruplets)
        self.register_buffer("mean", torch.zeros(self.count, dtype=torch.float64))
        self.register_buffer("deviation", torch.ones(self.count, dtype=torch.float64))

    def fit(self, positions: Tensor, weights: Tensor) -> None:
        """Take means and deviations from frames ``(F, n, 3)`` with normalised weights ``(F,)``."""
        raw = self.raw(positions.double())
        self.mean.copy_(weights @ raw)
        variance = weights @ (raw - self.mean).square()
        self.deviation.copy_(variance.clamp_min(_SMALLEST_SPREAD**2).sqrt())

    def raw(self, positions: Tensor) -> Tensor:
        """Return features ``(B, count)`` before they are standardised."""
        parts = [distances(positions, self.pairs)]
        if len(self.triplets):
            parts.append(angles(positions, self.triplets))
        if len(self.quadruplets):
            parts += torsion_cosines(positions, self.quadruplets)
        return torch.cat(parts, dim=-1)

    def forward(self, positions: Tensor) -> Tensor:
        """Return features ``(B, count)`` of positions ``(B, n, 3)`` in nm."""
        mean, deviation = self.mean.to(positions.dtype), self.deviation.to(positions.dtype)
        return (self.raw(positions) - mean) / deviation
