"""Mixture densities of a distance, of the cosine of an angle, and of a torsion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_IMAGES = (-1.0, 0.0, 1.0)  # turns; of a wrapped normal this narrow, the others hold less than 1e-100
_SMALLEST_SHARE = 1e-12  # of the unit interval, so that quantiles stay finite


def _pick(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one index of each row of ``(P, M)``, ``(P, 1)``."""
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)


def _log_normal_density(value: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((value - mean) / scale).square() - scale.log() - 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class LogNormalMixture:
    """Density of a positive number. All fields are ``(P, M)``; means and scales are those of its logarithm."""

    logits: Tensor
    means: Tensor
    scales: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``(P,)`` of values ``(P,)``."""
        log = value.log().unsqueeze(-1)
        parts = torch.log_softmax(self.logits, -1) + _log_normal_density(log, self.means, self.scales)
        return torch.logsumexp(parts, -1) - log.squeeze(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one value a row, ``(P,)``."""
        chosen = _pick(self.logits, generator)
        noise = torch.randn(chosen.shape, generator=generator, dtype=self.means.dtype)
        return (self.means.gather(-1, chosen) + self.scales.gather(-1, chosen) * noise).exp().squeeze(-1)


@dataclass(frozen=True)
class CosineMixture:
    """Density of a number in [-1, 1], by normal distributions cut off there. All fields are ``(P, M)``, means in [-1, 1].

    On the cosine of an angle a linear arrangement is an end of the interval, where the density in space is as smooth as
    elsewhere.
    """

    logits: Tensor
    means: Tensor
    scales: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``(P,)`` of values ``(P,)`` in [-1, 1]."""
        low, high = self._shares()
        inside = _log_normal_density(value.unsqueeze(-1), self.means, self.scales) - (high - low).log()
        return torch.logsumexp(torch.log_softmax(self.logits, -1) + inside, -1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one value a row, ``(P,)``."""
        chosen = _pick(self.logits, generator)
        low, high = (share.gather(-1, chosen) for share in self._shares())
        uniform = torch.rand(chosen.shape, generator=generator, dtype=self.means.dtype)
        share = (low + uniform * (high - low)).clamp(_SMALLEST_SHARE, 1.0 - _SMALLEST_SHARE)
        value = self.means.gather(-1, chosen) + self.scales.gather(-1, chosen) * torch.special.ndtri(share)
        return value.clamp(-1.0, 1.0).squeeze(-1)  # rounding alone can leave the interval

    def _shares(self) -> tuple[Tensor, Tensor]:
        return (
            torch.special.ndtr((-1.0 - self.means) / self.scales),
            torch.special.ndtr((1.0 - self.means) / self.scales),
        )


@dataclass(frozen=True)
class TorsionMixture:
    """Density of an angle, by wrapped normal distributions around evenly spread centres.

    Attributes:
        logits: ``(P, K)``; the centre of entry k is ``2 pi k / K``.
        scales: ``(P, 1)`` in radians, well below pi.
    """

    logits: Tensor
    scales: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``(P,)`` of angles ``(P,)`` in radians, any turn."""
        offset = torch.remainder(value.unsqueeze(-1) - self.centres() + math.pi, 2.0 * math.pi) - math.pi
        images = torch.stack([offset + 2.0 * math.pi * turn for turn in _IMAGES], -1)
        wrapped = torch.logsumexp(_log_normal_density(images, torch.zeros_like(images), self.scales.unsqueeze(-1)), -1)
        return torch.logsumexp(torch.log_softmax(self.logits, -1) + wrapped, -1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return one angle a row, ``(P,)``."""
        chosen = _pick(self.logits, generator)
        noise = torch.randn(chosen.shape, generator=generator, dtype=self.scales.dtype)
        return (self.centres()[chosen] + self.scales * noise).squeeze(-1)

    def centres(self) -> Tensor:
        """Return the centres ``(K,)``."""
        count = self.logits.shape[-1]
        return torch.arange(count, dtype=self.logits.dtype) * (2.0 * math.pi / count)
