"""Rational-quadratic splines on an interval, the identity outside (Durkan et al. 2019), by zuko.

Their second derivative jumps at the knots, so a flow of them makes densities, not forces: for those there are bumps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigurationError, MissingDependencyError
from .bijection import ElementwiseTransform, Transformed


class RationalQuadraticSpline(ElementwiseTransform):
    """Increasing splines on ``[-bound, bound]`` with ``bins`` bins, the identity outside; closed form both ways.

    Args:
        bins: number of bins K.
        bound: end of the interval.

    Raises:
        MissingDependencyError: without zuko.
    """

    def __init__(self, bins: int, bound: float) -> None:
        super().__init__()
        try:
            from zuko.transforms import MonotonicRQSTransform
        except ImportError as error:
            raise MissingDependencyError(
                "splines need zuko, which is not installed: pip install 'flowbridge[flow-families]'"
            ) from error
        if bins < 1 or not bound > 0.0:
            raise ConfigurationError(f"a spline needs at least one bin and a positive bound, got {bins} and {bound}")
        self.bins = bins
        self.bound = bound
        self.parameter_count = 3 * bins - 1
        self._spline: Any = MonotonicRQSTransform

    def _read(self, parameters: Tensor) -> Any:
        widths, heights, slopes = parameters.split([self.bins, self.bins, self.bins - 1], dim=-1)
        return self._spline(widths, heights, slopes, bound=self.bound)

    def forward(self, value: Tensor, parameters: Tensor) -> Transformed:
        return Transformed(*self._read(parameters).call_and_ladj(value))

    def inverse(self, value: Tensor, parameters: Tensor) -> Transformed:
        return Transformed(*self._read(parameters).inv.call_and_ladj(value))

    def initial_parameters(self, coordinates: int, generator: torch.Generator) -> Tensor:
        """Return parameters of the identity."""
        return torch.zeros(coordinates, self.parameter_count)
