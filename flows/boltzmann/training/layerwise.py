"""Derivatives of a flow layer by layer, from the closed-form direction alone.

A loss that follows samples ``x(z; theta)`` at fixed latent variables needs ``u . dx/dtheta``. Differentiating the sampling
direction would go through root finding. The closed-form direction ``z(x; theta)`` knows the same: along a path of fixed z,
``dx/dtheta = -(dz/dx)^-1 dz/dtheta``, hence ``u . dx/dtheta = -v . dz/dtheta`` with ``(dz/dx)^T v = u``. A layer that changes
some coordinates and reads the others has a triangular derivative, and a linear layer knows its matrix, so that v takes
one backward pass of each layer, from data to latent variables, which gives the gradients of its parameters too (Vaitl et al.,
"Fast and unified path gradient estimators for normalizing flows", arXiv 2403.15881).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...transforms.bijection import Bijection, Chain, Mixing, Triangular
from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates


class _Layer(NamedTuple):
    """One layer, evaluated on its own: the graph of ``mapped`` ends at ``value``, ``context`` and the layer's parameters."""

    parameters: list[nn.Parameter]
    value: Tensor
    context: Tensor | None
    mapped: Triangular | Mixing


class LayerwiseFlow:
    """A flow evaluated from data to latent variables, layer by layer, ready to be differentiated.

    Args:
        flow: the flow.
        coordinates: samples; no gradient flows back into them.

    Attributes:
        log_prob: log-density of the flow ``(B,)``, detached.
    """

    def __init__(self, flow: CoordinateFlow, coordinates: Coordinates) -> None:
        self._flow = flow
        self._circular, self._stiff = (part.detach().to(flow.dtype) for part in coordinates)
        with torch.enable_grad():
            self._turns = self._circular.clone().requires_grad_(True)
            self._features = flow.features(self._turns)
            context = self._features.detach().requires_grad_(True)
            self._layers = {
                "circular": _evaluated(flow.circular, self._circular, None),
                "stiff": _evaluated(flow.stiff, self._stiff, context),
            }
        self._latent = Coordinates(
            _last_value(self._layers["circular"], self._circular), _last_value(self._layers["stiff"], self._stiff)
        )
        log_prob = flow.base_log_prob(self._latent)
        for layer in (*self._layers["circular"], *self._layers["stiff"]):
            log_prob = log_prob + layer.mapped.log_det.detach()
        self.log_prob = log_prob

    def score(self) -> Coordinates:
        """Return the gradient of the log-density in coordinates."""
        latent = Coordinates(*(part.clone().requires_grad_(True) for part in self._latent))
        with torch.enable_grad():
            base = self._flow.base_log_prob(latent).sum()
        start = (
            torch.autograd.grad(base, latent, materialize_grads=True)
            if base.requires_grad
            else tuple(torch.zeros_like(part) for part in latent)
        )
        stiff, context = _score(self._layers["stiff"], start[1])
        circular, _ = _score(self._layers["circular"], start[0])
        return Coordinates(circular + self._through_features(context), stiff)

    def path_gradient(self, cotangent: Coordinates) -> list[tuple[nn.Parameter, Tensor]]:
        """Return, by parameter, the gradient of ``sum cotangent . x(z; theta)`` at fixed latent variables z.

        This frees the graphs: call it last.
        """
        circular, stiff = (part.to(self._flow.dtype) for part in cotangent)
        first, context = _path(self._layers["stiff"], stiff)
        second, _ = _path(self._layers["circular"], circular - self._through_features(context))
        return first + second

    def _through_features(self, context: Tensor | None) -> Tensor | float:
        if context is None or not self._features.requires_grad:
            return 0.0
        (pulled,) = torch.autograd.grad(self._features, self._turns, context, retain_graph=True)
        return pulled


def _evaluated(chain: Chain, value: Tensor, context: Tensor | None) -> list[_Layer]:
    """Return the layers in the order data -> latent."""
    layers = []
    for bijection in reversed(chain.bijections):
        leaf = value.detach().requires_grad_(True)
        mapped = cast(Bijection, bijection).layer_inverse(leaf, context)
        layers.append(_Layer([p for p in bijection.parameters() if p.requires_grad], leaf, context, mapped))
        value = mapped.value
    return layers


def _last_value(layers: list[_Layer], value: Tensor) -> Tensor:
    return layers[-1].mapped.value.detach() if layers else value


def _score(layers: list[_Layer], slope: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of latent log-density and log-determinants in data, and in the context."""
    total: Tensor | None = None
    for layer in reversed(layers):
        outputs, slopes = [layer.mapped.value], [slope]
        if layer.mapped.log_det.requires_grad:
            outputs.append(layer.mapped.log_det)
            slopes.append(torch.ones_like(layer.mapped.log_det))
        slope, context, _ = _backward(layer, outputs, slopes, [], keep=True)
        total = _sum(total, context)
    return slope, total


def _path(layers: list[_Layer], cotangent: Tensor) -> tuple[list[tuple[nn.Parameter, Tensor]], Tensor | None]:
    """Return minus ``v . dz/dtheta`` by parameter, and ``v . dz/dcontext``."""
    gradients: list[tuple[nn.Parameter, Tensor]] = []
    total: Tensor | None = None
    for layer in layers:
        mapped = layer.mapped
        if isinstance(mapped, Triangular):
            moved = mapped.changed * cotangent / mapped.slopes
        else:
            moved = mapped.solve_transposed(cotangent)
        seen, context, parameters = _backward(layer, [mapped.value], [moved], layer.parameters, keep=False)
        gradients += [(p, -slope) for p, slope in zip(layer.parameters, parameters, strict=True)]
        total = _sum(total, context)
        # Coordinates that a triangular layer leaves alone go on as they are, less what the others saw of them.
        cotangent = moved + (1.0 - mapped.changed) * (cotangent - seen) if isinstance(mapped, Triangular) else moved
    return gradients, total


def _backward(
    layer: _Layer, outputs: list[Tensor], slopes: list[Tensor], parameters: list[nn.Parameter], keep: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the gradients of a layer's input, context and parameters."""
    context = [] if layer.context is None else [layer.context]
    found = torch.autograd.grad(
        outputs, [layer.value, *context, *parameters], slopes, retain_graph=keep, materialize_grads=True
    )
    return found[0], found[1] if context else None, list(found[1 + len(context) :])


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part
