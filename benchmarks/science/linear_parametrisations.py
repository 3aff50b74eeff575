"""Invertible matrices in four parametrisations, for the same training step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowbridge.flows.transforms.linear_layer import InvertibleLinear
from flowbridge.flows.transforms.merging import MergingSchedule
from flowbridge.flows.transforms.rank_one_matrix import RankOneMatrix

BATCH = 32


class LinearModel(nn.Module):
    """A linear map of rows ``(B, n)`` that knows its determinant."""

    size: int

    def forward(self, value: Tensor) -> Tensor:
        """Return ``W x`` of each row."""
        raise TypeError(f"{type(self).__name__} defines no product")

    def log_abs_det(self) -> Tensor:
        """Return ``log |det W|``, 0-dimensional."""
        raise TypeError(f"{type(self).__name__} defines no determinant")

    def dense(self) -> Tensor:
        """Return W ``(n, n)``, without gradients."""
        with torch.no_grad():
            return self(torch.eye(self.size, dtype=next(self.parameters()).dtype)).T


class RankOne(LinearModel):
    """P4: perturbations of rank one."""

    def __init__(self, size: int, start: Tensor | None = None) -> None:
        super().__init__()
        self.size = size
        dtype = torch.float32 if start is None else start.dtype
        self.layer = InvertibleLinear(size, seed=0, bias=False, matrix=start, dtype=dtype)

    def forward(self, value: Tensor) -> Tensor:
        """See :meth:`LinearModel.forward`."""
        return self.layer.weight.multiply(value)

    def log_abs_det(self) -> Tensor:
        """See :meth:`LinearModel.log_abs_det`."""
        return self.layer.weight.log_abs_det()


class Dense(LinearModel):
    """A matrix of parameters; its determinant by ``slogdet``, differentiated by torch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, value: Tensor) -> Tensor:
        """See :meth:`LinearModel.forward`."""
        return value @ self.weight.T

    def log_abs_det(self) -> Tensor:
        """See :meth:`LinearModel.log_abs_det`."""
        return torch.linalg.slogdet(self.weight)[1]


class Triangular(LinearModel):
    """LU: a unit lower triangle times an upper one with a positive diagonal (Kingma, Dhariwal 2018; no permutation)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.lower = nn.Parameter(torch.zeros(size, size))
        self.upper = nn.Parameter(torch.zeros(size, size))
        self.log_diagonal = nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor) -> Tensor:
        """See :meth:`LinearModel.forward`."""
        first = value @ self.upper.triu(1).T + value * self.log_diagonal.exp()
        return first + first @ self.lower.tril(-1).T

    def log_abs_det(self) -> Tensor:
        """See :meth:`LinearModel.log_abs_det`."""
        return self.log_diagonal.sum()


class Orthogonal(LinearModel):
    """QR: n Householder reflections times an upper triangle with a positive diagonal (Hoogeboom et al. 2019)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        generator = torch.Generator().manual_seed(0)
        self.reflections = nn.Parameter(torch.randn(size, size, generator=generator) / math.sqrt(size))
        self.upper = nn.Parameter(torch.zeros(size, size))
        self.log_diagonal = nn.Parameter(torch.zeros(size))

    def forward(self, value: Tensor) -> Tensor:
        """See :meth:`LinearModel.forward`."""
        rotated = value @ self.upper.triu(1).T + value * self.log_diagonal.exp()
        vectors = self.reflections.tril(-1) + torch.eye(self.size, dtype=value.dtype)
        lengths = 2.0 / vectors.square().sum(0)
        return rotated @ torch.linalg.householder_product(vectors, lengths).T

    def log_abs_det(self) -> Tensor:
        """See :meth:`LinearModel.log_abs_det`."""
        return self.log_diagonal.sum()


PARAMETRISATIONS: dict[str, Callable[..., LinearModel]] = {
    "P4": RankOne,
    "dense": Dense,
    "LU": Triangular,
    "QR": Orthogonal,
}


def training_step(model: LinearModel) -> Callable[[], object]:
    """Return a step of Adam on the negative log-likelihood of normal data, merges included."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    if any(isinstance(part, RankOneMatrix) for part in model.modules()):
        MergingSchedule(model, optimiser, every=10, correct_every=50)
    x = torch.randn(BATCH, model.size, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimiser.zero_grad()
        (0.5 * model(x).square().sum(-1).mean() - model.log_abs_det()).backward()
        optimiser.step()

    return step
