"""Native contacts of a chain of beads, a measure of folding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ...core.errors import ConfigurationError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class NativeContacts:
    """Pairs of beads that touch in the native structure.

    The fraction is that of Best, Hummer and Eaton, PNAS 110, 17874 (2013): the mean over contacts of
    ``1 / (1 + exp(steepness (d - tolerance d0)))``.

    Attributes:
        pairs: ``(C, 2)``.
        native_distances: d0 ``(C,)`` in nm.
        steepness: 1/nm.
        tolerance: factor by which a contact may be longer.
    """

    pairs: NDArray[np.int64]
    native_distances: FloatArray
    steepness: float = 50.0
    tolerance: float = 1.2

    @classmethod
    def of(cls, native: NDArray[np.float64], cutoff: float, separation: int = 3) -> NativeContacts:
        """Return the contacts of positions ``(n, 3)`` nm closer than ``cutoff`` and at least ``separation`` beads apart.

        Raises ConfigurationError where there is none.
        """
        i, j = np.triu_indices(len(native), separation)
        apart = np.linalg.norm(native[i] - native[j], axis=1)
        near = apart < cutoff
        if not near.any():
            raise ConfigurationError(f"the native structure has no contacts within {cutoff} nm")
        return cls(np.stack([i[near], j[near]], axis=1), apart[near])

    def fraction(self, positions: NDArray[Any]) -> FloatArray:
        """Return the fraction of native contacts ``(F,)`` of positions ``(F, n, 3)`` nm."""
        return self.each(positions).mean(axis=1)

    def each(self, positions: NDArray[Any]) -> FloatArray:
        """Return the degree ``(F, C)`` to which each contact is formed, from 0 to 1."""
        apart = np.linalg.norm(
            np.asarray(positions[:, self.pairs[:, 0]] - positions[:, self.pairs[:, 1]], dtype=np.float64), axis=2
        )
        formed: FloatArray = expit(-self.steepness * (apart - self.tolerance * self.native_distances))
        return formed


def contact_map(positions: NDArray[Any], cutoff: float) -> FloatArray:
    """Return the fraction of frames ``(n, n)`` in which two beads are closer than ``cutoff`` nm."""
    count = positions.shape[1]
    fractions: FloatArray = np.zeros((count, count))
    for i in range(count):
        fractions[i] = (np.linalg.norm(positions - positions[:, i : i + 1], axis=2) < cutoff).mean(axis=0)
    return fractions


def transitions(values: NDArray[np.float64], low: float, high: float) -> int:
    """Return how often a time series ``(F,)`` went all the way from below ``low`` to above ``high`` or back."""
    side, count = 0, 0
    for value in values:
        now = 1 if value > high else -1 if value < low else side
        count += int(side != 0 and now != side)
        side = now
    return count
