"""Samples per second of training steps of alanine dipeptide's flow: ``python -m benchmarks.training``.

A step is all that training does with a batch: loss, gradient, its norm, Adam. Refinement is timed with the force field and with
an energy that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flowbridge.core.energy import BatchedEnergy
from flowbridge.flows.boltzmann_generator import BoltzmannGenerator
from flowbridge.flows.molecule_coordinates import Coordinates
from flowbridge.flows.training.objectives import force_matching, negative_log_likelihood, path_gradient
from flowbridge.flows.training.target import TargetDensity
from flowbridge.integrations.openmm import OpenMMEnergy
from numpy.typing import NDArray
from openmm import app
from torch import Tensor

from .harness import arguments, paired, ratio, report
from .molecules import alanine_flow, alanine_frames, alanine_topology, demo_flow

_BATCH = 512
_POWERS = (1 / 3, 1 / 3, 1 / 3)


class NoEnergy:
    """Energies and forces that are zero."""

    def energies_and_forces(self, positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return zeros ``(B,)`` and ``(B, N, 3)``."""
        return np.zeros(len(positions)), np.zeros_like(positions)


def step_of(flow: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """Return an optimiser step on a loss; the learning rate is too small to change the flow that is timed."""
    parameters = list(flow.parameters())
    optimiser = torch.optim.Adam(parameters, lr=1e-9, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()

    return step


def likelihood_losses(model: BoltzmannGenerator) -> dict[str, Callable[[], Tensor]]:
    """Return the losses of the first stage on frames."""
    frames = alanine_frames()
    coordinates, _ = model.coordinates.inverse(torch.as_tensor(frames[np.arange(_BATCH) % len(frames)]))
    data = Coordinates(*(part.to(model.flow.dtype) for part in coordinates))

    def matched() -> Tensor:
        likelihood, force = force_matching(model.flow, data, Coordinates(*(torch.zeros_like(part) for part in data)))
        return likelihood + force

    return {"likelihood": lambda: negative_log_likelihood(model.flow, data), "force matching": matched}


def refinement_loss(model: BoltzmannGenerator, energy: BatchedEnergy) -> Callable[[], Tensor]:
    """Return the loss of the second stage."""
    assert model.facts.temperature is not None
    target = TargetDensity(model.coordinates, energy, model.facts.temperature)
    generator = torch.Generator().manual_seed(1)
    return lambda: path_gradient(model.flow, model.flow.sample_latent(_BATCH, generator), target, None, _POWERS).loss


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(threads=2, rounds=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = alanine_flow(demo_flow()).requires_grad_(True)
    topology, _ = alanine_topology()
    energy = OpenMMEnergy(app.ForceField("amber96.xml", "amber96_obc.xml").createSystem(topology))
    energy.settle(alanine_frames())
    losses = likelihood_losses(model)
    losses["path gradient"] = refinement_loss(model, energy)
    losses["path gradient, no energy"] = refinement_loss(model, NoEnergy())
    cases = {name: step_of(model.flow, loss) for name, loss in losses.items()}
    timings = paired(cases, work=dict.fromkeys(cases, float(_BATCH)), rounds=options.rounds, seconds=0.5)
    results: dict[str, Any] = {"batch": _BATCH, "samples_per_second": {}, "rounds": {}}
    rows = []
    for name, one in timings.items():
        results["samples_per_second"][name] = 1e6 / one.median
        results["rounds"][name] = one.rounds
        relative = ratio(one, timings["likelihood"])
        rows.append((name, f"{1e-3 * one.median * _BATCH:.1f}", f"{1e6 / one.median:.0f}", f"{relative:.2f}"))
    columns = ("training step", "milliseconds", "samples a second", "over likelihood")
    report("training", f"alanine dipeptide, the demo's flow: steps of {_BATCH}", columns, rows, results)


if __name__ == "__main__":
    main()
