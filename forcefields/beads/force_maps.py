"""Force maps from the forces on atoms to those on beads, with the least noise that the physics allows.

A map B of forces belongs to a map M of positions when ``B M^T = 1`` (Noid et al., J. Chem. Phys. 128, 244114 (2008)): the
mapped forces then average, at fixed beads, to the mean force. Where the simulation constrains distances, the forces of
constraints are not among those that an engine reports; they cancel when atoms that constraints join have one coefficient.
All maps with both properties have the same mean force and differ in noise alone; the least noisy one is a constrained
least-squares problem (Kraemer et al., J. Phys. Chem. Lett. 14, 3970 (2023)), solved here in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...core.errors import ConfigurationError
from .mappings import FloatArray, Mapping, require_frames

_ORTHOGONALITY = 1e-6
_RIDGE = 1e-6  # of the mean square force on a group of atoms
_FRAMES_PER_COEFFICIENT = 10

Constraints = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ForceMap:
    """A linear map of forces, ``F = B f``, that belongs to a mapping.

    Attributes:
        mapping: mapping of the positions.
        weights: B ``(n, N)``.
    """

    mapping: Mapping
    weights: FloatArray

    def __post_init__(self) -> None:
        if self.weights.shape != self.mapping.weights.shape:
            raise ConfigurationError(
                f"a force map has the shape of its mapping {self.mapping.weights.shape}, got {self.weights.shape}"
            )
        error = np.abs(self.weights @ self.mapping.weights.T - np.eye(len(self.weights))).max()
        if not error < _ORTHOGONALITY:
            raise ConfigurationError(
                f"this force map does not belong to the mapping: B M^T differs from the unit matrix by {error:.2g}, so mapped "
                "forces would not average to the mean force"
            )

    def forces(self, forces: NDArray[Any]) -> FloatArray:
        """Return bead forces ``(F, n, 3)`` of atom forces ``(F, N, 3)``; raises as :meth:`Mapping.positions`."""
        require_frames(forces, self.mapping.atoms, "forces")
        mapped: FloatArray = np.einsum("ba,fac->fbc", self.weights, forces, optimize=True)
        return mapped


def plain_force_map(mapping: Mapping, constraints: Constraints = ()) -> ForceMap:
    """Return the map that adds up the forces on the atoms of each bead, and on those that constraints tie to them.

    Args:
        mapping: mapping of the positions.
        constraints: pairs of atoms whose distance the simulation fixed.

    Raises:
        ConfigurationError: when a constraint joins atoms of two beads, or a bead to part of what it constrains: no sum of
            forces is a mean force then.
    """
    groups = constrained_groups(len(mapping.atoms), constraints)
    weights = np.zeros_like(mapping.weights)
    for bead in range(len(weights)):
        touched = {int(groups[atom]) for atom in mapping.members(bead)}
        weights[bead, np.isin(groups, list(touched))] = 1.0
    _refuse_shared_groups(mapping, groups)
    return ForceMap(mapping, weights)


def bonded_force_map(mapping: Mapping, constraints: Constraints = ()) -> ForceMap:
    """Return the map that adds the force on an atom of no bead to the bead that fewest bonds part it from.

    Forces between bonded atoms cancel in such sums, which is most of what :func:`optimised_force_map` gains, and no frames are
    looked at, which private data ask for. Atoms as near to two beads as to one belong to neither.

    Args:
        mapping: mapping of the positions, with one atom a bead.
        constraints: pairs of atoms whose distance the simulation fixed.

    Raises:
        ConfigurationError: when beads have several atoms, and when constraints join atoms that belong to different beads.
    """
    members = [mapping.members(bead) for bead in range(len(mapping.beads))]
    if any(len(one) != 1 for one in members):
        raise ConfigurationError("the bonded force map is for beads of one atom each: take plain_force_map")
    graph: networkx.Graph[int] = networkx.Graph(list(mapping.atoms.bonds))
    graph.add_nodes_from(range(len(mapping.atoms)))
    steps = [networkx.single_source_shortest_path_length(graph, one[0]) for one in members]
    weights = np.zeros_like(mapping.weights)
    for atom in range(len(mapping.atoms)):
        away = np.array([found.get(atom, np.inf) for found in steps])
        nearest = np.flatnonzero(away == away.min())
        if np.isfinite(away.min()) and len(nearest) == 1:
            weights[nearest[0], atom] = 1.0
    groups = constrained_groups(len(mapping.atoms), constraints)
    for group in range(int(groups.max()) + 1):
        if np.ptp(weights[:, groups == group], axis=1).any():
            raise ConfigurationError("constraints join atoms that bonds give to different beads: take plain_force_map")
    return ForceMap(mapping, weights)


def optimised_force_map(mapping: Mapping, forces: NDArray[Any], constraints: Constraints = ()) -> ForceMap:
    """Return the map whose bead forces have the least mean square over frames.

    With one coefficient b for each group of atoms that constraints join, minimise ``b C b^T`` under ``b A = 1``, where C is the
    mean product of group forces and A the mapping summed over groups: ``b = (A^T C^-1 A)^-1 A^T C^-1``.

    Args:
        mapping: mapping of the positions.
        forces: forces on atoms ``(F, N, 3)``, in any unit, without those of constraints.
        constraints: pairs of atoms whose distance the simulation fixed.

    Raises:
        ConfigurationError: for too few frames, for forces that are not finite, and for constraints between two beads.
    """
    require_frames(forces, mapping.atoms, "forces")
    groups = constrained_groups(len(mapping.atoms), constraints)
    _refuse_shared_groups(mapping, groups)
    count = int(groups.max()) + 1
    if 3 * len(forces) < _FRAMES_PER_COEFFICIENT * count:
        raise ConfigurationError(
            f"{len(forces)} frames are too few to optimise a force map of {count} coefficients a bead: give at least "
            f"{_FRAMES_PER_COEFFICIENT * count // 3 + 1}, or take the plain map"
        )
    summing = np.zeros((count, len(mapping.atoms)))
    summing[groups, np.arange(len(groups))] = 1.0
    grouped = np.einsum("ga,fac->fgc", summing, forces, optimize=True)
    covariance = np.einsum("fgc,fhc->gh", grouped, grouped, optimize=True) / len(forces)
    covariance += _RIDGE * np.trace(covariance) / count * np.eye(count)
    mapped = summing @ mapping.weights.T
    solved = np.linalg.solve(covariance, mapped)
    coefficients = np.linalg.solve(mapped.T @ solved, solved.T)
    return ForceMap(mapping, coefficients @ summing)


def constrained_groups(atoms: int, constraints: Constraints) -> NDArray[np.int64]:
    """Return for each atom the number of the group of atoms that constraints join it with, ``(N,)``."""
    for i, j in constraints:
        if not (0 <= i < atoms and 0 <= j < atoms):
            raise ConfigurationError(f"the constraint ({i}, {j}) is outside the {atoms} atoms")
    rows, columns = np.array(constraints, dtype=np.int64).reshape(-1, 2).T
    joined = coo_array((np.ones(len(rows)), (rows, columns)), shape=(atoms, atoms))
    groups: NDArray[np.int64] = connected_components(joined, directed=False)[1].astype(np.int64)
    return groups


def _refuse_shared_groups(mapping: Mapping, groups: NDArray[np.int64]) -> None:
    owner: dict[int, int] = {}
    for bead in range(len(mapping.beads)):
        for atom in mapping.members(bead):
            other = owner.setdefault(int(groups[atom]), bead)
            if other != bead:
                raise ConfigurationError(
                    f"constraints join {mapping.atoms.label(atom)} of bead {bead} with an atom of bead {other}: the force "
                    "of the constraint acts between the beads and is not known. Simulate without that constraint"
                )
