"""Couplings with fixed permutations between them, and with linear layers that start as those permutations and are trained."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbridge.core.execution.progress import track
from flowbridge.flows.transforms.bijection import Bijection, Chain
from flowbridge.flows.transforms.couplings import Coupling
from flowbridge.flows.transforms.linear_layer import InvertibleLinear
from flowbridge.flows.transforms.merging import MergingSchedule
from flowbridge.flows.transforms.rank_one_matrix import RankOneMatrix
from flowbridge.flows.transforms.sinh_arcsinh import Affine

from ..harness import done_once, mean_and_deviation, report
from .alanine_at_1000_kelvin import Alanine, coupling_blocks, simulated_alanine, torsion_divergences

KINDS = ("fixed", "P4")
_MODES, _RADIUS, _WIDTH, _COUPLINGS = 8, 2.0, 0.15, 6


def mixing_layer(kind: str, order: list[int], seed: int) -> InvertibleLinear:
    """Return the permutation ``order`` as a layer that is trained (``P4``) or not (``fixed``)."""
    layer = InvertibleLinear(len(order), seed, bias=False, matrix=torch.eye(len(order))[order])
    return layer if kind == "P4" else layer.requires_grad_(False)


def train_likelihood(flow: Chain, data: Tensor, steps: int, batch: int, rate: float, seed: int) -> None:
    """Minimise the negative log-likelihood with Adam, the rate falling to zero.

    Perturbations are merged every 5 steps; as their directions have so little time, their rate is ten times the others'.
    """
    trained = [part for part in flow.modules() if isinstance(part, RankOneMatrix) and part.u.requires_grad]
    linear = [one for part in trained for one in part.parameters()]
    known = {id(one) for one in linear}
    others = [one for one in flow.parameters() if one.requires_grad and id(one) not in known]
    optimiser = torch.optim.Adam([{"params": others}, {"params": linear, "lr": 10.0 * rate}], lr=rate)
    if trained:
        MergingSchedule(flow, optimiser, every=5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "likelihood", steps):
        chosen = torch.randint(len(data), (batch,), generator=generator)
        optimiser.zero_grad()
        negative_log_likelihood(flow, data[chosen]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 20.0)
        optimiser.step()
        schedule.step()
    flow.eval()


def negative_log_likelihoods(flow: Chain, data: Tensor) -> Tensor:
    """Return minus the log-density of data ``(B, D)``, the base being normal; ``(B,)``."""
    latent, log_det = flow.inverse(data)
    return 0.5 * latent.square().sum(-1) + 0.5 * data.shape[1] * math.log(2.0 * math.pi) - log_det


def negative_log_likelihood(flow: Chain, data: Tensor) -> Tensor:
    """Return the mean of :func:`negative_log_likelihoods`, 0-dimensional."""
    return negative_log_likelihoods(flow, data).mean()


def _trimmed(values: Tensor) -> dict[str, float]:
    """Return mean and median, and the mean without the largest hundredth: a few strained frames can outweigh all others."""
    kept = values.sort().values[: int(0.99 * len(values))]
    return {"mean_nll": float(values.mean()), "median_nll": float(values.median()), "nll": float(kept.mean())}


def mode_weights() -> Tensor:
    """Return the weights ``(8,)`` of the modes: 1 to 8, divided by their sum."""
    return torch.arange(1.0, _MODES + 1.0) / sum(range(1, _MODES + 1))


def modes(count: int, seed: int) -> Tensor:
    """Draw from eight normal distributions of width 0.15 on a circle of radius 2, ``(count, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(mode_weights(), count, replacement=True, generator=generator)
    angle = 2.0 * math.pi * chosen / _MODES
    centres = _RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return centres + _WIDTH * torch.randn(count, 2, generator=generator)


def found_weights(value: Tensor) -> tuple[Tensor, float]:
    """Return the share of points ``(S, 2)`` within four widths of each mode ``(8,)``, and of points near none."""
    angle = 2.0 * math.pi * torch.arange(_MODES) / _MODES
    centres = _RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    near = torch.cdist(value, centres) < 4.0 * _WIDTH
    shares = near.float().mean(0)
    return shares, 1.0 - float(shares.sum())


def compare_on_modes(output: Path, seeds: int, steps: int) -> dict[str, Any]:
    """Train on eight modes of different weights; print weights and likelihood; return the numbers."""
    entropy = (
        float(-(mode_weights() * mode_weights().log()).sum()) + 2.0 * math.log(_WIDTH) + math.log(2.0 * math.pi) + 1.0
    )
    results: dict[str, Any] = {"entropy": entropy}
    rows = []
    for kind in KINDS:
        results[kind] = runs = [
            done_once(output / f"modes-{steps}-{kind}-{seed}.json", lambda k=kind, s=seed: _modes_run(k, s, steps))
            for seed in range(seeds)
        ]
        likelihood = mean_and_deviation([run["nll"] for run in runs], 3)
        means = [statistics.mean(run[name] for run in runs) for name in ("error", "between")]
        weights = " ".join(f"{100 * value:.1f}" for value in torch.tensor([run["weights"] for run in runs]).mean(0))
        rows.append([kind, likelihood, *(f"{mean:.3f}" for mean in means), weights])
    exact = " ".join(f"{100 * float(value):.1f}" for value in mode_weights())
    rows.append(["exact", f"{entropy:.3f}", "0", "0", exact])
    columns = ["between", "NLL", "error", "outside", "weights, %"]
    report("invertible_linear_modes", "Eight modes: couplings with", columns, rows, results, small=steps < 1000)
    return results


def _modes_run(kind: str, seed: int, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    layers: list[Bijection] = []
    for number in range(_COUPLINGS):
        layers.append(Coupling(2, [0], Affine(), (64, 64), generator))
        layers.append(mixing_layer(kind, [1, 0], 100 * seed + number))
    flow = Chain(layers)
    train_likelihood(flow, modes(50_000, 1), steps, 256, 2e-3, seed)
    with torch.no_grad():
        value = flow(torch.randn(50_000, 2, generator=torch.Generator().manual_seed(9))).value
        shares, between = found_weights(value)
        return {
            "nll": float(negative_log_likelihood(flow, modes(20_000, 2))),
            "weights": shares.tolist(),
            "error": float((shares - mode_weights()).abs().sum()),
            "between": between,
        }


def compare_on_alanine(output: Path, frames: Path, *, small: bool) -> dict[str, Any]:
    """Train couplings on alanine dipeptide at 1000 K; print likelihood, weight of phi > 0 and torsions; return the numbers."""
    alanine = simulated_alanine(frames, 400 if small else 5000)
    exact, _ = _phi_weight(alanine, alanine.test)
    results: dict[str, Any] = {"phi > 0 in dynamics": exact}
    for kind in KINDS:
        file = output / f"alanine-{kind}{'-small' if small else ''}.json"
        results[kind] = done_once(file, lambda k=kind: _alanine_run(alanine, k, steps=10 if small else 500))
    rows = [
        [kind, f"{run['nll']:.3f}", f"{100 * run['phi']:.1f} ± {100 * run['phi_error']:.1f}"]
        + [f"{run['divergences'][name]:.3f}" for name in alanine.names]
        for kind, run in ((kind, results[kind]) for kind in KINDS)
    ]
    columns = ["between", "NLL (99 %)", "phi > 0, %", *(name.replace("methyl of ", "") for name in alanine.names)]
    title = f"Alanine at 1000 K (dynamics: phi > 0 {100 * exact:.1f} %); KL of torsions"
    report("invertible_linear_alanine", title, columns, rows, results, small=small)
    return results


def _alanine_run(alanine: Alanine, kind: str, steps: int) -> dict[str, Any]:
    orders = torch.Generator().manual_seed(5)
    dimension = alanine.flat.dimension

    def mixing(number: int) -> Bijection:
        return mixing_layer(kind, torch.randperm(dimension, generator=orders).tolist(), number)

    blocks = coupling_blocks(dimension, 5, torch.Generator().manual_seed(0), mixing)
    flow = Chain([layer for block in blocks for layer in block])
    train_likelihood(flow, alanine.training.float(), steps, 256, 1e-3, 0)
    with torch.no_grad():
        value = flow(torch.randn(20_000, dimension, generator=torch.Generator().manual_seed(1))).value
        weight, error = _phi_weight(alanine, value)
        return {
            **_trimmed(negative_log_likelihoods(flow, alanine.test.float())),
            "phi": weight,
            "phi_error": error,
            "divergences": torsion_divergences(alanine, value),
        }


def _phi_weight(alanine: Alanine, value: Tensor) -> tuple[float, float]:
    """Return the share of configurations with phi between 0 and 120 degrees, and its error from counting."""
    column = alanine.names.index("phi")
    turns = (value[:, column] / math.sqrt(12.0) + 0.5 + float(alanine.flat.cuts[column])) % 1.0
    share = float((turns < 1.0 / 3.0).double().mean())
    return share, math.sqrt(share * (1.0 - share) / len(value))
