"""Bonds and their orders, found from a geometry by distances and valences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components

from .formulas import ATOMIC_NUMBERS, ELEMENTS, VALENCES
from .partial_molecules import BOND_STRETCH, COVALENT_RADII

_RADII = {ATOMIC_NUMBERS[symbol]: radius for symbol, radius in zip(ELEMENTS, COVALENT_RADII, strict=True)}
_VALENCES = {ATOMIC_NUMBERS[symbol]: VALENCES[symbol] for symbol in ELEMENTS}
_LARGEST_ORDER = 3

Bond = tuple[int, int, int]
"""Two atoms, the lower index first, and the order."""


class BondSearch(NamedTuple):
    """Result of :func:`find_bonds`.

    Attributes:
        bonds: bonds with orders; empty where there is a fault.
        fault: why the geometry is no valid molecule, or None.
    """

    bonds: tuple[Bond, ...]
    fault: str | None


def find_bonds(numbers: Any, positions: Any) -> BondSearch:
    """Find the bonds of a geometry, if it is one neutral molecule in which every atom has its usual valence.

    Atoms are bonded when they are nearer than 1.25 times the sum of their covalent radii. Orders fill all valences; where
    several ways do, the one with the shortest multiple bonds is taken. Isolated ions, radicals, formal charges (nitro groups,
    carbon monoxide) and several molecules are faults.

    Args:
        numbers: ``(N,)`` atomic numbers.
        positions: ``(N, 3)`` in nm.
    """
    numbers = [int(number) for number in numbers]
    positions = np.asarray(positions, dtype=float)
    if not np.isfinite(positions).all():
        return BondSearch((), "positions are not finite")
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = np.array([_RADII[number] for number in numbers])
    reach = radii[:, None] + radii[None]
    near = distances < BOND_STRETCH * reach
    np.fill_diagonal(near, False)
    if connected_components(near, directed=False, return_labels=False) > 1:
        return BondSearch((), "the atoms fall apart into several molecules")
    free = np.array([_VALENCES[number] for number in numbers]) - near.sum(1)
    if (free < 0).any():
        atom = int(free.argmin())
        return BondSearch((), f"atom {atom} (Z = {numbers[atom]}) has {int(near[atom].sum())} neighbours")
    pairs = [(int(i), int(j)) for i, j in np.argwhere(np.triu(near))]
    extra = _fill_valences([int(f) for f in free], pairs, [float(distances[p] / reach[p]) for p in pairs])
    if extra is None:
        return BondSearch((), "its bonds leave radicals or charges: valences cannot be filled")
    return BondSearch(tuple((i, j, 1 + more) for (i, j), more in zip(pairs, extra, strict=True)), None)


def _fill_valences(free: list[int], pairs: list[tuple[int, int]], lengths: list[float]) -> list[int] | None:
    """Return additional orders of each pair that use up all free valences with the least sum of lengths, or None."""
    best: tuple[float, list[int]] | None = None

    def search(index: int, free: list[int], cost: float, chosen: list[int]) -> None:
        nonlocal best
        if best is not None and cost >= best[0]:
            return
        if index == len(pairs):
            if not any(free):
                best = (cost, chosen)
            return
        i, j = pairs[index]
        closing = [atom for atom in (i, j) if all(atom not in pair for pair in pairs[index + 1 :])]
        for more in range(min(free[i], free[j], _LARGEST_ORDER - 1), -1, -1):
            left = list(free)
            left[i] -= more
            left[j] -= more
            if not any(left[atom] for atom in closing):
                search(index + 1, left, cost + more * lengths[index], [*chosen, more])

    search(0, free, 0.0, [])
    return None if best is None else best[1]
