"""Free-energy surfaces on one or two coordinates, and their comparison between ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import DEFAULT_REPLICAS, Estimate, FloatArray, block_starts, bootstrap_factors, replica_error
from .estimates import jensen_shannon_divergence, scaled_weights

DEFAULT_CUTOFF = 5.0
"""kT above the minimum of the reference up to which bins are compared."""


@dataclass(frozen=True)
class Surface:
    """Weights of the bins of a grid, block by block.

    Attributes:
        edges: bin edges of each coordinate.
        block_sums: weights ``(G, B1, ...)`` in the bins, for each of G blocks of consecutive samples.
        smallest: probability that stands for an empty bin: that of half a sample.
    """

    edges: tuple[FloatArray, ...]
    block_sums: FloatArray
    smallest: float

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        edges: Sequence[ArrayLike],
        log_weights: ArrayLike | None = None,
        blocks: int | None = None,
    ) -> Surface:
        """Return the surface of samples.

        Args:
            values: ``(S, D)`` with D coordinates, in the order of the samples in time (or replica after replica).
            edges: increasing edges of the bins of each coordinate.
            log_weights: ``(S,)``; None for equal ones.
            blocks: number of blocks; see :func:`~flowbridge.core.statistics.bootstrap.block_starts`.

        Raises:
            ValueError: for shapes that do not fit, values that are not finite, or no sample inside the grid.
        """
        array = np.asarray(values, dtype=np.float64)
        grid = tuple(np.asarray(one, dtype=np.float64) for one in edges)
        if array.ndim != 2 or array.shape[1] != len(grid) or not len(array):
            raise ValueError(f"values must be (samples, {len(grid)}), got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(
                f"{int((~np.isfinite(array)).any(axis=1).sum())} of {len(array)} samples have values that are not finite"
            )
        weights = scaled_weights(np.zeros(len(array)) if log_weights is None else log_weights)
        starts = block_starts(len(array), blocks)
        ends = [*starts[1:], len(array)]
        sums = np.stack(
            [np.histogramdd(array[a:b], grid, weights=weights[a:b])[0] for a, b in zip(starts, ends, strict=True)]
        )
        if not sums.sum() > 0.0:
            raise ValueError("no sample falls into the bins: widen the edges")
        effective = weights.sum() ** 2 / np.square(weights).sum()
        return cls(grid, sums, 0.5 / float(effective))

    @property
    def probabilities(self) -> FloatArray:
        """Probabilities of the bins; they sum to one."""
        total: FloatArray = self.block_sums.sum(axis=0)
        return total / total.sum()

    @property
    def free_energy(self) -> FloatArray:
        """``-ln p`` of the bins in kT, lowest zero; infinite in empty bins."""
        with np.errstate(divide="ignore"):
            energy = -np.log(self.probabilities)
        shifted: FloatArray = energy - energy.min()
        return shifted


@dataclass(frozen=True)
class SurfaceComparison:
    """Comparison of a surface with a reference, with bootstrap errors of the surface (the reference counts as exact).

    Attributes:
        divergence: Jensen-Shannon divergence of the bins, nats.
        mean_square_error: mean square error of the free energy in kT^2, over bins within a cutoff of the reference's
            minimum, each bin once, at the shift that makes it smallest. An empty bin counts as half a sample.
        bins: number of compared bins.
    """

    divergence: Estimate[float]
    mean_square_error: Estimate[float]
    bins: int


def compare_surfaces(
    found: Surface,
    reference: Surface,
    *,
    cutoff: float = DEFAULT_CUTOFF,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> SurfaceComparison:
    """Compare a surface with a reference on the same bins; raises ValueError for other bins."""
    if any(not np.array_equal(a, b) for a, b in zip(found.edges, reference.edges, strict=True)):
        raise ValueError("the two surfaces have different bins: make both with the same edges")
    exact = reference.free_energy
    compared = exact < cutoff
    blocks = len(found.block_sums)
    factors = bootstrap_factors(blocks, replicas, seed)
    flat = found.block_sums.reshape(blocks, -1)
    resampled = factors @ flat
    expected = reference.probabilities.ravel()

    def divergence(sums: FloatArray) -> float:
        return jensen_shannon_divergence(sums, expected)

    def error(sums: FloatArray) -> float:
        fraction = np.maximum(sums / sums.sum(), found.smallest)[compared.ravel()]
        difference = -np.log(fraction) - exact.ravel()[compared.ravel()]
        return float(np.var(difference))

    def estimate(function: Any) -> Estimate[float]:
        values = np.array([function(row) for row in resampled])
        return Estimate(function(flat.sum(axis=0)), float(replica_error(values, blocks)))

    return SurfaceComparison(estimate(divergence), estimate(error), int(compared.sum()))
