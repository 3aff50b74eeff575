"""Sums of clipped contributions and the noise that hides any one of them.

Every unit u contributes tensors g_u1 .. g_uK ("blocks": the layers of a network, or all parameters as one), each scaled down to
norm C_k at most. Their sums over the drawn units are released with noise of standard deviation ``sigma C_k / s_k``, with shares
``s_1^2 + ... + s_K^2 = 1``.

*Adding or removing* a unit moves sum k by at most C_k. Measured in its noise divided by sigma that is s_k at most, and over all
blocks the square root of the sum of s_k^2, which is 1: the whole answer is one Gaussian mechanism of sensitivity 1 with noise
multiplier sigma. Equal shares ``1 / sqrt(K)`` give the ``sqrt(K)`` of DP-MAC (Harder et al., arXiv 1910.06924).

*Replacing* a unit moves sum k from ``+g_u`` to ``+g_u'``, by at most 2 C_k, so the sensitivity is 2.

The sum is divided by the expected number of units in a batch, a constant that no unit changes. (An average over the units that
happened to be drawn would depend on their number, and have another sensitivity.) Factors of a loss, such as the 1/2 of squares
or the 1/B of means, are where implementations have put too little noise: here they act before clipping or after the noise, and
the noise knows the clipping norm alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import NoiseSource
from ..units import UnitBatch, mean_by_unit

COUNT_SHARE = 0.01
"""Share of the noise budget, as a sum of s_k^2, that counts for adaptive clipping take."""


class Contributions(NamedTuple):
    """Clipped sums over units by block, how many units ``(K,)`` were within each norm, and how many were not finite."""

    sums: list[Tensor]
    within: Tensor
    non_finite: int


def contributions_of(found: list[tuple[Tensor, int, int]]) -> Contributions:
    """Return the contributions of all blocks, from :func:`clipped_sum` of each."""
    sums, within, broken = zip(*found, strict=True)
    return Contributions(list(sums), torch.tensor(within), max(broken))


def block_names(layers: int, order: int) -> list[str]:
    """Return the names of the coefficient tensors of DP-MAC: one for each layer, then one for each curvature."""
    names = [f"layer {number}" for number in range(1, layers + 1)]
    return names + ([f"{name} curvature" for name in names] if order == 2 else [])


def clip_factors(norms: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Return factors ``(U,)`` that bring norms down to the threshold, 0 where a norm is not finite, and the number of those.

    A contribution that is NaN or infinite is left out as a whole: this depends on its unit alone, so sensitivity stays.
    """
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (threshold / norms.clamp_min(1e-30)).clamp_max(1.0), 0.0)
    return factors, int((~finite).sum())


def clipped_sum(rows: Tensor, threshold: float) -> tuple[Tensor, int, int]:
    """Return the sum of contributions ``(U, ...)`` clipped to a norm, how many were within it, and how many not finite."""
    norms = rows.flatten(1).double().norm(dim=1)
    factors, broken = clip_factors(norms, threshold)
    kept = torch.where((factors > 0.0).reshape(-1, *(1,) * (rows.dim() - 1)), rows, 0.0)
    total = torch.tensordot(factors.to(rows.dtype), kept, dims=([0], [0]))
    return total, int((norms <= threshold).sum()), broken


def clipped_outer_sum(left: Tensor, right: Tensor, batch: UnitBatch, threshold: float) -> tuple[Tensor, int, int]:
    """Return :func:`clipped_sum` of the outer products of rows ``(S, a)`` and ``(S, b)``, averaged within each unit.

    Where every unit has one sample, norms are products of two vector norms, and no outer product is ever formed.
    """
    if len(batch.owners) == batch.units:
        norms = left.double().norm(dim=1) * right.double().norm(dim=1)
        factors, broken = clip_factors(norms, threshold)
        good = factors > 0.0
        weighted = torch.where(good[:, None], left * factors[:, None].to(left.dtype), 0.0)
        return weighted.T @ torch.where(good[:, None], right, 0.0), int((norms <= threshold).sum()), broken
    return clipped_sum(mean_by_unit(left[:, :, None] * right[:, None, :], batch), threshold)


def noise_shares(blocks: int, adaptive: bool) -> tuple[float, float]:
    """Return the share s_k of every block, and of every block's count where clipping adapts (0 where it does not)."""
    counted = COUNT_SHARE if adaptive else 0.0
    return ((1.0 - counted) / blocks) ** 0.5, (counted / blocks) ** 0.5


def noisy_sums(
    contributions: Contributions, thresholds: list[float], share: float, multiplier: float, noise: NoiseSource
) -> list[Tensor]:
    """Return the sums with noise of standard deviation ``multiplier * threshold / share``."""
    return [
        total + (multiplier * threshold / share * noise.normal(total.shape)).to(total.dtype)
        for total, threshold in zip(contributions.sums, thresholds, strict=True)
    ]


def adapted_thresholds(
    contributions: Contributions,
    thresholds: list[float],
    drawn: int,
    expected: float,
    quantile: float,
    rate: float,
    share: float,
    multiplier: float,
    noise: NoiseSource,
) -> list[float]:
    """Return thresholds moved towards a quantile of the norms (Andrew et al., arXiv 1905.03871, algorithm 1).

    Each unit contributes +1/2 where it is within the norm and -1/2 where it is not: sensitivity 1/2 for adding or removing.
    """
    centred = contributions.within.double() - 0.5 * drawn
    noisy = centred + 0.5 * multiplier / share * noise.normal(contributions.within.shape)
    fractions = (noisy / expected + 0.5).clamp(0.0, 1.0)
    steps = torch.exp(-rate * (fractions - quantile))
    return [threshold * float(step) for threshold, step in zip(thresholds, steps, strict=True)]
