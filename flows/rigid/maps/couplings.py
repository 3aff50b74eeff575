"""Coupling layers of rigid bodies: positions on the torus given orientations, and orientations given positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ....core.errors import ConfigurationError
from ...transforms.bijection import Transformed
from ..crystal import CrystalCoordinates, RigidBijection, RigidMapResult
from .conditioners import BodyFeatures
from .moebius import CircleMoebius, in_ball
from .orientation_maps import OrientationMap


class PositionCoupling(RigidBijection):
    """Moves bodies along each edge of the box by Moebius maps of the circle; both directions closed form.

    The conditioner sees all orientations, and the positions of the bodies that are not moved. Since maps of one circle
    form a group, several steps in a row would be one: more comes from more couplings.

    Args:
        features: inputs of the conditioner; with a box.
        conditioner: six outputs for each body.
        moved: ``(M,)`` true for bodies to move; the first, which carries the frame, never moves.
    """

    shown: Tensor
    moved: Tensor
    radius: Tensor

    def __init__(self, features: BodyFeatures, conditioner: nn.Module, moved: Tensor) -> None:
        super().__init__()
        if features.box is None:
            raise ConfigurationError("positions are moved on a torus: give the crystal a box")
        self.features, self.conditioner = features, conditioner
        self.register_buffer("radius", features.box / (2.0 * math.pi), persistent=False)
        chosen = moved.clone()
        chosen[0] = False
        self.register_buffer("moved", chosen.double(), persistent=False)
        self.register_buffer(
            "shown", torch.stack([1.0 - self.moved, torch.ones_like(self.moved)], dim=-1), persistent=False
        )

    def forward(self, value: CrystalCoordinates) -> RigidMapResult:
        return self._moved(value, 1.0)

    def inverse(self, value: CrystalCoordinates) -> RigidMapResult:
        return self._moved(value, -1.0)

    def _moved(self, value: CrystalCoordinates, direction: float) -> RigidMapResult:
        outputs = self.conditioner(self.features(value, self.shown)).to(value.displacements.dtype)
        centres = in_ball(outputs.unflatten(-1, (3, 2))) * self.moved[:, None, None]
        angles, log_slopes = CircleMoebius.forward(value.displacements / self.radius, direction * centres)
        return RigidMapResult(value._replace(displacements=angles * self.radius), log_slopes.sum((1, 2)))


class OrientationCoupling(RigidBijection):
    """Turns bodies by odd maps of their quaternions.

    The conditioner sees all positions, and the orientations of the bodies that are not turned.

    Args:
        features: inputs of the conditioner.
        conditioner: as many outputs for each body as the map has parameters.
        turned: ``(M,)`` true for bodies to turn.
        mapping: family of maps.
    """

    shown: Tensor
    turned: Tensor

    def __init__(self, features: BodyFeatures, conditioner: nn.Module, turned: Tensor, mapping: OrientationMap) -> None:
        super().__init__()
        self.features, self.conditioner, self.mapping = features, conditioner, mapping
        self.register_buffer("turned", turned.clone(), persistent=False)
        hidden = turned.double()
        self.register_buffer("shown", torch.stack([torch.ones_like(hidden), 1.0 - hidden], dim=-1), persistent=False)

    def forward(self, value: CrystalCoordinates) -> RigidMapResult:
        return self._turned(value, self.mapping.forward)

    def inverse(self, value: CrystalCoordinates) -> RigidMapResult:
        return self._turned(value, self.mapping.inverse)

    def _turned(self, value: CrystalCoordinates, mapping: Callable[[Tensor, Tensor], Transformed]) -> RigidMapResult:
        parameters = self.conditioner(self.features(value, self.shown)).to(value.orientations.dtype)
        turned = self.turned.nonzero().squeeze(-1)
        orientations, log_det = mapping(value.orientations[:, turned], parameters[:, turned])
        result = value.orientations.index_copy(1, turned, orientations)
        return RigidMapResult(value._replace(orientations=result), log_det.sum(1))
