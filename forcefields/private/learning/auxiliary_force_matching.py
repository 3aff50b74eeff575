"""DP-MAC for force matching: auxiliary coordinates for what layers say, and for how that changes with each bead.

The loss of a force field is on a gradient by positions, which a perceptron on invariant features can carry along as it goes
forward: every hidden layer keeps its activations x_k and their derivatives by the 3 n bead coordinates q_i,

    a = W_k x_(k-1) + b_k,   x_k = f(a),        A_i = W_k dx_(k-1)/dq_i,   dx_k/dq_i = f'(a) A_i,

and the last one turns derivatives into forces, F_i = -w . dx_K/dq_i. With U = (x, l dx/dq_1, .., l dx/dq_3n), l a length, this
is a feed-forward network with 1 + 3 n columns a sample, ``U_k = g(W_k U_(k-1) + b_k e_0)``. So the method of auxiliary
coordinates (see :mod:`.auxiliary_coordinates`) applies: each frame gets Z_k of its own for every hidden layer, and

    E = sum_n [ sum_k |Z_kn - g(W_k Z_(k-1)n + b_k e_0)|^2 + 1/2 |w Z_Kn + l F_n|^2 ]     (forces: columns 1 .. 3 n)

is a sum of local objectives, which ask a layer for values and slopes at once. The Z stay with their frames. To first order in
a layer's parameters the data enter through

    B_k = sum_n R_kn [Z_(k-1)n; e_0]^T,      R_k = derivatives of the local objective by (a, A_1, .., A_3n).

to second order also through the diagonal of the Gauss-Newton curvature, 2 |dg/dW_oj|^2 summed over the columns of g (last
layer: the sum of squares of the slopes).

The Z are found from a forward pass by a few short steps down E's gradient, as many as there are hidden layers: that is how far
the labels have to come. Long ones fit the noise of the labels, which is most of what forces on beads are: the Z then carry the
noise that the residual of the next layer is correlated with, which biases B (errors in variables). Adam's steps of one size, as
for classifiers, fit it too.

*Sensitivity.* A unit (a trajectory) contributes to block k the mean over its frames of these matrices ``(out, in + 1)``,
clipped to Frobenius norm C_k. It depends on the unit and on public parameters alone, as the Z do. Adding or removing a unit
moves the sum of block k by C_k at most; measured in noise of deviation ``sigma C_k / s_k`` with ``sum s_k^2 = 1``, all blocks
together move by ``(sum_k s_k^2)^(1/2) = 1`` over sigma: one Gaussian mechanism of multiplier sigma. Replacing a unit moves them
by twice that. How many frames a unit has, and how many columns a frame, changes nothing, since a unit is clipped after both
sums.

The energy's additive constant has no force and is not trained.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ....core.errors import ConfigurationError
from ...coarse_grained_force_field import CoarseGrainedForceField
from ...networks.invariant_network import InvariantNetwork
from ..units import UnitBatch, mean_by_unit
from .auxiliary_coordinates import damped
from .clipping import Contributions, block_names, clipped_sum, contributions_of


class AuxiliaryForceMatching:
    """Clipped coefficients of the layers of a force field's network on invariant features.

    Args:
        force_field: force field whose network is trained; from :func:`.force_matching.public_force_field`.
        coordinate_steps: steps on the auxiliary coordinates; None for one each hidden layer.
        coordinate_rate: their size.
        order: 1, or 2 with curvatures.
        length: l above, nm: public, about one over the size of force labels in kT/nm.

    Raises:
        ConfigurationError: for other networks: graphs of beads are trained by DP-SGD.
    """

    method: Literal["dp_mac", "dp_sgd"] = "dp_mac"

    def __init__(
        self,
        force_field: CoarseGrainedForceField,
        coordinate_steps: int | None = None,
        coordinate_rate: float = 1e-3,
        order: int = 1,
        length: float = 0.01,
    ) -> None:
        network = force_field.network
        if not isinstance(network, InvariantNetwork):
            raise ConfigurationError(
                f"DP-MAC trains force fields on invariant features, and this one has a {type(network).__name__}: take "
                "method = 'dp_sgd', or a network of kind = 'invariant'"
            )
        self.network = network
        self.coordinate_steps = len(network.bounded_layers) if coordinate_steps is None else coordinate_steps
        self.coordinate_rate = coordinate_rate
        self.order = order
        self.length = length

    @property
    def blocks(self) -> list[str]:
        """Names of the coefficient tensors."""
        return block_names(len(self._layers), self.order)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: weights and biases of the hidden layers, and the weights of the last."""
        hidden = [parameter for layer in self._layers[:-1] for parameter in layer.parameters()]
        weight, _ = self._layers[-1].parameters()
        return [*hidden, weight]

    @torch.no_grad()
    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        """Return clipped sums of the coefficient tensors, ``(out, in + 1)``, and ``(1, in)`` of the last layer."""
        labels = self.length * batch.targets.flatten(1)
        states = [self._inputs(batch.inputs)]
        for k in range(len(self._layers) - 1):
            states.append(self._predicted(states[k], k)[0])
        for _ in range(self.coordinate_steps):
            slopes = self._slopes(states, labels)
            moved = [state - self.coordinate_rate * slope for state, slope in zip(states[1:], slopes, strict=True)]
            states = [states[0], *moved]
        factors = self._factors(states, labels)
        tensors = [self._coefficients(state, factors[k], k) for k, state in enumerate(states)]
        if self.order == 2:
            tensors += [self._curvature(state, k) for k, state in enumerate(states)]
        found = [
            clipped_sum(mean_by_unit(t, batch), threshold) for t, threshold in zip(tensors, thresholds, strict=True)
        ]
        return contributions_of(found)

    def assign(self, means: list[Tensor], damping: float) -> None:
        """Turn noisy mean coefficients into gradients of the parameters: ``B``, or ``B / (curvature + damping)``."""
        count = len(self._layers)
        slopes = damped(means[:count], means[count:], damping)
        for layer, slope in zip(self._layers[:-1], slopes, strict=False):
            layer.weight.grad, layer.bias.grad = slope[:, :-1].clone(), slope[:, -1].clone()
        self._layers[-1].weight.grad = slopes[-1].clone()

    @property
    def _layers(self) -> list[nn.Linear]:
        return [*self.network.bounded_layers, self.network.output]

    def _inputs(self, positions: Tensor) -> Tensor:
        """Return features and their slopes ``(S, 1 + 3 n, features)``."""
        size = positions.shape[1:].numel()  # not positions[0]: a batch that was drawn may hold nobody
        directions = torch.eye(size, dtype=positions.dtype).reshape(size, 1, *positions.shape[1:])

        def along(direction: Tensor) -> Tensor:
            found = torch.func.jvp(self.network.features, (positions,), (direction.expand_as(positions),))
            slope: Tensor = found[1]
            return slope

        values, slopes = self.network.features(positions), torch.func.vmap(along, out_dims=1)(directions)
        return torch.cat([values[:, None], self.length * slopes], dim=1)

    def _predicted(self, state: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what hidden layer k makes of a state, its pre-activations, and f' and f'' there ``(S, 1, out)``."""
        layer = self._layers[k]
        drive = state @ layer.weight.T
        drive[:, 0] += layer.bias
        value, slope, bend = _derivatives(drive[:, :1], self.network.activation)
        result = slope * drive
        result[:, :1] = value
        if self._skips(k):
            result = result + state
        return result, drive, slope, bend

    def _skips(self, k: int) -> bool:
        layer = self._layers[k]
        return self.network.residual and layer.in_features == layer.out_features

    def _factors(self, states: list[Tensor], labels: Tensor) -> list[Tensor]:
        """Return R_k of every layer."""
        factors = [self._factor(states, k)[0] for k in range(len(states) - 1)]
        return [*factors, self._output_factor(states[-1], labels)]

    def _factor(self, states: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Return R of hidden layer k, and the derivative of its objective by what it predicts."""
        predicted, drive, slope, bend = self._predicted(states[k], k)
        missed = 2.0 * (predicted - states[k + 1])
        factor = slope * missed
        factor[:, :1] += bend * (missed[:, 1:] * drive[:, 1:]).sum(1, keepdim=True)
        return factor, missed

    def _coefficients(self, state: Tensor, factor: Tensor, k: int) -> Tensor:
        """Return ``R [Z; e_0]^T`` of each sample, and ``R Z^T`` of the last layer, whose bias is not trained.

        Hidden layers miss by as many powers of the rate as there are layers behind them: these are divided out, a constant that
        no data change, so that one clipping norm suits all layers.
        """
        behind = len(self._layers) - 1 - k
        trained_bias = behind > 0
        factor = self.coordinate_rate**-behind * factor
        product = factor.transpose(1, 2) @ state
        return torch.cat([product, factor[:, 0, :, None]], dim=2) if trained_bias else product

    def _curvature(self, state: Tensor, k: int) -> Tensor:
        """Return the curvatures of layer k by its parameters, of each sample."""
        value, along = state[:, 0, None].square(), state[:, 1:]
        along_squared = along.square().sum(1)[:, None]
        if k + 1 == len(self._layers):
            return along_squared
        _, drive, slope, bend = self._predicted(state, k)
        driven = drive[:, 1:].transpose(1, 2)
        slope, bend = slope.transpose(1, 2), bend.transpose(1, 2)  # (S, out, 1)
        own = slope.square() + bend.square() * driven.square().sum(2, keepdim=True)
        mixed = 2.0 * slope * bend * (driven @ along) * state[:, 0, None]
        return 2.0 * torch.cat([own * value + mixed + slope.square() * along_squared, own], dim=2)

    def _output_factor(self, state: Tensor, labels: Tensor) -> Tensor:
        factor = state @ self._layers[-1].weight.T
        factor[:, 0] = 0.0  # energies have no labels
        factor[:, 1:, 0] += labels
        return factor

    def _slopes(self, states: list[Tensor], labels: Tensor) -> list[Tensor]:
        """Return the gradients of E by the Z."""
        pairs = [self._factor(states, k) for k in range(len(states) - 1)]
        factors = [factor for factor, _ in pairs] + [self._output_factor(states[-1], labels)]
        slopes = []
        for k in range(1, len(states)):
            slope = factors[k] @ self._layers[k].weight - pairs[k - 1][1]
            if k < len(pairs) and self._skips(k):
                slope = slope + pairs[k][1]
            slopes.append(slope)
        return slopes


def _derivatives(x: Tensor, activation: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return an activation with its first and second derivative."""
    if isinstance(activation, nn.Tanh):
        value = torch.tanh(x)
        slope = 1.0 - value.square()
        return value, slope, -2.0 * value * slope
    share = torch.sigmoid(x)
    rest = share * (1.0 - share)
    return x * share, share + x * rest, rest * (2.0 + x * (1.0 - 2.0 * share))
