"""Sums over triangles of two particles and a third one, with their derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TriangleSums(NamedTuple):
    """Sums over third particles ``(P, B, C)``, and their changes as the two of a pair move apart by their difference."""

    value: Tensor
    change: Tensor


class Triangles(nn.Module):
    """``t_ij = sum over k of a(d_ik) a(d_jk)``, the lowest feature of a pair that sees angles.

    All of it is products of small symmetric matrices: with ``s = a' / d`` and ``x_ik . x_ij = (r_ik^2 + r_ij^2 - r_jk^2) / 2``
    the change of ``a(d_ik)`` as i moves by ``x_ij`` is ``s_ik`` times that. So the change of the sum takes ``N^3`` operations,
    as the sum itself does.

    Args:
        count: particles N.
    """

    rows: Tensor
    selected: Tensor
    off_diagonal: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(count, count, 1)
        rows = torch.zeros(count, count, dtype=torch.long)
        rows[first, second] = rows[second, first] = torch.arange(len(first))
        self.count = count
        self.register_buffer("rows", rows.flatten(), persistent=False)
        self.register_buffer("selected", first * count + second, persistent=False)
        self.register_buffer("off_diagonal", 1.0 - torch.eye(count), persistent=False)

    def forward(self, sides: Tensor) -> Tensor:
        """Return the sums ``(P, B, C)`` of features of pairs ``(P, B, C)``."""
        sides = self._square(sides)
        return self._pairs(sides @ sides)

    def with_change(self, sides: Tensor, slopes: Tensor, squares: Tensor) -> TriangleSums:
        """Return the sums and how they change as i moves by ``x_i - x_j`` and j by as much the other way.

        Args:
            sides: features a of pairs ``(P, B, C)``.
            slopes: their derivatives by the distance, over the distance ``(P, B, C)``.
            squares: squared distances ``(P, B, 1)``.
        """
        sides, slopes, squares = self._square(sides), self._square(slopes), self._square(squares)
        moved = slopes * squares @ sides + squares * (slopes @ sides) - slopes @ (sides * squares)
        return TriangleSums(self._pairs(sides @ sides), self._pairs(0.5 * (moved + moved.transpose(-1, -2))))

    def _square(self, of_pairs: Tensor) -> Tensor:
        """Return symmetric matrices ``(B, C, N, N)``, zero on the diagonal."""
        square = of_pairs.index_select(0, self.rows).view(self.count, self.count, *of_pairs.shape[1:])
        return square.permute(2, 3, 0, 1) * self.off_diagonal.to(of_pairs.dtype)

    def _pairs(self, square: Tensor) -> Tensor:
        return square.permute(2, 3, 0, 1).flatten(0, 1).index_select(0, self.selected)
