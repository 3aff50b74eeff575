"""The cost of privacy on images: digits of scikit-learn or MNIST classified, digits through an autoencoder.

Clipping norm and learning rate are tuned for either method alike, on seeds that the results do not use; as usual in such
tables, tuning is not on the ledger. Principal axes, where a task has them, are private and on it (DP-PCA).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flowbridge.forcefields.private.budget import PrivacyBudget, Release
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.feed_forward import (
    FeedForwardConfiguration,
    FeedForwardNetwork,
    task_losses,
)
from flowbridge.forcefields.private.statistics import private_principal_axes
from flowbridge.forcefields.private.training import train_privately
from flowbridge.forcefields.private.units import UnitData

from ..harness import done_once, mean_and_deviation, report
from .idx_files import read_mnist

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
DELTA = 1e-5
METHODS = ("dp_mac", "dp_sgd")
STEPS, BATCH = 100, 256
_TEST = 360
_FEW = 10  # steps of a run that shows only that everything works, for which the quick accountant will do
_TUNING_SEEDS = (1001, 1002)


class Task(NamedTuple):
    """A network and its figure of merit; ``sign`` is +1 where more is better.

    ``widths`` begin with the pixels, or with the private principal axes that they are projected on.
    """

    pixels: int
    widths: tuple[int, ...]
    activation: str
    kind: str
    sign: int
    centre: float
    steps: int
    batch: int
    grid: tuple[dict[str, float], ...]


def _grid(clips: tuple[float, ...], rates: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    return tuple({"clip": c, "learning_rate": r} for c, r in itertools.product(clips, rates))


TASKS = {
    "digits": Task(64, (64, 64, 10), "relu", "classification", 1, 0.3, STEPS, BATCH, _grid((0.5, 2.0), (0.02, 0.05))),
    "autoencoder": Task(
        64, (64, 48, 16, 48, 64), "tanh", "regression", -1, 0.3, STEPS, BATCH, _grid((0.3, 2.0), (0.005, 0.015))
    ),
    # 300 hidden units on 60 axes, as in arXiv 1910.06924; ten epochs.
    "mnist": Task(784, (60, 300, 10), "relu", "classification", 1, 0.13, 600, 1000, _grid((0.5, 2.0), (0.005, 0.02))),
}


class Split(NamedTuple):
    """Training data and test data of a seed."""

    train: UnitData
    inputs: Tensor
    targets: Tensor


def split(task: Task, seed: int) -> Split:
    """Return 1437 digits to train on and 360 to test on; pixels are scaled by their public range, 0 to 16."""
    pixels, digits = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels / 16.0, dtype=torch.float32)
    targets = torch.tensor(digits) if task.kind == "classification" else inputs
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    test, train = order[:_TEST], order[_TEST:]
    return Split(UnitData(inputs[train], targets[train]), inputs[test], targets[test])


def mnist_split(folder: Path) -> Split:
    """Return MNIST with its own division into training and test images."""
    (inputs, digits), (test_inputs, test_digits) = (read_mnist(folder, part) for part in ("train", "test"))
    train = UnitData(torch.from_numpy(inputs), torch.from_numpy(digits))
    return Split(train, torch.from_numpy(test_inputs), torch.from_numpy(test_digits))


def network(task: Task, seed: int) -> FeedForwardNetwork:
    """Return an untrained network, whose inputs are centred by a public constant."""
    settings = FeedForwardConfiguration.model_validate(
        {"inputs": task.pixels, "widths": task.widths, "activation": task.activation, "task": task.kind, "seed": seed}
    )
    model = FeedForwardNetwork(settings)
    model.standardise(torch.full((task.pixels,), task.centre), model.projection.clone())
    return model


def project(
    task: Task, model: FeedForwardNetwork, train: UnitData, noise_multiplier: float, seed: int
) -> list[Release]:
    """Let the network see private principal axes where the task has them, and return the releases for the ledger."""
    if task.widths[0] == task.pixels:
        return []
    centre = torch.full((task.pixels,), task.centre)
    found = private_principal_axes(train, task.widths[0], noise_multiplier, centre=centre, seed=seed)
    model.standardise(centre, found.axes.float())
    return [found.release]


@torch.no_grad()
def quality(task: Task, model: FeedForwardNetwork, data: Split) -> float:
    """Return the test accuracy in percent, or the mean square error of a pixel."""
    outputs = model.predict(data.inputs)
    if task.kind == "classification":
        return 100.0 * float((outputs.argmax(1) == data.targets).float().mean())
    return float((outputs - data.targets).square().mean())


def private_run(
    task: Task, data: Split, method: str, epsilon: float, seed: int, choice: Mapping[str, float], steps: int
) -> float:
    """Train within a budget, and return the quality."""
    model = network(task, seed)
    # Noise of the axes: 16, 8 and 4 at epsilon 0.5, 2 and 8, as in arXiv 1910.06924.
    before = project(task, model, data.train, 8.0 * (2.0 / epsilon) ** 0.5, seed)
    settings = PrivateTraining.model_validate(
        {"method": method, "steps": steps, "batch": min(task.batch, data.train.units // 5), "average": 0.9, **choice}
        | ({"coordinate_steps": 20} if method == "dp_mac" else {})
    )
    budget = PrivacyBudget(epsilon=epsilon, delta=DELTA, accountant="prv" if steps > _FEW else "rdp")
    train_privately(model, data.train, budget, settings, before=before, seed=seed)
    return quality(task, model, data)


def plain_run(task: Task, data: Split, seed: int, steps: int) -> float:
    """Train without privacy, and return the quality."""
    model = network(task, seed)
    project(task, model, data.train, 1e-6, seed)  # next to no noise
    optimiser = torch.optim.Adam(model.parameters(), lr=0.005)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(data.train.units, (128,), generator=generator)
        optimiser.zero_grad()
        outputs = model.predict(data.train.inputs[chosen])
        task_losses(outputs, data.train.targets[chosen], task.kind).mean().backward()
        optimiser.step()
    return quality(task, model, data)


def utility(
    name: str,
    output: Path,
    seeds: int,
    epsilons: tuple[float, ...],
    deadline: float,
    *,
    small: bool,
    mnist: Path | None = None,
) -> dict[str, Any]:
    """Tune, train over seeds, print the table, and return its numbers."""
    task = TASKS[name]
    whole = mnist_split(mnist) if mnist is not None else None
    grid, steps, plain_steps = (task.grid[:1], 3, 3) if small else (task.grid, task.steps, 15 * task.steps)
    tuning = _TUNING_SEEDS[:1] if small else _TUNING_SEEDS
    results: dict[str, dict[str, Any]] = {}

    def data(seed: int) -> Split:
        return whole if whole is not None else split(task, seed)

    plain = [
        done_once(output / f"plain-{seed}.json", lambda s=seed: plain_run(task, data(s), s, plain_steps), deadline)
        for seed in range(seeds)
    ]
    results["none"] = {"values": plain}
    for epsilon, method in itertools.product(epsilons, METHODS):

        def run(seed: int, choice: Mapping[str, float], m: str = method, e: float = epsilon) -> float:
            return private_run(task, data(seed), m, e, seed, choice, steps)

        scored = []
        for number, choice in enumerate(grid):
            files = [output / f"{method}-{epsilon:g}-tuning{number}-{seed}.json" for seed in tuning]
            found = [
                done_once(file, lambda s=s, c=choice: run(s, c), deadline)
                for file, s in zip(files, tuning, strict=True)
            ]
            scored.append(task.sign * statistics.mean(found))
        best = grid[scored.index(max(scored))]
        values = [
            done_once(output / f"{method}-{epsilon:g}-{seed}.json", lambda s=seed, c=best: run(s, c), deadline)
            for seed in range(seeds)
        ]
        results[f"{method} {epsilon:g}"] = {"values": values, "choice": dict(best)}
    _print(name, task, results, epsilons, seeds, small)
    return results


def _print(
    name: str, task: Task, results: Mapping[str, Any], epsilons: tuple[float, ...], seeds: int, small: bool
) -> None:
    classified = task.kind == "classification"
    digits = 1 if classified else 4
    rows = [
        [
            f"{epsilon:g}",
            *(mean_and_deviation(results[f"{method} {epsilon:g}"]["values"], digits) for method in METHODS),
        ]
        for epsilon in epsilons
    ]
    rows.append(["no privacy", mean_and_deviation(results["none"]["values"], digits), ""])
    what = "test accuracy, %" if classified else "mean square error of a pixel (0 to 1)"
    title = f"{name}, {what}: {seeds} seeds, delta {DELTA:g}"
    columns = ["epsilon", "DP-MAC", "DP-SGD"]
    report(f"private_training_{name}", title, columns, rows, dict(results), small=small)
