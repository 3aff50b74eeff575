"""The contract of evaluators: callables that give a builder the energies of molecules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Geometry = tuple[Any, Any]
"""Atomic numbers ``(N,)`` and positions ``(N, 3)`` in nm."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one molecule.

    Attributes:
        energy: energy in eV; None where there is a fault.
        positions: ``(N, 3)`` in nm, that the energy is of: relaxed ones from an evaluator that relaxes.
        evaluations: number of energy evaluations, now or when it was first computed; 0 when a fault was found before.
        fault: why there is no energy, or None.
        known: whether it was looked up.
    """

    energy: float | None
    positions: NDArray[np.float64]
    evaluations: int
    fault: str | None = None
    known: bool = False


class GeometryEvaluator(Protocol):
    """Evaluates molecules: any energy, relaxed or not. A molecule that cannot be evaluated is a fault, never an exception."""

    def __call__(self, molecules: Sequence[Geometry]) -> list[Evaluation]:
        """Return one evaluation for each molecule, in their order."""
        ...
