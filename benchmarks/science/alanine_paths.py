"""Alanine dipeptide at 1000 K by affine couplings with and without kernels (experiment 3 of arXiv 2002.06707)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from flowbridge.flows.stochastic.distributions import StandardNormal
from flowbridge.flows.stochastic.kernels import Kernel
from flowbridge.flows.stochastic.metropolis import MetropolisKernel
from flowbridge.flows.stochastic.molecules import MoleculeEnergy, sample_molecules
from flowbridge.flows.stochastic.stochastic_flow import StochasticFlow, path_likelihood
from flowbridge.flows.stochastic.training import PathStage, train_paths
from flowbridge.flows.transforms.bijection import Bijection

from ..harness import done_once
from .alanine_at_1000_kelvin import TEMPERATURE, Alanine, coupling_blocks, simulated_alanine, torsion_divergences

_BLOCKS, _KERNEL_STEPS, _STEP = 5, 20, 0.1

PUBLISHED = {
    "phi": (1.71, 0.41),
    "methyl of ACE": (3.95, 0.20),
    "psi": (0.81, 0.16),
    "methyl of ALA": (0.72, 0.08),
    "methyl of NME": (0.87, 0.10),
}
"""RNVP alone and RNVP + MC, from the paper's notebook, which does not say which methyl group is which."""


def compare_on_alanine(folder: Path, *, small: bool) -> dict[str, Any]:
    """Train couplings by likelihood, put kernels between them and train by path likelihood; return what both give.

    The kernels cost two hundred times what the couplings cost, so the second training is short and starts from the first.
    """
    alanine = simulated_alanine(folder, 400 if small else 20_000)
    stages = (
        PathStage(20 if small else 1000, 256, 1e-3),
        PathStage(2 if small else 1000, 16 if small else 64, 1e-3, gradient_norm=100.0),
    )
    blocks = coupling_blocks(alanine.flat.dimension, _BLOCKS, torch.Generator().manual_seed(0))
    results: dict[str, Any] = {}
    for number, name in enumerate(("RNVP", "RNVP + MC")):
        flow = _flow(alanine, blocks, kernels=number == 1)
        begin, checkpoint = time.monotonic(), folder / f"{name.replace(' ', '')}.checkpoint"
        losses = train_paths(
            flow, alanine.training.float(), [stages[number]], seed=number, checkpoint=checkpoint, checkpoint_interval=10
        )
        more = {"losses": losses, "training_seconds": time.monotonic() - begin}
        results[name] = done_once(
            checkpoint.with_suffix(".json"),
            lambda flow=flow, more=more: {**_measured(alanine, flow, 200 if small else 10_000), **more},
        )
    results["dynamics"] = torsion_divergences(alanine, alanine.training)
    return results


def _measured(alanine: Alanine, flow: StochasticFlow, count: int) -> dict[str, Any]:
    begin = time.monotonic()
    samples = sample_molecules(flow, alanine.particles, count, alanine.energy, seed=1)
    seconds = time.monotonic() - begin
    with torch.no_grad():
        bound = path_likelihood(flow, alanine.test[:500].float(), torch.Generator().manual_seed(3))
    value, _ = alanine.flat.inverse(torch.as_tensor(samples.positions))
    return {
        "divergences": torsion_divergences(alanine, value),
        "reweighted_divergences": torsion_divergences(alanine, value, torch.as_tensor(samples.weights)),
        "effective_sample_percent": samples.effective_sample_percent(),
        "held_out_bound": float(bound),
        "acceptance": samples.provenance["acceptance"],
        "sampling_seconds": seconds,
    }


def _flow(alanine: Alanine, blocks: list[list[Bijection]], *, kernels: bool) -> StochasticFlow:
    target = MoleculeEnergy(alanine.flat, alanine.energy, TEMPERATURE, alanine.lowest)
    steps: list[Bijection | Kernel] = []
    for block in blocks:
        steps += block
        if kernels:
            steps.append(MetropolisKernel(_STEP, _KERNEL_STEPS))
    return StochasticFlow(StandardNormal(alanine.flat.dimension), target, steps)
