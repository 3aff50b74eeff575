"""Mappings from atoms to beads: linear, checked, and with the topology of the beads.

A bead is one atom (a slice) or the centre of mass of several. Which beads are bonded is read off the molecule: atoms that
belong to no bead are given to the nearest one along bonds, and two beads are bonded where a bond joins their atoms.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingOf
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigurationError, MoleculeMismatchError
from ...core.potential import Particles

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_ROW_SUM = 1e-9
_CARBON = 6


@dataclass(frozen=True)
class Mapping:
    """A linear map of atom positions to bead positions, ``R = M r``.

    Attributes:
        atoms: the particles that are mapped.
        beads: the beads; atomic number 0, their masses those of the atoms that they stand for.
        weights: M ``(n, N)``; rows sum to one, and no atom is in two beads.
    """

    atoms: Particles
    beads: Particles
    weights: FloatArray

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        object.__setattr__(self, "weights", weights)
        shape = (len(self.beads), len(self.atoms))
        if weights.shape != shape:
            raise ConfigurationError(
                f"the weights of {shape[0]} beads and {shape[1]} atoms are {shape}, got {weights.shape}"
            )
        if not np.isfinite(weights).all():
            raise ConfigurationError("the weights of a mapping must be finite numbers")
        sums = weights.sum(1)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > _ROW_SUM)
        if len(wrong):
            raise ConfigurationError(
                f"the weights of bead {wrong[0]} ({self.beads.names[wrong[0]]}) sum to {sums[wrong[0]]:.9g}, not to 1: "
                "a bead would not move with its atoms"
            )
        shared = np.flatnonzero((weights != 0.0).sum(0) > 1)
        if len(shared):
            beads = np.flatnonzero(weights[:, shared[0]])
            raise ConfigurationError(
                f"{self.atoms.label(int(shared[0]))} is in {len(beads)} beads, {beads.tolist()}: give each atom to one bead"
            )

    def members(self, bead: int) -> tuple[int, ...]:
        """Return the atoms that a bead is made of."""
        return tuple(int(i) for i in np.flatnonzero(self.weights[bead]))

    def positions(self, positions: NDArray[Any]) -> FloatArray:
        """Return bead positions ``(F, n, 3)`` of atom positions ``(F, N, 3)``.

        Raises:
            MoleculeMismatchError: for another number of atoms.
            ConfigurationError: when a position is NaN or infinite; the message names the frame and the atom.
        """
        require_frames(positions, self.atoms, "positions")
        mapped: FloatArray = np.einsum("ba,fac->fbc", self.weights, positions, optimize=True)
        return mapped


def require_frames(frames: NDArray[Any], atoms: Particles, what: str) -> None:
    """Refuse arrays that are no finite vectors of these atoms, one frame after the other."""
    if frames.ndim != 3 or frames.shape[1:] != (len(atoms), 3):
        raise MoleculeMismatchError(
            f"{what} of {len(atoms)} atoms are (frames, {len(atoms)}, 3), got {tuple(frames.shape)}: does the trajectory "
            "belong to this topology?"
        )
    bad = ~np.isfinite(frames).all(axis=2)
    if bad.any():
        frame, atom = np.argwhere(bad)[0]
        raise ConfigurationError(
            f"{int(bad.any(axis=1).sum())} of {len(frames)} frames have {what} that are not finite, first frame {frame} at "
            f"{atoms.label(int(atom))}: leave those frames out, or find what broke the simulation"
        )


def slice_mapping(atoms: Particles, chosen: Sequence[int], names: Sequence[str] | None = None) -> Mapping:
    """Return the mapping that keeps some atoms and drops the others.

    Args:
        atoms: atoms of the molecule.
        chosen: index of the atom of each bead.
        names: names of the beads; those of the atoms where None.

    Raises:
        ConfigurationError: for indices outside the molecule or an atom that is chosen twice.
    """
    return _mapping(atoms, [(index,) for index in chosen], names)


def centre_of_mass_mapping(
    atoms: Particles, groups: Sequence[Sequence[int]], names: Sequence[str] | None = None, *, complete: bool = False
) -> Mapping:
    """Return the mapping to centres of mass of groups of atoms.

    Args:
        atoms: atoms of the molecule.
        groups: indices of the atoms of each bead.
        names: names of the beads; those of their heaviest atoms where None.
        complete: refuse groups that leave atoms out.

    Raises:
        ConfigurationError: for empty groups, indices outside the molecule, atoms in two groups, and lost atoms where
            ``complete`` asks for all.
    """
    if complete:
        lost = sorted(set(range(len(atoms))) - {int(i) for group in groups for i in group})
        if lost:
            raise ConfigurationError(
                f"{len(lost)} atoms are in no bead, the first is {atoms.label(lost[0])}: add them to beads, or take "
                "complete=False if they may be lost"
            )
    return _mapping(atoms, groups, names)


def alpha_carbons(atoms: Particles) -> Mapping:
    """Return the mapping to the alpha carbons of a protein, one bead a residue."""
    chosen = [i for i, name in enumerate(atoms.names) if name == "CA" and atoms.atomic_numbers[i] in (_CARBON, 0)]
    return slice_mapping(atoms, _some(chosen, "alpha carbon (CA)"))


def backbone(atoms: Particles) -> Mapping:
    """Return the mapping to N, CA and C of every residue, those of caps included."""
    wanted = {"N": 7, "CA": _CARBON, "C": _CARBON}
    chosen = [i for i, name in enumerate(atoms.names) if wanted.get(name) == atoms.atomic_numbers[i]]
    return slice_mapping(atoms, _some(chosen, "backbone atom (N, CA, C)"))


def five_beads(atoms: Particles) -> Mapping:
    """Return the five-bead mapping of capped alanine: C, N, CA, C, N, which hold phi and psi.

    Raises:
        ConfigurationError: when the molecule is not ACE-ALA-NME.
    """
    place = {(residue, name): i for i, (residue, name) in enumerate(zip(atoms.residue_names, atoms.names, strict=True))}
    wanted = [("ACE", "C"), ("ALA", "N"), ("ALA", "CA"), ("ALA", "C"), ("NME", "N")]
    missing = [f"{residue}:{name}" for residue, name in wanted if (residue, name) not in place]
    if missing:
        raise ConfigurationError(
            f"the five beads of capped alanine need {', '.join(missing)}, which this molecule lacks: name it ACE, ALA, NME, or "
            "use another mapping"
        )
    return slice_mapping(atoms, [place[key] for key in wanted])


NAMED_MAPPINGS = {"alpha_carbons": alpha_carbons, "backbone": backbone, "five_beads": five_beads}
"""Mappings that need nothing but the molecule."""


def identity_mapping(beads: Particles) -> Mapping:
    """Return the mapping of particles that are beads already onto themselves."""
    return Mapping(beads, beads, np.eye(len(beads)))


def _some(chosen: list[int], what: str) -> list[int]:
    if not chosen:
        raise ConfigurationError(
            f"the molecule has no {what}: its atoms may be named otherwise; select the beads instead"
        )
    return chosen


def _mapping(atoms: Particles, groups: Sequence[Sequence[int]], names: Sequence[str] | None) -> Mapping:
    if not groups:
        raise ConfigurationError("a mapping needs at least one bead")
    masses = np.array(atoms.masses)
    weights = np.zeros((len(groups), len(atoms)))
    taken: dict[int, int] = {}
    for bead, group in enumerate(groups):
        if not len(group):
            raise ConfigurationError(f"bead {bead} has no atoms: its selection matches nothing in this molecule")
        for index in group:
            if not 0 <= index < len(atoms):
                raise ConfigurationError(f"bead {bead} names atom {index}, the molecule has 0 .. {len(atoms) - 1}")
            if index in taken:
                raise ConfigurationError(
                    f"{atoms.label(index)} is in beads {taken[index]} and {bead}: give each atom to one bead"
                )
            taken[index] = bead
        weights[bead, list(group)] = masses[list(group)] / masses[list(group)].sum()
    heaviest = [max(group, key=lambda i: masses[i]) for group in groups]
    if names is not None and len(names) != len(groups):
        raise ConfigurationError(f"{len(names)} names for {len(groups)} beads")
    beads = Particles(
        names=tuple(names) if names is not None else tuple(atoms.names[i] for i in heaviest),
        atomic_numbers=(0,) * len(groups),
        masses=tuple(float(masses[list(group)].sum()) for group in groups),
        bonds=_bead_bonds(atoms, taken),
        residue_names=tuple(atoms.residue_names[i] for i in heaviest),
        residue_indices=_counted([atoms.residue_indices[i] for i in heaviest]),
    )
    return Mapping(atoms, beads, weights)


def _bead_bonds(atoms: Particles, taken: MappingOf[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the bonds between beads: of the atoms of one bead, and of those that are nearest to it, to those of another."""
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(range(len(atoms)))
    graph.add_edges_from(atoms.bonds)
    owner = dict(taken)
    front = sorted(taken)
    while front:
        reached = []
        for atom in front:
            for other in sorted(graph.neighbors(atom)):
                if other not in owner:
                    owner[other] = owner[atom]
                    reached.append(other)
        front = reached
    joined = {
        tuple(sorted((owner[i], owner[j])))
        for i, j in atoms.bonds
        if i in owner and j in owner and owner[i] != owner[j]
    }
    return tuple((i, j) for i, j in sorted(joined))


def _counted(indices: list[int]) -> tuple[int, ...]:
    """Return residue numbers from 0 without gaps, as Particles have them."""
    order = {number: place for place, number in enumerate(sorted(set(indices)))}
    return tuple(order[number] for number in indices)
