"""Losses with their gradients, as functions of a module and tensors: evaluated with torch, or compiled.

They keep no graph and never branch on values; see :mod:`flowbridge.flows.boltzmann.compiled_functions`. Parameters and
tensors hold all that differs between trainings, so one program serves every training of the same sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core.compilation.functions import Results
from ...flows.boltzmann.molecule_coordinates import Coordinates


def augmented_likelihood_gradients(
    flow: nn.Module, circular: Tensor, stiff: Tensor, auxiliary: Tensor
) -> tuple[Tensor, ...]:
    """Return ``-mean log p`` and its gradients by the parameters of an augmented flow.

    Args:
        flow: an :class:`~flowbridge.forcefields.training.augmented_flow.AugmentedFlow`.
        circular: torsions ``(B, T)`` in turns.
        stiff: standardised stiff coordinates ``(B, S)``.
        auxiliary: ``(B, A)``.
    """
    with torch.enable_grad():
        loss = -flow.log_prob(Coordinates(circular, stiff), auxiliary).mean()  # type: ignore[operator]
        return (loss.detach(), *_by_parameters(loss, flow))


def network_force_gradients(
    network: nn.Module, positions: Tensor, labels: Tensor, *standardisation: Tensor
) -> tuple[Tensor, ...]:
    """Return the mean square of a component of the error of forces and its gradients by the parameters of a network.

    Args:
        network: gives energies ``(B,)`` in kT.
        positions: ``(B, n, 3)`` nm.
        labels: forces ``(B, n, 3)`` kT/nm.
        standardisation: mean and deviation of the network's features, where it has them.
    """
    with torch.enable_grad():
        loss = _force_error(network, positions, labels, standardisation)
        return (loss.detach(), *_by_parameters(loss, network))


def noise_contrastive_gradients(
    network: nn.Module,
    positions: Tensor,
    labels: Tensor,
    frames: Tensor,
    frame_offsets: Tensor,
    samples: Tensor,
    sample_offsets: Tensor,
    balance: Tensor,
    *standardisation: Tensor,
) -> tuple[Tensor, ...]:
    """Return the weighted sum of force error and :func:`ranking_loss`, and its gradients by the parameters of a network.

    Args:
        network: gives energies ``(B,)`` in kT.
        positions: positions of the labels ``(B, n, 3)`` nm.
        labels: forces ``(B, n, 3)`` kT/nm.
        frames: positions ``(F, n, 3)`` nm.
        frame_offsets: ``log exp(-U/kT)/q`` ``(F,)`` of the frames without the network.
        samples: positions ``(S, n, 3)`` nm.
        sample_offsets: as ``frame_offsets`` ``(S,)``.
        balance: weights ``(2,)`` of the force error and the ranking loss.
        standardisation: mean and deviation of the network's features, where it has them.
    """
    with torch.enable_grad():
        error = _force_error(network, positions, labels, standardisation)
        energies = _energies(network, torch.cat([frames, samples]), standardisation)
        count = len(frames)
        ranking = ranking_loss(frame_offsets - energies[:count], sample_offsets - energies[count:])
        loss = balance[0] * error + balance[1] * ranking
        return (loss.detach(), *_by_parameters(loss, network))


def loss_and_slope(found: Results, expected: Results) -> tuple[Results, Results]:
    """Return what compiled and interpreted results have to agree in: the loss, and the gradient as one vector.

    The ranking loss does not depend on a constant in the energy, so one component of the gradient is rounding alone.
    """
    first, second = ((one[0], torch.cat([part.flatten() for part in one[1:]])) for one in (found, expected))
    return first, second


def ranking_loss(frames: Tensor, samples: Tensor) -> Tensor:
    """Return the ranking loss of noise-contrastive estimation from log-ratios of frames ``(F,)`` and samples ``(S,)``.

    It is the mean of ``-log r(frame) / mean(r(frame), r(samples))``: with many samples the cross-entropy of frames under the
    Boltzmann distribution less that under the density of the samples, in nats.
    """
    among = torch.logaddexp(frames, torch.logsumexp(samples, 0)) - math.log(1.0 + len(samples))
    return (among - frames).mean()


def _force_error(network: nn.Module, positions: Tensor, labels: Tensor, standardisation: tuple[Tensor, ...]) -> Tensor:
    leaf = positions.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_energies(network, leaf, standardisation).sum(), leaf, create_graph=True)
    return (gradient + labels).square().mean()


def _energies(network: nn.Module, positions: Tensor, standardisation: tuple[Tensor, ...]) -> Tensor:
    if not standardisation:
        return network(positions)
    features = dict(zip(("features.mean", "features.deviation"), standardisation, strict=True))
    return torch.func.functional_call(network, features, (positions,))


def _by_parameters(loss: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
    parameters = list(module.parameters())
    return tuple(g.detach() for g in torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
