"""A z-matrix for any connected molecule: which bond, angle and torsion place each atom.

The tree grows breadth-first from the centre of the molecule. The first atom placed on a rotatable bond carries the
proper torsion; its siblings are placed relative to it by improper-style torsions, so that they follow when the bond
turns and their own coordinates stay stiff. A ring is opened at the bonds that the tree leaves out; these bond lengths
are then functions of the other coordinates, which remain a complete set (3N - 6 in all).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import networkx
import numpy as np
from numpy.typing import NDArray

from ...core.errors import CoordinateError
from ...core.potential import Particles

# Angles closer to 0 or 180 degrees leave the torsions about them undefined. A linear group bends by some degrees in
# every frame of a simulation at room temperature.
_LINEAR_DEGREES = 10.0


@dataclass(frozen=True)
class Row:
    """Placement of one atom: a distance from ``bond``, an angle with ``angle``, a torsion with ``torsion``.

    ``angle`` and ``torsion`` are -1 where the atom needs none (the three atoms of the frame). ``relative`` says that
    the torsion is measured from a sibling, ``rotor`` that it turns nothing but hydrogens.
    """

    atom: int
    bond: int
    angle: int = -1
    torsion: int = -1
    relative: bool = False
    rotor: bool = False


@dataclass(frozen=True)
class ZMatrix:
    """The frame's origin and the rows, in an order in which each row's references come before it."""

    origin: int
    rows: tuple[Row, ...]

    @property
    def atom_count(self) -> int:
        """Number of atoms N."""
        return len(self.rows) + 1

    def levels(self) -> list[list[int]]:
        """Group the rows with a torsion by the depth at which they can be placed, as indices into ``rows``."""
        depth = {self.origin: 0, **{row.atom: 0 for row in self.rows if row.torsion < 0}}
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.torsion >= 0:
                depth[row.atom] = 1 + max(depth[row.bond], depth[row.angle], depth[row.torsion])
                groups.setdefault(depth[row.atom], []).append(index)
        return [groups[level] for level in sorted(groups)]


def build_zmatrix(particles: Particles) -> ZMatrix:
    """Return a z-matrix for a molecule.

    Raises:
        CoordinateError: without bonds, for fewer than three atoms, or when an atom is not connected to the rest; the
            message names the atom.
    """
    graph = _molecular_graph(particles)
    origin, first, second = _frame(graph, particles)
    # Breadth first, with the two bonds of the frame before all others.
    tree = networkx.bfs_tree(
        graph,
        origin,
        sort_neighbors=lambda atoms: sorted(atoms, key=lambda atom: (atom != first, atom != second, atom)),
    )
    size = {atom: 1 + len(networkx.descendants(tree, atom)) for atom in tree}

    def rank(atom: int) -> tuple[bool, int, int]:
        return (particles.atomic_numbers[atom] == 1, -size[atom], atom)

    rows = [Row(first, origin), Row(second, origin, first)]
    parent = {first: origin, second: origin}
    anchor = {origin: first, first: second, second: first}  # what the torsion about (atom, parent) is measured from
    queue = deque([origin, first, second])
    while queue:
        centre = queue.popleft()
        children = sorted((atom for atom in tree.successors(centre) if atom not in (first, second)), key=rank)
        for child in children:
            if centre == origin:
                row = Row(child, origin, first, second, relative=True)
            elif child == children[0]:
                rotor = all(particles.atomic_numbers[other] == 1 for other in children)
                row = Row(child, centre, parent[centre], anchor[centre], rotor=rotor)
            else:
                row = Row(child, centre, parent[centre], children[0], relative=True)
            rows.append(row)
            parent[child] = centre
            # the torsion about (child, centre) is measured from what the centre itself hangs on
            anchor[child] = first if centre == origin else parent[centre]
            queue.append(child)
    return ZMatrix(origin, tuple(rows))


def _molecular_graph(particles: Particles) -> networkx.Graph:
    n = len(particles)
    if n < 3:
        raise CoordinateError(f"internal coordinates need at least three atoms, this molecule has {n}")
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(particles.bonds)
    pieces = sorted(networkx.connected_components(graph), key=len, reverse=True)
    if len(pieces) > 1:
        atom = min(pieces[1])
        raise CoordinateError(
            f"{particles.label(atom)} is not bonded to the rest of the molecule ({len(pieces)} pieces for {n} atoms): "
            "internal coordinates describe one connected molecule; add the missing bond (CONECT records in a PDB "
            "file) or treat the pieces separately"
        )
    return graph


def _frame(graph: networkx.Graph, particles: Particles) -> tuple[int, int, int]:
    """Return the origin and two of its neighbours: the most central heavy atom with its two largest branches."""
    candidates = [atom for atom in graph if graph.degree[atom] >= 2]
    heavy = [atom for atom in candidates if _heavy_degree(graph, particles, atom) >= 2] or candidates
    distance = dict(networkx.all_pairs_shortest_path_length(graph))
    origin = min(heavy, key=lambda atom: (sum(distance[atom].values()), atom))
    pruned = graph.copy()
    pruned.remove_node(origin)
    branch = {atom: len(networkx.node_connected_component(pruned, atom)) for atom in graph.neighbors(origin)}
    ranked = sorted(branch, key=lambda atom: (particles.atomic_numbers[atom] == 1, -branch[atom], atom))
    return origin, ranked[0], ranked[1]


def _heavy_degree(graph: networkx.Graph, particles: Particles, atom: int) -> int:
    return sum(particles.atomic_numbers[other] != 1 for other in graph.neighbors(atom))


def refuse_linear(zmatrix: ZMatrix, positions: NDArray[np.float64], particles: Particles) -> None:
    """Raise CoordinateError when three atoms that define an angle are close to a line in half of the structures.

    Args:
        zmatrix: the z-matrix.
        positions: ``(F, N, 3)`` in nm.
        particles: particles, for the names in the message.
    """
    for row in zmatrix.rows:
        if row.angle < 0:
            continue
        first = positions[:, row.atom] - positions[:, row.bond]
        second = positions[:, row.angle] - positions[:, row.bond]
        sine = np.linalg.norm(np.cross(first, second), axis=-1)
        angle = float(np.median(np.degrees(np.arctan2(sine, (first * second).sum(-1)))))
        if min(angle, 180.0 - angle) < _LINEAR_DEGREES:
            raise CoordinateError(
                f"{particles.label(row.bond)} is bonded linearly: the angle {particles.label(row.atom)} - "
                f"{particles.label(row.bond)} - {particles.label(row.angle)} is {angle:.1f} degrees, so torsions about "
                "it are undefined; molecules with linear groups cannot be described by bonds, angles and torsions"
            )
