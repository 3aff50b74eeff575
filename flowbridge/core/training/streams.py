"""Random streams of steps: each depends on seed and step number alone, so that a resumed training repeats its numbers."""

from __future__ import annotations

import torch

_STRIDE = 1_000_003  # between the streams of one step and those of the next seed
_RANGE = (-(2**63), 2**64)  # what torch takes as a seed
_LARGEST = 2**62


def stream_seed(seed: int, number: int, offset: int = 0) -> int:
    """Return the seed of stream ``number`` of a random seed.

    Args:
        seed: random seed.
        number: of the step, or of whatever is counted.
        offset: separates streams of the same number that are used for different things.
    """
    value = seed * _STRIDE + number + offset
    return value if _RANGE[0] <= value < _RANGE[1] else value % _LARGEST


def random_stream(seed: int, number: int, offset: int = 0) -> torch.Generator:
    """Return a generator at the beginning of a stream; arguments as for :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, number, offset))
