"""Coverage of rare basins in training: find torsional basins in the data and raise those that are too rare.

Training on a flow's own samples forgets what it rarely samples. A basin that holds 0.3 % of the samples gives a batch of
512 one or two of them; a mild bias that raises it keeps it learned, and the importance weights take the bias out again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import fourier_gaussian

from .target import CoverageBias

_BINS = 72
_BARRIER = 0.15  # a minimum separates two basins if its density is below this share of the lower maximum
_FEWEST = 50  # frames that make a basin


@dataclass(frozen=True)
class Basin:
    """One basin of one circular coordinate.

    Attributes:
        circular: index of the coordinate.
        low: start of the basin in turns.
        high: its end in turns, between low and low + 1.
        centre: circular mean of the data in it, turns.
        concentration: concentration of the von Mises bump that covers it smoothly.
    """

    circular: int
    low: float
    high: float
    centre: float
    concentration: float

    def holds(self, circular: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Return which rows of ``(F, T)`` turns lie in the basin."""
        return (circular[:, self.circular] - self.low) % 1.0 < self.high - self.low


def find_basins(circular: NDArray[np.float64], count: int) -> list[Basin]:
    """Return the basins of the first ``count`` circular coordinates of data ``(F, T)`` in turns."""
    basins: list[Basin] = []
    for index in range(count):
        turns = circular[:, index] % 1.0
        edges = _barriers(_smooth_histogram(turns))
        for low, high in zip(edges, [*edges[1:], edges[0] + 1.0] if edges else [], strict=True):
            member = (turns - low) % 1.0 < high - low
            if len(edges) > 1 and member.sum() >= _FEWEST:
                mean = np.exp(2j * np.pi * turns[member]).mean()
                spread = math.sqrt(max(-2.0 * math.log(max(abs(mean), 1e-12)), 1e-6))
                centre = float(np.angle(mean) / (2.0 * np.pi)) % 1.0
                basins.append(Basin(index, low, high, centre, float(np.clip(0.2 / spread**2, 1.0, 4.0))))
    return basins


def _smooth_histogram(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    histogram = np.histogram(turns, _BINS, (0.0, 1.0))[0].astype(float)
    smooth = fourier_gaussian(np.fft.rfft(histogram), 2.0, n=_BINS)  # bins
    return np.maximum(np.fft.irfft(smooth, _BINS), 0.0)


def _barriers(density: NDArray[np.float64]) -> list[float]:
    """Return the positions (turns) of the minima that separate basins, in increasing order."""
    floor = 1e-9 * density.max()  # the smoothed histogram carries rounding where there are no data
    peaks = [
        i
        for i in range(_BINS)
        if density[i] > floor and density[i] >= density[i - 1] and density[i] > density[(i + 1) % _BINS]
    ]
    kept: list[int] = []
    for peak in sorted(peaks, key=lambda i: -density[i]):
        # on a circle two peaks are apart when the minima on both ways round are low
        between = [max(density[_lowest(density, peak, k)], density[_lowest(density, k, peak)]) for k in kept]
        if all(depth < _BARRIER * density[peak] for depth in between):
            kept.append(peak)
    if len(kept) < 2:
        return []
    kept.sort()
    following = [*kept[1:], kept[0]]
    return sorted((_lowest(density, a, b) + 0.5) / _BINS for a, b in zip(kept, following, strict=True))


def _lowest(density: NDArray[np.float64], start: int, end: int) -> int:
    """Return the bin of the lowest density on the way up from ``start`` to ``end``, round the circle if need be."""
    path = np.arange(start, end if end > start else end + _BINS) % _BINS
    return int(path[np.argmin(density[path])])


def coverage_biases(
    basins: list[Basin],
    circular: NDArray[np.floating[Any]],
    weights: NDArray[np.float64],
    least: float,
    limit: float,
) -> tuple[CoverageBias, ...]:
    """Return the biases that raise basins with a population below ``least`` towards it.

    Args:
        basins: basins of the training data.
        circular: ``(S, T)`` samples in turns.
        weights: their importance weights ``(S,)``.
        least: smallest population allowed; 0 for no bias.
        limit: largest factor by which a basin is raised.
    """
    biases = []
    for basin in basins:
        population = float(weights[basin.holds(circular)].sum() / weights.sum())
        if population < least:
            factor = min(least / max(population, 1e-12), limit)
            biases.append(CoverageBias(basin.circular, basin.centre, basin.concentration, math.log(factor)))
    return tuple(biases)
