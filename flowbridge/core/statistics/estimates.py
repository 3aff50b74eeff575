"""Statistics of weighted samples: effective sample size, averages, free energies, divergences, their errors.

Weights are always given as unnormalised natural logarithms, ``log_weights``, of shape ``(S,)``: importance
weights ``p(x)/q(x)`` span hundreds of orders of magnitude before they are normalised. ``-inf`` is a weight of
zero; NaN and ``+inf`` are refused. Free energies are in kT. Errors are one sigma, from a bootstrap over
blocks of consecutive samples (see :mod:`flowbridge.core.statistics.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import OverlapError
from .bootstrap import (
    DEFAULT_REPLICAS,
    Estimate,
    FloatArray,
    block_starts,
    bootstrap_factors,
    bootstrap_of_sums,
    replica_error,
)

__all__ = [
    "MINIMUM_BLOCKS",
    "Estimate",
    "FreeEnergyProfile",
    "block_bootstrap",
    "checked_log_weights",
    "effective_sample_percent",
    "effective_sample_size",
    "free_energy_difference",
    "free_energy_profile",
    "jensen_shannon_divergence",
    "jensen_shannon_noise",
    "largest_weight_ratio",
    "mean_with_error",
    "scaled_weights",
    "weighted_mean",
]

MINIMUM_BLOCKS = 4  # two halves of at least two, below which a scatter between halves says nothing


@dataclass(frozen=True)
class FreeEnergyProfile:
    """Free energy along one coordinate.

    Attributes:
        edges: ``(B + 1,)`` bin edges, in the units of the coordinate.
        free_energy: ``(B,)`` -ln of the density, in kT, shifted so that its lowest bin is zero; ``inf`` in
            bins that hold no weight.
        error: ``(B,)`` standard error of -ln of the normalised density, in kT; ``inf`` in bins without
            weight. It is not the error of the difference to the lowest bin.
        counts: ``(B,)`` number of samples in each bin, whatever their weight.
    """

    edges: FloatArray
    free_energy: FloatArray
    error: FloatArray
    counts: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def centers(self) -> FloatArray:
        """Bin centres ``(B,)``."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])


def checked_log_weights(log_weights: ArrayLike) -> FloatArray:
    """Return log-weights as ``(S,)`` float64.

    Raises:
        ValueError: when they are empty, not one-dimensional, hold NaN or ``+inf``, or are all ``-inf``.
    """
    array = np.asarray(log_weights, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"log_weights must be a non-empty array of shape (S,), got shape {array.shape}")
    bad = np.isnan(array) | (array == np.inf)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {array.size} log-weights are NaN or +inf, the first at index "
            f"{int(np.argmax(bad))}: evaluate those samples again, or give them -inf (zero weight) on purpose"
        )
    if array.max() == -np.inf:
        raise ValueError(f"all {array.size} log-weights are -inf: no sample has any weight")
    return array


def scaled_weights(log_weights: ArrayLike) -> FloatArray:
    """Return weights ``(S,)`` divided by the largest one, so that nothing overflows.

    Raises:
        ValueError: as :func:`checked_log_weights`.
    """
    array = checked_log_weights(log_weights)
    return np.exp(array - array.max())


def effective_sample_size(log_weights: ArrayLike) -> float:
    """Return Kish's effective sample size ``(sum w)^2 / sum w^2``, without clipping of large weights.

    It lies between 1 and S. It is itself an estimate: where the samples miss a region that the target has, it
    is too high, and only independent samples of the target can tell (L. Kish, Survey Sampling, 1965).
    """
    weights = scaled_weights(log_weights)
    return float(weights.sum() ** 2 / (weights**2).sum())


def effective_sample_percent(log_weights: ArrayLike) -> float:
    """Return the effective sample size in percent of the number of samples."""
    return 100.0 * effective_sample_size(log_weights) / np.size(log_weights)


def largest_weight_ratio(log_weights: ArrayLike) -> float:
    """Return the largest weight over the mean weight: 1 if all are equal, S if one sample has it all."""
    return float(1.0 / scaled_weights(log_weights).mean())


def _checked_values(values: ArrayLike, samples: int) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] != samples:
        raise ValueError(f"values must have one entry a sample: {samples} weights, values {array.shape}")
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {array.size} values are NaN or infinite")
    return array


def weighted_mean(values: ArrayLike, log_weights: ArrayLike) -> FloatArray:
    """Return the weighted mean over the first axis of ``values`` ``(S, ...)``."""
    weights = scaled_weights(log_weights)
    mean: FloatArray = np.tensordot(weights, _checked_values(values, weights.size), axes=1) / weights.sum()
    return mean


def block_bootstrap(
    values: ArrayLike,
    log_weights: ArrayLike,
    estimator: Callable[[Any, FloatArray], Any],
    *,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> Estimate[FloatArray]:
    """Return any estimator of weighted samples with its block bootstrap error.

    The estimator is called once a replica on all the samples; for a function of weighted sums
    :func:`~flowbridge.core.statistics.bootstrap.bootstrap_of_sums` is far cheaper.

    Args:
        values: ``(S, ...)``, handed on to the estimator unchanged.
        log_weights: ``(S,)``.
        estimator: ``estimator(values, log_weights)``, a number or an array. It must use the weights.
        blocks: number of blocks of consecutive samples, see :func:`~flowbridge.core.statistics.bootstrap.block_starts`.
        replicas: number of bootstrap replicas.
        seed: random seed.
    """
    array = checked_log_weights(log_weights)
    if np.shape(values)[:1] != array.shape:
        raise ValueError(f"values of shape {np.shape(values)} do not match {array.size} log-weights")
    starts = block_starts(array.size, blocks)
    lengths = np.diff(starts, append=array.size)
    shifts = np.log(bootstrap_factors(len(starts), replicas, seed))
    results = [np.asarray(estimator(values, array + np.repeat(shift, lengths)), float) for shift in shifts]
    value = np.asarray(estimator(values, array), dtype=np.float64)
    return Estimate(value, replica_error(np.stack(results), len(starts)))


def mean_with_error(
    values: ArrayLike,
    log_weights: ArrayLike,
    *,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> Estimate[FloatArray]:
    """Return the weighted mean over the first axis of ``values`` ``(S, ...)`` with its block bootstrap error.

    An angle is not a number to average: give its cosine and sine. Other arguments as for
    :func:`block_bootstrap`.
    """
    weights = scaled_weights(log_weights)
    array = _checked_values(values, weights.size)
    mean = weighted_mean(array, log_weights)
    starts = block_starts(weights.size, blocks)
    # Centred values: the rounding error of large sums would otherwise drown a small spread.
    centred = (array - mean).reshape(weights.size, -1) * weights[:, None]
    sums = np.add.reduceat(np.column_stack([weights, centred]), starts, axis=0)
    error = bootstrap_of_sums(sums, lambda s: s[:, 1:] / s[:, :1], replicas=replicas, seed=seed)
    return Estimate(mean, error.reshape(mean.shape))


def _checked_region(region: ArrayLike, samples: int, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.asarray(region)
    if mask.dtype != np.bool_ or mask.shape != (samples,):
        raise ValueError(
            f"region {name} must be a boolean mask of shape ({samples},), got {mask.dtype} of shape {mask.shape}"
        )
    return mask


def free_energy_difference(
    in_a: ArrayLike,
    in_b: ArrayLike,
    log_weights: ArrayLike,
    *,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> Estimate[float]:
    """Return ``F_B - F_A = -ln(sum of w in B / sum of w in A)`` in kT with its block bootstrap error.

    Args:
        in_a: boolean mask ``(S,)`` of the samples in region A.
        in_b: the same for region B.
        log_weights: ``(S,)``.
        blocks: number of blocks of consecutive samples, see :func:`~flowbridge.core.statistics.bootstrap.block_starts`.
        replicas: number of bootstrap replicas.
        seed: random seed.

    Raises:
        OverlapError: when a region holds no sample, or none with weight.
    """
    weights = scaled_weights(log_weights)
    masks = [_checked_region(mask, weights.size, name) for mask, name in ((in_a, "A"), (in_b, "B"))]
    for mask, name in zip(masks, "AB", strict=True):
        if weights[mask].sum() == 0.0:
            raise OverlapError(
                f"region {name} holds {int(mask.sum())} of {weights.size} samples and none of the weight: "
                "it has no free energy. Draw more samples, or widen the region"
            )
    starts = block_starts(weights.size, blocks)
    sums = np.add.reduceat(np.column_stack([weights * mask for mask in masks]), starts, axis=0)
    total_a, total_b = sums.sum(axis=0)
    error = bootstrap_of_sums(sums, lambda s: np.log(s[:, 0] / s[:, 1]), replicas=replicas, seed=seed)
    return Estimate(float(np.log(total_a / total_b)), float(error))


def _profile_edges(values: FloatArray, bins: int | ArrayLike, period: float | None) -> FloatArray:
    if isinstance(bins, (int, np.integer)):
        if bins < 1:
            raise ValueError(f"a profile needs at least one bin, got {bins}")
        if period is not None:
            return np.linspace(-0.5 * period, 0.5 * period, int(bins) + 1)
        low, high = values.min(), values.max()
        if low == high:
            raise ValueError(f"all {values.size} values are {low}: give bin edges")
        return np.linspace(low, high, int(bins) + 1)
    edges = np.asarray(bins, dtype=np.float64)
    if edges.ndim != 1 or edges.size < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"bin edges must be two or more increasing numbers, got {edges}")
    if period is not None and not np.isclose(edges[-1] - edges[0], period):
        raise ValueError(f"bin edges span {edges[-1] - edges[0]}, which is not the period {period}")
    return edges


def _bin_indices(values: FloatArray, edges: FloatArray, period: float | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    if period is not None:
        values = edges[0] + np.mod(values - edges[0], period)
    else:
        outside = (values < edges[0]) | (values > edges[-1])
        if outside.any():
            raise ValueError(
                f"{int(outside.sum())} of {values.size} values lie outside the bin edges "
                f"[{edges[0]}, {edges[-1]}]: widen the edges, or leave those samples out beforehand"
            )
    # The last bin is closed, and rounding in the modulo can land on its upper edge too.
    return np.minimum(np.searchsorted(edges, values, side="right") - 1, edges.size - 2)


def free_energy_profile(
    values: ArrayLike,
    log_weights: ArrayLike,
    bins: int | ArrayLike,
    period: float | None = None,
    *,
    blocks: int | None = None,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> FreeEnergyProfile:
    """Return the free energy ``-ln p(value)`` along a coordinate in kT, with an error for each bin.

    Args:
        values: ``(S,)`` in any units.
        log_weights: ``(S,)``.
        bins: number of equal bins, or increasing edges ``(B + 1,)``.
        period: period of the coordinate, None if it has none. Values are brought into the period; equal bins cover
            ``[-period/2, period/2]``, and edges must cover exactly one period.
        blocks: number of blocks of consecutive samples, see :func:`~flowbridge.core.statistics.bootstrap.block_starts`.
        replicas: number of bootstrap replicas.
        seed: random seed.

    Raises:
        ValueError: when a value of a coordinate without period lies outside the edges.
    """
    weights = scaled_weights(log_weights)
    array = _checked_values(values, weights.size)
    if array.ndim != 1:
        raise ValueError(f"a profile is along one coordinate: values must be (S,), got {array.shape}")
    edges = _profile_edges(array, bins, period)
    index = _bin_indices(array, edges, period)
    count = edges.size - 1
    starts = block_starts(weights.size, blocks)
    block = np.repeat(np.arange(len(starts)), np.diff(starts, append=weights.size))
    sums = np.bincount(block * count + index, weights, len(starts) * count).reshape(len(starts), count)
    held = sums.sum(axis=0) > 0
    free_energy = np.full(count, np.inf)
    error = np.full(count, np.inf)
    free_energy[held] = -np.log(sums.sum(axis=0)[held] / np.diff(edges)[held])
    error[held] = bootstrap_of_sums(
        sums[:, held], lambda s: np.log(s / s.sum(axis=1, keepdims=True)), replicas=replicas, seed=seed
    )
    counts = np.bincount(index, minlength=count)
    return FreeEnergyProfile(edges, free_energy - free_energy.min(), error, counts)


def _normalised_histograms(p: ArrayLike, q: ArrayLike) -> tuple[FloatArray, FloatArray]:
    arrays = []
    for histogram, name in ((p, "p"), (q, "q")):
        array = np.asarray(histogram, dtype=np.float64)
        if array.size == 0 or not np.isfinite(array).all() or (array < 0).any() or array.sum() == 0.0:
            raise ValueError(f"histogram {name} must hold finite numbers >= 0, not all of them zero")
        arrays.append(array / array.sum())
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"histograms must have the same bins, got {arrays[0].shape} and {arrays[1].shape}")
    return arrays[0], arrays[1]


def _jensen_shannon(p: FloatArray, q: FloatArray) -> FloatArray:
    """Return divergences ``(...,)`` of normalised histograms ``(..., B)``."""

    def entropy(h: FloatArray) -> FloatArray:
        value: FloatArray = -np.sum(h * np.log(h, out=np.zeros_like(h), where=h > 0), axis=-1)
        return value

    # Rounding can leave -1e-17 for equal histograms.
    return np.maximum(entropy(0.5 * (p + q)) - 0.5 * (entropy(p) + entropy(q)), 0.0)


def jensen_shannon_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Return the Jensen-Shannon divergence of two histograms in nats.

    ``H((p + q)/2) - H(p)/2 - H(q)/2`` with Shannon's entropy H: zero for equal histograms, ln 2 for disjoint
    ones (J. Lin, IEEE Trans. Inf. Theory 37, 145, 1991). It is the divergence, not its square root.

    Args:
        p: non-negative numbers of any shape (counts, weights, densities on equal bins); normalised here.
        q: the same, of the same shape.
    """
    first, second = _normalised_histograms(p, q)
    return float(_jensen_shannon(first.ravel(), second.ravel()))


def jensen_shannon_noise(
    p_blocks: ArrayLike, q_blocks: ArrayLike, *, splits: int = DEFAULT_REPLICAS, seed: int = 0
) -> Estimate[float]:
    """Return what :func:`jensen_shannon_divergence` would be if both histograms came from one distribution.

    Two finite sets of independent samples of one distribution differ by about
    ``(bins - 1)/8 * (1/samples_p + 1/samples_q)``. How many samples of a trajectory are independent differs from
    bin to bin, so nothing is assumed of it: each set is split at random into halves of its blocks many times, and the
    divergence between halves, ``(bins - 1)/8 * 4/samples``, is four times what the whole set contributes.

    Args:
        p_blocks: ``(G, ...)`` histograms of at least four blocks that are independent of each other, such as the
            replicas of a simulation that started from independent points.
        q_blocks: ``(H, ...)`` the same for the other set, over the same bins.
        splits: number of random splits.
        seed: random seed of the splits.

    Returns:
        Mean and standard deviation over the splits, in nats.
    """
    if splits < 2:
        raise ValueError(f"need at least two splits, got {splits=}")
    generator = np.random.default_rng(seed)
    values = np.zeros(splits)
    for name, given in (("p_blocks", p_blocks), ("q_blocks", q_blocks)):
        blocks = np.asarray(given, dtype=np.float64)
        if blocks.ndim < 2 or len(blocks) < MINIMUM_BLOCKS:
            raise ValueError(f"{name} must hold at least four histograms, (G, bins), got the shape {blocks.shape}")
        flat = blocks.reshape(len(blocks), -1)
        for split in range(splits):
            order = generator.permutation(len(flat))
            half, other = flat[order[: len(flat) // 2]].sum(0), flat[order[len(flat) // 2 :]].sum(0)
            values[split] += 0.25 * jensen_shannon_divergence(half, other)
    return Estimate(float(values.mean()), float(values.std(ddof=1)))
