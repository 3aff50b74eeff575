"""Seconds an epoch of private training, of opacus' own engine and of plain training, in turns."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from opacus import PrivacyEngine

from flowbridge.core.training.trainer import Trainer
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.feed_forward import task_losses
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.training import PrivateObjective
from flowbridge.forcefields.private.units import UnitData

from ..harness import paired, ratio, report
from .private_images import BATCH, DELTA, METHODS, STEPS, TASKS, Task, network, split


def speed(rounds: int, *, small: bool) -> dict[str, Any]:
    """Time an epoch (every digit once on average) of each way to train, in turns."""
    task = TASKS["digits"]
    data = split(task, 0).train
    epoch = 1 if small else round(data.units / BATCH)
    budget = PrivacyBudget(epsilon=2.0, delta=DELTA)
    cases = {"no privacy": _plain_epoch(task, data, epoch), "opacus PrivacyEngine": _opacus_epoch(task, data, epoch)}
    for method in METHODS:
        settings = PrivateTraining.model_validate({"method": method, "steps": STEPS, "batch": BATCH})
        trainer = Trainer(PrivateObjective(network(task, 0), data, budget, settings, None, (), SeededNoise(0)))
        cases[method] = lambda t=trainer: [t.advance() for _ in range(epoch)]  # type: ignore[misc]
    timings = paired(cases, rounds=rounds)
    rows = [
        [name, f"{1e-6 * t.median:.4f}", f"{ratio(t, timings['opacus PrivacyEngine']):.2f}"]
        for name, t in timings.items()
    ]
    results = {name: {"seconds an epoch": 1e-6 * t.median} for name, t in timings.items()}
    title = f"Seconds an epoch, digits, batch {BATCH}"
    report("private_training_speed", title, ["", "seconds", "over opacus"], rows, results, small=small)
    return results


def _plain_epoch(task: Task, data: UnitData, steps: int) -> Any:
    model = network(task, 0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.005)

    def run() -> None:
        for _ in range(steps):
            chosen = torch.randint(data.units, (BATCH,))
            optimiser.zero_grad()
            task_losses(model.predict(data.inputs[chosen]), data.targets[chosen], task.kind).mean().backward()
            optimiser.step()

    return run


def _opacus_epoch(task: Task, data: UnitData, steps: int) -> Any:
    layers = [m for layer in network(task, 0).dense_layers for m in (layer, torch.nn.ReLU())][:-1]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.inputs, data.targets), batch_size=BATCH)
    model = torch.nn.Sequential(*layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its generator, which a timing does not need to be safe
        model, optimiser, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.005),
            data_loader=loader,
            noise_multiplier=2.0,
            max_grad_norm=1.0,
        )

    def run() -> None:
        for inputs, targets in itertools.islice(loader, steps):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimiser.step()

    return run
