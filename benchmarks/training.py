"""Samples per second of training steps of alanine dipeptide's flow, compiled and not: ``python -m benchmarks.training``.

A step is all that training does with a batch: loss, gradient, its norm, Adam. Refinement is timed with the force field and with
an energy that costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowbridge.core.energy import BatchedEnergy
from flowbridge.flows.boltzmann.compiled_functions import CompiledSampling
from flowbridge.flows.boltzmann.generator import BoltzmannGenerator
from flowbridge.flows.boltzmann.molecule_coordinates import Coordinates
from flowbridge.flows.boltzmann.training.compiled_gradients import GradientEvaluator, with_gradients
from flowbridge.flows.boltzmann.training.objectives import (
    force_matching_gradients,
    likelihood_gradients,
    path_gradients,
)
from flowbridge.flows.boltzmann.training.target import TargetDensity
from flowbridge.integrations.openmm import OpenMMEnergy

from .harness import arguments, paired, ratio, report
from .molecules import alanine_flow, alanine_frames, alanine_system, demo_flow

_BATCH = 512
_POWERS = (1 / 3, 1 / 3, 1 / 3)
_MODES = {"torch": "never", "compiled": "always"}


class NoEnergy:
    """Energies and forces that are zero."""

    def energies_and_forces(self, positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return zeros ``(B,)`` and ``(B, N, 3)``."""
        return np.zeros(len(positions)), np.zeros_like(positions)


def step_of(flow: torch.nn.Module, gradients: Callable[[], tuple[Tensor, ...]]) -> Callable[[], object]:
    """Return an optimiser step; the learning rate is too small to change the flow that is timed."""
    parameters = list(flow.parameters())
    optimiser = torch.optim.Adam(parameters, lr=1e-9, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with_gradients(torch.zeros(()), flow, gradients()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()

    return step


def likelihood_steps(model: BoltzmannGenerator, mode: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the gradients of the first stage, on frames."""
    frames = alanine_frames()
    coordinates, _ = model.coordinates.inverse(torch.as_tensor(frames[np.arange(_BATCH) % len(frames)]))
    data = Coordinates(*(part.to(model.flow.dtype) for part in coordinates))
    slopes = Coordinates(*(torch.zeros_like(part) for part in data))
    likelihood = GradientEvaluator(model.flow, likelihood_gradients, mode)
    matching = GradientEvaluator(model.flow, force_matching_gradients, mode)
    return {
        "likelihood": lambda: likelihood(*data).by_parameter,
        "force matching": lambda: matching(*data, *slopes, torch.tensor(0.1)).by_parameter,
    }


def refinement_step(model: BoltzmannGenerator, energy: BatchedEnergy, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return the gradient of the second stage, on samples of the flow."""
    assert model.metadata.temperature is not None
    target = TargetDensity(model.coordinates, energy, model.metadata.temperature)
    sampling, path = CompiledSampling(model.flow, mode), GradientEvaluator(model.flow, path_gradients, mode)
    generator = torch.Generator().manual_seed(1)
    normaliser, powers = torch.tensor(math.nan, dtype=torch.float64), torch.tensor(_POWERS, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        samples = sampling(model.flow.sample_latent(_BATCH, generator)).coordinates
        log_density, slopes = target(samples)
        return path(*samples, log_density, *slopes, normaliser, powers).by_parameter

    return gradients


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(threads=2, rounds=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = alanine_flow(demo_flow()).requires_grad_(True)
    energy = OpenMMEnergy(alanine_system())
    energy.settle(alanine_frames())
    cases = {}
    for how, mode in _MODES.items():
        steps = likelihood_steps(model, mode)
        steps["path gradient"] = refinement_step(model, energy, mode)
        steps["path gradient, no energy"] = refinement_step(model, NoEnergy(), mode)
        cases |= {(name, how): step_of(model.flow, gradients) for name, gradients in steps.items()}
    work = {f"{name}, {how}": float(_BATCH) for name, how in cases}
    named = {f"{name}, {how}": case for (name, how), case in cases.items()}
    timings = paired(named, work=work, rounds=options.rounds, seconds=0.5)
    results: dict[str, Any] = {"batch": _BATCH, "compiled_over_eager": {}, "samples_per_second": {}, "rounds": {}}
    rows = []
    for name, how in cases:
        one = timings[f"{name}, {how}"]
        results["samples_per_second"][f"{name}, {how}"] = 1e6 / one.median
        results["rounds"][f"{name}, {how}"] = one.rounds
        gain = ratio(timings[f"{name}, torch"], one)
        if how == "compiled":
            results["compiled_over_eager"][name] = gain
        rows.append((f"{name}, {how}", f"{1e-3 * one.median * _BATCH:.1f}", f"{1e6 / one.median:.0f}", f"{gain:.2f}"))
    columns = ("training step", "milliseconds", "samples a second", "over torch")
    report("training", f"alanine dipeptide, the demo's flow: steps of {_BATCH}", columns, rows, results)


if __name__ == "__main__":
    main()
