"""Molecules under construction, in batches: placed atoms, the bag of atoms left, and the frames of new placements."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COVALENT_RADII = (0.031, 0.076, 0.071, 0.066, 0.057)
"""nm, in the order of ``ELEMENTS`` (Cordero et al., Dalton Trans. 2008, 2832)."""

BOND_STRETCH = 1.25
"""Atoms are bonded below this multiple of the sum of their covalent radii."""

_COLLINEAR = 0.1  # sine of the smallest angle between two axes that a torsion is measured with
_FAR = 1e6


class PartialMolecules(NamedTuple):
    """A batch of B molecules of which some atoms are placed, in rows of N.

    Attributes:
        positions: ``(B, N, 3)`` in nm; what stands in rows that are not placed does not matter.
        elements: ``(B, N)``, indices into ``ELEMENTS``.
        placed: ``(B, N)``, whether a row holds an atom; in each molecule the first rows do, in the order of building.
        bag: ``(B, E)``, how many atoms of each element are left to place.
    """

    positions: Tensor
    elements: Tensor
    placed: Tensor
    bag: Tensor

    @property
    def size(self) -> int:
        """Number of molecules."""
        return len(self.positions)

    def select(self, rows: Tensor) -> PartialMolecules:
        """Return the molecules with these indices."""
        return PartialMolecules(*(tensor[rows] for tensor in self))

    def first_rows(self, count: int) -> PartialMolecules:
        """Return the same molecules with their first ``count`` rows only."""
        return PartialMolecules(self.positions[:, :count], self.elements[:, :count], self.placed[:, :count], self.bag)


class Placements(NamedTuple):
    """Placements of P atoms, each relative to a focus atom of its own partial molecule.

    Attributes:
        focus: ``(P,)``, row of the atom that the new one is attached to.
        element: ``(P,)``, index into ``ELEMENTS``.
        distance: ``(P,)`` in nm, from the focus.
        cosine: ``(P,)``, of the angle new atom - focus - first reference.
        torsion: ``(P,)`` in radians, new atom - focus - first - second reference.
    """

    focus: Tensor
    element: Tensor
    distance: Tensor
    cosine: Tensor
    torsion: Tensor


def bonded_pairs(distances: Tensor, elements: Tensor) -> Tensor:
    """Return which pairs ``(..., N, N)`` are near enough for a bond, of distances ``(..., N, N)`` and elements ``(..., N)``."""
    radii = torch.tensor(COVALENT_RADII, dtype=distances.dtype)[elements]
    near = distances < BOND_STRETCH * (radii.unsqueeze(-1) + radii.unsqueeze(-2))
    return near & ~torch.eye(distances.shape[-1], dtype=torch.bool)


class PlacementFrames(NamedTuple):
    """Axes at P focus atoms, right-handed; they turn with the molecule, and a reflection of it turns torsions over.

    Attributes:
        origin: ``(P, 3)``, the focus.
        axes: ``(P, 3, 3)``: towards the first reference, towards the second's projection, and normal to both.
        first: ``(P,)``, row of the first reference; the focus itself where there is none.
        reach: ``(P,)`` in nm, from the focus to the first reference.
        has_torsion: ``(P,)``, whether there is a second reference off the axis; where not, the second and third axes are
            arbitrary, and the density may not depend on the torsion.
    """

    origin: Tensor
    axes: Tensor
    first: Tensor
    reach: Tensor
    has_torsion: Tensor

    def place(self, distance: Tensor, cosine: Tensor, torsion: Tensor) -> Tensor:
        """Return the position ``(P, ..., 3)`` of each placement; arguments ``(P, ...)``."""
        sine = (1.0 - cosine.square()).clamp(min=0.0).sqrt()
        local = torch.stack([cosine, sine * torsion.cos(), sine * torsion.sin()], -1) * distance.unsqueeze(-1)
        extra = (1,) * (local.dim() - 2)
        axes, origin = self.axes.view(-1, *extra, 3, 3), self.origin.view(-1, *extra, 3)
        return origin + (local.unsqueeze(-1) * axes).sum(-2)

    def coordinates(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance, cosine and torsion ``(P,)`` of positions ``(P, 3)``: the inverse of :meth:`place`."""
        local = ((position - self.origin).unsqueeze(-2) * self.axes).sum(-1)
        distance = local.norm(dim=-1)
        return distance, (local[:, 0] / distance).clamp(-1.0, 1.0), torch.atan2(local[:, 2], local[:, 1])


def frames_at(molecules: PartialMolecules, focus: Tensor) -> PlacementFrames:
    """Return the frame at one placed atom of each molecule.

    The first reference is the earliest placed atom that is bonded to the focus, or else the nearest; the second the earliest
    bonded to the first, or else to the focus, or else the nearest to the first, as long as it is off the axis.

    Args:
        molecules: P of them.
        focus: ``(P,)``, rows of placed atoms.
    """
    rows = torch.arange(molecules.size)
    positions, placed = molecules.positions, molecules.placed
    count = positions.shape[1]
    order = torch.arange(count, dtype=positions.dtype)
    origin = positions[rows, focus]
    focus_bonds, focus_distances = _neighbours(molecules, focus)
    score = torch.where(focus_bonds, order, _FAR + focus_distances)
    score = score.masked_fill(~placed, float("inf")).scatter(1, focus.unsqueeze(1), float("inf"))
    best, first = score.min(1)
    has_first = torch.isfinite(best)
    first = torch.where(has_first, first, focus)
    unit = torch.eye(3, dtype=positions.dtype)
    towards = torch.where(has_first.unsqueeze(1), positions[rows, first] - origin, unit[0])
    reach = towards.norm(dim=-1, keepdim=True)
    axis = towards / reach

    first_bonds, first_distances = _neighbours(molecules, first)
    arms = positions - positions[rows, first].unsqueeze(1)
    across = arms - (arms * axis.unsqueeze(1)).sum(-1, keepdim=True) * axis.unsqueeze(1)
    sine = across.norm(dim=-1) / arms.norm(dim=-1).clamp(min=1e-9)
    score = torch.where(first_bonds, order, torch.where(focus_bonds, count + order, _FAR + first_distances))
    usable = placed & (sine > _COLLINEAR)
    usable = usable.scatter(1, focus.unsqueeze(1), False).scatter(1, first.unsqueeze(1), False)
    best, second = score.masked_fill(~usable, float("inf")).min(1)
    has_torsion = torch.isfinite(best) & has_first
    spare = unit[axis.abs().argmin(-1)]
    spare = spare - (spare * axis).sum(-1, keepdim=True) * axis
    direction = torch.where(has_torsion.unsqueeze(1), across[rows, second], spare)
    plane = direction / direction.norm(dim=-1, keepdim=True)
    axes = torch.stack([axis, plane, torch.linalg.cross(axis, plane)], 1)
    return PlacementFrames(origin, axes, first, reach.squeeze(1), has_torsion)


def _neighbours(molecules: PartialMolecules, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether atoms ``(P, N)`` are bonded to the centre ``(P,)`` of their molecule, and how far they are from it."""
    rows = torch.arange(molecules.size)
    distances = (molecules.positions - molecules.positions[rows, centre].unsqueeze(1)).norm(dim=-1)
    radii = torch.tensor(COVALENT_RADII, dtype=distances.dtype)[molecules.elements]
    near = distances < BOND_STRETCH * (radii + radii.gather(1, centre.unsqueeze(1)))
    return near.scatter(1, centre.unsqueeze(1), False) & molecules.placed, distances
