"""Unit quaternions as orientations: q and -q are one rotation, and all functions agree for both.

Quaternions are ``(w, x, y, z)`` with the scalar first, and turn vectors of the body's frame into the laboratory's.
Volumes of orientations are shares of all orientations (the Haar measure of SO(3), normalised to one), which is the area
of the sphere of quaternions over its total, because each rotation has two of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....core.errors import CoordinateError

NORM_TOLERANCE = 1e-4
"""Largest deviation of the norm of a quaternion from one; float32 arithmetic stays below it."""

CHART_LOG_VOLUME = -2.0 * math.log(math.pi)


def checked_orientations(quaternions: Tensor) -> Tensor:
    """Return quaternions ``(..., 4)``, normalised to rounding.

    Raises:
        CoordinateError: when the shape is another, or a norm is not one within :data:`NORM_TOLERANCE`.
    """
    if quaternions.ndim < 1 or quaternions.shape[-1] != 4:
        raise CoordinateError(f"orientations must be quaternions (..., 4), got shape {tuple(quaternions.shape)}")
    norms = quaternions.norm(dim=-1, keepdim=True)
    wrong = ~((norms.detach() - 1.0).abs() < NORM_TOLERANCE)  # also NaN
    if bool(wrong.any()):
        first = norms.detach().reshape(-1)[int(wrong.reshape(-1).nonzero()[0])]
        raise CoordinateError(
            f"{int(wrong.sum())} of {wrong.numel()} quaternions are not of unit length, the first has norm {float(first):.6g}: "
            "divide them by their norms, if they are meant as orientations"
        )
    return quaternions / norms


def conjugate(quaternions: Tensor) -> Tensor:
    """Return the inverse rotations ``(..., 4)``."""
    return torch.cat([quaternions[..., :1], -quaternions[..., 1:]], dim=-1)


def product(first: Tensor, second: Tensor) -> Tensor:
    """Return Hamilton's product ``(..., 4)``: the rotation ``second`` followed by ``first``."""
    a, u = first[..., :1], first[..., 1:]
    b, v = second[..., :1], second[..., 1:]
    scalar = a * b - (u * v).sum(-1, keepdim=True)
    return torch.cat([scalar, a * v + b * u + torch.linalg.cross(*torch.broadcast_tensors(u, v))], dim=-1)


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Return ``(..., 3, 3)`` matrices that turn vectors of the body's frame into the laboratory's."""
    w, x, y, z = quaternions.unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def random_orientations(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return ``(*shape, 4)`` quaternions of uniformly distributed rotations, of either sign."""
    return torch.nn.functional.normalize(torch.randn(*shape, 4, generator=generator, dtype=dtype), dim=-1)


def superposition(points: Tensor, template: Tensor) -> Tensor:
    """Return quaternions ``(..., 4)`` of the rotations that bring ``template`` (S, 3) closest to ``points`` (..., S, 3).

    Both are taken about their origins. The rotation is the leading eigenvector of a symmetric 4 x 4 matrix (B. K. P. Horn,
    J. Opt. Soc. Am. A 4, 629 (1987)); its sign is the eigensolver's. Differentiable once.
    """
    correlation = torch.einsum("...si,sj->...ij", points, template)
    skew = torch.stack(
        [
            correlation[..., 2, 1] - correlation[..., 1, 2],
            correlation[..., 0, 2] - correlation[..., 2, 0],
            correlation[..., 1, 0] - correlation[..., 0, 1],
        ],
        dim=-1,
    )
    trace = correlation.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(3, dtype=points.dtype, device=points.device)
    top = torch.cat([trace.squeeze(-1), skew], dim=-1).unsqueeze(-2)
    rest = torch.cat([skew.unsqueeze(-1), correlation + correlation.mT - trace * identity], dim=-1)
    matrix = torch.cat([top, rest], dim=-2)
    values, vectors = torch.linalg.eigh(matrix.detach())
    leading = vectors[..., -1]
    # The derivative of an eigenvector by perturbation theory. The eigensolver's own is undefined where two of the other
    # eigenvalues coincide, as they do for symmetric bodies.
    # Collapsed points have no gap, and an arbitrary rotation.
    gaps = (values[..., -1:] - values[..., :-1]).clamp_min(torch.finfo(values.dtype).tiny)
    others = vectors[..., :-1]
    moved = torch.einsum("...ik,...i->...k", others, (matrix @ leading.unsqueeze(-1)).squeeze(-1)) / gaps
    return leading + torch.einsum("...ik,...k->...i", others, moved - moved.detach())


def to_chart(orientations: Tensor) -> Tensor:
    """Return ``(..., 3)``: the axis times the tangent of half the angle of each rotation.

    This gnomonic projection does not see the sign of the quaternion, and covers all rotations but those by half a turn,
    which are at infinity. A linear map of it is the projective linear map ``p -> unit(A p)`` of the quaternion.
    """
    return orientations[..., 1:] / orientations[..., :1]


def from_chart(chart: Tensor) -> Tensor:
    """Return the quaternions ``(..., 4)`` with positive scalar part that :func:`to_chart` maps to ``chart``."""
    return torch.nn.functional.normalize(torch.cat([torch.ones_like(chart[..., :1]), chart], dim=-1), dim=-1)


def chart_log_volume(chart: Tensor) -> Tensor:
    """Return the logarithms ``(...)`` of the share of all orientations per volume of the chart: ``1 / (pi (1 + v^2))^2``."""
    return CHART_LOG_VOLUME - 2.0 * torch.log1p(chart.square().sum(-1))
