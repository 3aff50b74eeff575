"""What privacy costs on scikit-learn's digits, and whether bills hold: ``python -m benchmarks.science.private_training``.

    python -m benchmarks.science.private_training digits|autoencoder|speed|audit [--small] [--minutes M]

``digits``: test accuracy against epsilon for DP-MAC, DP-SGD and no privacy; ``autoencoder``: reconstruction error; ``speed``:
seconds an epoch, in turns with opacus' own engine; ``audit``: lower bounds from canaries in many audits of the real mechanism
and of broken ones. Every run is kept in ``--output`` and not done again; ``--minutes`` stops in time. Clipping norm and
learning rate are tuned for either method alike, on seeds that the results do not use; as usual in such tables, tuning is not
billed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flowbridge.forcefields.private.audit import CanaryAttack
from flowbridge.forcefields.private.auxiliary_coordinates import AuxiliaryCoordinates
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.clipping import Contributions
from flowbridge.forcefields.private.feed_forward import FeedForwardConfiguration, FeedForwardNetwork, task_losses
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.training import PrivateTrainer, PrivateTraining, train_privately
from flowbridge.forcefields.private.units import UnitBatch, UnitData
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import Tensor

from flowbridge.workflows.stages import write_json

from ..harness import paired, ratio, report

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
DELTA = 1e-5
METHODS = ("dp_mac", "dp_sgd")
_TEST, _STEPS, _BATCH = 360, 100, 256
_TUNING_SEEDS = (1001, 1002)
_GRIDS: dict[str, tuple[dict[str, float], ...]] = {
    "digits": tuple({"clip": c, "learning_rate": r} for c, r in itertools.product((0.5, 2.0), (0.02, 0.05))),
    "autoencoder": tuple({"clip": c, "learning_rate": r} for c, r in itertools.product((0.3, 2.0), (0.005, 0.015))),
}


class Task(NamedTuple):
    """A network and what it is judged by; ``sign`` is +1 where more is better."""

    widths: tuple[int, ...]
    activation: str
    kind: str
    sign: int


_TASKS = {
    "digits": Task((64, 64, 10), "relu", "classification", 1),
    "autoencoder": Task((64, 48, 16, 48, 64), "tanh", "regression", -1),
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


def network(task: Task, seed: int) -> FeedForwardNetwork:
    """Return an untrained network, whose inputs are centred by a public constant."""
    settings = FeedForwardConfiguration.model_validate(
        {"inputs": 64, "widths": task.widths, "activation": task.activation, "task": task.kind, "seed": seed}
    )
    model = FeedForwardNetwork(settings)
    model.standardise(torch.full((64,), 0.3), torch.eye(64))
    return model


@torch.no_grad()
def quality(task: Task, model: FeedForwardNetwork, data: Split) -> float:
    """Return the test accuracy in percent, or the mean square error of a pixel."""
    outputs = model.predict(data.inputs)
    if task.kind == "classification":
        return 100.0 * float((outputs.argmax(1) == data.targets).float().mean())
    return float((outputs - data.targets).square().mean())


def private_run(task: Task, method: str, epsilon: float, seed: int, choice: Mapping[str, float], steps: int) -> float:
    """Train within a budget, and return the quality."""
    data, model = split(task, seed), network(task, seed)
    settings = PrivateTraining.model_validate(
        {"method": method, "steps": steps, "batch": _BATCH, "average": 0.9, "coordinate_steps": 20, **choice}
    )
    train_privately(model, data.train, PrivacyBudget(epsilon=epsilon, delta=DELTA), settings, seed=seed)
    return quality(task, model, data)


def plain_run(task: Task, seed: int, steps: int) -> float:
    """Train without privacy, and return the quality."""
    data, model = split(task, seed), network(task, seed)
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
    name: str, output: Path, seeds: int, epsilons: tuple[float, ...], deadline: float, *, small: bool
) -> dict[str, Any]:
    """Tune, train over seeds, print the table, and return its numbers."""
    task = _TASKS[name]
    grid, steps = (_GRIDS[name][:1], 3) if small else (_GRIDS[name], _STEPS)
    results: dict[str, dict[str, Any]] = {}
    plain = [
        _kept(output / f"plain-{seed}.json", lambda s=seed: plain_run(task, s, 3 if small else 1500), deadline)
        for seed in range(seeds)
    ]
    results["none"] = {"values": plain}
    for epsilon, method in itertools.product(epsilons, METHODS):

        def run(seed: int, choice: Mapping[str, float], m: str = method, e: float = epsilon) -> float:
            return private_run(task, m, e, seed, choice, steps)

        scored = []
        for number, choice in enumerate(grid):
            files = [output / f"{method}-{epsilon:g}-tuning{number}-{seed}.json" for seed in _TUNING_SEEDS]
            found = [
                _kept(file, lambda s=s, c=choice: run(s, c), deadline)
                for file, s in zip(files, _TUNING_SEEDS[: 1 if small else 2], strict=False)
            ]
            scored.append(task.sign * statistics.mean(found))
        best = grid[scored.index(max(scored))]
        values = [
            _kept(output / f"{method}-{epsilon:g}-{seed}.json", lambda s=seed, c=best: run(s, c), deadline)
            for seed in range(seeds)
        ]
        results[f"{method} {epsilon:g}"] = {"values": values, "choice": dict(best)}
    _print_utility(name, results, epsilons, seeds, small)
    return results


def _print_utility(name: str, results: Mapping[str, Any], epsilons: tuple[float, ...], seeds: int, small: bool) -> None:
    digits = 1 if name == "digits" else 4
    rows = [
        [f"{epsilon:g}", *(_spread(results[f"{method} {epsilon:g}"]["values"], digits) for method in METHODS)]
        for epsilon in epsilons
    ]
    rows.append(["no privacy", _spread(results["none"]["values"], digits), ""])
    what = "test accuracy, %" if name == "digits" else "mean square error of a pixel (0 to 1)"
    title = f"Digits, {what}: {seeds} seeds, delta {DELTA:g}"
    report(
        f"private_training_{name}" + ("_small" if small else ""),
        title,
        ["epsilon", "DP-MAC", "DP-SGD"],
        rows,
        dict(results),
    )


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


class OutOfTime(Exception):
    """The minutes asked for are over; the same command continues."""


def _kept(file: Path, work: Any, deadline: float) -> float:
    if not file.is_file():
        if time.monotonic() > deadline:
            raise OutOfTime
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"value": work()})
    return float(json.loads(file.read_text())["value"])


def speed(rounds: int, *, small: bool) -> dict[str, Any]:
    """Time an epoch (every digit once on average) of each way to train, in turns."""
    task = _TASKS["digits"]
    data = split(task, 0).train
    epoch = 1 if small else round(data.units / _BATCH)
    budget = PrivacyBudget(epsilon=2.0, delta=DELTA)
    cases = {"no privacy": _plain_epoch(task, data, epoch), "opacus PrivacyEngine": _opacus_epoch(task, data, epoch)}
    for method in METHODS:
        settings = PrivateTraining.model_validate({"method": method, "steps": _STEPS, "batch": _BATCH})
        trainer = PrivateTrainer(network(task, 0), data, budget, settings, None, (), SeededNoise(0))
        cases[method] = lambda t=trainer: [t.advance() for _ in range(epoch)]  # type: ignore[misc]
    timings = paired(cases, rounds=rounds)
    rows = [
        [name, f"{1e-6 * t.median:.4f}", f"{ratio(t, timings['opacus PrivacyEngine']):.2f}"]
        for name, t in timings.items()
    ]
    results = {name: {"seconds an epoch": 1e-6 * t.median} for name, t in timings.items()}
    title = f"Seconds an epoch, digits, batch {_BATCH}"
    report("private_training_speed" + ("_small" if small else ""), title, ["", "seconds", "over opacus"], rows, results)
    return results


def _plain_epoch(task: Task, data: UnitData, steps: int) -> Any:
    model = network(task, 0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.005)

    def run() -> None:
        for _ in range(steps):
            chosen = torch.randint(data.units, (_BATCH,))
            optimiser.zero_grad()
            task_losses(model.predict(data.inputs[chosen]), data.targets[chosen], task.kind).mean().backward()
            optimiser.step()

    return run


def _opacus_epoch(task: Task, data: UnitData, steps: int) -> Any:
    layers = [m for layer in network(task, 0).dense_layers for m in (layer, torch.nn.ReLU())][:-1]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.inputs, data.targets), batch_size=_BATCH)
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


class _Silent(SeededNoise):
    """A mechanism that forgot its noise."""

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


class _Unclipped(AuxiliaryCoordinates):
    """A mechanism that forgot to clip."""

    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        return super().contributions(batch, [1e9] * len(thresholds))


def attacks() -> dict[str, CanaryAttack]:
    """Return the attack on both methods, and on mechanisms broken on purpose; epsilon 1 is on the bill."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    inputs[:, 2] = 0.0  # where the canary is alone
    data = UnitData(inputs, (inputs[:, 0] > 0.0).long())

    def model() -> FeedForwardNetwork:
        return FeedForwardNetwork(FeedForwardConfiguration(inputs=3, widths=(3, 2)))

    loud = torch.tensor([[0.0, 0.0, 30.0]])
    canary = UnitData(loud, model().predict(loud).argmin(1))
    budget = PrivacyBudget(epsilon=1.0, delta=1e-3, accountant="prv")
    settings = PrivateTraining(steps=4, batch=30, learning_rate=1e-3, coordinate_steps=0)
    mac = settings.model_copy(update={"method": "dp_mac"})
    return {
        "DP-MAC": CanaryAttack(model, data, canary, budget, mac),
        "without noise": CanaryAttack(model, data, canary, budget, mac, noise=_Silent),
        "without clipping": CanaryAttack(
            model,
            data,
            canary,
            budget,
            mac,
            learner=lambda m: _Unclipped(m, 1, 0, 0.1),  # type: ignore[arg-type]
        ),
        "DP-SGD": CanaryAttack(model, data, canary, budget, settings),
    }


def _bound(attack: CanaryAttack, trainings: int, number: int) -> float:
    return attack.run(trainings, seed=100_000 * number).epsilon_lower


def audit(output: Path, audits: int, trainings: int, deadline: float, *, small: bool) -> dict[str, Any]:
    """Audit every mechanism many times; print the table; return its numbers."""
    results: dict[str, Any] = {}
    for name, attack in attacks().items():
        count = audits if name.startswith("DP") else max(audits // 5, 1)
        bounds: list[float] = []
        for number in range(count):
            file = output / f"{name.replace(' ', '-')}-{trainings}-{number}.json"
            try:
                bounds.append(_kept(file, lambda a=attack, n=number: _bound(a, trainings, n), deadline))
            except OutOfTime:  # as many audits as there was time for
                break
        if not bounds:
            continue
        results[name] = {"bounds": bounds, "above": sum(bound > attack.budget.epsilon for bound in bounds)}
    rows = [
        [
            name,
            "1",
            f"{statistics.median(r['bounds']):.2f}",
            f"{max(r['bounds']):.2f}",
            f"{r['above']} of {len(r['bounds'])}",
        ]
        for name, r in results.items()
    ]
    title = f"Audits of {trainings} trainings with the canary and {trainings} without; lower bounds of epsilon, 95 % confidence"
    columns = ["mechanism", "stated", "median bound", "largest", "above the stated"]
    report("private_training_audit" + ("_small" if small else ""), title, columns, rows, results)
    return results


def _parts(arguments: argparse.Namespace) -> Iterator[str]:
    yield from ([arguments.part] if arguments.part else ["digits", "autoencoder", "speed", "audit"])


def main(words: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["digits", "autoencoder", "speed", "audit"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--audits", type=int, default=100)
    parser.add_argument("--trainings", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/private_training"))
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60.0 * arguments.minutes
    folder = arguments.output / ("small" if arguments.small else "full")
    try:
        for part in _parts(arguments):
            if part == "speed":
                speed(2 if arguments.small else 9, small=arguments.small)
            elif part == "audit":
                count, trainings = (1, 20) if arguments.small else (arguments.audits, arguments.trainings)
                audit(folder / "audit", count, trainings, deadline, small=arguments.small)
            else:
                seeds = 1 if arguments.small else arguments.seeds
                chosen = (8.0,) if arguments.small else tuple(arguments.epsilons)
                utility(part, folder / part, seeds, chosen, deadline, small=arguments.small)
    except OutOfTime:
        print(f"{arguments.minutes:g} minutes are over: the same command continues from {folder}")


if __name__ == "__main__":
    main()
