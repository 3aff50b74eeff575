"""Equivariant flows on DW4 and LJ13: likelihoods against entropies, effective sample sizes, and flows without symmetry beside.

    python -m benchmarks.science.equivariant_flows            # everything, some hours on one core; repeat to go on after a stop
    python -m benchmarks.science.equivariant_flows --small    # all stages in seconds, printed as JSON; the numbers mean nothing
    python -m benchmarks.science.equivariant_flows --samples  # reference samples only, LJ55 among them

Published beside (arXiv 2306.15030, flow matching on a GPU): DW4 -log p 1.68 to 1.72 and effective sample size 87 to 92 %, LJ13
-15.8 to -16.1 and 40 to 58 %, all without the Gaussian constant.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow, FieldSettings
from flowbridge.flows.equivariant.graph_field import GraphFieldSettings
from flowbridge.flows.equivariant.kernel_field import KernelFieldSettings
from flowbridge.flows.equivariant.network_field import NetworkFieldSettings
from flowbridge.flows.equivariant.training import ContinuousFlowTraining, FlowMatchingStage
from torch import Tensor

from flowbridge.workflows.stages import Stage

from ..harness import report
from .equivariant_systems import (
    CASES,
    TEST,
    Case,
    judged,
    moved,
    negative_log_likelihood,
    reference_samples,
    trained_flow,
)

_BASELINES: dict[str, FieldSettings] = {
    "graph": GraphFieldSettings(hidden=32, radial=32, longest=10.0, crowding=1.0),
    "kernel": KernelFieldSettings(distances=50, longest=10.0),
    "network": NetworkFieldSettings(hidden=128, layers=3),
}
_BASELINE_SAMPLES = (100, 1000)
_BASELINE_TRAINING = ContinuousFlowTraining(
    matching=FlowMatchingStage(steps=400, batch=256, learning_rate=4e-3, average=0.99)
)


def main() -> None:
    """Run the stages that are asked for, print their tables and write them to benchmarks/results."""
    parser = argparse.ArgumentParser(description="equivariant flows")
    parser.add_argument("--output", type=Path, default=Path("runs/equivariant_flows"), help="stages, models, samples")
    parser.add_argument("--systems", nargs="+", default=["DW4", "LJ13"], choices=["DW4", "LJ13"])
    parser.add_argument("--samples", action="store_true", help="reference samples only, LJ55 too")
    parser.add_argument("--without-baselines", action="store_true")
    parser.add_argument("--draws", type=int, default=10_000, help="for the effective sample size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="all stages in seconds, to see that they work")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = run(
        list(CASES) if given.samples else given.systems,
        given.output / "small" if given.small else given.output,
        given.seed,
        draws=200 if given.small else given.draws,
        small=given.small,
        train=not given.samples,
        baselines=not given.without_baselines,
    )
    if given.small:
        print(json.dumps(results, indent=1))
    else:
        show("equivariant_flows_samples" if given.samples else "equivariant_flows", results)


def run(
    systems: list[str], output: Path, seed: int, *, draws: int, small: bool, train: bool = True, baselines: bool = True
) -> dict[str, Any]:
    """Return the numbers of all tables; what is finished in ``output`` is not done again."""
    results: dict[str, Any] = {"seed": seed, "samples": {}, "flows": {}, "baselines": []}
    for name in systems:
        case = smaller(CASES[name]) if small else CASES[name]
        x, results["samples"][name] = reference_samples(name, case, output, seed + 1)
        if not train:
            continue
        held_out = min(TEST, len(x) // 2)
        samples, test = x[:-held_out], x[-held_out:]
        model, training = trained_flow(name, case, samples, output, seed)
        results["flows"][name] = {
            "training_samples": len(samples),
            "test_samples": len(test),
            "parameters": training["parameters"],
            "training_seconds": training["wall_seconds"],
            **_judged_once(name, case, model, test, draws, output, seed + 2),
        }
        if name == "DW4" and baselines:
            results["baselines"] = compared(case, samples, test[:1000], output, seed, small)
    return results


def _judged_once(
    name: str, case: Case, model: EquivariantFlow, test: Tensor, draws: int, output: Path, seed: int
) -> dict[str, Any]:
    """Return what ``judged`` says of a trained model, from its stage where it was asked before."""
    digest = None if model.model_file is None else model.model_file.digest
    inputs = {"model": digest, "test": len(test), "draws": draws, "seed": seed}
    stage = Stage.completed(output, f"judge-{name}", inputs, lambda _: judged(case, model, test, draws, seed))
    results = stage.results or {}
    results.pop("wall_seconds", None)
    return results


def compared(case: Case, samples: Tensor, test: Tensor, output: Path, seed: int, small: bool) -> list[dict[str, Any]]:
    """Return test likelihoods of three fields with few and many samples, on a test set as it is and moved by symmetries."""
    rows = []
    for count in (50,) if small else _BASELINE_SAMPLES:
        # Spread over the run, since samples that follow each other are of the same chains.
        chosen = samples[torch.linspace(0, len(samples) - 1, count).long()]
        row: dict[str, Any] = {"samples": count}
        for name, settings in _BASELINES.items():
            training = case.training if small else _BASELINE_TRAINING
            matching = training.matching.model_copy(update={"alignment": name != "network"})
            training = training.model_copy(update={"matching": matching})
            part = replace(case, training=training)
            model, _ = trained_flow(f"DW4-{name}-{count}", part, chosen, output, seed, settings)
            constant = model.flow.prior.gaussian_constant
            row[name] = float(negative_log_likelihood(model, test).mean()) - constant
            row[f"{name}_moved"] = float(negative_log_likelihood(model, moved(test, seed)).mean()) - constant
        rows.append(row)
    return rows


def smaller(case: Case) -> Case:
    """Return a case whose stages take seconds."""
    training = case.training
    return replace(
        case,
        exchange=replace(case.exchange, chains=20, equilibration=20, thinning=1, frames=20),
        training=training.model_copy(
            update={
                "matching": training.matching.model_copy(update={"steps": 10, "batch": 32, "pool": 64}),
                "likelihood": tuple(
                    stage.model_copy(update={"steps": 2, "batch": 8, "solver_steps": 2})
                    for stage in training.likelihood
                ),
            }
        ),
    )


def show(name: str, results: dict[str, Any]) -> None:
    """Print the tables, and write the results under ``name``."""
    rows = [["reference samples", "", ""]]
    for system, found in results["samples"].items():
        value, error = found["virial"]
        rows.append([f"{system} virial", f"{found['degrees_of_freedom']}", f"{value:.2f} +- {error:.2f}"])
        rows.append([f"{system} mean energy", "", f"{found['energy'][0]:.2f} +- {found['energy'][1]:.2f}"])
    for system, found in results["flows"].items():
        gap, share = CASES[system].asked
        floor = CASES[system].floor[0]
        constant = found["nll"] - found["nll_without_constant"]
        rows += [
            [
                f"{system} flow",
                "",
                f"{found['training_samples']} samples, {found['training_seconds']:.0f} s of training",
            ],
            [
                f"{system} -log p without constant",
                f"{floor:.2f} is the floor",
                f"{found['nll_without_constant']:.3f} +- {found['nll_error']:.3f}",
            ],
            [f"{system} -log p with constant", f"{floor + constant:.2f} is the floor", f"{found['nll']:.3f}"],
            [f"{system} gap, paired", f"<= {gap}", f"{found['gap']:.3f} +- {found['gap_error']:.3f}"],
            [
                f"{system} effective sample size, unclipped",
                f">= {share:.0f} %",
                f"{found['effective_sample_percent']:.1f} % of {found['draws']}",
            ],
            [
                f"{system} log partition function",
                f"{CASES[system].log_partition[0]:.2f}",
                f"{found['log_partition']:.3f}",
            ],
        ]
        rows += [
            [f"{system} asymmetry, {dtype}", most, f"{found['equivariance'][dtype]:.1e}"]
            for dtype, most in (("float32", "<= 1e-5"), ("float64", "<= 1e-10"))
        ]
    for row in results["baselines"]:
        rows.append([f"DW4, {row['samples']} samples: test -log p", "", "moved by symmetries"])
        rows += [[f"    {field}", f"{row[field]:.2f}", f"{row[f'{field}_moved']:.2f}"] for field in _BASELINES]
    report(name, "equivariant flows", ("", "asked", "measured"), rows, results)


if __name__ == "__main__":
    main()
