"""Block bootstrap: standard errors of all that is computed from weighted, possibly correlated samples.

The bootstrap is Bayesian (D. Rubin, Ann. Stat. 9, 130, 1981): a replica multiplies the weights of each block
of consecutive samples by a random factor, flat Dirichlet over the blocks. To first order this equals drawing
blocks with replacement, with one difference that matters for free energies: no replica ever loses a rarely
visited basin, so that its logarithm stays finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Value = TypeVar("Value")

DEFAULT_BLOCKS = 100
DEFAULT_REPLICAS = 200


class Estimate(NamedTuple, Generic[Value]):
    """A value and its standard error (one sigma), in the same units and of the same shape."""

    value: Value
    error: Value


def block_starts(samples: int, blocks: int | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first index of each block of consecutive samples ``(blocks,)``; sizes differ by at most one.

    Args:
        samples: number of samples.
        blocks: number of blocks; None for 100, or one a sample where there are fewer. Blocks should be longer
            than the correlation time of the samples; fewer than about 20 give noisy error bars.

    Raises:
        ValueError: when there are fewer than two blocks, or more blocks than samples.
    """
    count = min(DEFAULT_BLOCKS, samples) if blocks is None else blocks
    if not 2 <= count <= samples:
        raise ValueError(
            f"an error bar needs at least 2 blocks and at most one block a sample, "
            f"got {count} blocks for {samples} samples"
        )
    return np.arange(count, dtype=np.int64) * samples // count


def bootstrap_factors(blocks: int, replicas: int = DEFAULT_REPLICAS, seed: int = 0) -> FloatArray:
    """Return random factors ``(replicas, blocks)`` for the weights of the blocks; each row has mean one."""
    if replicas < 2:
        raise ValueError(f"an error bar needs at least 2 bootstrap replicas, got {replicas}")
    factors = np.random.default_rng(seed).standard_exponential((replicas, blocks))
    return factors * (blocks / factors.sum(axis=1, keepdims=True))


def replica_error(replicas: FloatArray, blocks: int) -> FloatArray:
    """Return the standard error from the values ``(R, ...)`` of an estimator on R replicas of B blocks."""
    # A flat Dirichlet over B blocks has (B - 1)/(B + 1) of the variance that a mean over B blocks really has.
    error: FloatArray = np.std(replicas, axis=0, ddof=1) * np.sqrt((blocks + 1) / (blocks - 1))
    return error


def bootstrap_of_sums(
    block_sums: ArrayLike,
    estimator: Callable[[FloatArray], FloatArray],
    *,
    replicas: int = DEFAULT_REPLICAS,
    seed: int = 0,
) -> FloatArray:
    """Return the bootstrap standard error of a function of weighted sums.

    Functions of sums over samples (means, ratios, histograms, free energies) are bootstrapped from the sums of
    blocks, at a cost that does not depend on the number of samples.

    Args:
        block_sums: ``(B, M)``, M weighted sums over each of B blocks.
        estimator: takes sums ``(R, M)`` of R replicas, returns their values ``(R, ...)``.
        replicas: number R of replicas.
        seed: random seed.
    """
    sums = np.asarray(block_sums, dtype=np.float64)
    return replica_error(estimator(bootstrap_factors(len(sums), replicas, seed) @ sums), len(sums))
