"""Reordering of coordinates, whose derivative is reordering back.

Indexing with a tensor is differentiated as a sum over equal indices, which cannot be vectorised or fused with what surrounds
it; an order has no equal indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Reorder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return value.index_select(-1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(gradients[0], inverse, order), None, None


class Permutation(nn.Module):
    """A fixed order of the last axis.

    Args:
        order: source index of each entry of the result; every index of the axis once.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: list[int] | tuple[int, ...]) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each of 0 .. {len(order) - 1} once, got {list(order)}")
        indices = torch.tensor(order, dtype=torch.long)
        self.register_buffer("order", indices, persistent=False)
        self.register_buffer("inverse_order", torch.argsort(indices), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return ``(..., D)`` with entry i taken from ``order[i]``."""
        result: Tensor = _Reorder.apply(value, self.order, self.inverse_order)
        return result

    def inverse(self, value: Tensor) -> Tensor:
        """Return ``(..., D)`` put back."""
        result: Tensor = _Reorder.apply(value, self.inverse_order, self.order)
        return result
