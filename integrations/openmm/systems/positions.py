"""Configurations of samples as OpenMM positions with units."""

from __future__ import annotations

import numpy as np
from openmm import unit

from ....core.samples import WeightedSamples


def positions_from_samples(samples: WeightedSamples, index: int) -> unit.Quantity:
    """Return configuration ``index`` as a Quantity ``(N, 3)`` in nanometres, float64, ready for a Context.

    Raises:
        IndexError: when there is no such sample; negative numbers count from the end.
    """
    if not -len(samples) <= index < len(samples):
        raise IndexError(f"sample {index} of {len(samples)}")
    return unit.Quantity(samples.positions[index].astype(np.float64), unit.nanometer)
