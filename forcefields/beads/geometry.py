"""Distances, angles and torsions of beads, differentiable as often as one likes."""

from __future__ import annotations

import torch
from torch import Tensor

# nm^2 or nm^4: keeps roots differentiable where beads coincide or lie on a line, and is lost in rounding elsewhere.
_TINY = 1e-24


def distances(positions: Tensor, pairs: Tensor) -> Tensor:
    """Return distances ``(B, P)`` in nm of pairs ``(P, 2)`` of positions ``(B, N, 3)``."""
    return _length(positions[:, pairs[:, 0]] - positions[:, pairs[:, 1]])


def angles(positions: Tensor, triplets: Tensor) -> Tensor:
    """Return angles ``(B, A)`` in radians at the second of three beads ``(A, 3)``."""
    i, j, k = (positions[:, triplets[:, column]] for column in range(3))
    first, second = i - j, k - j
    return torch.atan2(_length(torch.linalg.cross(first, second)), (first * second).sum(-1))


def torsion_cosines(positions: Tensor, quadruplets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(B, T)`` of torsions of four beads ``(T, 4)``, IUPAC sign."""
    i, j, k, m = (positions[:, quadruplets[:, column]] for column in range(4))
    first, axis, last = i - j, k - j, m - k
    axis = axis / _length(axis).unsqueeze(-1)
    normal = torch.linalg.cross(axis, first)
    x = (torch.linalg.cross(normal, axis) * last).sum(-1)
    y = (normal * last).sum(-1)
    scale = (x.square() + y.square() + _TINY).rsqrt()
    return x * scale, y * scale


def _length(vectors: Tensor) -> Tensor:
    return (vectors.square().sum(-1) + _TINY).sqrt()
