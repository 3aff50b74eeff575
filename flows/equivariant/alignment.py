"""Pairs of prior points and samples by optimal transport up to permutations and rotations.

Configurations that differ by a permutation of particles, a rotation or a reflection are the same to an equivariant flow.
Pairs of prior points and samples are brought as near to each other as these allow before they are joined by straight
lines (L. Klein, A. Krämer, F. Noé, NeurIPS 2023, arXiv 2306.15030, section 4), so that the lines cross less.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...core.errors import ConfigurationError


class Coupled(NamedTuple):
    """Prior points and samples ``(B, N, D)``, row by row the ends of a line."""

    start: Tensor
    end: Tensor


def permuted_to(reference: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with the particles of each configuration in the order that is nearest to ``reference``.

    Args:
        reference: ``(B, N, D)``.
        x: ``(B, N, D)``; the sum of squared distances is minimised by the Hungarian algorithm.
    """
    gain = (reference.double() @ x.double().transpose(1, 2)).numpy()
    order = np.stack([linear_sum_assignment(matrix, maximize=True)[1] for matrix in gain])
    return torch.gather(x, 1, torch.from_numpy(order).unsqueeze(-1).expand_as(x))


def rotated_to(reference: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` rotated or reflected about the origin to be nearest to ``reference``, both ``(B, N, D)``.

    The orthogonal Procrustes solution (W. Kabsch, Acta Cryst. A 32, 922, 1976) without the condition on the determinant, since
    pair energies do not know left from right.
    """
    u, _, vt = torch.linalg.svd(x.transpose(1, 2) @ reference, full_matrices=False)
    return x @ (u @ vt)


def aligned_to(reference: Tensor, x: Tensor, rounds: int = 2) -> Tensor:
    """Return ``x`` permuted and rotated towards ``reference``, by turns.

    Each turn lowers the distance, to a minimum in the neighbourhood of the first permutation, not always to the lowest.
    """
    if rounds < 1:
        raise ConfigurationError(f"alignment takes at least one round, got {rounds}")
    for _ in range(rounds):
        x = rotated_to(reference, permuted_to(reference, x))
    return x


def couple(start: Tensor, end: Tensor, group: int, rounds: int = 2) -> Coupled:
    """Pair mean-free prior points with samples within groups of rows, each pair aligned.

    Args:
        start: prior points ``(B, N, D)``.
        end: samples ``(B, N, D)``.
        group: rows among which partners are assigned, by all ``group^2`` aligned distances; 1 keeps the rows as they are.
        rounds: rounds of alignment, see :func:`aligned_to`.

    Raises:
        ConfigurationError: when ``group`` does not divide the number of rows.
    """
    if start.shape != end.shape:
        raise ValueError(f"prior points {tuple(start.shape)} and samples {tuple(end.shape)} differ in shape")
    count = len(start)
    if group < 1 or count % group:
        raise ConfigurationError(f"groups of {group} do not divide {count} pairs")
    if group == 1:
        return Coupled(start, aligned_to(start, end, rounds))
    shape = (count // group, group, group, *start.shape[1:])
    origin = start.view(count // group, group, 1, *start.shape[1:]).expand(shape).reshape(-1, *start.shape[1:])
    candidates = end.view(count // group, 1, group, *end.shape[1:]).expand(shape).reshape(-1, *end.shape[1:])
    candidates = aligned_to(origin, candidates, rounds).view(shape)
    costs = (origin.view(shape) - candidates).square().sum((-1, -2)).numpy()
    chosen = torch.from_numpy(np.stack([linear_sum_assignment(cost)[1] for cost in costs]))
    rows = torch.arange(count // group).unsqueeze(1)
    columns = torch.arange(group).unsqueeze(0)
    return Coupled(start, candidates[rows, columns, chosen].reshape(start.shape))
