"""Losses with their gradients, as functions of a module and tensors: evaluated with torch, or compiled.

They record nothing and decide nothing by value; see :mod:`flowbridge.flows.compiled_functions`. All that differs from one
training to the next comes as parameters or tensors, so that one program serves every training of the same sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.compilation.programs import resolved
from ...flows.molecule_coordinates import Coordinates

_LONG = 3000  # steps from which compiling, a minute or two, pays


def compilation_of(mode: str, steps: int) -> str:
    """Return whether a stage is compiled: with ``auto`` where it is long enough.

    Not by what the cache holds: compiled and interpreted sums round differently, and a seed should give one model.
    """
    chosen = resolved(mode)
    return "never" if chosen == "auto" and steps < _LONG else chosen


def augmented_likelihood_gradients(
    flow: nn.Module, circular: Tensor, stiff: Tensor, auxiliary: Tensor
) -> tuple[Tensor, ...]:
    """Return ``-mean log p`` and its gradients by the parameters of an augmented flow.

    Args:
        flow: an :class:`~flowbridge.forcefields.augmented_flow.AugmentedFlow`.
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
        leaf = positions.detach().requires_grad_(True)
        names = ("features.mean", "features.deviation")
        if standardisation:
            energy = torch.func.functional_call(network, dict(zip(names, standardisation, strict=True)), (leaf,))
        else:
            energy = network(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf, create_graph=True)
        loss = (gradient + labels).square().mean()
        return (loss.detach(), *_by_parameters(loss, network))


def _by_parameters(loss: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
    parameters = list(module.parameters())
    return tuple(g.detach() for g in torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
