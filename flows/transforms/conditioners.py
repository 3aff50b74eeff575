"""Networks that give the parameters of a coupling layer's transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_OUTPUT_SCALE = 0.02  # a fresh conditioner hardly depends on its input, so a fresh flow is close to its base


class Conditioner(nn.Module):
    """A smooth multilayer perceptron with residual connections between layers of equal width.

    SiLU is infinitely differentiable, as forces of a flow require (arXiv 2110.00351).

    Args:
        inputs: number of input features; with 0 the parameters are learned constants.
        hidden: widths of the hidden layers.
        start: ``(D, P)`` parameters that the fresh network gives.
        generator: source of random numbers for the initial weights.
        parameters_apart: order of the output in memory; see ``ElementwiseTransform.parameters_apart``.
    """

    def __init__(
        self,
        inputs: int,
        hidden: tuple[int, ...],
        start: Tensor,
        generator: torch.Generator,
        *,
        parameters_apart: bool = False,
    ) -> None:
        super().__init__()
        self.parameters_apart = parameters_apart
        self.output_shape = tuple(start.shape)
        widths = (inputs, *hidden)
        self.constant = inputs == 0
        self.hidden = nn.ModuleList(
            [] if self.constant else [linear_layer(a, b, generator) for a, b in zip(widths, hidden, strict=False)]
        )
        self.output = linear_layer(widths[-1] if not self.constant else 1, start.numel(), generator)
        with torch.no_grad():
            self.output.weight.mul_(0.0 if self.constant else _OUTPUT_SCALE)
            self.output.bias.copy_((start.T if parameters_apart else start).reshape(-1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(B, inputs)`` to transform parameters ``(B, D, P)``."""
        if self.constant:
            return self._shaped(self.output.bias.unsqueeze(0)).expand(features.shape[0], -1, -1)
        x = features
        for layer in self.hidden:
            y = functional.silu(layer(x))
            x = x + y if y.shape[-1] == x.shape[-1] else y
        return self._shaped(self.output(x))

    def _shaped(self, flat: Tensor) -> Tensor:
        coordinates, parameters = self.output_shape
        if self.parameters_apart:
            return flat.reshape(-1, parameters, coordinates).transpose(1, 2)
        return flat.reshape(-1, coordinates, parameters)


def linear_layer(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with torch's default initial distribution, drawn from ``generator`` alone."""
    layer = nn.Linear(inputs, outputs)
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def normal_layer(inputs: int, outputs: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    """Return a layer with normal weights of variance ``scale^2 / inputs`` and without a bias at the start."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(scale / math.sqrt(inputs) * torch.randn(outputs, inputs, generator=generator))
        layer.bias.zero_()
    return layer


class FourierFeatures(nn.Module):
    """cos and sin of multiples of angles given in turns, and of sums and differences of chosen pairs.

    Args:
        angles: number of angles.
        harmonics: multiples 1 .. harmonics.
        pairs: index pairs whose sum and difference get features too.
    """

    combinations: Tensor

    def __init__(self, angles: int, harmonics: int, pairs: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        combinations = [torch.eye(angles) * k for k in range(1, harmonics + 1)]
        for i, j in pairs:
            for sign in (1.0, -1.0):
                row = torch.zeros(1, angles)
                row[0, i], row[0, j] = 1.0, sign
                combinations.append(row)
        matrix = torch.cat(combinations) if angles else torch.zeros(0, 0)
        self.register_buffer("combinations", matrix, persistent=False)
        self.count = 2 * matrix.shape[0]

    def forward(self, turns: Tensor) -> Tensor:
        """Map ``(B, angles)`` in turns to ``(B, count)``."""
        phases = 2.0 * math.pi * (turns @ self.combinations.to(turns.dtype).T)
        return torch.cat([phases.cos(), phases.sin()], dim=-1)
