"""What training minimises: maximum likelihood, force matching, reverse Kullback-Leibler, path gradients.

All act on the trained flow in coordinates; the fixed map to positions drops out of every gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import NonFiniteEnergyError
from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates
from .layerwise import LayerwiseFlow
from .target import TargetDensity

_FORCE_OUTLIER = 10.0  # times the median: larger force errors count as this
_PATH_OUTLIER = 5.0
_SMALLEST_SIZE = 1e-30  # of a difference of gradients: at the optimum all are zero, and so is their median
_LARGEST_WEIGHT = 10.0
_TURN_SCALE = 0.05  # a typical width of a torsion in turns, where stiff coordinates have width one


def negative_log_likelihood(flow: CoordinateFlow, data: Coordinates) -> Tensor:
    """Return ``-mean log q`` over data, a scalar."""
    return -flow.log_prob(data).mean()


def force_matching(flow: CoordinateFlow, data: Coordinates, gradient: Coordinates) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood and half the mean squared difference of log-density gradients.

    The difference is taken in standardised coordinates (torsions times 0.05 turns), each configuration limited to ten
    times the median, so that a few strained frames do not carry the whole gradient. Needs second derivatives of the flow.
    """
    leaves = Coordinates(*(part.detach().requires_grad_(True) for part in data))
    log_prob = flow.log_prob(leaves)
    circular, stiff = torch.autograd.grad(log_prob.sum(), leaves, create_graph=True)
    error = (_TURN_SCALE * (circular - gradient.circular)).square().sum(-1)
    error = error + (stiff - gradient.stiff).square().sum(-1)
    limit = _FORCE_OUTLIER * error.detach().median()
    limited = error * (limit / error.detach().clamp_min(1e-30)).clamp(max=1.0)
    return -log_prob.mean(), 0.5 * limited.mean()


def reverse_kl(flow: CoordinateFlow, latent: Coordinates, target: TargetDensity) -> Tensor:
    """Return a scalar whose gradient is that of ``KL(q | pi)`` by plain reparametrisation."""
    coordinates, log_det = flow(latent)
    value = target(coordinates)
    slopes = torch.cat(value.gradient, dim=1)
    finite = torch.isfinite(value.log_density) & torch.isfinite(slopes).all(1)
    _require_finite(finite)
    pulled = _inner(coordinates, value.gradient, finite)
    return -(pulled + log_det)[finite].mean()


class PathGradient(NamedTuple):
    """Surrogate loss, and of the batch: log-weights ``(B,)`` and the effective sample share."""

    loss: Tensor
    log_weights: Tensor
    effective_share: float


def path_gradient(
    flow: CoordinateFlow,
    latent: Coordinates,
    target: TargetDensity,
    log_normaliser: float | None,
    powers: tuple[float, float, float],
) -> PathGradient:
    """Return a surrogate whose gradient is the path gradient of a mixture of divergences.

    With ``delta = grad log q - grad log pi`` at samples x of the flow (parameters held), the gradient of KL(q|pi), KL(pi|q)
    and the chi-squared divergence along the sampling path is the mean of ``c(w) delta . dx/dtheta`` with c = 1, w, w^2
    (Roeder, Wu, Duvenaud 2017; Vaitl et al. 2022, 2024). All three vanish sample by sample where q = pi, so the gradient
    has no noise at the optimum.

    Args:
        flow: the flow.
        latent: draws from its base.
        target: the density to match.
        log_normaliser: running estimate of log Z that makes the mean weight one; the batch's own where None.
        powers: shares of 1, w and w^2 in c(w).
    """
    with torch.no_grad():
        coordinates, _ = flow(latent)
    value = target(coordinates)
    layers = LayerwiseFlow(flow, coordinates)
    log_prob, score = layers.log_prob, layers.score()
    with torch.no_grad():
        log_weights = value.log_density - log_prob.double()
        delta = Coordinates(*(a - b.to(a.dtype) for a, b in zip(score, value.gradient, strict=True)))
        size = torch.sqrt((_TURN_SCALE * delta.circular).square().sum(-1) + delta.stiff.square().sum(-1))
        finite = torch.isfinite(log_weights) & torch.isfinite(size)
        _require_finite(finite)
        usable = log_weights[finite]
        batch_normaliser = torch.logsumexp(usable, 0) - torch.log(torch.tensor(float(len(log_weights))))
        shift = batch_normaliser if log_normaliser is None else log_normaliser
        weights = torch.exp(log_weights - shift).clamp(max=_LARGEST_WEIGHT)
        factor = powers[0] + powers[1] * weights + powers[2] * weights.square()
        limit = _PATH_OUTLIER * size[finite].median()
        limited = factor * (limit / size.clamp_min(_SMALLEST_SIZE)).clamp(max=1.0)
        # zero, not NaN, where there is no energy: backpropagation multiplies even rows that the loss leaves out
        share_of_loss = (limited / len(log_weights)).unsqueeze(1)
        pull = Coordinates(
            *(torch.where(finite.unsqueeze(1), share_of_loss.to(d.dtype) * d, torch.zeros_like(d)) for d in delta)
        )
        share = torch.exp(2 * torch.logsumexp(usable, 0) - torch.logsumexp(2 * usable, 0)) / len(log_weights)
    # A scalar that has these gradients, for an optimiser that wants to differentiate something.
    loss = log_prob.new_zeros(())
    for parameter, gradient in layers.path_gradient(pull):
        loss = loss + (parameter * gradient).sum()
    return PathGradient(loss, log_weights, float(share))


def _require_finite(finite: Tensor) -> None:
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
