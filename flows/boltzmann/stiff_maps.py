"""Fixed maps that standardise bonds, angles and stiff torsions before anything is trained.

Each is fitted once to training data in closed form and then stays as it is, so that the trained layers only carry what
is not Gaussian (whitened) or not uniform (interval).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import ConfigurationError
from ..transforms.bijection import Bijection, Transformed

_RIDGE = 1e-3  # of the mean square of a cosine, 1/2
_SMALLEST_VARIANCE = 1e-6  # relative to the largest: directions below it carry rounding, not physics
_SMALLEST_TAIL = 1e-300  # its quantile, -37 deviations, and the slope there are finite
_RIGID = 1e-5  # nm or radians: a hundredth of any thermal vibration, and what constraint solvers leave of a bond


class WhitenedMap(Bijection):
    """``latent = (s - mean - F(t) B) W``: regression on torsion features F taken out, residual whitened (ZCA).

    The context is F, so that stiff coordinates may follow the torsions linearly. Both directions closed form.
    """

    mean: Tensor
    regression: Tensor
    whitening: Tensor
    colouring: Tensor
    log_volume: Tensor

    def __init__(self, dimension: int, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimension, dtype=torch.float64))
        self.register_buffer("regression", torch.zeros(features, dimension, dtype=torch.float64))
        self.register_buffer("whitening", torch.eye(dimension, dtype=torch.float64))
        self.register_buffer("colouring", torch.eye(dimension, dtype=torch.float64))
        self.register_buffer("log_volume", torch.zeros((), dtype=torch.float64))

    def fit(self, stiff: NDArray[np.float64], features: NDArray[np.float64]) -> None:
        """Fit to data ``(F, D)`` with torsion features ``(F, C)``; raises ConfigurationError for too few frames."""
        frames, dimension = stiff.shape
        needed = 2 * (dimension + features.shape[1] + 1)
        if frames < needed:
            raise ConfigurationError(
                f"whitening {dimension} coordinates with {features.shape[1]} torsion features needs at least {needed} "
                f"frames, got {frames}: keep more frames in [simulate]"
            )
        # The ridge leaves features that hardly vary in the data (a torsion that was not sampled all round) without
        # influence: an ordinary fit would extrapolate wildly where the flow samples them.
        centred = features - features.mean(0)
        gram = centred.T @ centred + _RIDGE * frames * np.eye(features.shape[1])
        coefficients = np.linalg.solve(gram, centred.T @ (stiff - stiff.mean(0)))
        mean = stiff.mean(0) - features.mean(0) @ coefficients
        covariance = np.cov(stiff - mean - features @ coefficients, rowvar=False).reshape(dimension, dimension)
        scale = np.sqrt(np.diag(covariance))
        _require_motion(scale)
        variance, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
        variance = np.maximum(variance, _SMALLEST_VARIANCE * variance.max())
        whitening = (axes / np.sqrt(variance)) @ axes.T / scale[:, None]
        self.mean.copy_(torch.from_numpy(mean))
        self.regression.copy_(torch.from_numpy(coefficients))
        self.whitening.copy_(torch.from_numpy(whitening))
        self.colouring.copy_(torch.from_numpy(np.linalg.inv(whitening)))
        self.log_volume.copy_(torch.tensor(np.linalg.slogdet(whitening)[1]))

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        latent = (value - self._centre(context)) @ self.whitening
        return Transformed(latent, self.log_volume.expand(len(value)))

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        data = value @ self.colouring + self._centre(context)
        return Transformed(data, -self.log_volume.expand(len(value)))

    def _centre(self, context: Tensor | None) -> Tensor:
        mean: Tensor = self.mean
        return mean if context is None or not context.shape[1] else mean + context @ self.regression


class IntervalMap(Bijection):
    """Each coordinate by the distribution function of a normal truncated to its domain, to [0, 1].

    As the prior of arXiv 2110.00351 has it. The normal is wider than the data by ``widening``, so that the tails do not
    run into the ends. Both directions closed form (error function and its inverse).
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, low: Tensor, high: Tensor, widening: float = 1.3) -> None:
        super().__init__()
        self.widening = widening
        self.register_buffer("low", low.double())
        self.register_buffer("high", high.double())
        self.register_buffer("mean", 0.5 * (low + high).double())
        self.register_buffer("deviation", (high - low).double() / 4.0)

    def fit(self, stiff: NDArray[np.float64], features: NDArray[np.float64]) -> None:
        """Fit mean and deviation to data ``(F, D)``; ``features`` are not used.

        Raises ConfigurationError when a coordinate leaves its domain.
        """
        outside = np.flatnonzero((stiff.min(0) < self.low.numpy()) | (stiff.max(0) > self.high.numpy()))
        if outside.size:
            first = int(outside[0])
            raise ConfigurationError(
                f"stiff coordinate {first} ranges over {stiff[:, first].min():.4f} .. {stiff[:, first].max():.4f}, "
                f"outside its domain {self.low[first]:.3f} .. {self.high[first]:.3f} (nm, radians): "
                "use map = 'whitened' for this molecule"
            )
        self.mean.copy_(torch.from_numpy(stiff.mean(0)))
        deviation = stiff.std(0)
        _require_motion(deviation)
        self.deviation.copy_(torch.from_numpy(self.widening * deviation))

    def _ends(self) -> tuple[Tensor, Tensor]:
        low = torch.special.ndtr((self.low - self.mean) / self.deviation)
        high = torch.special.ndtr((self.high - self.mean) / self.deviation)
        return low, high - low

    def _standard(self, value: Tensor) -> Tensor:
        """Return the standard normal variable for a share of the domain, each half from its own tail."""
        lowest, highest = (self.low - self.mean) / self.deviation, (self.high - self.mean) / self.deviation
        below, above = torch.special.ndtr(lowest), torch.special.ndtr(-highest)
        share = 1.0 - below - above
        left = torch.special.ndtri((below + share * value).clamp(_SMALLEST_TAIL, 0.75))
        right = -torch.special.ndtri((above + share * (1.0 - value)).clamp(_SMALLEST_TAIL, 0.75))
        standard = torch.where(below + share * value < 0.5, left, right)
        # The ends of the domain are the images of 0 and 1, also where their tails are too small for a float64.
        return torch.minimum(torch.maximum(standard, lowest), highest)

    def _log_slope(self, standard: Tensor, share: Tensor) -> Tensor:
        density = -0.5 * standard.square() - 0.5 * math.log(2.0 * math.pi)
        return (density - self.deviation.log() - share.log()).sum(-1)

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        low, share = self._ends()
        standard = (value - self.mean) / self.deviation
        return Transformed((torch.special.ndtr(standard) - low) / share, self._log_slope(standard, share))

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        """Map values ``(B, D)`` of the interval [0, 1] to coordinates; see :meth:`Bijection.forward`."""
        rounding = 16.0 * torch.finfo(torch.float32).eps
        outside = (value < -rounding) | (value > 1.0 + rounding)
        if bool(outside.any()):
            raise ConfigurationError(
                f"{int(outside.sum())} values lie outside [0, 1] (first: {value[outside][0].item():.6g}): the latent "
                "space of map = 'interval' is the unit cube"
            )
        _, share = self._ends()
        standard = self._standard(value.double().clamp(0.0, 1.0))  # the networks run in float32, whose 1 may be 1 + eps
        return Transformed(self.mean + self.deviation * standard, -self._log_slope(standard, share))


def _require_motion(deviation: NDArray[np.float64]) -> None:
    """Raise ConfigurationError when a coordinate hardly moves in the data: its density would be a delta function."""
    rigid = np.flatnonzero(~(deviation > _RIGID))
    if rigid.size:
        raise ConfigurationError(
            f"stiff coordinate {rigid[0]} moves by only {deviation[rigid[0]]:.1e} (nm or radians) in the training "
            f"frames, as do {rigid.size - 1} others: a density needs every bond, angle and torsion to move; simulate "
            "without constraints, and give more than one frame"
        )


StiffMap = WhitenedMap | IntervalMap
