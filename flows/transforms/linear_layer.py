"""The bijection ``y = W x + b`` with a matrix that stays invertible while it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bijection import Bijection, Mixing, Transformed
from .rank_one_matrix import RankOneMatrix


class InvertibleLinear(Bijection):
    """``y = W x + b`` with W a :class:`~.rank_one_matrix.RankOneMatrix`; closed form both ways.

    Train it with a :class:`~flowbridge.flows.transforms.merging.MergingSchedule`: without one W explores a single
    direction v.

    Args:
        dimension: n.
        seed: random seed of the random directions.
        bias: whether there is a b.
        matrix: start ``(n, n)``; the identity where None. Its determinant fixes the sign of the trained one's.
        dtype: precision of parameters and buffers.
    """

    def __init__(
        self,
        dimension: int,
        seed: int,
        *,
        bias: bool = True,
        matrix: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weight = RankOneMatrix(dimension, seed, matrix=matrix, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(dimension, dtype=dtype)) if bias else None

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """See :meth:`Bijection.forward`; the context is not used."""
        mapped = self.weight.multiply(value)
        return Transformed(
            mapped if self.bias is None else mapped + self.bias, self.weight.log_abs_det().expand(len(value))
        )

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """See :meth:`Bijection.inverse`; the context is not used."""
        shifted = value if self.bias is None else value - self.bias
        return Transformed(self.weight.solve(shifted), -self.weight.log_abs_det().expand(len(value)))

    def layer_inverse(self, value: Tensor, context: Tensor | None = None) -> Mixing:
        # The derivative is W^-1.
        return Mixing(*self.inverse(value), self.weight.multiply_transposed)
