"""Training objectives: maximum likelihood, force matching, reverse Kullback-Leibler divergence, path gradients.

All of them act on the trained flow in coordinates; the fixed map to positions drops out of every gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ....core.errors import NonFiniteEnergyError
from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates
from .layerwise import LayerwiseFlow
from .target import TargetDensity

_FORCE_OUTLIER = 10.0  # times the median: larger force errors count as this
_PATH_OUTLIER = 5.0
_SMALLEST_SIZE = 1e-30  # of a difference of gradients: at the optimum all are zero, and so is their median
_LARGEST_WEIGHT = 10.0
_TURN_SCALE = 0.05  # a typical width of a torsion in turns, where stiff coordinates have width one


class LossGradients(NamedTuple):
    """Losses of a batch and their gradients.

    Attributes:
        losses: scalars, or values ``(B,)`` of the configurations, in the order of the function's docstring.
        by_parameter: gradients of the objective, in the order of ``flow.parameters()``.
    """

    losses: tuple[Tensor, ...]
    by_parameter: tuple[Tensor, ...]


# The functions of a flow and of tensors below record nothing, decide nothing by value and give fresh tensors: they can be
# evaluated with torch as they stand, or compiled: see compiled_gradients.


def likelihood_gradients(flow: CoordinateFlow, circular: Tensor, stiff: Tensor) -> LossGradients:
    """Return ``-mean log q`` over data, and its gradient.

    Args:
        flow: the flow.
        circular: torsions ``(B, C)`` in turns.
        stiff: standardised stiff coordinates ``(B, S)``.
    """
    with torch.enable_grad():
        loss = -flow.log_prob(Coordinates(circular, stiff)).mean()
        return LossGradients((loss.detach(),), _gradients(loss, flow))


def force_matching_gradients(
    flow: CoordinateFlow,
    circular: Tensor,
    stiff: Tensor,
    circular_slope: Tensor,
    stiff_slope: Tensor,
    weight: Tensor,
) -> LossGradients:
    """Return the negative log-likelihood, half the mean squared difference of log-density gradients, and the gradient.

    The difference is taken in standardised coordinates (torsions times 0.05 turns), each configuration limited to ten
    times the median, so that a few strained frames do not carry the whole gradient. Needs second derivatives of the flow.

    Args:
        flow: the flow.
        circular: torsions ``(B, C)`` in turns.
        stiff: standardised stiff coordinates ``(B, S)``.
        circular_slope: gradient of the target's log-density in the torsions.
        stiff_slope: gradient in the stiff coordinates.
        weight: 0-dimensional weight of the second loss.
    """
    with torch.enable_grad():
        leaves = Coordinates(circular.detach().requires_grad_(True), stiff.detach().requires_grad_(True))
        log_prob = flow.log_prob(leaves)
        found = torch.autograd.grad(log_prob.sum(), leaves, create_graph=True)
        error = (_TURN_SCALE * (found[0] - circular_slope)).square().sum(-1)
        error = error + (found[1] - stiff_slope).square().sum(-1)
        limit = _FORCE_OUTLIER * error.detach().median()
        limited = error * (limit / error.detach().clamp_min(1e-30)).clamp(max=1.0)
        likelihood, force = -log_prob.mean(), 0.5 * limited.mean()
        return LossGradients((likelihood.detach(), force.detach()), _gradients(likelihood + weight * force, flow))


def path_gradients(
    flow: CoordinateFlow,
    circular: Tensor,
    stiff: Tensor,
    log_density: Tensor,
    circular_slope: Tensor,
    stiff_slope: Tensor,
    log_normaliser: Tensor,
    powers: Tensor,
) -> LossGradients:
    """Return log-weights ``(B,)`` of samples of the flow, NaN where not finite, and the path gradient of divergences.

    With ``delta = grad log q - grad log pi`` at samples x of the flow (parameters held), the gradient of KL(q|pi), KL(pi|q)
    and the chi-squared divergence along the sampling path is the mean of ``c(w) delta . dx/dtheta`` with c = 1, w, w^2
    (Roeder, Wu, Duvenaud 2017; Vaitl et al. 2022, 2024). All three vanish sample by sample where q = pi, so the gradient
    has no noise at the optimum. Samples whose energy or force is not finite count as having none.

    Args:
        flow: the flow.
        circular: torsions ``(B, C)`` of the samples, in turns.
        stiff: their standardised stiff coordinates ``(B, S)``.
        log_density: log-density of the target ``(B,)``, float64.
        circular_slope: gradient of the target's log-density in the torsions, float64.
        stiff_slope: gradient in the stiff coordinates, float64.
        log_normaliser: 0-dimensional float64; a running estimate of log Z that makes the mean weight one, or NaN for the
            batch's own.
        powers: ``(3,)`` coefficients of 1, w and w^2 in c(w), float64.
    """
    layers = LayerwiseFlow(flow, Coordinates(circular, stiff))
    log_prob, score = layers.log_prob, layers.score()
    with torch.no_grad():
        log_weights = log_density - log_prob.double()
        delta = (
            score.circular - circular_slope.to(score.circular.dtype),
            score.stiff - stiff_slope.to(score.stiff.dtype),
        )
        size = torch.sqrt((_TURN_SCALE * delta[0]).square().sum(-1) + delta[1].square().sum(-1))
        finite = torch.isfinite(log_weights) & torch.isfinite(size)
        usable = torch.where(finite, log_weights, torch.full_like(log_weights, -torch.inf))
        own = torch.logsumexp(usable, 0) - math.log(len(log_weights))
        shift = torch.where(torch.isnan(log_normaliser), own, log_normaliser)
        weights = torch.exp(usable - shift).clamp(max=_LARGEST_WEIGHT)
        factor = powers[0] + powers[1] * weights + powers[2] * weights.square()
        limit = _PATH_OUTLIER * torch.nanmedian(torch.where(finite, size, torch.full_like(size, torch.nan)))
        limited = factor * (limit / size.clamp_min(_SMALLEST_SIZE)).clamp(max=1.0)
        # zero, not NaN, where there is no energy: backpropagation multiplies even rows that the loss leaves out
        share = (limited / len(log_weights)).unsqueeze(1)
        pull = Coordinates(
            *(torch.where(finite.unsqueeze(1), share.to(d.dtype) * d, torch.zeros_like(d)) for d in delta)
        )
    found = {id(parameter): gradient for parameter, gradient in layers.path_gradient(pull)}
    none = torch.full_like(log_weights, torch.nan)
    return LossGradients(
        (torch.where(finite, log_weights, none),),
        tuple(found[id(p)] if id(p) in found else torch.zeros_like(p) for p in flow.parameters()),
    )


def effective_sample_fraction(log_weights: Tensor) -> Tensor:
    """Return the effective sample size of weights as a fraction of their number; NaN counts as no weight.

    Raises:
        NonFiniteEnergyError: where all are NaN.
    """
    finite = torch.isfinite(log_weights)
    _require_some(finite)
    usable = log_weights[finite]
    return torch.exp(2 * torch.logsumexp(usable, 0) - torch.logsumexp(2 * usable, 0)) / len(log_weights)


def _gradients(loss: Tensor, flow: CoordinateFlow) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(flow.parameters()), materialize_grads=True)


def reverse_kl(flow: CoordinateFlow, latent: Coordinates, target: TargetDensity) -> Tensor:
    """Return a scalar whose gradient is that of ``KL(q | pi)`` by plain reparametrisation."""
    coordinates, log_det = flow(latent)
    value = target(coordinates)
    slopes = torch.cat(value.gradient, dim=1)
    finite = torch.isfinite(value.log_density) & torch.isfinite(slopes).all(1)
    _require_some(finite)
    pulled = _inner(coordinates, value.gradient, finite)
    return -(pulled + log_det)[finite].mean()


def _require_some(finite: Tensor) -> None:
    if not bool(finite.any()):
        raise NonFiniteEnergyError(
            f"none of the {len(finite)} samples of a training batch has a finite energy and force: the flow has left the "
            "region where the target is defined; lower the learning rate, or train longer by likelihood first"
        )


def _inner(coordinates: Coordinates, gradient: Coordinates, finite: Tensor) -> Tensor:
    """Return ``gradient . coordinates`` a configuration, with zero gradient where the target is not finite."""
    total = coordinates.stiff.new_zeros(len(finite))
    for part, slope in zip(coordinates, gradient, strict=True):
        usable = torch.where(finite.unsqueeze(1), slope, torch.zeros_like(slope)).to(part.dtype)
        total = total + (part * usable).sum(-1)
    return total
