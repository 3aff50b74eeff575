"""An invariant network on partial molecules, which gives the densities of the next placement."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .configuration import BuilderConfiguration
from .formulas import ELEMENTS
from .mixtures import CosineMixture, LogNormalMixture, TorsionMixture
from .partial_molecules import PartialMolecules, PlacementFrames

_DISTANCE_SCALES = (0.004, 0.5)  # of the logarithm
_COSINE_SCALES = (0.004, 1.0)
_TORSION_SCALES = (0.02, 0.4)  # radians
_BAG_UNIT = 4.0  # atoms


def _between(raw: Tensor, limits: tuple[float, float]) -> Tensor:
    """Map real numbers to an interval, evenly on its logarithm."""
    low, high = math.log(limits[0]), math.log(limits[1])
    return (low + (high - low) * torch.sigmoid(raw)).exp()


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class RadialFunctions(nn.Module):
    """Gaussian functions of a distance."""

    centres: Tensor

    def __init__(self, configuration: BuilderConfiguration) -> None:
        super().__init__()
        low, high = configuration.radial_range
        self.register_buffer("centres", torch.linspace(low, high, configuration.radial))
        self.spacing = (high - low) / max(configuration.radial - 1, 1)

    def forward(self, distances: Tensor) -> Tensor:
        """Return ``(..., R)`` of distances ``(...)`` in nm."""
        reduced = (distances.to(self.centres.dtype).unsqueeze(-1) - self.centres) / self.spacing
        return torch.exp(-reduced.square())


class RadialSums(nn.Module):
    """Sums over neighbours of their features times functions of their distance, mixed to ``width`` features."""

    def __init__(self, configuration: BuilderConfiguration) -> None:
        super().__init__()
        self.values = nn.Linear(configuration.width, configuration.channels)
        self.mix = nn.Linear(configuration.radial * configuration.channels, configuration.width)

    def forward(self, functions: Tensor, features: Tensor) -> Tensor:
        """Return ``(B, C, width)``.

        Args:
            functions: ``(B, C, N, R)``, zero for pairs that do not count.
            features: ``(B, N, width)`` of the neighbours.
        """
        batch, centres, neighbours, radial = functions.shape
        flat = functions.transpose(2, 3).reshape(batch, centres * radial, neighbours)
        mixed: Tensor = self.mix(torch.bmm(flat, self.values(features)).view(batch, centres, -1))
        return mixed


class PlacementNetwork(nn.Module):
    """Densities of focus, element, distance, angle and torsion of the next atom.

    All inputs are invariant under rotations, translations and reflections: distances between placed atoms, and from
    places that the new atom could take. So are its densities; only the sign of a torsion turns over with a reflection.
    """

    def __init__(self, configuration: BuilderConfiguration) -> None:
        super().__init__()
        width, components, elements = configuration.width, configuration.components, len(ELEMENTS)
        self.torsions = configuration.torsions
        self.radial = RadialFunctions(configuration)
        self.embedding = nn.Embedding(elements, width)
        self.bag = _perceptron(elements, width, width)
        self.sums = nn.ModuleList(RadialSums(configuration) for _ in range(configuration.layers))
        self.updates = nn.ModuleList(_perceptron(2 * width, width, width) for _ in range(configuration.layers))
        self.first = _perceptron(width, width, elements)
        self.focus = _perceptron(width, width, 1)
        self.element = _perceptron(width, width, elements)
        self.new_element = nn.Embedding(elements, width)
        self.distance = _perceptron(2 * width, width, 3 * components)
        self.cosine = _perceptron(3 * width + 2 * configuration.radial, width, 3 * components)
        self.around = RadialSums(configuration)
        self.context = nn.Linear(2 * width + configuration.radial, width)
        self.score = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.torsion_scale = _perceptron(2 * width + configuration.radial, width, 1)

    def features(self, molecules: PartialMolecules) -> Tensor:
        """Return features of every row ``(B, N, width)``; zero where nothing is placed."""
        there = molecules.placed.unsqueeze(-1)
        value = (self.embedding(molecules.elements) + self._bag_features(molecules).unsqueeze(1)) * there
        between = molecules.positions.unsqueeze(1) - molecules.positions.unsqueeze(2)
        pairs = molecules.placed.unsqueeze(1) & molecules.placed.unsqueeze(2)
        pairs = pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool)
        functions = self.radial(torch.linalg.vector_norm(between, dim=-1)) * pairs.unsqueeze(-1)
        for sums, update in zip(self.sums, self.updates, strict=True):
            value = value + update(torch.cat([value, sums(functions, value)], -1)) * there
        return value

    def first_logits(self, molecules: PartialMolecules) -> Tensor:
        """Return logits of the element of the first atom ``(B, E)``, before masks."""
        logits: Tensor = self.first(self._bag_features(molecules))
        return logits

    def focus_logits(self, features: Tensor, molecules: PartialMolecules) -> Tensor:
        """Return logits of the focus ``(B, N)``; minus infinity where nothing is placed."""
        logits: Tensor = self.focus(features).squeeze(-1)
        return logits.masked_fill(~molecules.placed, -torch.inf)

    def element_logits(self, at_focus: Tensor) -> Tensor:
        """Return logits of the new element ``(P, E)``, before masks, of features of the focus ``(P, width)``."""
        logits: Tensor = self.element(at_focus)
        return logits

    def distance_density(self, at_focus: Tensor, element: Tensor) -> LogNormalMixture:
        """Return the density of the distance from the focus in nm."""
        raw = self.distance(torch.cat([at_focus, self.new_element(element)], -1))
        logits, means, scales = (part.double() for part in raw.chunk(3, -1))
        spread = torch.linspace(math.log(0.095), math.log(0.155), logits.shape[-1], dtype=torch.float64)
        return LogNormalMixture(logits, spread + 0.3 * means, _between(scales - 1.0, _DISTANCE_SCALES))

    def cosine_density(
        self, features: Tensor, frames: PlacementFrames, focus: Tensor, element: Tensor, distance: Tensor
    ) -> CosineMixture:
        """Return the density of the cosine of the angle; arguments ``(P, N, width)``, P frames and ``(P,)`` each."""
        rows = torch.arange(len(features))
        parts = [
            features[rows, focus],
            features[rows, frames.first],
            self.new_element(element),
            self.radial(distance),
            self.radial(frames.reach),
        ]
        logits, means, scales = (part.double() for part in self.cosine(torch.cat(parts, -1)).chunk(3, -1))
        spread = torch.atanh(torch.linspace(-0.99, 0.6, logits.shape[-1], dtype=torch.float64))
        return CosineMixture(logits, torch.tanh(spread + means), _between(scales - 1.0, _COSINE_SCALES))

    def torsion_density(
        self,
        features: Tensor,
        molecules: PartialMolecules,
        frames: PlacementFrames,
        focus: Tensor,
        element: Tensor,
        distance: Tensor,
        cosine: Tensor,
    ) -> TorsionMixture:
        """Return the density of the torsion; it scores the places around the axis by their distances to placed atoms."""
        count = self.torsions
        turns = torch.arange(count, dtype=torch.float64) * (2.0 * math.pi / count)
        shape = (len(focus), count)
        places = frames.place(
            distance.unsqueeze(1).expand(shape), cosine.unsqueeze(1).expand(shape), turns.expand(shape)
        )
        away = torch.linalg.vector_norm(places.unsqueeze(2) - molecules.positions.unsqueeze(1), dim=-1)
        functions = self.radial(away) * molecules.placed[:, None, :, None]
        at_focus = features[torch.arange(len(focus)), focus]
        known = torch.cat([at_focus, self.new_element(element), self.radial(distance)], -1)
        logits = self.score(self.around(functions, features) + self.context(known).unsqueeze(1)).squeeze(-1)
        return TorsionMixture(logits.double(), _between(self.torsion_scale(known).double() - 0.5, _TORSION_SCALES))

    def _bag_features(self, molecules: PartialMolecules) -> Tensor:
        bag: Tensor = self.bag(molecules.bag.to(self.embedding.weight.dtype) / _BAG_UNIT)
        return bag
