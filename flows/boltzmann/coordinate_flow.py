"""The trained part of a flow: latent variables to the coordinates of a molecule.

The circular torsions have a chain of their own (base: uniform on the torus); the stiff coordinates follow, conditioned on
the torsions (base: standard normal, or uniform on the interval for the paper's design).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..transforms.bijection import Bijection, Chain, Transformed, Triangular
from ..transforms.bumps import CircularBumps
from ..transforms.conditioners import FourierFeatures
from ..transforms.couplings import Coupling
from ..transforms.linear_layer import InvertibleLinear
from ..transforms.registry import find_transform
from .configuration import FlowConfiguration
from .molecule_coordinates import Coordinates, MoleculeCoordinates


class FlowResult(NamedTuple):
    """Mapped coordinates and the log-determinant ``(B,)`` of the direction taken."""

    coordinates: Coordinates
    log_det: Tensor


class CircleShift(Bijection):
    """A fixed rotation of every angle: no angle is special for all layers."""

    shift: Tensor

    def __init__(self, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("shift", torch.rand(dimension, generator=generator))

    def forward(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        moved = value + self.shift.to(value.dtype)
        return Transformed(moved - moved.detach().floor(), value.new_zeros(len(value)))

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Transformed:
        moved = value - self.shift.to(value.dtype)
        return Transformed(moved - moved.detach().floor(), value.new_zeros(len(value)))

    def layer_inverse(self, value: Tensor, context: Tensor | None = None) -> Triangular:
        return Triangular(*self.inverse(value), torch.ones_like(value), value.new_ones(value.shape[1]))


class IntervalFeatures(nn.Module):
    """Centre and widen [0, 1] coordinates for a network."""

    def forward(self, value: Tensor) -> Tensor:
        """Map ``(B, D)`` to ``(B, D)``."""
        return 4.0 * value - 2.0


class CoordinateFlow(nn.Module):
    """Latent variables <-> :class:`~flowbridge.flows.boltzmann.molecule_coordinates.Coordinates`, in the network's dtype.

    The direction coordinates -> latent is closed form; latent -> coordinates needs root finding in the circular chain
    (and in the stiff one of the paper's design).
    """

    def __init__(self, coordinates: MoleculeCoordinates, configuration: FlowConfiguration) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(configuration.seed)
        self.circular_dimension = len(coordinates.layout.circular)
        self.stiff_dimension = coordinates.stiff_dimension
        self.uniform_base = configuration.stiff.map == "interval"
        self.circular = _circular_chain(coordinates, configuration, generator)
        self.stiff = _stiff_chain(coordinates, configuration, generator)
        self.features = FourierFeatures(
            self.circular_dimension, configuration.stiff.harmonics, coordinates.layout.pairs
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks."""
        return next(self.parameters()).dtype

    def sample_latent(self, count: int, generator: torch.Generator) -> Coordinates:
        """Draw from the base: uniform angles, and normal (or uniform) stiff variables."""
        circular = torch.rand(count, self.circular_dimension, generator=generator, dtype=self.dtype)
        draw = torch.rand if self.uniform_base else torch.randn
        return Coordinates(circular, draw(count, self.stiff_dimension, generator=generator, dtype=self.dtype))

    def base_log_prob(self, latent: Coordinates) -> Tensor:
        """Return the base log-density ``(B,)``."""
        if self.uniform_base:
            return latent.stiff.new_zeros(len(latent.stiff))
        return -0.5 * latent.stiff.square().sum(-1) - 0.5 * self.stiff_dimension * math.log(2.0 * math.pi)

    def forward(self, latent: Coordinates) -> FlowResult:
        """Map latent to coordinates."""
        circular, first = self.circular(latent.circular)
        stiff, second = self.stiff(latent.stiff, self.features(circular))
        return FlowResult(Coordinates(circular, stiff), first + second)

    def inverse(self, coordinates: Coordinates) -> FlowResult:
        """Map coordinates to latent; closed form."""
        circular, stiff = coordinates.circular.to(self.dtype), coordinates.stiff.to(self.dtype)
        latent, first = self.circular.inverse(circular)
        rest, second = self.stiff.inverse(stiff, self.features(circular))
        return FlowResult(Coordinates(latent, rest), first + second)

    def log_prob(self, coordinates: Coordinates) -> Tensor:
        """Return the log-density ``(B,)`` of coordinates (turns and standardised units), in the network's dtype."""
        latent, log_det = self.inverse(coordinates)
        return self.base_log_prob(latent) + log_det


def _circular_chain(
    coordinates: MoleculeCoordinates, configuration: FlowConfiguration, generator: torch.Generator
) -> Chain:
    settings = configuration.torsions
    total = len(coordinates.layout.circular)
    rotors = coordinates.layout.rotors if settings.rotors_last else 0
    core = total - rotors
    layers: list[Bijection] = []

    def layer(transformed: list[int], conditioning: list[int]) -> Coupling:
        encoder = FourierFeatures(len(conditioning), settings.harmonics)
        transform = CircularBumps(
            settings.components, minimum_width=settings.minimum_width, learn_steepness=settings.learn_steepness
        )
        return Coupling(
            total, transformed, transform, settings.hidden, generator,
            conditioning=conditioning, encoder=encoder, features=encoder.count, wrap=True,
        )  # fmt: skip

    for number in range(settings.couplings if core else 0):
        if core == 1:
            first, second = [0], list[int]()
        elif core == 2:
            first, second = ([0], [1]) if number % 2 == 0 else ([1], [0])
        else:
            if number % 2 == 0:
                order = torch.randperm(core, generator=generator).tolist()
                halves = (order[: core // 2], order[core // 2 :])
            first, second = halves if number % 2 == 0 else halves[::-1]
        layers += [layer(first, second), CircleShift(total, generator)]
        if core == 1:
            break  # without a condition one mixture is as good as several
    # Generated after the core and one after the other, each given all before it.
    layers += [layer([index], list(range(index))) for index in range(core, total)]
    return Chain(layers)


def _stiff_chain(
    coordinates: MoleculeCoordinates, configuration: FlowConfiguration, generator: torch.Generator
) -> Chain:
    settings = configuration.stiff
    dimension = coordinates.stiff_dimension
    context = FourierFeatures(len(coordinates.layout.circular), settings.harmonics, coordinates.layout.pairs).count
    interval, registered = settings.map == "interval", find_transform(settings.transform)

    def layer(transformed: list[int], conditioning: list[int] | None = None) -> Coupling:
        encoder = IntervalFeatures() if interval else None
        seen = dimension - len(transformed) if conditioning is None else len(conditioning)
        return Coupling(
            dimension, transformed, registered.make(settings.components), settings.hidden, generator,
            conditioning=conditioning, encoder=encoder, features=seen, context=context,
        )  # fmt: skip

    if settings.split == "angles_then_bonds":
        angles = list(coordinates.stiff_angles) + list(range(coordinates.stiff_angles.stop, dimension))
        bonds = list(range(coordinates.stiff_angles.start))
        halves = (angles[::2], angles[1::2])
        layers = [
            layer(halves[number % 2], halves[1 - number % 2])
            for number in range(max(settings.couplings - 1, 0))
            if halves[number % 2]  # three atoms have one angle, and nothing for the other half
        ]
        return Chain([*layers, layer(bonds, angles)])
    stiff_layers: list[Bijection] = []
    for number in range(settings.couplings):
        if number % 2 == 0:
            order = torch.randperm(dimension, generator=generator).tolist()
            parts = (sorted(order[: dimension // 2]), sorted(order[dimension // 2 :]))
        if number and settings.mixing == "rank_one":
            stiff_layers.append(InvertibleLinear(dimension, configuration.seed + number, bias=False))
        stiff_layers.append(layer(parts[number % 2]))
    return Chain(stiff_layers)
