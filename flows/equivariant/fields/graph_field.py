"""A graph network as an equivariant velocity whose exact divergence costs about as much as itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from ....core.configuration import StrictModel
from ...transforms.conditioners import normal_layer
from .pair_geometry import FARTHEST, PairGeometry
from .triangles import Triangles
from .vector_fields import VectorField, Velocity


class GraphFieldSettings(StrictModel):
    """Sizes of a graph field.

    Attributes:
        hidden: channels of pairs.
        features: channels of messages and particles.
        triangles: channels of what two particles know of their distances to the same third one.
        radial: Gaussians of the distance.
        longest: reduced distance that the Gaussians reach to.
        crowding: power of their spacing; 1 is uniform, 2 has them denser at short distances.
        width: standard deviation of each, in units of the distance to the next.
        frequencies: number of frequencies of the time.
    """

    hidden: int = Field(default=32, ge=1)
    features: int = Field(default=16, ge=1)
    triangles: int = Field(default=16, ge=1)
    radial: int = Field(default=32, ge=2)
    longest: float = Field(default=8.0, gt=0.0)
    crowding: float = Field(default=2.0, ge=1.0)
    width: float = Field(default=1.3, gt=0.0)
    frequencies: int = Field(default=4, ge=1)


class _Pairs(NamedTuple):
    """Inputs of the layers for pairs: differences ``(P, B, D)``, distances ``(P, B, 1)``, radial features ``(P, B, K)``."""

    difference: Tensor
    distance: Tensor
    radial: Tensor


class _TimeBiases(NamedTuple):
    """Biases of five activations ``(B, F, C or H)``, weights of the kernels ``(B, K)`` and the constant ``(B, 1)``."""

    message: Tensor
    particle: Tensor
    side: Tensor
    seen: Tensor
    last: Tensor
    kernels: Tensor
    constant: Tensor


class GraphField(VectorField):
    """``v_i = sum_j (x_i - x_j) phi(d_ij, h_i, h_j, t_ij, m, t)``, each pair weighed by what it knows of the others.

    One round of messages ``g(d_ij, t)`` makes features ``h_i`` of the surroundings of each particle; ``t_ij`` are sums over
    triangles with a third particle, ``m`` is the sum of all messages. A second network weighs the pairs, and both particles
    of a pair are moved by opposite amounts. The field is equivariant under rotations, reflections, translations and
    permutations, and keeps the centre. Its divergence is ``sum over pairs of 2 D phi + (change of phi as i and j move apart
    along their difference)``: one derivative in forward mode for each pair, through features that depend on it directly. So
    it is exact and costs about as much as the field, ``N^2`` operations, and ``N^3`` small ones for the triangles; an EGNN of
    several rounds (arXiv 2102.09844) needs ``N D`` derivatives of the whole.
    """

    centres: Tensor
    widths: Tensor

    def __init__(self, count: int, dimension: int, settings: GraphFieldSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.count, self.dimension = settings, count, dimension
        self.geometry = PairGeometry(count)
        k, h, f, c = settings.radial, settings.hidden, settings.features, settings.triangles
        self.sizes = (f, c, h)
        centres = settings.longest * torch.linspace(0.0, 1.0, k, dtype=torch.float64) ** settings.crowding
        self.register_buffer("centres", centres.float())
        self.register_buffer("widths", (settings.width * torch.gradient(centres)[0]).float())
        self.triangles = Triangles(count)
        self.time = normal_layer(2 * settings.frequencies + 2, h, generator)
        self.time_biases = normal_layer(h, 2 * f + c + 2 * h, generator)
        # All that is linear in the Gaussians: messages, sides of triangles, pairs. So many of them overlap at a time.
        self.radial = normal_layer(k, f + c + h, generator, scale=math.sqrt(k / (4.0 * settings.width)))
        self.particle = normal_layer(f, f, generator, scale=1.0 / math.sqrt(count))
        self.pair_particles = normal_layer(f, h, generator)
        self.pair_products = normal_layer(f, h, generator)
        self.pair_triangles = normal_layer(c, h, generator, scale=1.0 / math.sqrt(count))
        self.pair_all = normal_layer(f, h, generator, scale=1.0 / count)
        self.pair_hidden = normal_layer(h, h, generator)
        self.weight = nn.Parameter(torch.zeros(h))
        self.kernels = normal_layer(h, k + 1, generator, scale=0.0)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        pairs, biases = self._pairs(x), self._time_biases(time, x)
        message, side, own = self.radial(pairs.radial).split(self.sizes, -1)
        received = self.geometry.gather(silu(message + biases.message))
        features = silu(self.particle(received) + biases.particle)
        seen = self._seen(own, features, received, self.triangles(silu(side + biases.side))) + biases.seen
        phi = self._weight(pairs, silu(self.pair_hidden(silu(seen)) + biases.last), biases)
        return self.geometry.gather_signed(pairs.difference * phi).transpose(0, 1)

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """See :meth:`VectorField.with_divergence`; the derivative of each pair is written out."""
        geometry, pairs = self.geometry, self._pairs(x)
        biases = self._time_biases(time, x)
        slopes = pairs.radial * (self.centres - pairs.distance) / self.widths.square()
        direction = pairs.difference / pairs.distance
        squares = pairs.difference.square().sum(-1, keepdim=True)
        stretch = squares / pairs.distance

        message, side, own = self.radial(pairs.radial).split(self.sizes, -1)
        message_slope, side_slope, own_slope = (slopes @ self.radial.weight.T).split(self.sizes, -1)
        message, bend = _silu_and_slope(message + biases.message)
        message_slope = bend * message_slope
        side, bend = _silu_and_slope(side + biases.side)
        triangles = self.triangles.with_change(side, bend * side_slope / pairs.distance, squares)
        received = geometry.gather(message)
        features, bend = _silu_and_slope(self.particle(received) + biases.particle)
        # How what i received changes as i moves, (N, B, D, F), and as the other of a pair moves away by its difference.
        gradient = geometry.gather_signed(direction.unsqueeze(-1) * message_slope.unsqueeze(2))
        along = pairs.difference.unsqueeze(-1)
        change_of_all = 2.0 * (geometry.differences(gradient) * along).sum(2)
        gradient = bend.unsqueeze(2) * (gradient @ self.particle.weight.T)
        away = stretch * (message_slope @ self.particle.weight.T)
        change_of_sum = (geometry.differences(gradient) * along).sum(2) + geometry.sums(bend) * away
        change_of_difference = (geometry.sums(gradient) * along).sum(2) + geometry.differences(bend) * away

        difference = geometry.differences(features)
        seen = self._seen(own, features, received, triangles.value) + biases.seen
        first, bend_first = _silu_and_slope(seen)
        last, bend_last = _silu_and_slope(self.pair_hidden(first) + biases.last)
        phi = self._weight(pairs, last, biases)
        change = 2.0 * stretch * own_slope + change_of_sum @ self.pair_particles.weight.T
        change = change + (2.0 * difference * change_of_difference) @ self.pair_products.weight.T
        change = change + triangles.change @ self.pair_triangles.weight.T + change_of_all @ self.pair_all.weight.T
        change = bend_last * ((bend_first * change) @ self.pair_hidden.weight.T)
        phi_change = change @ self.weight + 2.0 * stretch.squeeze(-1) * (slopes * biases.kernels).sum(-1)
        divergence = (2.0 * self.dimension * phi.squeeze(-1) + phi_change).sum(0)
        return Velocity(geometry.gather_signed(pairs.difference * phi).transpose(0, 1), divergence)

    def _pairs(self, x: Tensor) -> _Pairs:
        difference, distance = self.geometry.separations(x)
        exponents = 0.5 * ((distance - self.centres) / self.widths).square()
        radial = torch.exp(-exponents.clamp(max=FARTHEST))
        return _Pairs(difference, distance, radial)

    def _seen(self, own: Tensor, features: Tensor, received: Tensor, triangles: Tensor) -> Tensor:
        """Return the input of the pairs' network ``(P, B, H)``: what is linear in all that a pair knows."""
        of_particles = self.geometry.sums(self.pair_particles(features))
        of_difference = self.pair_products(self.geometry.differences(features).square())
        everything = self.pair_all(received.sum(0))
        return own + of_particles + of_difference + self.pair_triangles(triangles) + everything

    def _weight(self, pairs: _Pairs, last: Tensor, biases: _TimeBiases) -> Tensor:
        """Return the weights phi ``(P, B, 1)`` from the last hidden channels, and from kernels of the distance."""
        phi = last @ self.weight + (pairs.radial * biases.kernels).sum(-1) + biases.constant.squeeze(-1)
        return phi.unsqueeze(-1)

    def _time_biases(self, time: Tensor, x: Tensor) -> _TimeBiases:
        t = time.to(x.dtype).expand(len(x)).unsqueeze(-1)
        angles = math.pi * t * torch.arange(1, self.settings.frequencies + 1, device=x.device, dtype=x.dtype)
        waves = torch.cat([t, t.square(), angles.cos(), angles.sin()], -1)
        hidden = silu(self.time(waves))
        kernels = self.kernels(hidden)
        message, side, own = self.sizes
        biases = self.time_biases(hidden).split((message, message, side, own, own), -1)
        return _TimeBiases._make((*biases, kernels[:, :-1], kernels[:, -1:]))


def _silu_and_slope(value: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(value)
    result = value * gate
    return result, gate + result * (1.0 - gate)
