"""Families of odd maps of the sphere of quaternions whose parameters a conditioner gives, one set for each body."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...transforms.bijection import Transformed
from .convex_gradient import ProjectiveConvexGradient, QuadraticMixture
from .moebius import SymmetrisedMoebius, in_ball

_FLOOR = 0.05  # of the quadratic forms: bounds how far a map can be from the identity
_SPREAD = 0.3  # of the first quadratic forms about the unit


class OrientationMap(Protocol):
    """A family of invertible odd maps of unit quaternions; zero parameters are near the identity.

    Attributes:
        parameter_count: unconstrained numbers P that one body needs.
    """

    parameter_count: int

    def forward(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """Map ``(..., 4)`` by parameters ``(..., P)`` latent -> data; returns log-dets ``(...)``."""
        ...

    def inverse(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """Undo :meth:`forward`."""
        ...


class MoebiusSteps:
    """Symmetrised Moebius maps one after the other; with different axes they make up any projective linear map.

    Both directions are closed form.

    Args:
        steps: number of maps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.parameter_count = 4 * steps

    def forward(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`OrientationMap.forward`."""
        log_det = orientations.new_zeros(orientations.shape[:-1])
        for centres in self._centres(parameters):
            orientations, change = SymmetrisedMoebius.forward(orientations, centres)
            log_det = log_det + change
        return Transformed(orientations, log_det)

    def inverse(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`OrientationMap.inverse`."""
        log_det = orientations.new_zeros(orientations.shape[:-1])
        for centres in reversed(self._centres(parameters)):
            orientations, change = SymmetrisedMoebius.inverse(orientations, centres)
            log_det = log_det + change
        return Transformed(orientations, log_det)

    def _centres(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return in_ball(parameters.unflatten(-1, (self.steps, 4))).unbind(-2)


class ConvexGradients:
    """Gradients of convex functions; one direction closed form, the other a convex minimisation.

    Args:
        components: quadratic forms of each function.
        closed: direction in closed form, ``"inverse"`` (data -> latent) or ``"forward"``.
        seed: random seed of the first quadratic forms, which must differ to become different.
        first_exponent: exponent of the power mean for zero parameters.
        least_exponent: its lower bound, at least 1/2.
    """

    def __init__(
        self, components: int, closed: str, seed: int, first_exponent: float = 2.0, least_exponent: float = 1.0
    ) -> None:
        self.components, self.closed = components, closed
        self.first_exponent, self.least_exponent = first_exponent, least_exponent
        self.parameter_count = 16 * components + 1
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(components, 4, 4, generator=generator, dtype=torch.float64)
        self._start = torch.eye(4, dtype=torch.float64) + _SPREAD * noise

    def forward(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`OrientationMap.forward`."""
        mapping = ProjectiveConvexGradient.forward if self.closed == "forward" else ProjectiveConvexGradient.inverse
        return mapping(orientations, self._mixture(parameters))

    def inverse(self, orientations: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`OrientationMap.inverse`."""
        mapping = ProjectiveConvexGradient.inverse if self.closed == "forward" else ProjectiveConvexGradient.forward
        return mapping(orientations, self._mixture(parameters))

    def _mixture(self, parameters: Tensor) -> QuadraticMixture:
        factors = parameters[..., :-1].unflatten(-1, (self.components, 4, 4)) + self._start.to(parameters)
        # softplus(x + log(e - 1)) is one at zero.
        share = functional.softplus(parameters[..., -1] + 0.5413248546129181)
        power = self.least_exponent + (self.first_exponent - self.least_exponent) * share
        return QuadraticMixture(factors, power, torch.full_like(factors[..., 0, 0], _FLOOR))
