"""Resampling of paths (sequential Monte Carlo): small weights end, large weights continue more than once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ...core.statistics.estimates import effective_sample_percent


@dataclass(frozen=True)
class Resampling:
    """The criterion of resampling.

    Attributes:
        threshold: after a kernel, paths are resampled if their effective sample size is below this fraction of their number; 1
            resamples after every kernel that leaves any difference.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ConfigurationError(f"the threshold of resampling is a fraction in (0, 1], got {self.threshold}")

    def wanted(self, log_weights: Tensor) -> bool:
        """Return whether paths with these log-weights ``(B,)`` are to be resampled."""
        refuse_worthless(log_weights)
        return effective_sample_percent(log_weights.detach().numpy()) < 100.0 * self.threshold


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """Return the logarithm of the mean of weights, 0-dimensional float64: an estimate of ``log Z_target``."""
    return torch.logsumexp(log_weights.double(), 0) - math.log(len(log_weights))


def systematic_indices(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``(B,)`` indices of which each appears its weight times B, rounded up or down, unbiased on average."""
    refuse_worthless(log_weights)
    count = len(log_weights)
    cumulative = torch.cumsum(torch.softmax(log_weights.double(), 0), 0)
    points = (torch.arange(count) + torch.rand((), generator=generator, dtype=torch.float64)) / count
    # Divided by its own last entry, the sum ends on exactly one, and every point falls below it.
    return torch.searchsorted(cumulative / cumulative[-1], points, right=True)


def refuse_worthless(log_weights: Tensor) -> None:
    """Raise NonFiniteEnergyError where log-weights ``(B,)`` are NaN or ``+inf``, or all are ``-inf``."""
    bad = torch.isnan(log_weights) | torch.isposinf(log_weights)
    if bool(bad.any()):
        raise NonFiniteEnergyError(
            f"{int(bad.sum())} of {len(log_weights)} paths have a weight that is not a number or infinite, the first at index "
            f"{int(torch.nonzero(bad)[0])}: an energy along the path is NaN or -inf, or the steps of a kernel without "
            "acceptance are too long for it"
        )
    if not bool(torch.isfinite(log_weights).any()):
        raise NonFiniteEnergyError(
            f"all {len(log_weights)} paths have weight zero: the energy is infinite at the end of each, so the flow misses the "
            "region where the target is defined"
        )
