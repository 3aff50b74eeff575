"""A graph network as an equivariant velocity whose exact divergence costs about as much as itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from ..configuration import Section
from .pair_geometry import PairGeometry
from .vector_fields import VectorField, Velocity

_SOFTENING = 1e-6  # squared reduced length added to squared distances: keeps directions finite where two particles meet

_FARTHEST = 40.0  # exponent of Gaussians: what underflows to denormal numbers takes processors ten times the time


class GraphFieldSettings(Section):
    """Sizes of a graph field.

    Attributes:
        hidden: channels of pairs.
        features: channels of messages and particles.
        radial: Gaussians of the distance.
        longest: reduced distance that the Gaussians reach to.
        crowding: power of their spacing; 1 is uniform, 2 has them denser at short distances.
        width: standard deviation of each, in units of the distance to the next.
        frequencies: of the time.
    """

    hidden: int = Field(default=32, ge=1)
    features: int = Field(default=16, ge=1)
    radial: int = Field(default=32, ge=2)
    longest: float = Field(default=8.0, gt=0.0)
    crowding: float = Field(default=2.0, ge=1.0)
    width: float = Field(default=1.3, gt=0.0)
    frequencies: int = Field(default=4, ge=1)


class _Pairs(NamedTuple):
    """What the layers know of pairs: differences ``(P, B, D)``, distances ``(P, B, 1)``, radial features ``(P, B, K)``."""

    difference: Tensor
    distance: Tensor
    radial: Tensor


class GraphField(VectorField):
    """``v_i = sum_j (x_i - x_j) phi(d_ij, h_i, h_j, t)``, with features ``h_i`` of the surroundings of each particle.

    One round of messages ``g(d_ij, t)`` makes the features, a second network weighs the pairs, and both particles of a pair
    are moved by opposite amounts. The field is equivariant under rotations, reflections, translations and permutations, and
    keeps the centre. Its divergence is ``sum over pairs of 2 D phi + (change of phi as i and j move apart along their
    difference)``: one derivative in forward mode for each pair, through features that depend on it directly. So it is exact
    and takes ``N^2`` operations like the field; an EGNN of several rounds (arXiv 2102.09844) needs ``N D`` derivatives of the
    whole.
    """

    centres: Tensor
    widths: Tensor

    def __init__(self, count: int, dimension: int, settings: GraphFieldSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.count, self.dimension = settings, count, dimension
        self.geometry = PairGeometry(count)
        k, h, f = settings.radial, settings.hidden, settings.features
        centres = settings.longest * torch.linspace(0.0, 1.0, k, dtype=torch.float64) ** settings.crowding
        self.register_buffer("centres", centres.float())
        self.register_buffer("widths", (settings.width * torch.gradient(centres)[0]).float())
        times = 2 * settings.frequencies + 2
        self.time = _linear(times, h, generator)
        self.time_biases = _linear(h, 2 * f + 2 * h, generator)
        self.message = _linear(k, f, generator, scale=math.sqrt(k / (4.0 * settings.width)))  # some overlap at a time
        self.particle = _linear(f, f, generator, scale=1.0 / math.sqrt(count))
        self.pair_radial = _linear(k, h, generator, scale=math.sqrt(k / (4.0 * settings.width)))
        self.pair_particles = _linear(f, h, generator)
        self.pair_products = _linear(f, h, generator)
        self.pair_hidden = _linear(h, h, generator)
        self.weight = nn.Parameter(torch.zeros(h))
        self.kernels = _linear(h, k + 1, generator, scale=0.0)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """See :meth:`VectorField.forward`."""
        pairs, biases = self._pairs(x), self._time_biases(time, x)
        message = silu(self.message(pairs.radial) + biases[0])
        features = silu(self.particle(self.geometry.gather(message)) + biases[1])
        phi = self._weigh(pairs, features, biases)[-1]
        return self.geometry.gather_signed(pairs.difference * phi).transpose(0, 1)

    def with_divergence(self, time: Tensor, x: Tensor) -> Velocity:
        """See :meth:`VectorField.with_divergence`; the derivative of each pair is written out."""
        geometry, pairs = self.geometry, self._pairs(x)
        biases = self._time_biases(time, x)
        slopes = pairs.radial * (self.centres - pairs.distance) / self.widths.square()
        direction = pairs.difference / pairs.distance
        stretch = (pairs.difference * direction).sum(-1, keepdim=True)  # |x_ij|^2 / d

        before = self.message(pairs.radial) + biases[0]
        message, bend = _silu_and_slope(before)
        message_slope = bend * (slopes @ self.message.weight.T)
        before = self.particle(geometry.gather(message)) + biases[1]
        features, bend = _silu_and_slope(before)
        # How the features of i change as i moves, (N, B, D, F), and as the other of a pair moves away by its difference.
        gradient = geometry.gather_signed(direction.unsqueeze(-1) * message_slope.unsqueeze(2))
        gradient = bend.unsqueeze(2) * (gradient @ self.particle.weight.T)
        away = stretch * (message_slope @ self.particle.weight.T)
        along = pairs.difference.unsqueeze(-1)
        change_of_sum = (geometry.differences(gradient) * along).sum(2) + geometry.sums(bend) * away
        change_of_difference = (geometry.sums(gradient) * along).sum(2) + geometry.differences(bend) * away

        before, difference, last, phi = self._weigh(pairs, features, biases)
        change = 2.0 * stretch * (slopes @ self.pair_radial.weight.T) + change_of_sum @ self.pair_particles.weight.T
        change = change + (2.0 * difference * change_of_difference) @ self.pair_products.weight.T
        change = _silu_and_slope(before)[1] * change
        change = _silu_and_slope(last)[1] * (change @ self.pair_hidden.weight.T)
        phi_change = change @ self.weight + 2.0 * stretch.squeeze(-1) * (slopes * biases[4]).sum(-1)
        divergence = (2.0 * self.dimension * phi.squeeze(-1) + phi_change).sum(0)
        return Velocity(geometry.gather_signed(pairs.difference * phi).transpose(0, 1), divergence)

    def _pairs(self, x: Tensor) -> _Pairs:
        difference = self.geometry.differences(x.transpose(0, 1))
        distance = (difference.square().sum(-1, keepdim=True) + _SOFTENING).sqrt()
        exponents = 0.5 * ((distance - self.centres) / self.widths).square()
        radial = torch.exp(-exponents.clamp(max=_FARTHEST))
        return _Pairs(difference, distance, radial)

    def _weigh(
        self, pairs: _Pairs, features: Tensor, biases: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the inputs of both activations, differences of features, and the weights phi ``(P, B, 1)``."""
        difference = self.geometry.differences(features)
        before = self.pair_radial(pairs.radial) + self.geometry.sums(self.pair_particles(features)) + biases[2]
        before = before + self.pair_products(difference.square())
        last = self.pair_hidden(silu(before)) + biases[3]
        phi = silu(last) @ self.weight + (pairs.radial * biases[4]).sum(-1) + biases[5].squeeze(-1)
        return before, difference, last, phi.unsqueeze(-1)

    def _time_biases(self, time: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return biases of four layers ``(B, F or H)``, weights of the kernels ``(B, K)`` and the constant ``(B, 1)``."""
        t = time.to(x.dtype).expand(len(x)).unsqueeze(-1)
        angles = math.pi * t * torch.arange(1, self.settings.frequencies + 1, device=x.device, dtype=x.dtype)
        waves = torch.cat([t, t.square(), angles.cos(), angles.sin()], -1)
        hidden = silu(self.time(waves))
        kernels = self.kernels(hidden)
        sizes = 2 * (self.settings.features,) + 2 * (self.settings.hidden,)
        return (*self.time_biases(hidden).split(sizes, -1), kernels[:, :-1], kernels[:, -1:])


def _silu_and_slope(value: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(value)
    result = value * gate
    return result, gate + result * (1.0 - gate)


def _linear(inputs: int, outputs: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(scale / math.sqrt(inputs) * torch.randn(outputs, inputs, generator=generator))
        layer.bias.zero_()
    return layer
