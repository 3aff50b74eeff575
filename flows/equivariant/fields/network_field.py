"""A velocity field without any symmetry but translation, for comparison with equivariant fields."""

from __future__ import annotations

import itertools

import torch
from pydantic import Field
from torch import Tensor, nn

from ....core.configuration import StrictModel
from ...transforms.conditioners import normal_layer
from .vector_fields import VectorField


class NetworkFieldSettings(StrictModel):
    """Sizes of a network field.

    Attributes:
        hidden: width of each hidden layer.
        layers: hidden layers.
    """

    hidden: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1)


class NetworkField(VectorField):
    """A multilayer perceptron of all coordinates and the time, as in neural ordinary differential equations.

    The centre is taken out of what it reads and of what it gives, so that densities live on the same mean-free subspace as
    those of equivariant fields. The divergence takes ``N D`` derivatives.
    """

    def __init__(self, count: int, dimension: int, settings: NetworkFieldSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.count, self.dimension = settings, count, dimension
        sizes = [count * dimension + 1] + [settings.hidden] * settings.layers + [count * dimension]
        modules: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 2):
            scale = 0.0 if number == len(sizes) else 1.0  # the field starts at rest
            modules += [normal_layer(inputs, outputs, generator, scale), nn.SiLU()]
        self.network = nn.Sequential(*modules[:-1])

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        t = time.to(x.dtype).expand(len(x)).unsqueeze(-1)
        centred = x - x.mean(1, keepdim=True)
        velocity = self.network(torch.cat([centred.flatten(1), t], 1)).view(x.shape)
        return velocity - velocity.mean(1, keepdim=True)
