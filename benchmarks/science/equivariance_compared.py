"""Fields with and without symmetries on few samples in one orientation: what each knows of turned and permuted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbridge.flows.equivariant.alignment import aligned_to
from flowbridge.flows.equivariant.fields.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.fields.kernel_field import KernelFieldSettings
from flowbridge.flows.equivariant.fields.network_field import NetworkFieldSettings
from flowbridge.flows.equivariant.flow_potential import FieldSettings
from flowbridge.flows.equivariant.mean_free import without_mean
from flowbridge.flows.equivariant.training import ContinuousFlowTraining, FlowMatchingStage

from .equivariant_systems import Case, moved, negative_log_likelihood, trained_flow

FIELDS: dict[str, FieldSettings] = {
    "graph": GraphFieldSettings(hidden=32, radial=32, longest=10.0, crowding=1.0),
    "kernel": KernelFieldSettings(distances=50, longest=10.0),
    "network": NetworkFieldSettings(hidden=128, layers=3),
}
COUNTS = (100, 1000, 10_000)
_TRAINING = ContinuousFlowTraining(matching=FlowMatchingStage(steps=500, batch=256, learning_rate=4e-3, average=0.99))


def compared(case: Case, samples: Tensor, test: Tensor, output: Path, seed: int, small: bool) -> list[dict[str, Any]]:
    """Return, for each field, size of the training set and kind of it, -log p without constant of three test sets.

    Training sets are in ``one`` orientation and order of the particles, as near to the first sample as rotations, reflections
    and permutations allow, or in ``all``, as they were sampled. Test sets: ``same``, in that one orientation and order;
    ``permuted``; ``moved``, permuted and turned. A density that need not care for all images of a configuration can be
    higher on one of them than an invariant one, so ``same`` flatters the field without symmetries.
    """
    standard = without_mean(test[:1])
    same = in_one_orientation(test, standard)
    tests = {"same": same, "permuted": moved(same, seed, turned=False), "moved": moved(same, seed)}
    rows = []
    for count in (50,) if small else COUNTS:
        # Spread over the run, since samples that follow each other are of the same chains.
        chosen = samples[torch.linspace(0, len(samples) - 1, count).long()]
        sets = {"one": in_one_orientation(chosen, standard), "all": chosen}
        for name, settings in FIELDS.items():
            for kind in ("one", "all") if name == "network" else ("one",):
                training = case.training if small else _TRAINING
                matching = training.matching.model_copy(update={"alignment": name != "network"})
                part = replace(case, training=training.model_copy(update={"matching": matching, "path": ()}))
                label = f"DW4-{name}-{count}-{kind}"
                model, _ = trained_flow(label, part, sets[kind], output, seed, settings)
                constant = model.flow.prior.gaussian_constant
                found = {
                    key: float(negative_log_likelihood(part, model, x).mean()) - constant for key, x in tests.items()
                }
                rows.append({"samples": count, "field": name, "training": kind, **found})
    return rows


def in_one_orientation(x: Tensor, standard: Tensor) -> Tensor:
    """Return configurations ``(S, N, D)`` turned and permuted to be near to ``standard`` ``(1, N, D)``."""
    centred = without_mean(x)
    return aligned_to(standard.to(x.dtype).expand_as(x).contiguous(), centred, rounds=5)
