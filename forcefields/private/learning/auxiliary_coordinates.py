"""DP-MAC: layers learn from local objectives, whose Taylor coefficients are all that the data have to say.

Method of auxiliary coordinates (Carreira-Perpinan and Wang, 2014), made private by Harder, Koehler, Welling and Park (arXiv
1910.06924). Each sample gets activations z_k of its own for every hidden layer, and the objective is a sum of local ones,

    E = sum_n [ sum_k |z_kn - f(W_k z_(k-1)n)|^2  +  loss(W_K z_(K-1)n, y_n) ].

The z are found for fixed W by some Adam steps from a forward pass; they stay with their samples and are never released. Then
each layer's objective is expanded around the present W. To first order the data enter through

    b_k = sum_n r_kn [z_(k-1)n; 1]^T,   r_kn = 2 (f(a_kn) - z_kn) f'(a_kn),   a = W z   (output: r = d loss / d a),

to second order also through the diagonal of the Gauss-Newton curvature,

    h_k = sum_n c_kn ([z_(k-1)n; 1]^2)^T,   c_kn = 2 f'(a_kn)^2   (output: the diagonal of the second derivative of the loss).

The whole curvature, out x in^2 numbers, would drown in its own noise. Each coefficient tensor of each unit is clipped in
Frobenius norm and is a block of :mod:`.clipping`. With one step per expansion, the first order is DP-SGD on the local
objectives, clipped layer by layer.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from ..units import UnitBatch
from .clipping import Contributions, block_names, clipped_outer_sum, contributions_of
from .feed_forward import FeedForwardNetwork, activate, activation_slope

_DECAYS = (0.9, 0.999)
_TINY = 1e-8


class AuxiliaryCoordinates:
    """Clipped coefficients of a feed-forward network's layers.

    Args:
        network: network whose ``dense_layers`` are trained.
        order: 1, or 2 with curvatures.
        coordinate_steps: Adam steps on the z.
        coordinate_rate: their learning rate.
    """

    method: Literal["dp_mac", "dp_sgd"] = "dp_mac"

    def __init__(
        self, network: FeedForwardNetwork, order: int = 1, coordinate_steps: int = 30, coordinate_rate: float = 0.01
    ) -> None:
        self.network = network
        self.order = order
        self.coordinate_steps = coordinate_steps
        self.coordinate_rate = coordinate_rate

    @property
    def blocks(self) -> list[str]:
        """Names of the coefficient tensors."""
        return block_names(len(self.network.dense_layers), self.order)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: weights and biases of each layer in turn."""
        return [parameter for layer in self.network.dense_layers for parameter in layer.parameters()]

    @torch.no_grad()
    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        """Return clipped sums of the coefficient tensors ``(out, in + 1)``."""
        features = self.network.standardised(batch.inputs)
        states = self._coordinates(features, batch.targets)
        pre_activations = self._pre_activations(states)
        residuals = self._residuals(states, pre_activations, batch.targets)
        factors = [*residuals, *(self._curvatures(pre_activations) if self.order == 2 else [])]
        extended = [torch.cat([state, torch.ones_like(state[:, :1])], dim=1) for state in states]
        right = extended + ([state.square() for state in extended] if self.order == 2 else [])
        found = [
            clipped_outer_sum(a, b, batch, threshold)
            for a, b, threshold in zip(factors, right, thresholds, strict=True)
        ]
        return contributions_of(found)

    def assign(self, means: list[Tensor], damping: float) -> None:
        """Turn noisy mean coefficients into gradients of the parameters: ``b``, or ``b / (h + damping)``."""
        layers = self.network.dense_layers
        slopes = damped(means[: len(layers)], means[len(layers) :], damping)
        for layer, slope in zip(layers, slopes, strict=True):
            layer.weight.grad, layer.bias.grad = slope[:, :-1].clone(), slope[:, -1].clone()

    def _coordinates(self, features: Tensor, targets: Tensor) -> list[Tensor]:
        """Return z_0 .. z_(K-1): the features, and minimisers of E for fixed weights. Samples do not see each other."""
        states = [features]
        for layer in self.network.dense_layers[:-1]:
            states.append(activate(layer(states[-1]), self.network.settings.activation))
        momenta = [torch.zeros_like(state) for state in states]
        squares = [torch.zeros_like(state) for state in states]
        for step in range(1, self.coordinate_steps + 1):
            pre_activations = self._pre_activations(states)
            residuals = self._residuals(states, pre_activations, targets)
            corrections = [1.0 - decay**step for decay in _DECAYS]
            for k in range(1, len(states)):
                outward = residuals[k] @ self.network.dense_layers[k].weight
                gradient = outward + 2.0 * (states[k] - self._activated(pre_activations[k - 1]))
                momenta[k].lerp_(gradient, 1.0 - _DECAYS[0])
                squares[k].lerp_(gradient.square(), 1.0 - _DECAYS[1])
                scale = (squares[k] / corrections[1]).sqrt_().add_(_TINY)
                states[k] = states[k] - self.coordinate_rate / corrections[0] * momenta[k] / scale
        return states

    def _pre_activations(self, states: list[Tensor]) -> list[Tensor]:
        return [layer(state) for layer, state in zip(self.network.dense_layers, states, strict=True)]

    def _residuals(self, states: list[Tensor], pre_activations: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Return r_1 .. r_K: derivatives of the local objectives by the pre-activations."""
        activation = self.network.settings.activation
        residuals = [
            2.0 * (activate(a, activation) - z) * activation_slope(a, activation)
            for a, z in zip(pre_activations[:-1], itertools.islice(states, 1, None), strict=True)
        ]
        outputs = pre_activations[-1]
        if self.network.settings.task == "classification":
            hot = nn.functional.one_hot(targets.long(), outputs.shape[1]).to(outputs.dtype)
            return [*residuals, torch.softmax(outputs, dim=1) - hot]
        return [*residuals, outputs - targets.to(outputs.dtype)]

    def _curvatures(self, pre_activations: list[Tensor]) -> list[Tensor]:
        activation = self.network.settings.activation
        hidden = [2.0 * activation_slope(a, activation).square() for a in pre_activations[:-1]]
        outputs = pre_activations[-1]
        if self.network.settings.task == "classification":
            shares = torch.softmax(outputs, dim=1)
            return [*hidden, shares * (1.0 - shares)]
        return [*hidden, torch.ones_like(outputs)]

    def _activated(self, pre_activation: Tensor) -> Tensor:
        return activate(pre_activation, self.network.settings.activation)


def damped(slopes: list[Tensor], curvatures: list[Tensor], damping: float) -> list[Tensor]:
    """Return ``b / (h + damping)``, or the slopes as they are where there are no curvatures."""
    if not curvatures:
        return slopes
    # The noise may make a curvature negative; what is done after it costs no privacy.
    return [b / (h.clamp_min(0.0) + damping) for b, h in zip(slopes, curvatures, strict=True)]
