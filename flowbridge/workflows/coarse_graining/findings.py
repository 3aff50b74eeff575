"""What the analysis of a coarse-grained force field finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...core.statistics.free_energy_surfaces import Surface

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SurfacePair:
    """A surface of the reference and of the coarse-grained force field, with the names of its coordinates."""

    names: tuple[str, ...]
    reference: Surface
    coarse: Surface


@dataclass
class Findings:
    """What was found: numbers for ``results.json``, and what figures show."""

    numbers: dict[str, Any] = field(default_factory=dict)
    surfaces: dict[str, SurfacePair] = field(default_factory=dict)
    contact_series: FloatArray | None = None
    contact_maps: tuple[FloatArray, FloatArray] | None = None
