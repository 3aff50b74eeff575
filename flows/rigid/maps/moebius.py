"""Moebius maps of circles and, symmetrised, of spheres: smooth, invertible in closed form, one conditioner output each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transforms.bijection import Transformed

LARGEST_RADIUS = 0.95
"""Parameters stay within this distance from the origin of the unit ball, where the maps would become singular."""


def in_ball(values: Tensor) -> Tensor:
    """Return ``(..., d)`` vectors of the unit ball for unconstrained ones; about the same where they are small."""
    squares = values.square().sum(-1, keepdim=True)
    return values * (1.0 + squares / LARGEST_RADIUS**2).rsqrt()


class CircleMoebius:
    """The Moebius map of the circle, ``z -> (z - w) / (1 - conj(w) z)``, on angles.

    It is ``angle + 2 arg(1 - w exp(-i angle))``: without branches, since ``|w| < 1``. Source: D. J. Rezende et al.,
    arXiv 2002.02428, section 2.1.1; inverse by ``-w``.
    """

    @staticmethod
    def forward(angles: Tensor, centres: Tensor) -> Transformed:
        """Map angles ``(...)`` in radians by centres ``(..., 2)`` of the unit disc; returns ``log`` derivatives ``(...)``."""
        real = 1.0 - centres[..., 0] * angles.cos() - centres[..., 1] * angles.sin()
        imaginary = centres[..., 0] * angles.sin() - centres[..., 1] * angles.cos()
        log_slope = torch.log1p(-centres.square().sum(-1)) - torch.log(real.square() + imaginary.square())
        return Transformed(angles + 2.0 * torch.atan2(imaginary, real), log_slope)

    @staticmethod
    def inverse(angles: Tensor, centres: Tensor) -> Transformed:
        """Undo :meth:`forward`."""
        return CircleMoebius.forward(angles, -centres)


class SymmetrisedMoebius:
    """The normalised sum of the Moebius maps of the sphere with centres c and -c: the layer of arXiv 2301.11355.

    The sum is odd, so it maps rotations. It has a closed form, which the paper does not use: with ``A = I - 2 c c^T /
    (1 + |c|^2)`` it is ``p -> unit(A p)``, a projective linear map that shrinks the axis of c by ``k = (1 - |c|^2) / (1
    + |c|^2)``. Its inverse is that of ``A``, its volume change ``k / |A p|^d``, and nothing is singular at ``c = 0``. A
    stack of such layers with constant centres is one projective linear map: what they can learn comes from the
    conditioning.
    """

    @staticmethod
    def forward(points: Tensor, centres: Tensor) -> Transformed:
        """Map points ``(..., d)`` of the unit sphere by centres ``(..., d)`` of the unit ball; returns log-dets ``(...)``."""
        squares = centres.square().sum(-1, keepdim=True)
        image = points - 2.0 * centres * (centres * points).sum(-1, keepdim=True) / (1.0 + squares)
        return _projected(image, _log_shrinkage(squares))

    @staticmethod
    def inverse(points: Tensor, centres: Tensor) -> Transformed:
        """Undo :meth:`forward`."""
        squares = centres.square().sum(-1, keepdim=True)
        image = points + 2.0 * centres * (centres * points).sum(-1, keepdim=True) / (1.0 - squares)
        return _projected(image, -_log_shrinkage(squares))


def _log_shrinkage(squares: Tensor) -> Tensor:
    return (torch.log1p(-squares) - torch.log1p(squares)).squeeze(-1)


def _projected(image: Tensor, log_determinant: Tensor) -> Transformed:
    norm = image.norm(dim=-1, keepdim=True)
    return Transformed(image / norm, log_determinant - image.shape[-1] * norm.squeeze(-1).log())
