"""The coupling layers of a flow of rigid bodies, from its configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..configuration import RigidFlowConfiguration
from ..crystal import Crystal, CrystalCoordinates, RigidBijection
from .conditioners import BodyFeatures, BodyTransformer, ConstantParameters
from .couplings import OrientationCoupling, PositionCoupling
from .orientation_maps import ConvexGradients, MoebiusSteps, OrientationMap


class FluctuationScales(NamedTuple):
    """Typical displacement in nm and typical vector part of a relative quaternion, where coupling layers act."""

    displacement: float
    rotation: float

    @classmethod
    def of(cls, coordinates: CrystalCoordinates) -> FluctuationScales:
        """Return the root mean squares over samples."""
        displacement = (
            coordinates.displacements[:, 1:].square().mean().sqrt() if coordinates.displacements.shape[1] > 1 else 1.0
        )
        return cls(float(displacement), float(coordinates.orientations[..., 1:].square().mean().sqrt()))


def coupling_layers(
    crystal: Crystal, configuration: RigidFlowConfiguration, scales: FluctuationScales
) -> list[RigidBijection]:
    """Return fresh layers, in the order latent -> data; positions are moved only where there is a box."""
    generator = torch.Generator().manual_seed(configuration.seed)
    features = BodyFeatures(crystal.box, *scales)
    count = crystal.count
    alone = count == 1 or not configuration.halves
    even = torch.arange(count) % 2 == 0
    groups = [torch.ones(count, dtype=torch.bool)] if alone else [even, ~even]
    nothing_to_see = alone and crystal.box is None

    def conditioner(outputs: int) -> nn.Module:
        if nothing_to_see:
            return ConstantParameters(count, outputs)
        return BodyTransformer(
            count, features.count, outputs, configuration.channels, configuration.heads, configuration.blocks, generator
        )

    layers: list[RigidBijection] = []
    for repetition in range(configuration.repetitions):
        if crystal.box is not None and count > 1:
            layers += [PositionCoupling(features, conditioner(6), group) for group in groups]
        for number, group in enumerate(groups):
            mapping = _orientation_map(configuration, configuration.seed + 100 * repetition + number)
            layers.append(OrientationCoupling(features, conditioner(mapping.parameter_count), group, mapping))
    return layers


def _orientation_map(configuration: RigidFlowConfiguration, seed: int) -> OrientationMap:
    if configuration.orientations == "moebius":
        return MoebiusSteps(configuration.moebius_steps)
    exponents = configuration.first_exponent, configuration.least_exponent
    return ConvexGradients(configuration.components, configuration.closed, seed, *exponents)
