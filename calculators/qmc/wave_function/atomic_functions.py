"""Functions on nuclei, solid harmonics times radial functions, with first and second derivatives in closed form.

They build orbitals, one-electron terms of the Jastrow factor and the basis of the logarithmic density.
For ``f = P_l(d) R(r)`` with a solid harmonic ``P_l`` of degree l, ``d`` the vector from the nucleus and ``r = |d|``:

    grad f = R grad P_l + P_l (R'/r) d
    lap f  = P_l (R'' + (2l + 2) R'/r)

Distances are in bohr.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import ConfigurationError

MAXIMUM_DEGREE = 2
_TINY = 1e-10  # bohr; keeps 1/r finite on a nucleus, where a Slater function has no derivative


@dataclass(frozen=True)
class Shell:
    """The 2l + 1 functions of one degree and one radial function on one nucleus.

    Attributes:
        center: index of the nucleus.
        degree: degree l, from 0 to 2.
        family: name of the radial function, one of :data:`RADIAL_FAMILIES`.
        parameter: exponent or power of the radial function.
    """

    center: int
    degree: int
    family: str
    parameter: float


class FunctionValues(NamedTuple):
    """K functions at P points: values ``(K, P)``, gradients ``(3, K, P)``, Laplacians ``(K, P)``.

    Derivatives that were not requested are empty tensors.
    """

    values: Tensor
    gradients: Tensor
    laplacians: Tensor


class RadialValues(NamedTuple):
    """R, R'/r and R'' + (2l + 2) R'/r, each ``(S, P)`` for S parameters."""

    value: Tensor
    slope: Tensor
    laplacian: Tensor


def _slater(r: Tensor, z: Tensor, degree: int) -> RadialValues:
    """``exp(-z r)``, with the cusp of a nucleus."""
    e = torch.exp(-z * r)
    inverse = 1.0 / r
    return RadialValues(e, -z * e * inverse, e * (z * z - (2 * degree + 2) * z * inverse))


def _slater_r(r: Tensor, z: Tensor, degree: int) -> RadialValues:
    """``r exp(-z r)``."""
    e = torch.exp(-z * r)
    inverse = 1.0 / r
    slope = e * (inverse - z)
    return RadialValues(r * e, slope, e * (z * z * r - 2.0 * z) + (2 * degree + 2) * slope)


def _gaussian(r: Tensor, a: Tensor, degree: int) -> RadialValues:
    """``exp(-a r^2)``."""
    square = r * r
    e = torch.exp(-a * square)
    return RadialValues(e, -2.0 * a * e, e * (4.0 * a * a * square - (4 * degree + 6) * a))


def _soft_radius(r: Tensor, power: Tensor, degree: int) -> RadialValues:
    """``(1 + r^2)^(power/2)``: grows like a power of r and is smooth at the nucleus."""
    square = r * r
    s2 = 1.0 + square
    value = s2 ** (0.5 * power)
    slope = power * value / s2
    curvature = slope + power * (power - 2.0) * square * value / (s2 * s2)
    return RadialValues(value, slope, curvature + (2 * degree + 2) * slope)


def _soft_logarithm(r: Tensor, factor: Tensor, degree: int) -> RadialValues:
    """``factor ln(1 + r^2)/2``."""
    square = r * r
    s2 = 1.0 + square
    slope = factor / s2
    return RadialValues(0.5 * factor * torch.log1p(square), slope, slope * (1.0 - 2.0 * square / s2 + 2 * degree + 2))


def _rational_power(r: Tensor, power: Tensor, degree: int) -> RadialValues:
    """``u^power`` with ``u = 1/(1 + r^2/2)``: the scaled distance of the Jastrow factor."""
    square = r * r
    u = 1.0 / (1.0 + 0.5 * square)
    value = u**power
    slope = -power * value * u
    curvature = slope + power * (power + 1.0) * square * value * u * u
    return RadialValues(value, slope, curvature + (2 * degree + 2) * slope)


RADIAL_FAMILIES: dict[str, Callable[[Tensor, Tensor, int], RadialValues]] = {
    "slater": _slater,
    "slater_r": _slater_r,
    "gaussian": _gaussian,
    "soft_radius": _soft_radius,
    "soft_logarithm": _soft_logarithm,
    "rational_power": _rational_power,
}
"""Radial functions by name. Parameters: exponents, powers, or a factor; see each function."""


def solid_harmonics(d: Tensor, degree: int) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Return the real solid harmonics of ``d`` ``(3, P)`` and their gradients; None stands for zero."""
    x, y, z = d
    one = torch.ones_like(x)
    if degree == 0:
        return [one], [[None, None, None]]
    if degree == 1:
        return [x, y, z], [[one, None, None], [None, one, None], [None, None, one]]
    if degree == 2:
        values = [x * y, y * z, x * z, 0.5 * (x * x - y * y), (2 * z * z - x * x - y * y) / 12**0.5]
        scale = 1.0 / 3**0.5
        gradients: list[list[Tensor | None]] = [
            [y, x, None], [None, z, y], [z, None, x], [x, -y, None], [-scale * x, -scale * y, 2 * scale * z],
        ]  # fmt: skip
        return values, gradients
    raise ConfigurationError(f"functions of degree {degree} are not known: give a degree from 0 to {MAXIMUM_DEGREE}")


class _Block(NamedTuple):
    """One component of the shells of one kind on one nucleus, which are evaluated together."""

    center: int
    degree: int
    family: str
    component: int
    parameters: Tensor  # (S, 1)
    first: int  # place of the first of them in the order of evaluation


class AtomicFunctions:
    """A set of functions on nuclei, evaluated together.

    Args:
        centers: positions of the nuclei ``(A, 3)`` in bohr.
        shells: shells on the nuclei. The order of the functions is the order of the shells, and within a shell x, y, z, or
            xy, yz, xz, (xx - yy)/2, (2zz - xx - yy)/sqrt(12).

    Raises:
        ConfigurationError: for a shell on a missing nucleus, or of an unknown kind.
    """

    def __init__(self, centers: Tensor, shells: Sequence[Shell]) -> None:
        self.centers = centers
        self.shells = tuple(shells)
        groups: dict[tuple[int, int, str], list[tuple[int, float]]] = {}
        start = 0
        for shell in self.shells:
            if not 0 <= shell.center < len(centers) or shell.family not in RADIAL_FAMILIES:
                raise ConfigurationError(
                    f"{shell} does not fit: {len(centers)} nuclei, radial functions {', '.join(RADIAL_FAMILIES)}"
                )
            if not 0 <= shell.degree <= MAXIMUM_DEGREE:
                raise ConfigurationError(f"{shell}: the degree must be from 0 to {MAXIMUM_DEGREE}")
            groups.setdefault((shell.center, shell.degree, shell.family), []).append((start, shell.parameter))
            start += 2 * shell.degree + 1
        self.count = start
        # Shells of one kind on one nucleus are evaluated together, hence in their own order.
        order: list[int] = []
        self._blocks: list[_Block] = []
        for (center, degree, family), members in groups.items():
            parameters = torch.tensor([p for _, p in members], dtype=torch.float64)[:, None]
            for component in range(2 * degree + 1):
                self._blocks.append(_Block(center, degree, family, component, parameters, len(order)))
                order += [first + component for first, _ in members]
        self._order = torch.tensor(order, dtype=torch.long)
        self._place = torch.argsort(self._order)

    def evaluate(self, points: Tensor, coefficients: Tensor | None = None, derivatives: int = 0) -> FunctionValues:
        """Return the functions, or linear combinations of them, at ``points`` ``(P, 3)``.

        Args:
            points: points in bohr, float64.
            coefficients: coefficients ``(K, M)`` of M combinations of the K functions; None for the functions themselves.
            derivatives: 0 for values, 1 with gradients, 2 with Laplacians.
        """
        matrix = None if coefficients is None else coefficients[self._order].T
        # Functions without a coefficient, such as those that symmetry forbids, are skipped.
        used = [True] * self.count if matrix is None else (matrix != 0.0).any(0).tolist()
        blocks = [block for block in self._blocks if any(used[block.first : block.first + len(block.parameters)])]
        rows = sum(len(block.parameters) for block in blocks)
        values = points.new_empty(rows, len(points))
        gradients = points.new_empty(3, rows, len(points)) if derivatives >= 1 else points.new_empty(0)
        laplacians = points.new_empty(rows, len(points)) if derivatives >= 2 else points.new_empty(0)
        self._fill(points, blocks, values, gradients, laplacians, derivatives)
        if matrix is None:
            place = self._place
            return FunctionValues(
                values[place],
                gradients[:, place] if derivatives >= 1 else gradients,
                laplacians[place] if derivatives >= 2 else laplacians,
            )
        kept = [row for b in blocks for row in range(b.first, b.first + len(b.parameters))]
        matrix = matrix[:, kept].contiguous()
        return FunctionValues(
            matrix @ values,
            torch.matmul(matrix, gradients) if derivatives >= 1 else gradients,
            matrix @ laplacians if derivatives >= 2 else laplacians,
        )

    def _fill(
        self,
        points: Tensor,
        blocks: list[_Block],
        values: Tensor,
        gradients: Tensor,
        laplacians: Tensor,
        derivatives: int,
    ) -> None:
        away: dict[int, tuple[Tensor, Tensor]] = {}
        radials: dict[tuple[int, int, str], RadialValues] = {}
        start = 0
        for block in blocks:
            if block.center not in away:
                d = (points - self.centers[block.center]).T.contiguous()
                away[block.center] = d, (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]).sqrt().clamp_min(_TINY)
            d, r = away[block.center]
            kind = (block.center, block.degree, block.family)
            if kind not in radials:
                radials[kind] = RADIAL_FAMILIES[block.family](r, block.parameters, block.degree)
            radial = radials[kind]
            harmonics, slopes = solid_harmonics(d, block.degree)
            harmonic, slope = harmonics[block.component], slopes[block.component]
            rows = slice(start, start + len(block.parameters))
            torch.mul(radial.value, harmonic, out=values[rows])
            for axis in range(3 if derivatives >= 1 else 0):
                torch.mul(radial.slope, harmonic * d[axis], out=gradients[axis, rows])
                part = slope[axis]
                if part is not None:
                    gradients[axis, rows].addcmul_(radial.value, part[None])
            if derivatives >= 2:
                torch.mul(radial.laplacian, harmonic, out=laplacians[rows])
            start = rows.stop
