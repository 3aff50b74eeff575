"""Many audits of the real mechanisms of private training, and of mechanisms broken on purpose."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbridge.forcefields.private.audit import CanaryAttack
from flowbridge.forcefields.private.budget import PrivacyBudget
from flowbridge.forcefields.private.configuration import PrivateTraining
from flowbridge.forcefields.private.learning.auxiliary_coordinates import AuxiliaryCoordinates
from flowbridge.forcefields.private.learning.clipping import Contributions
from flowbridge.forcefields.private.learning.feed_forward import FeedForwardConfiguration, FeedForwardNetwork
from flowbridge.forcefields.private.noise import SeededNoise
from flowbridge.forcefields.private.units import UnitBatch, UnitData

from ..harness import OutOfTime, done_once, report


class _Silent(SeededNoise):
    """A mechanism that forgot its noise."""

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


class _Unclipped(AuxiliaryCoordinates):
    """A mechanism that forgot to clip."""

    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        return super().contributions(batch, [1e9] * len(thresholds))


def attacks() -> dict[str, CanaryAttack]:
    """Return the attack on both methods, and on mechanisms broken on purpose; epsilon 1 is on the ledger."""
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
    broken = partial(_Unclipped, order=1, coordinate_steps=0, coordinate_rate=0.1)
    return {
        "DP-MAC": CanaryAttack(model, data, canary, budget, mac),
        "without noise": CanaryAttack(model, data, canary, budget, mac, noise=_Silent),
        "without clipping": CanaryAttack(model, data, canary, budget, mac, broken),  # type: ignore[arg-type]
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
                bounds.append(done_once(file, lambda a=attack, n=number: _bound(a, trainings, n), deadline))
            except OutOfTime:  # as many audits as there was time for
                break
        if not bounds:
            continue
        results[name] = {"bounds": bounds, "above": sum(bound > attack.budget.epsilon for bound in bounds)}
    rows = []
    for name, found in results.items():
        bounds = found["bounds"]
        largest, above = f"{max(bounds):.2f}", f"{found['above']} of {len(bounds)}"
        rows.append([name, "1", f"{statistics.median(bounds):.2f}", largest, above])
    title = f"Audits of {trainings} trainings with the canary and {trainings} without; lower bounds of epsilon, 95 % confidence"
    columns = ["mechanism", "stated", "median bound", "largest", "above the stated"]
    report("private_training_audit", title, columns, rows, results, small=small)
    return results
