"""Angles, torsions and separations along a chain that follow from the bonds of beads."""

from __future__ import annotations

import networkx
import numpy as np
from numpy.typing import NDArray

from ...core.potential import Particles


def bead_graph(beads: Particles) -> networkx.Graph:
    """Return the graph of beads and bonds."""
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(range(len(beads)))
    graph.add_edges_from(beads.bonds)
    return graph


def bonded_angles(beads: Particles) -> tuple[tuple[int, int, int], ...]:
    """Return all (i, j, k) with bonds i-j and j-k, each once, in the order of j."""
    graph = bead_graph(beads)
    found = []
    for j in sorted(graph):
        near = sorted(graph.neighbors(j))
        found += [(i, j, k) for a, i in enumerate(near) for k in near[a + 1 :]]
    return tuple(found)


def bonded_torsions(beads: Particles) -> tuple[tuple[int, int, int, int], ...]:
    """Return all proper torsions (i, j, k, m) along bonds, each once, in the order of their middle bonds."""
    graph = bead_graph(beads)
    found = []
    for j, k in sorted(tuple(sorted(edge)) for edge in graph.edges):
        for i in sorted(set(graph.neighbors(j)) - {k}):
            found += [(i, j, k, m) for m in sorted(set(graph.neighbors(k)) - {j, i})]
    return tuple(found)


def pairs_apart(beads: Particles, bonds: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of beads that at least so many bonds separate, or that no path joins."""
    graph = bead_graph(beads)
    near = {i: set(networkx.single_source_shortest_path_length(graph, i, bonds - 1)) for i in graph}
    return tuple((i, j) for i in sorted(graph) for j in range(i + 1, len(beads)) if j not in near[i])


def all_pairs(beads: int) -> NDArray[np.int64]:
    """Return all pairs (i, j) with i < j, ``(P, 2)``."""
    return np.stack(np.triu_indices(beads, 1), axis=1)
