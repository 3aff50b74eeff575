"""The fixed part of a flow: Cartesian positions to circular torsions and standardised stiff coordinates.

Nothing here is trained by gradients. Which torsions are circular, where the stiff ones are centred and how they are
standardised is read off training data once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...core.potential import Particles
from ..transforms.bijection import Transformed
from ..transforms.bumps import log_period
from ..transforms.conditioners import FourierFeatures
from ..transforms.permutations import Permutation
from .configuration import FlowConfiguration
from .internal_coordinates import InternalCoordinates, InternalPoint
from .stiff_maps import IntervalMap, StiffMap, WhitenedMap
from .zmatrix import ZMatrix, build_zmatrix, refuse_linear

# A torsion is stiff when the data leave a gap of this many degrees free of it and its spread is small.
_STIFF_GAP = 120.0
_STIFF_SPREAD = 30.0
_BOND_DOMAIN = (0.05, 0.30)  # nm, arXiv 2110.00351
_ANGLE_DOMAIN = (0.15 * math.pi, math.pi)
_MANY_TORSIONS = 4  # up to this many, sums and differences of all pairs are features


class Coordinates(NamedTuple):
    """Circular torsions ``(B, T)`` in turns, [0, 1), and standardised stiff coordinates ``(B, S)``; float64."""

    circular: Tensor
    stiff: Tensor


@dataclass(frozen=True)
class Layout:
    """Circular and stiff torsions of a z-matrix; the stiff ones are centred.

    Attributes:
        circular: indices of circular torsions, those that turn more than hydrogens first.
        rotors: number of those, at the end, that turn only hydrogens.
        stiff: indices of stiff torsions.
        centres: their circular means in radians.
    """

    circular: tuple[int, ...]
    rotors: int
    stiff: tuple[int, ...]
    centres: tuple[float, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of circular coordinates (no rotors) whose sums and differences are worth a feature."""
        core = len(self.circular) - self.rotors
        if core <= _MANY_TORSIONS:
            return tuple((i, j) for i in range(core) for j in range(i + 1, core))
        return tuple((i, i + 1) for i in range(core - 1))


def choose_layout(torsions: NDArray[np.float64], zmatrix: ZMatrix, circular: str) -> Layout:
    """Return the layout that data ``(F, N-3)`` in radians ask for; ``circular`` as in FlowConfiguration."""
    rows = [row for row in zmatrix.rows if row.torsion >= 0]
    centres = np.angle(np.exp(1j * torsions).mean(0)) if len(torsions) else np.zeros(len(rows))
    soft = [
        index
        for index, row in enumerate(rows)
        if circular == "all" or (not row.relative and row.rotor) or not _is_stiff(torsions[:, index], centres[index])
    ]
    core = [index for index in soft if not rows[index].rotor]
    rotors = [index for index in soft if rows[index].rotor]
    stiff = [index for index in range(len(rows)) if index not in set(soft)]
    return Layout(tuple(core + rotors), len(rotors), tuple(stiff), tuple(float(centres[i]) for i in stiff))


def _is_stiff(values: NDArray[np.float64], centre: float) -> bool:
    deviation = np.degrees(np.angle(np.exp(1j * (values - centre))))
    turns = np.sort(np.degrees(values) % 360.0)
    gap = np.diff(np.concatenate([turns, turns[:1] + 360.0])).max()
    return bool(gap > _STIFF_GAP and np.sqrt(np.mean(deviation**2)) < _STIFF_SPREAD)


class MoleculeCoordinates(nn.Module):
    """Positions ``(B, N, 3)`` nm <-> :class:`Coordinates`; both directions closed form.

    Build with :meth:`fit`, or from a stored layout and load the state.
    """

    centres: Tensor

    def __init__(self, zmatrix: ZMatrix, layout: Layout, configuration: FlowConfiguration) -> None:
        super().__init__()
        self.layout = layout
        self.internal = InternalCoordinates(zmatrix)
        bonds, angles = zmatrix.atom_count - 1, zmatrix.atom_count - 2
        self.stiff_angles = range(bonds, bonds + angles)
        self.stiff_dimension = bonds + angles + len(layout.stiff)
        self.features = FourierFeatures(len(layout.circular), configuration.stiff.harmonics, layout.pairs)
        self.torsion_order = Permutation(layout.circular + layout.stiff)
        self.register_buffer("centres", torch.tensor(layout.centres, dtype=torch.float64), persistent=False)
        self.map: StiffMap = self._stiff_map(configuration, bonds, angles)

    def _stiff_map(self, configuration: FlowConfiguration, bonds: int, angles: int) -> StiffMap:
        if configuration.stiff.map == "whitened":
            return WhitenedMap(self.stiff_dimension, self.features.count)
        torsions = (-math.pi, math.pi)
        ends = [_BOND_DOMAIN] * bonds + [_ANGLE_DOMAIN] * angles + [torsions] * len(self.layout.stiff)
        low, high = torch.tensor(ends, dtype=torch.float64).unbind(1)
        return IntervalMap(low, high)

    @classmethod
    def fit(cls, particles: Particles, positions: NDArray[np.float64], configuration: FlowConfiguration) -> Self:
        """Return coordinates for a molecule, fitted to frames ``(F, N, 3)`` in nm.

        Raises CoordinateError when the molecule has no usable z-matrix, ConfigurationError for too few frames.
        """
        zmatrix = build_zmatrix(particles)
        refuse_linear(zmatrix, positions, particles)
        point, _ = InternalCoordinates(zmatrix).inverse(torch.as_tensor(positions))
        layout = choose_layout(point.torsions.numpy(), zmatrix, configuration.circular)
        coordinates = cls(zmatrix, layout, configuration)
        circular, raw = coordinates._split(point)
        coordinates.map.fit(raw.numpy(), coordinates.features(circular).numpy())
        return coordinates

    def _split(self, point: InternalPoint) -> tuple[Tensor, Tensor]:
        """Return circular torsions in turns and raw stiff coordinates (nm, radians, stiff torsions from their centres)."""
        ordered, count = self.torsion_order(point.torsions), len(self.layout.circular)
        turns = ordered[:, :count] / (2.0 * math.pi)
        offset = ordered[:, count:] - self.centres
        offset = offset - 2.0 * math.pi * torch.round(offset.detach() / (2.0 * math.pi))
        return turns - turns.detach().floor(), torch.cat([point.bonds, point.angles, offset], 1)

    def inverse(self, positions: Tensor) -> tuple[Coordinates, Tensor]:
        """Return coordinates of positions ``(B, N, 3)`` nm and log |d coordinates / d positions| ``(B,)``."""
        point, log_det = self.internal.inverse(positions)
        circular, raw = self._split(point)
        stiff, change = self.map.inverse(raw, self.features(circular))
        return Coordinates(circular, stiff), log_det + change - log_period(circular.shape[1])

    def forward(self, coordinates: Coordinates) -> Transformed:
        """Return positions ``(B, N, 3)`` nm and log |d positions / d coordinates| ``(B,)``.

        The determinant is NaN where the coordinates belong to no configuration: a bond that is not positive, an angle outside
        (0, pi), a stiff torsion half a turn or more from its centre. The positions there have other coordinates.
        """
        circular, stiff = (part.double() for part in coordinates)
        raw, change = self.map(stiff, self.features(circular))
        bonds, angles = self.stiff_angles.start, len(self.stiff_angles)
        offset = raw[:, bonds + angles :] + self.centres
        torsions = self.torsion_order.inverse(torch.cat([2.0 * math.pi * circular, offset], 1))
        point = InternalPoint(raw[:, :bonds], raw[:, bonds : bonds + angles], torsions)
        positions, volume = self.internal(point)
        possible = (point.bonds > 0).all(1) & (point.angles > 0).all(1) & (point.angles < math.pi).all(1)
        possible = possible & (raw[:, bonds + angles :].abs() < math.pi).all(1)
        log_det = volume + change + log_period(circular.shape[1])
        return Transformed(positions, torch.where(possible, log_det, torch.full_like(log_det, torch.nan)))

    def describe(self) -> dict[str, Any]:
        """Return the layout as plain data, for the model file."""
        layout = self.layout
        return {
            "circular": list(layout.circular),
            "rotors": layout.rotors,
            "stiff": list(layout.stiff),
            "centres": list(layout.centres),
        }

    @staticmethod
    def layout_from(data: dict[str, Any]) -> Layout:
        """Return the layout that :meth:`describe` wrote."""
        return Layout(
            tuple(int(i) for i in data["circular"]),
            int(data["rotors"]),
            tuple(int(i) for i in data["stiff"]),
            tuple(float(c) for c in data["centres"]),
        )
