"""Bennett's acceptance ratio for weighted samples of two ensembles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit, log_expit, logsumexp

from ..errors import NonFiniteEnergyError, OverlapError
from .bootstrap import DEFAULT_REPLICAS, Estimate, FloatArray, block_starts, bootstrap_factors, replica_error
from .estimates import effective_sample_size, scaled_weights

MINIMUM_OVERLAP = 0.03


@dataclass(frozen=True)
class _Side:
    """Samples of one state: gaps ``u_b - u_a`` ``(S,)``, weights that sum to one, effective sample size."""

    gaps: FloatArray
    weights: FloatArray
    size: float

    @classmethod
    def of(cls, gaps: ArrayLike, log_weights: ArrayLike) -> Self:
        """Return checked gaps ``(S,)`` with normalised weights; raises ValueError for shapes that differ."""
        weights = scaled_weights(log_weights)
        array = np.asarray(gaps, dtype=np.float64)
        if array.shape != weights.shape:
            raise ValueError(f"energy gaps {array.shape} and log-weights {weights.shape} do not match")
        # The gap of a sample without weight does not matter, and may be NaN.
        array = np.where(weights > 0.0, array, 0.0)
        if np.isnan(array).any():
            raise NonFiniteEnergyError(f"{int(np.isnan(array).sum())} samples with weight have no energy gap")
        return cls(array, weights / weights.sum(), effective_sample_size(log_weights))

    def log_accepted(self, sign: float, shift: float) -> float:
        """Return ln of the effective size times the weighted mean of ``1/(1 + exp(sign (gap + shift)))``."""
        with np.errstate(divide="ignore"):
            terms = log_expit(-sign * (self.gaps + shift)) + np.log(self.weights)
        return float(logsumexp(terms) + np.log(self.size))

    def log_acceptance_variance(self, sign: float, shift: float, blocks: int | None, replicas: int, seed: int) -> float:
        """Return the block bootstrap variance of ln of the weighted mean acceptance."""
        starts = block_starts(len(self.gaps), blocks)
        accepted = self.weights * expit(-sign * (self.gaps + shift))
        sums = np.add.reduceat(np.column_stack([self.weights, accepted]), starts, axis=0)
        totals = bootstrap_factors(len(starts), replicas, seed) @ sums
        return float(replica_error(np.log(totals[:, 1] / totals[:, 0]), len(starts))) ** 2


def weighted_acceptance_ratio(
    gaps_a: ArrayLike,
    gaps_b: ArrayLike,
    log_weights_a: ArrayLike,
    log_weights_b: ArrayLike,
    *,
    minimum_overlap: float = MINIMUM_OVERLAP,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> Estimate[float]:
    """Return ``F_b - F_a`` in kT from weighted samples of states a and b, with its error.

    Bennett's equation (J. Comput. Phys. 22, 245, 1976) with weighted averages, and effective sample sizes in
    the place of numbers of samples. Any constant in the place of the numbers gives a consistent estimate;
    this one is the best for equal weights. The error is a block bootstrap of the two averages, at a fixed
    constant, to which the estimate is insensitive in first order.

    Args:
        gaps_a: ``u_b - u_a`` of samples of state a ``(S,)``; ``+inf`` where b is impossible.
        gaps_b: ``u_b - u_a`` of samples of state b ``(T,)``; ``-inf`` where a is impossible.
        log_weights_a: ``(S,)``, with which the first samples represent state a.
        log_weights_b: ``(T,)``, with which the second samples represent state b.
        minimum_overlap: the larger of the two elements of the overlap matrix of a and b must reach this.
        blocks: number of blocks of consecutive samples; None for 100.
        replicas: number of bootstrap replicas.
        seed: random seed of the bootstrap.

    Raises:
        OverlapError: when the states share too few configurations; the message has the overlap.
        NonFiniteEnergyError: when a gap of a sample with weight is NaN.
    """
    side_a, side_b = _Side.of(gaps_a, log_weights_a), _Side.of(gaps_b, log_weights_b)
    difference = _solve(side_a, side_b)
    shift = float(np.log(side_a.size / side_b.size)) - difference
    # The probability of b given the sample, in the mixture of both sets; that of a is the rest.
    shared = 0.0
    for side in (side_a, side_b):
        probability = expit(-(side.gaps + shift))
        shared += side.size * float(side.weights @ (probability * (1.0 - probability)))
    if not shared / min(side_a.size, side_b.size) >= minimum_overlap:
        raise OverlapError(
            f"the two states do not overlap: {shared / side_a.size:.2g} and {shared / side_b.size:.2g} "
            f"in the overlap matrix (needed: {minimum_overlap:g}). Sample states in between, or draw more samples"
        )
    variance = side_a.log_acceptance_variance(1.0, shift, blocks, replicas, 2 * seed)
    variance += side_b.log_acceptance_variance(-1.0, shift, blocks, replicas, 2 * seed + 1)
    return Estimate(difference, variance**0.5)


def _solve(side_a: _Side, side_b: _Side) -> float:
    ratio = float(np.log(side_a.size / side_b.size))

    def imbalance(difference: float) -> float:
        shift = ratio - difference
        return side_a.log_accepted(1.0, shift) - side_b.log_accepted(-1.0, shift)

    sides = [side.gaps[(side.weights > 0.0) & np.isfinite(side.gaps)] for side in (side_a, side_b)]
    if not (sides[0].size and sides[1].size):
        raise OverlapError(
            f"{sides[0].size} samples of state a have a finite energy in b and {sides[1].size} of b in a: "
            "the states do not overlap"
        )
    gaps = np.concatenate(sides)
    # 40 kT beyond all gaps one side accepts everything and the other nothing, whatever their sizes.
    margin = 40.0 + 2.0 * abs(ratio)
    return float(brentq(imbalance, gaps.min() - margin, gaps.max() + margin, xtol=1e-10, rtol=1e-12))
