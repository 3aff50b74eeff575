"""Smooth bijections of the circle and of the interval: mixtures of compactly supported bumps.

Koehler, Kraemer, Noe, "Smooth normalizing flows" (arXiv 2110.00351). With the ramp ``rho(x) = exp(-alpha / x)`` the
sigmoid on [0, 1] is ``rho(x) / (rho(x) + rho(1 - x)) = sigmoid(alpha (1/(1-x) - 1/x))``: 0 to the left of 0, 1 to the
right of 1, and infinitely differentiable everywhere. Its density is unimodal for alpha >= 0.8656721. A weight of the identity
in every mixture keeps the slope positive, so the energy and the forces of a flow exist everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .bijection import ElementwiseTransform, Transformed
from .root_finding import invert_increasing

UNIMODAL_STEEPNESS = 0.8656721
"""Smallest alpha for which the density of the sigmoid has one maximum (ramp power 1)."""

# At this distance from the ends exp(-alpha / x) < exp(-886), zero in float64 with all its derivatives: clamping here
# keeps 1/x finite and changes nothing.
_EDGE = 1.0 / 1024.0


def smooth_sigmoid(x: Tensor, steepness: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the compactly supported sigmoid and its derivative, elementwise.

    Args:
        x: any shape; the sigmoid rises on [0, 1].
        steepness: alpha, broadcast against x.
    """
    inside = x.clamp(_EDGE, 1.0 - _EDGE)
    left, right = inside.reciprocal(), (1.0 - inside).reciprocal()
    value = torch.sigmoid(steepness * (right - left))
    # sigmoid'(u) = s (1 - s); du/dx = alpha (1/x^2 + 1/(1-x)^2)
    slope = value * (1.0 - value) * steepness * (left.square() + right.square())
    return value, slope


class BumpMixture(ElementwiseTransform):
    """Base class of circular and interval mixtures: it reads the parameters and solves the implicit forward map.

    Data -> latent is closed form (a cumulative distribution function); latent -> data is solved by root finding.

    Args:
        components: number of bumps K.
        minimum_width: smallest support of a bump, as a fraction of the unit interval.
        minimum_identity: smallest weight c of the identity; its reciprocal bounds the ratio of densities.
        learn_steepness: let alpha depend on the conditioner too, between 0.8657 and 10.8657, as in the paper;
            otherwise ``steepness`` holds for all.
        steepness: alpha where it is not learned.
    """

    def __init__(
        self,
        components: int,
        minimum_width: float = 0.06,
        minimum_identity: float = 1e-3,
        learn_steepness: bool = False,
        steepness: float = 1.2,
    ) -> None:
        super().__init__()
        self.components = components
        self.minimum_width = minimum_width
        self.minimum_identity = minimum_identity
        self.learn_steepness = learn_steepness
        self.steepness = steepness
        self.parameter_count = components * (4 if learn_steepness else 3) + 1

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]:
        """Return weights, raw centres, widths (all ``(..., K)``), weight of the identity ``(...,)`` and steepness."""
        k = self.components
        weights = functional.softmax(parameters[..., :k], dim=-1)
        centres = parameters[..., k : 2 * k]
        widths = self.minimum_width + (1.0 - self.minimum_width) * torch.sigmoid(parameters[..., 2 * k : 3 * k])
        identity = self.minimum_identity + (1.0 - self.minimum_identity) * torch.sigmoid(parameters[..., 3 * k] - 3.0)
        if not self.learn_steepness:
            return weights, centres, widths, identity, self.steepness
        return (
            weights,
            centres,
            widths,
            identity,
            UNIMODAL_STEEPNESS + 10.0 * torch.sigmoid(parameters[..., 3 * k + 1 :]),
        )

    def _cumulative(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and f'(x); x ``(...,)``, parameters ``(..., P)``."""
        raise TypeError(f"{type(self).__name__} is abstract: use CircularBumps or IntervalBumps")

    def _bracket(self, level: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return ends between which the root of f(x) = level lies."""
        raise TypeError(f"{type(self).__name__} is abstract: use CircularBumps or IntervalBumps")

    def inverse(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.inverse`; closed form."""
        latent, slope = self._cumulative(value, parameters)
        return Transformed(latent, slope.log())

    def forward(self, value: Tensor, parameters: Tensor) -> Transformed:
        """See :meth:`ElementwiseTransform.forward`; root finding with implicit derivatives."""
        shape = value.shape
        flat, flat_parameters = value.reshape(-1), parameters.reshape(-1, self.parameter_count)
        low, high = self._bracket(flat, flat_parameters)
        root, log_slope = invert_increasing(self._cumulative, flat, flat_parameters, low, high)
        return Transformed(root.reshape(shape), log_slope.reshape(shape))


class CircularBumps(BumpMixture):
    """Smooth maps of the circle of circumference 1 with f(x + 1) = f(x) + 1.

    Each bump is evaluated once: x minus its centre is wrapped to [-1/2, 1/2], where the whole support (at most 1) lies,
    and the winding number is added back. Values are not wrapped; the caller wraps where it wants an angle.
    """

    def _cumulative(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        weights, centres, widths, identity, steepness = self._read(parameters)
        distance = x.unsqueeze(-1) - centres
        winding = torch.floor(distance + 0.5)
        rise, slope = smooth_sigmoid((distance - winding) / widths + 0.5, steepness)
        mixture = (weights * (rise + winding)).sum(-1)
        density = (weights * slope / widths).sum(-1)
        straight = x - (weights * centres).sum(-1) + 0.5
        return (1.0 - identity) * mixture + identity * straight, (1.0 - identity) * density + identity

    def _bracket(self, level: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        # Every component lies within 1/2 of the straight line x - centre + 1/2, hence so does the mixture.
        weights, centres, *_ = self._read(parameters)
        middle = level + (weights * centres).sum(-1) - 0.5
        return middle - 0.5, middle + 0.5

    def initial_parameters(self, coordinates: int, generator: torch.Generator) -> Tensor:
        """Equal weights, centres spread evenly with a random offset, widths about a half, weight of the identity 1/4."""
        start = torch.zeros(coordinates, self.parameter_count)
        offset = torch.rand(coordinates, 1, generator=generator)
        k = self.components
        start[:, k : 2 * k] = (torch.arange(k) / k + offset) % 1.0
        start[:, 3 * k] = 2.0
        return start


class IntervalBumps(BumpMixture):
    """Smooth maps of [0, 1] onto itself; the support of each bump lies inside the interval."""

    def _placed(self, centres: Tensor, widths: Tensor) -> Tensor:
        return 0.5 * widths + (1.0 - widths) * torch.sigmoid(centres)

    def _cumulative(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        weights, centres, widths, identity, steepness = self._read(parameters)
        distance = x.unsqueeze(-1) - self._placed(centres, widths)
        rise, slope = smooth_sigmoid(distance / widths + 0.5, steepness)
        mixture = (weights * rise).sum(-1)
        density = (weights * slope / widths).sum(-1)
        return (1.0 - identity) * mixture + identity * x, (1.0 - identity) * density + identity

    def _bracket(self, level: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        # Outside [0, 1] the map goes on as a straight line of slope `identity`: no root is lost there.
        *_, identity, _ = self._read(parameters)
        low = torch.minimum(torch.zeros_like(level), level / identity)
        high = torch.maximum(torch.ones_like(level), 1.0 + (level - 1.0) / identity)
        return low, high

    def initial_parameters(self, coordinates: int, generator: torch.Generator) -> Tensor:
        """Equal weights, centres spread evenly, widths about a half, weight of the identity 1/4."""
        start = torch.zeros(coordinates, self.parameter_count)
        k = self.components
        levels = (torch.arange(k) + 0.5) / k
        start[:, k : 2 * k] = torch.log(levels / (1.0 - levels))
        start[:, 3 * k] = 2.0
        return start


def log_period(turns: int) -> float:
    """Return ``turns * log(2 pi)``: the volume factor between torsions in turns and in radians."""
    return turns * math.log(2.0 * math.pi)
