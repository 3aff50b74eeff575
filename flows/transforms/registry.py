"""Elementwise transforms by the names that configurations and model files know them under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ...core.errors import ConfigurationError
from .bijection import ElementwiseTransform
from .bumps import IntervalBumps
from .sinh_arcsinh import Affine, SinhArcsinh

Domain = Literal["line", "interval"]
"""What a transform maps onto itself: all real numbers, or [0, 1]."""


@dataclass(frozen=True)
class RegisteredTransform:
    """A family of transforms that the couplings of a flow may use.

    Attributes:
        domain: what it maps onto itself.
        make: number of components of a mixture to the transform; families without components ignore it.
    """

    domain: Domain
    make: Callable[[int], ElementwiseTransform]


TRANSFORMS: dict[str, RegisteredTransform] = {
    "affine": RegisteredTransform("line", lambda components: Affine()),
    "sinh_arcsinh": RegisteredTransform("line", lambda components: SinhArcsinh()),
    "bumps": RegisteredTransform("interval", lambda components: IntervalBumps(components, minimum_identity=1e-4)),
}
"""Every transform that flows on internal coordinates may name; a script adds its own before it uses them."""


def find_transform(name: str) -> RegisteredTransform:
    """Return the transform of a name; raises ConfigurationError where there is none."""
    if name not in TRANSFORMS:
        raise ConfigurationError(
            f"no transform {name!r} is registered, there are {', '.join(TRANSFORMS)}: "
            "put one into flowbridge.flows.transforms.registry.TRANSFORMS first"
        )
    return TRANSFORMS[name]
