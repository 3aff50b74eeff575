"""Bonds and angles of a molecule, pooled by chemical type, and their values in configurations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mdtraj
import numpy as np

from ...core.potential import Particles
from ...core.sample_files import ELEMENT_SYMBOLS

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_HYBRIDISATION = {2: "sp", 3: "sp²", 4: "sp³"}  # of carbon, by its number of neighbours
_DOUBLE_BONDED_ENDS = ("O", "S")  # drawn with a double bond where they end a chain, as in C=O


@dataclass(frozen=True)
class TermType:
    """Bonds or angles of one kind.

    Attributes:
        label: such as ``C–H``, ``C=O`` or ``C–C(sp³)–N``.
        atoms: ``(T, 2)`` or ``(T, 3)`` indices; the second atom of an angle is its vertex.
    """

    label: str
    atoms: np.ndarray[Any, np.dtype[np.int64]]

    def values(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return all values ``(S, T)`` in nm or degrees in positions ``(S, N, 3)`` nm, single precision."""
        frames = mdtraj.Trajectory(positions.astype(np.float32, copy=False), None)
        if self.atoms.shape[1] == 2:
            lengths: np.ndarray[Any, np.dtype[np.float32]] = mdtraj.compute_distances(
                frames, self.atoms, periodic=False
            )
            return lengths
        angles: np.ndarray[Any, np.dtype[np.float32]] = np.degrees(
            mdtraj.compute_angles(frames, self.atoms, periodic=False)
        )
        return angles


def bond_types(particles: Particles) -> list[TermType]:
    """Return the bonds by type: elements, hybridisation of carbon in bonds between heavy atoms; heavy ones first."""
    neighbours = _neighbours(particles)
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for i, j in particles.bonds:
        groups[_bond_label(particles, neighbours, i, j)].append((i, j))
    return _ordered(groups, particles)


def angle_types(particles: Particles) -> list[TermType]:
    """Return the angles by type: elements, hybridisation of a carbon vertex between heavy atoms; heavy ones first."""
    neighbours = _neighbours(particles)
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for vertex in range(len(particles)):
        for i, k in combinations(sorted(neighbours[vertex]), 2):
            ends = sorted((i, k), key=lambda atom: (_symbol(particles, atom) == "H", _symbol(particles, atom)))
            first, last = (_symbol(particles, atom) for atom in ends)
            heavy = "H" not in (first, last)
            middle = _decorated(particles, neighbours, vertex) if heavy else _symbol(particles, vertex)
            groups[f"{first}–{middle}–{last}"].append((i, vertex, k))
    return _ordered(groups, particles)


def _neighbours(particles: Particles) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(len(particles))]
    for i, j in particles.bonds:
        found[i].add(j)
        found[j].add(i)
    return found


def _symbol(particles: Particles, atom: int) -> str:
    number = particles.atomic_numbers[atom]
    return ELEMENT_SYMBOLS[number] if number else particles.names[atom]


def _decorated(particles: Particles, neighbours: list[set[int]], atom: int) -> str:
    symbol = _symbol(particles, atom)
    hybridisation = _HYBRIDISATION.get(len(neighbours[atom]))
    return f"C({hybridisation})" if symbol == "C" and hybridisation else symbol


def _bond_label(particles: Particles, neighbours: list[set[int]], i: int, j: int) -> str:
    symbols = _symbol(particles, i), _symbol(particles, j)
    if "H" in symbols:
        heavy = symbols[0] if symbols[1] == "H" else symbols[1]
        return f"{heavy}–H"
    ends = [n for n, atom in enumerate((i, j)) if symbols[n] in _DOUBLE_BONDED_ENDS and len(neighbours[atom]) == 1]
    if ends:
        return f"{symbols[1 - ends[0]]}={symbols[ends[0]]}"
    return "–".join(sorted(_decorated(particles, neighbours, atom) for atom in (i, j)))


def _ordered(groups: dict[str, list[tuple[int, ...]]], particles: Particles) -> list[TermType]:
    """Return types without hydrogen first (they say most about the chain), then by number."""

    def rank(label: str) -> tuple[int, int, str]:
        hydrogens = sum(particles.atomic_numbers[atom] == 1 for atom in groups[label][0])
        return hydrogens, -len(groups[label]), label

    return [TermType(label, np.array(groups[label])) for label in sorted(groups, key=rank)]
