"""Slow coordinates of a chain of beads by time-lagged independent component analysis (deeptime)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigurationError, MissingDependencyError

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SlowCoordinates:
    """Linear slow coordinates of all pair distances of beads.

    Attributes:
        mean: mean distances ``(P,)``.
        directions: directions ``(P, D)``.
        timescales: implied timescales ``(D,)``, in frames.
    """

    mean: FloatArray
    directions: FloatArray
    timescales: FloatArray

    @classmethod
    def fit(cls, trajectories: Sequence[NDArray[Any]], lag: int, dimensions: int = 2) -> SlowCoordinates:
        """Return the slowest coordinates of unbiased trajectories.

        Args:
            trajectories: positions ``(F, n, 3)``, each continuous in time.
            lag: lag time in frames.
            dimensions: number of coordinates D.

        Raises:
            ConfigurationError: for trajectories no longer than the lag.
            MissingDependencyError: without deeptime.
        """
        try:
            from deeptime.decomposition import TICA
        except ImportError as error:
            raise MissingDependencyError(
                "slow coordinates need deeptime: pip install 'flowbridge[coarse-graining]'"
            ) from error
        if lag < 1 or min(len(one) for one in trajectories) <= lag:
            raise ConfigurationError(
                f"every trajectory must be longer than the lag of {lag} frames, and the lag positive"
            )
        features = [pair_distances(one) for one in trajectories]
        model = TICA(lagtime=lag, dim=dimensions).fit(features).fetch_model()
        directions = np.asarray(model.instantaneous_coefficients)[:, :dimensions]
        return cls(np.asarray(model.mean_0), directions, np.asarray(model.timescales()[:dimensions]))

    def __call__(self, positions: NDArray[Any]) -> FloatArray:
        """Return the coordinates ``(F, D)`` of positions ``(F, n, 3)``."""
        projected: FloatArray = (pair_distances(positions) - self.mean) @ self.directions
        return projected


def pair_distances(positions: NDArray[Any]) -> FloatArray:
    """Return distances ``(F, P)`` of all pairs of positions ``(F, n, 3)``, i < j."""
    i, j = np.triu_indices(positions.shape[1], 1)
    array: FloatArray = np.linalg.norm(np.asarray(positions[:, i] - positions[:, j], dtype=np.float64), axis=2)
    return array
