"""Networks of coarse-grained force fields: a perceptron on invariant features, or a graph network for several sequences."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ...core.configuration import StrictModel
from ...core.potential import Particles
from ...flows.transforms.conditioners import linear_layer
from .features import InvariantFeatures
from .graph_network import GraphConfiguration, GraphNetwork


class InvariantConfiguration(StrictModel):
    """A perceptron on invariant features (CGnet).

    Attributes:
        width: width of the hidden layers.
        depth: number of hidden layers.
        activation: ``tanh``, as for capped alanine, or ``silu``, as for the fast folders of arXiv 2203.11167.
        residual: add the input of each hidden layer of equal width to its output.
        lipschitz: bound of the spectral norm of each hidden layer; None for none.
        seed: random seed of the initial parameters.
    """

    kind: Literal["invariant"] = "invariant"
    width: PositiveInt = 128
    depth: PositiveInt = 4
    activation: Literal["tanh", "silu"] = "tanh"
    residual: bool = False
    lipschitz: PositiveFloat | None = 4.0
    seed: int = 0


NetworkConfiguration = Annotated[InvariantConfiguration | GraphConfiguration, Field(discriminator="kind")]


class InvariantNetwork(nn.Module):
    """Energies of bead configurations in units of kT, from invariant features.

    Args:
        beads: beads with their bonds.
        configuration: sizes.
    """

    def __init__(self, beads: Particles, configuration: InvariantConfiguration) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(configuration.seed)
        self.features = InvariantFeatures(beads)
        widths = (self.features.count, *(configuration.width,) * configuration.depth)
        self.hidden = nn.ModuleList(linear_layer(a, b, generator) for a, b in itertools.pairwise(widths))
        self.output = linear_layer(widths[-1], 1, generator)
        self.activation = nn.Tanh() if configuration.activation == "tanh" else nn.SiLU()
        self.residual = configuration.residual
        self.lipschitz = configuration.lipschitz

    @property
    def bounded_layers(self) -> list[nn.Linear]:
        """Layers whose spectral norm is kept below ``lipschitz``."""
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies ``(B,)`` in kT of positions ``(B, n, 3)`` in nm, in the dtype of the positions."""
        x = self.features(positions)
        for layer in self.hidden:
            y = self.activation(layer(x))
            x = x + y if self.residual and x.shape[-1] == y.shape[-1] else y
        energy: Tensor = self.output(x).squeeze(-1)
        return energy


def build_network(beads: Particles, configuration: InvariantConfiguration | GraphConfiguration) -> nn.Module:
    """Return a fresh network."""
    if isinstance(configuration, InvariantConfiguration):
        return InvariantNetwork(beads, configuration)
    return GraphNetwork(beads, configuration)
