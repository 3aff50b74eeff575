"""Random numbers for privacy: from the operating system's cryptographic generator, or repeatable for research.

A guarantee assumes that nobody can predict or compute the noise. A seed can be guessed, and 32 bits of Mersenne twister output
more so: ledgers say which source was used.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

_SPARE = 11  # of 64 random bits, what double precision has no room for
_SUMMED = 4


class NoiseSource(Protocol):
    """Gaussian and uniform numbers for numbered steps."""

    @property
    def kind(self) -> Literal["cryptographic", "seeded"]:
        """Name of the source in ledgers."""

    def begin(self, step: int) -> None:
        """Start the step: a repeatable source gives the same numbers for the same step."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Return standard normal numbers, float64, on the CPU."""

    def uniform(self, count: int) -> Tensor:
        """Return numbers ``(count,)`` in (0, 1), float64, on the CPU."""


class CryptographicNoise:
    """Every number from ``os.urandom``; for models that leave the house.

    A normal number is half the sum of four, each by the inverse distribution function of 53 random bits: what the roundings
    of one would give away about its value, the sum hides (Holohan and Braghin, arXiv 2107.10138, as in opacus' secure mode).
    """

    kind: Literal["cryptographic", "seeded"] = "cryptographic"

    def begin(self, step: int) -> None:
        """Nothing is remembered between steps."""

    def uniform(self, count: int) -> Tensor:
        """See :meth:`NoiseSource.uniform`."""
        bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(_SPARE)
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0 ** (_SPARE - 64))

    def normal(self, shape: torch.Size) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        drawn = torch.special.ndtri(self.uniform(_SUMMED * shape.numel())).reshape(_SUMMED, *shape)
        return drawn.sum(0) / _SUMMED**0.5


class SeededNoise:
    """The same numbers for the same seed, stream and step: repeatable, and no protection from anyone who knows the seed."""

    kind: Literal["cryptographic", "seeded"] = "seeded"

    def __init__(self, seed: int, stream: str = "training") -> None:
        self.seed = seed
        self._stream = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
        self._generator = torch.Generator()
        self.begin(0)

    def begin(self, step: int) -> None:
        """See :meth:`NoiseSource.begin`."""
        words = np.random.SeedSequence([abs(self.seed), int(self.seed < 0), self._stream, step]).generate_state(
            1, np.uint64
        )
        self._generator.manual_seed(int(words[0]) >> 1)

    def uniform(self, count: int) -> Tensor:
        """See :meth:`NoiseSource.uniform`."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, shape: torch.Size) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


def noise_source(seed: int | None, stream: str) -> NoiseSource:
    """Return cryptographic noise for None; repeatable noise for a seed, other numbers for every stream."""
    return CryptographicNoise() if seed is None else SeededNoise(seed, stream)
