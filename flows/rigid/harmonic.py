"""Harmonic crystals: normal distributions in the chart of displacements and orientations, and linear maps between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from .crystal import CrystalCoordinates, RigidBijection, RigidMapResult, from_flat, to_flat
from .maps.quaternions import chart_log_volume, random_orientations, to_chart


def flat_dimension(count: int) -> int:
    """Return the number of coordinates of :func:`~flowbridge.flows.rigid.crystal.to_flat` for ``count`` bodies."""
    return 6 * count - 3


def orientation_log_volume(coordinates: CrystalCoordinates) -> Tensor:
    """Return ``(B,)`` logarithms of the share of all orientations per volume of the charts."""
    return chart_log_volume(to_chart(coordinates.orientations)).sum(-1)


class HarmonicMap(RigidBijection):
    """An affine map of displacements and orientation charts: ``z -> target + matrix (z - source)``.

    Exact for a harmonic crystal, where the fluctuations at two temperatures are proportional: the map to start from, both
    directions closed form. On each quaternion alone it is a projective linear map, as the symmetrised Moebius layer is, and
    like that one it takes each orientation to one orientation whatever the sign. Target and matrix are trained with the
    rest, in units of the fluctuations: ``matrix = start S (I + change) S^-1`` with the columns of S the principal
    fluctuations.

    Args:
        source: ``(6 M - 3,)`` mean that is subtracted.
        target: ``(6 M - 3,)`` mean that is added at first.
        start: ``(6 M - 3, 6 M - 3)`` matrix at first.
        covariance: ``(6 M - 3, 6 M - 3)`` of what is to be mapped; sets the units.

    Raises:
        ConfigurationError: for shapes that do not fit, or a covariance that is not positive definite.
    """

    source: Tensor
    start: Tensor
    scale: Tensor
    target: Tensor

    def __init__(self, source: Tensor, target: Tensor, start: Tensor, covariance: Tensor) -> None:
        super().__init__()
        dimension = len(source)
        square = (dimension, dimension)
        if target.shape != (dimension,) or start.shape != square or covariance.shape != square or dimension % 6 != 3:
            raise ConfigurationError(
                f"source {tuple(source.shape)}, target {tuple(target.shape)}, start {tuple(start.shape)} and covariance "
                f"{tuple(covariance.shape)} must have 6 M - 3 coordinates for M bodies"
            )
        self.count = (dimension + 3) // 6
        values, vectors = _eigen(covariance)
        for name, tensor in (
            ("source", source),
            ("target", target),
            ("start", start),
            ("scale", vectors * values.sqrt()),
        ):
            self.register_buffer(name, tensor.double().clone())
        self.shift = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))
        self.change = nn.Parameter(torch.zeros(square, dtype=torch.float64))

    @classmethod
    def untrained(cls, count: int) -> HarmonicMap:
        """Return a map of ``count`` bodies with the shapes of any other, to load parameters into; changes nothing."""
        dimension = flat_dimension(count)
        zero, unit = torch.zeros(dimension, dtype=torch.float64), torch.eye(dimension, dtype=torch.float64)
        return cls(zero, zero, unit, unit)

    @classmethod
    def contraction(cls, centre: Tensor, covariance: Tensor, factor: float) -> HarmonicMap:
        """Return the map that multiplies deviations from ``centre`` (6 M - 3,): by ``sqrt(T_b / T_a)`` for a cooled crystal."""
        return cls(centre, centre, factor * torch.eye(len(centre), dtype=torch.float64), covariance)

    @classmethod
    def between(cls, source: Tensor, covariance: Tensor, target: Tensor, target_covariance: Tensor) -> HarmonicMap:
        """Return the map of least displacement that takes one normal distribution to another.

        Source: I. Olkin, F. Pukelsheim, Linear Algebra Appl. 48, 257 (1982).
        """
        root, inverse_root = _symmetric_power(covariance, 0.5), _symmetric_power(covariance, -0.5)
        matrix = inverse_root @ _symmetric_power(root @ target_covariance @ root, 0.5) @ inverse_root
        return cls(source, target, matrix, covariance)

    def forward(self, value: CrystalCoordinates) -> RigidMapResult:
        """See :meth:`RigidBijection.forward`; closed form."""
        matrix, target, log_det = self._map()
        return self._result(value, target + (to_flat(value) - self.source) @ matrix.mT, log_det)

    def inverse(self, value: CrystalCoordinates) -> RigidMapResult:
        """See :meth:`RigidBijection.inverse`; closed form."""
        matrix, target, log_det = self._map()
        flat = self.source + torch.linalg.solve(matrix, (to_flat(value) - target).mT).mT
        return self._result(value, flat, -log_det)

    def _map(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrix, the target and the logarithm of the determinant."""
        unit = torch.eye(len(self.source), dtype=torch.float64, device=self.source.device)
        matrix = self.start @ self.scale @ torch.linalg.solve(self.scale, unit + self.change, left=False)
        moved = self.target + self.start @ (self.scale @ self.shift)
        return matrix, moved, torch.linalg.slogdet(matrix).logabsdet

    def _result(self, before: CrystalCoordinates, flat: Tensor, log_det: Tensor) -> RigidMapResult:
        after = from_flat(flat, self.count)
        return RigidMapResult(after, log_det + orientation_log_volume(after) - orientation_log_volume(before))


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(covariance.double())
    if not float(values[0]) > 1e-12 * float(values[-1]):
        raise ConfigurationError(
            f"a covariance of crystal coordinates is not positive definite: its eigenvalues go from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}. It needs more, and less dependent, samples than it has coordinates ({len(values)})"
        )
    return values, vectors


def _symmetric_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = _eigen(matrix)
    return (vectors * values**power) @ vectors.mT


class HarmonicBase(nn.Module):
    """The normal distribution of displacements and orientation charts: a harmonic crystal.

    Args:
        mean: ``(6 M - 3,)``.
        covariance: ``(6 M - 3, 6 M - 3)``.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.count = (len(mean) + 3) // 6
        self.register_buffer("mean", mean.double())
        self.register_buffer("factor", torch.linalg.cholesky(covariance.double()))

    def sample(self, count: int, generator: torch.Generator) -> CrystalCoordinates:
        """Return ``count`` independent samples."""
        normal = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return from_flat(self.mean + normal @ self.factor.mT, self.count)

    def log_prob(self, coordinates: CrystalCoordinates) -> Tensor:
        """Return log-densities ``(B,)`` by nm^3 of each body but the first and shares of the orientations."""
        flat = to_flat(coordinates)
        scaled = torch.linalg.solve_triangular(self.factor, (flat - self.mean).mT, upper=False)
        constant = 0.5 * len(self.mean) * math.log(2.0 * math.pi) + self.factor.diagonal().log().sum()
        return -0.5 * scaled.square().sum(0) - constant - orientation_log_volume(coordinates)


class UniformBase(nn.Module):
    """Every orientation alike, of bodies that stay on their sites: only for single bodies, which have no relative position."""

    def sample(self, count: int, generator: torch.Generator) -> CrystalCoordinates:
        """Return ``count`` independent orientations of one body."""
        return CrystalCoordinates(
            torch.zeros(count, 1, 3, dtype=torch.float64), random_orientations((count, 1), generator)
        )

    def log_prob(self, coordinates: CrystalCoordinates) -> Tensor:
        """Return zeros ``(B,)``: the density by shares of the orientations is one."""
        return coordinates.orientations.new_zeros(len(coordinates.orientations))
