"""A smooth bias on one torsion as a Fourier series: a native force of OpenMM, in closed form for reweighting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from ....core.errors import ConfigurationError
from .steering import Torsion
from .torsion_bias import BIAS_GROUP, FloatArray, torsion_angles


@dataclass(frozen=True)
class FourierBias:
    """``sum_n a_n cos(n t) + b_n sin(n t)`` in kJ/mol on a torsion t.

    Attributes:
        torsion: indices of four atoms.
        cosines: coefficients a of n = 1, 2, ...
        sines: coefficients b.
    """

    torsion: Torsion
    cosines: tuple[float, ...]
    sines: tuple[float, ...]

    @classmethod
    def fit(cls, torsion: Torsion, grid: NDArray[np.float64], harmonics: int) -> FourierBias:
        """Return the series closest to values on a grid of ``[-pi, pi]`` whose last point repeats the first.

        Raises ConfigurationError for more harmonics than the grid can resolve.
        """
        points = np.linspace(-math.pi, math.pi, len(grid))[:-1]
        if not 0 < harmonics <= (len(points) - 1) // 2:
            raise ConfigurationError(f"{len(points)} points cannot tell {harmonics} harmonics apart")
        orders = np.arange(1, harmonics + 1)
        cosines = 2.0 * (grid[:-1, None] * np.cos(np.outer(points, orders))).mean(0)
        sines = 2.0 * (grid[:-1, None] * np.sin(np.outer(points, orders))).mean(0)
        return cls(torsion, tuple(map(float, cosines)), tuple(map(float, sines)))

    def add_to(self, system: openmm.System) -> openmm.Force:
        """Add the bias to a System, in force group :data:`BIAS_GROUP`, and return the force."""
        force = openmm.CustomTorsionForce(
            "+".join(f"({a!r})*cos({n}*theta)+({b!r})*sin({n}*theta)" for n, a, b in self._terms())
        )
        force.addTorsion(*self.torsion, [])
        force.setForceGroup(BIAS_GROUP)
        system.addForce(force)
        return force

    def energies(self, positions: NDArray[Any]) -> FloatArray:
        """Return the bias ``(F,)`` in kJ/mol of positions ``(F, N, 3)``."""
        angles = torsion_angles(np.asarray(positions, dtype=np.float64), self.torsion)
        total: FloatArray = sum(
            (a * np.cos(n * angles) + b * np.sin(n * angles) for n, a, b in self._terms()), np.zeros(len(angles))
        )
        return total

    def _terms(self) -> list[tuple[int, float, float]]:
        return [(n + 1, a, b) for n, (a, b) in enumerate(zip(self.cosines, self.sines, strict=True))]
