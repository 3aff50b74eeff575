"""Cartesian positions to bonds, angles and torsions and back, with the exact volume change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..transforms.bijection import Transformed
from .zmatrix import ZMatrix


class InternalPoint(NamedTuple):
    """Bonds ``(B, N-1)`` nm, angles ``(B, N-2)`` and torsions ``(B, N-3)`` in radians, torsions in (-pi, pi]."""

    bonds: Tensor
    angles: Tensor
    torsions: Tensor


class InternalCoordinates(nn.Module):
    """The map between 3N Cartesian coordinates and 3N - 6 internal ones; both directions closed form, C-infinity.

    Rigid motion is left out: with it integrated over, ``d^3N x = (constant) prod b_i^2 prod sin a_i  db da dt``, where all
    N - 1 bonds and N - 2 angles take part (those of the frame too). Torsions have the IUPAC sign.

    The work is done in float64, because a torsion of atoms a few tenths of a nanometre apart loses half its digits in
    float32.
    """

    torsion_atoms: Tensor
    gathered_atoms: Tensor
    storage_slot: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        self.zmatrix = zmatrix
        rows = zmatrix.rows
        if any((row.angle < 0) != (i < 1) or (row.torsion < 0) != (i < 2) for i, row in enumerate(rows)):
            raise ValueError(
                "the first row of a z-matrix has a bond, the second an angle too, all others a torsion too"
            )
        self._index("torsion_atoms", [(row.atom, row.bond, row.angle, row.torsion) for row in rows[2:]], 4)
        # All positions that inverse() needs, one column of the z-matrix after the other, in a single gather: what indexing
        # costs is the sum over equal indices in its derivative.
        gathered = [row.atom for row in rows] + [row.bond for row in rows]
        gathered += [row.angle for row in rows[1:]] + [row.torsion for row in rows[2:]]
        self.register_buffer("gathered_atoms", torch.tensor(gathered, dtype=torch.long), persistent=False)
        self._level_names = []
        for number, level in enumerate(zmatrix.levels()):
            name = f"level_{number}"
            self._level_names.append(name)
            # columns: index of the bond, angle and torsion in their lists, then the three reference atoms
            self._index(
                name,
                [(i, i - 1, i - 2, rows[i].bond, rows[i].angle, rows[i].torsion) for i in level],
                6,
            )
        order = [zmatrix.origin, rows[0].atom, rows[1].atom]
        order += [rows[i].atom for level in zmatrix.levels() for i in level]
        self.register_buffer("storage_slot", torch.argsort(torch.tensor(order)), persistent=False)

    def _index(self, name: str, rows: list[tuple[int, ...]], columns: int) -> None:
        self.register_buffer(name, torch.tensor(rows, dtype=torch.long).reshape(len(rows), columns), persistent=False)

    @property
    def dimension(self) -> int:
        """Number of internal coordinates, 3N - 6."""
        return 3 * self.zmatrix.atom_count - 6

    def inverse(self, positions: Tensor) -> tuple[InternalPoint, Tensor]:
        """Return internal coordinates of positions ``(B, N, 3)`` nm, and log |d internal / d positions| ``(B,)``."""
        count = len(self.zmatrix.rows)
        atom, bonded, angle, turn = positions.double()[:, self.gathered_atoms].split(
            [count, count, count - 1, count - 2], dim=1
        )
        first = atom - bonded
        bonds = torch.linalg.vector_norm(first, dim=-1)
        second = angle - bonded[:, 1:]
        angles = torch.atan2(
            torch.linalg.vector_norm(torch.linalg.cross(first[:, 1:], second), dim=-1),
            (first[:, 1:] * second).sum(-1),
        )
        torsions = torsion(first[:, 2:], second[:, 1:], turn - angle[:, 1:])
        return InternalPoint(bonds, angles, torsions), -self.log_volume(bonds, angles)

    def forward(self, point: InternalPoint) -> Transformed:
        """Return positions ``(B, N, 3)`` nm in the frame of the first three atoms, and log |d positions / d internal|."""
        bonds, angles, torsions = (part.double() for part in point)
        zero = torch.zeros_like(bonds[:, 0])
        first = torch.stack([bonds[:, 0], zero, zero], -1)
        second = torch.stack([bonds[:, 1] * angles[:, 0].cos(), bonds[:, 1] * angles[:, 0].sin(), zero], -1)
        placed = torch.stack([torch.zeros_like(first), first, second], 1)
        for name in self._level_names:
            level = getattr(self, name)
            bond, angle, turn = bonds[:, level[:, 0]], angles[:, level[:, 1]], torsions[:, level[:, 2]]
            i, j, k = (placed[:, self.storage_slot[level[:, column]]] for column in (3, 4, 5))
            placed = torch.cat([placed, _place(i, j, k, bond, angle, turn)], 1)
        return Transformed(placed[:, self.storage_slot], self.log_volume(bonds, angles))

    @staticmethod
    def log_volume(bonds: Tensor, angles: Tensor) -> Tensor:
        """Return ``sum 2 log b + sum log sin a`` ``(B,)``: log |d positions / d internal| without rigid motion."""
        return 2.0 * bonds.log().sum(-1) + angles.sin().log().sum(-1)


def _place(i: Tensor, j: Tensor, k: Tensor, bond: Tensor, angle: Tensor, turn: Tensor) -> Tensor:
    """Return points at ``bond`` from i, ``angle`` with j, ``turn`` (IUPAC torsion) with k; ``(B, M, 3)``."""
    axis = _unit(j - i)
    normal = _unit(torch.linalg.cross(k - j, axis))
    side = torch.linalg.cross(axis, normal)
    radial = bond * angle.sin()
    return (
        i
        + (bond * angle.cos()).unsqueeze(-1) * axis
        + (radial * turn.cos()).unsqueeze(-1) * side
        + (radial * turn.sin()).unsqueeze(-1) * normal
    )


def _unit(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def torsion(first: Tensor, axis: Tensor, last: Tensor) -> Tensor:
    """Return torsions ``(B, M)`` in radians with the IUPAC sign, of vectors j -> i, j -> k and k -> m, ``(B, M, 3)``."""
    axis = _unit(axis)
    normal = torch.linalg.cross(axis, first)
    return torch.atan2((normal * last).sum(-1), (torch.linalg.cross(normal, axis) * last).sum(-1))
