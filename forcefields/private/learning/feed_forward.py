"""Feed-forward networks that classify, regress or encode, kept in model files like everything that was trained."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ....core.configuration import StrictModel
from ....core.errors import ConfigurationError
from ....core.model import Model

Activation = Literal["relu", "tanh", "softplus"]


class FeedForwardConfiguration(StrictModel):
    """Sizes of a network.

    Attributes:
        inputs: numbers that go in.
        widths: of the first layer's input (``inputs``, or fewer where they are projected), the hidden layers, and the output.
        activation: of hidden layers.
        task: ``classification`` (outputs are logits, targets class numbers) or ``regression`` (mean square error; an
            autoencoder is a regression on its inputs).
        seed: of the initial parameters.
    """

    inputs: PositiveInt
    widths: tuple[PositiveInt, ...] = Field(min_length=2)
    activation: Activation = "relu"
    task: Literal["classification", "regression"] = "classification"
    seed: int = 0


class FeedForwardNetwork(Model):
    """Dense layers with one activation.

    ``standardise`` sets a fixed linear map of the inputs, which is where private statistics go.
    """

    kind: ClassVar[str] = "feed_forward_network"
    description: ClassVar[str] = "a network that classifies or regresses, which has no energy of positions"
    shift: Tensor
    projection: Tensor

    def __init__(self, configuration: FeedForwardConfiguration) -> None:
        super().__init__()
        self.settings = configuration
        generator = torch.Generator().manual_seed(configuration.seed)
        self.layers = nn.ModuleList(_linear(a, b, generator) for a, b in itertools.pairwise(configuration.widths))
        first = configuration.widths[0]
        self.register_buffer("shift", torch.zeros(configuration.inputs))
        self.register_buffer("projection", torch.eye(configuration.inputs, first))

    @property
    def dense_layers(self) -> list[nn.Linear]:
        """From the first to the output."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def standardise(self, shift: Tensor, projection: Tensor) -> None:
        """Make the first layer see ``(inputs - shift) @ projection``.

        Args:
            shift: ``(inputs,)``.
            projection: ``(inputs, widths[0])``.
        """
        if shift.shape != self.shift.shape or projection.shape != self.projection.shape:
            raise ConfigurationError(
                f"a shift of shape {tuple(shift.shape)} and a projection of {tuple(projection.shape)} do not fit a network of "
                f"{self.settings.inputs} inputs whose first layer sees {self.settings.widths[0]}"
            )
        self.shift.copy_(shift)
        self.projection.copy_(projection)

    def standardised(self, inputs: Tensor) -> Tensor:
        """Return what the first layer sees ``(S, widths[0])`` of inputs ``(S, inputs)``."""
        return (inputs.to(self.shift.dtype) - self.shift) @ self.projection

    def predict(self, inputs: Tensor) -> Tensor:
        """Return outputs ``(S, widths[-1])`` of inputs ``(S, inputs)``: logits of classes, or values."""
        return self.outputs(self.standardised(inputs))

    def outputs(self, features: Tensor) -> Tensor:
        """Return outputs of standardised inputs."""
        *hidden, last = self.dense_layers
        x = features
        for layer in hidden:
            x = activate(layer(x), self.settings.activation)
        result: Tensor = last(x)
        return result

    def configuration(self) -> dict[str, Any]:
        """See :meth:`Model.configuration`."""
        return self.settings.model_dump(mode="json")

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """See :meth:`Model.from_configuration`."""
        return cls(FeedForwardConfiguration.model_validate(configuration))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return the activation of ``x``."""
    if activation == "relu":
        return torch.relu(x)
    return torch.tanh(x) if activation == "tanh" else nn.functional.softplus(x)


def activation_slope(x: Tensor, activation: Activation) -> Tensor:
    """Return the derivative of the activation at ``x``."""
    if activation == "relu":
        return (x > 0.0).to(x.dtype)
    return 1.0 - torch.tanh(x).square() if activation == "tanh" else torch.sigmoid(x)


def task_losses(outputs: Tensor, targets: Tensor, task: str) -> Tensor:
    """Return losses ``(S,)``: cross-entropy, or half the sum of squares."""
    if task == "classification":
        return nn.functional.cross_entropy(outputs, targets.long(), reduction="none")
    return 0.5 * (outputs - targets).square().sum(-1)


def refuse_unfit(network: FeedForwardNetwork, inputs: Tensor, targets: Tensor) -> None:
    """Raise ConfigurationError when data do not have the shapes a network takes."""
    settings = network.settings
    if inputs.dim() != 2 or inputs.shape[1] != settings.inputs:
        raise ConfigurationError(f"inputs have shape {tuple(inputs.shape)}, the network takes (S, {settings.inputs})")
    outputs = settings.widths[-1]
    if settings.task == "regression" and targets.shape != (len(inputs), outputs):
        raise ConfigurationError(
            f"targets have shape {tuple(targets.shape)}, the network gives {(len(inputs), outputs)}"
        )
    if settings.task == "classification":
        whole = targets.dim() == 1 and not targets.is_floating_point()
        if not whole or int(targets.min()) < 0 or int(targets.max()) >= outputs:
            raise ConfigurationError(f"targets must be class numbers (S,) from 0 to {outputs - 1}, as integers")


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    bound = math.sqrt(6.0 / (inputs + outputs))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer
