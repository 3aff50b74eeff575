"""Counts of the parts of a molecular graph: atoms by their multiple bonds, bonds, angles, chains, rings."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import networkx

from .bonds import Bond
from .formulas import ATOMIC_NUMBERS

_SYMBOLS = {number: symbol for symbol, number in ATOMIC_NUMBERS.items()}
_HYDROGEN = ATOMIC_NUMBERS["H"]
_MULTIPLE = {1: "", 2: "=", 3: "#"}
_LARGEST_RING = 8
_KEY = 16  # characters

_Neighbours = dict[int, list[tuple[int, int]]]


def graph_features(numbers: Any, bonds: Sequence[Bond]) -> Counter[str]:
    """Count the parts of a molecule whose contributions make up most of its energy.

    They are in the manner of group additivity (Benson and Buss, J. Chem. Phys. 29, 546 (1958)): heavy atoms by their multiple
    bonds and heavy neighbours, bonds, pairs of heavy atoms around a third, chains of four by their bond orders, and rings
    without chords by size, multiple bonds, hetero atoms, and the atoms that two of them share. Kekulé structures of one
    molecule may count differently.

    Args:
        numbers: ``(N,)`` atomic numbers.
        bonds: all of them, with orders.
    """
    numbers = [int(number) for number in numbers]
    heavy_bonds = [bond for bond in bonds if _HYDROGEN not in (numbers[bond[0]], numbers[bond[1]])]
    neighbours: _Neighbours = defaultdict(list)
    for i, j, order in heavy_bonds:
        neighbours[i].append((order, j))
        neighbours[j].append((order, i))
    heavy = [atom for atom, number in enumerate(numbers) if number != _HYDROGEN]
    kinds = {atom: _kind(numbers[atom], neighbours[atom]) for atom in heavy}
    found: Counter[str] = Counter()
    for atom in heavy:
        found[f"atom {kinds[atom]}"] += 1
        found[f"atom {kinds[atom]} with {len(neighbours[atom])} neighbours"] += 1
        for (_, first), (_, second) in itertools.combinations(neighbours[atom], 2):
            ends = ",".join(sorted((kinds[first], kinds[second])))
            found[f"angle {ends} at {_SYMBOLS[numbers[atom]]}"] += 1
    for i, j, order in heavy_bonds:
        found[f"bond {order} of {','.join(sorted((kinds[i], kinds[j])))}"] += 1
        for (before, first), (after, last) in itertools.product(neighbours[i], neighbours[j]):
            if first != j and last != i and first != last:
                orders = min((before, after), (after, before))
                found[f"chain {orders[0]}-{order}-{orders[1]}"] += 1
    found.update(_ring_features(numbers, heavy_bonds, neighbours))
    return found


def graph_key(numbers: Any, bonds: Sequence[Bond]) -> str:
    """Return the features as a short text: equal for equal graphs, and different for nearly all that differ."""
    features = sorted(graph_features(numbers, bonds).items())
    return hashlib.sha256(repr(features).encode()).hexdigest()[:_KEY]


def _kind(number: int, neighbours: list[tuple[int, int]]) -> str:
    return _SYMBOLS[number] + "".join(sorted(_MULTIPLE[order] for order, _ in neighbours))


def _ring_features(numbers: list[int], bonds: list[Bond], neighbours: _Neighbours) -> Counter[str]:
    found: Counter[str] = Counter()
    graph = networkx.Graph([(i, j) for i, j, _ in bonds])
    rings = [frozenset(ring) for ring in networkx.chordless_cycles(graph, _LARGEST_RING)] if graph else []
    for ring in rings:
        size = len(ring)
        inside = sum(order - 1 for i, j, order in bonds if i in ring and j in ring)
        outside = sum(order > 1 and other not in ring for atom in ring for order, other in neighbours[atom])
        hetero = sum(numbers[atom] != ATOMIC_NUMBERS["C"] for atom in ring)
        found[f"ring {size}"] += 1
        found[f"ring {size} with {inside} more bonds"] += 1
        found[f"ring {size} with {hetero} hetero atoms"] += 1
        if outside:
            found[f"ring {size}, multiple bonds out of it"] += outside
    for first, second in itertools.combinations(rings, 2):
        shared = len(first & second)
        if shared:
            sizes = sorted((len(first), len(second)))
            found[f"rings {sizes[0]} and {sizes[1]} share {shared} atoms"] += 1
    return found
