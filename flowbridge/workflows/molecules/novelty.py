"""What is new: isomers by canonical SMILES, geometries by numbers that no rotation, reflection or renumbering changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from ase.data import atomic_masses
from numpy.typing import NDArray

from ...flows.molecules.formulas import Formula

SMILES = "trained_on"
GEOMETRIES = "trained_geometries"
"""Where the provenance of a builder keeps what it was taught with."""

_TOLERANCE = np.array([0.002, 0.01, 0.01, 0.01])  # relative
_SMALLEST = 1e-4  # amu nm², of a linear molecule's smallest moment nothing is compared below it
_DIGITS = 5


def fingerprint(numbers: Any, positions: Any) -> NDArray[np.float64]:
    """Return the repulsion of the nuclei (in 1/nm) and the moments of inertia (in amu nm²) from small to large, ``(4,)``.

    Args:
        numbers: ``(N,)`` atomic numbers.
        positions: ``(N, 3)`` in nm.
    """
    charges, places = np.asarray(numbers, dtype=int), np.asarray(positions, dtype=float)
    i, j = np.triu_indices(len(charges), 1)
    repulsion = float((charges[i] * charges[j] / np.linalg.norm(places[i] - places[j], axis=1)).sum())
    masses = atomic_masses[charges]
    arms = places - masses @ places / masses.sum()
    spread = (masses[:, None, None] * arms[:, :, None] * arms[:, None, :]).sum(0)
    return np.array([repulsion, *np.linalg.eigvalsh(np.trace(spread) * np.eye(3) - spread)])


def same_geometry(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Return whether fingerprints of one formula are of one geometry: within 0.2 % and 1 %, of what relaxations leave."""
    return bool((np.abs(first - second) <= np.maximum(_TOLERANCE * np.abs(second), _SMALLEST)).all())


@dataclass(frozen=True)
class Taught:
    """What a builder was taught with: SMILES, and fingerprints of geometries by formula."""

    smiles: frozenset[str] = frozenset()
    geometries: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of(cls, molecules: Iterable[tuple[str, Any, Any]]) -> Self:
        """Return what was taught with molecules: SMILES, atomic numbers ``(N,)`` and positions ``(N, 3)`` in nm of each."""
        smiles, found = set(), defaultdict(list)
        for name, numbers, positions in molecules:
            smiles.add(name)
            found[str(Formula.of_atomic_numbers(numbers))].append(fingerprint(numbers, positions))
        return cls(frozenset(smiles), {formula: np.array(rows) for formula, rows in found.items()})

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> Self:
        """Read what :meth:`provenance` wrote; nothing where a file says nothing."""
        geometries = {formula: np.array(rows) for formula, rows in provenance.get(GEOMETRIES, {}).items()}
        return cls(frozenset(provenance.get(SMILES, ())), geometries)

    def provenance(self) -> dict[str, Any]:
        """Return it as model files keep it."""
        rows = {
            formula: [[float(f"{value:.{_DIGITS}g}") for value in row] for row in values.tolist()]
            for formula, values in sorted(self.geometries.items())
        }
        return {SMILES: sorted(self.smiles), GEOMETRIES: rows}

    def has_geometry(self, numbers: Any, positions: Any) -> bool:
        """Return whether a geometry is one of those taught."""
        own = fingerprint(numbers, positions)
        return any(same_geometry(own, row) for row in self.geometries.get(str(Formula.of_atomic_numbers(numbers)), ()))
