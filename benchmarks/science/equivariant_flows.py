"""Equivariant flows on DW4 and LJ13: likelihoods, entropies, effective sample sizes, and flows without symmetry.

    python -m benchmarks.science.equivariant_flows            # everything, some hours on one core; repeat to go on after a stop
    python -m benchmarks.science.equivariant_flows --small    # all stages in seconds, printed as JSON; the numbers mean nothing
    python -m benchmarks.science.equivariant_flows --samples  # reference samples only, LJ55 among them
    torchrun --nproc-per-node 2 -m benchmarks.science.equivariant_flows --systems LJ13  # trained by two processes

Published for comparison (arXiv 2306.15030, flow matching on a GPU): DW4 -log p 1.68 to 1.72 and effective sample size 87
to 92 %, LJ13 -15.8 to -16.1 and 40 to 58 %, all without the Gaussian constant.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbridge.core.training.processes import is_main_process
from flowbridge.flows.equivariant.flow_potential import EquivariantFlow
from flowbridge.workflows.stages import StageFolder

from ..harness import report, study
from .equivariance_compared import compared
from .equivariant_figures import Compared, draw_samples
from .equivariant_systems import CASES, VALIDATION, Case, evaluated, reference_samples, test_samples, trained_flow


def main() -> None:
    """Run the stages that are asked for, print their tables and write them to benchmarks/results."""
    parser = study("equivariant flows", "runs/equivariant_flows")
    parser.add_argument("--systems", nargs="+", default=["DW4", "LJ13"], choices=["DW4", "LJ13"])
    parser.add_argument("--samples", action="store_true", help="reference samples only, LJ55 too")
    parser.add_argument("--without-baselines", action="store_true")
    parser.add_argument("--draws", type=int, default=10_000, help="for the effective sample size")
    parser.add_argument("--seed", type=int, default=0)
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
    if not is_main_process():
        return
    if given.small:
        print(json.dumps(results, indent=1))
    elif given.samples:
        show("equivariant_flows_samples", results)
    else:
        for system in given.systems:
            show(f"equivariant_flows_{system}", of_one(system, results))


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
        samples = x[: -min(VALIDATION, len(x) // 2)]
        test = test_samples(name, case, output, seed + 101)
        model, training = trained_flow(name, case, samples, output, seed)
        found, picture = _evaluated_once(name, case, model, test, draws, output, seed + 2)
        if is_main_process():
            draw_samples(picture, output / f"equivariant_flows_{name}.png")
        results["flows"][name] = {
            "training_samples": len(samples),
            "test_samples": len(test),
            "parameters": training["parameters"],
            "training_seconds": training["wall_seconds"],
            **found,
        }
        if name == "DW4" and baselines:
            results["baselines"] = compared(case, samples, test[:1000], output, seed, small)
    return results


def _evaluated_once(
    name: str, case: Case, model: EquivariantFlow, test: Tensor, draws: int, output: Path, seed: int
) -> tuple[dict[str, Any], Compared]:
    """Return what ``evaluated`` says of a trained model, from its stage where it was asked before, and what is drawn of it."""
    digest = None if model.model_file is None else model.model_file.digest
    inputs = {"model": digest, "test": len(test), "draws": draws, "seed": seed}

    def work(folder: Path) -> dict[str, Any]:
        return evaluated(case, model, test, draws, seed, folder)

    stage = StageFolder.completed(output, f"evaluate-{name}", inputs, work)
    results = stage.results or {}
    results.pop("wall_seconds", None)
    with np.load(stage.folder / "draws.npz") as kept:
        samples, log_weights = torch.from_numpy(kept["samples"]), kept["log_weights"]
    return results, Compared(name, case.system, test, samples, log_weights, results["effective_sample_percent"])


def of_one(system: str, results: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to one system: each has a file of its own, which says what machine it ran on."""
    parts = {part: {system: results[part][system]} for part in ("samples", "flows")}
    return {"seed": results["seed"], **parts, "baselines": results["baselines"] if system == "DW4" else []}


def smaller(case: Case) -> Case:
    """Return a case whose stages take seconds."""
    training = case.training
    return replace(
        case,
        exchange=replace(case.exchange, chains=20, equilibration=20, thinning=1, frames=20),
        solver=case.solver.model_copy(update={"steps": 2}),
        training=training.model_copy(
            update={
                "matching": training.matching.model_copy(update={"steps": 10, "batch": 32, "pool": 64}),
                "path": tuple(
                    stage.model_copy(update={"steps": 2, "batch": 8, "solver_steps": 2}) for stage in training.path
                ),
                "compilation": "never",
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
        gap, least = CASES[system].asked
        floor = CASES[system].floor[0]
        constant = found["nll"] - found["nll_without_constant"]
        partition, percent = f"{CASES[system].log_partition[0]:.2f}", f"{found['effective_sample_percent']:.1f} %"
        likelihood = f"{found['nll_without_constant']:.3f} +- {found['nll_error']:.3f}"
        effort = f"{found['training_samples']} samples, {found['training_seconds']:.0f} s of training"
        lines = [
            ("flow", "", effort),
            ("-log p without constant", f"{floor:.2f} is the floor", likelihood),
            ("-log p with constant", f"{floor + constant:.2f} is the floor", f"{found['nll']:.3f}"),
            ("gap, paired", f"<= {gap}", f"{found['gap']:.3f} +- {found['gap_error']:.3f}"),
            ("effective sample size, unclipped", f">= {least:.0f} %", f"{percent} of {found['draws']}"),
            ("log partition function", partition, f"{found['log_partition']:.3f}"),
            ("asymmetry, float32", "<= 1e-5", f"{found['equivariance']['float32']:.1e}"),
            ("asymmetry, float64", "<= 1e-10", f"{found['equivariance']['float64']:.1e}"),
        ]
        rows += [[f"{system} {line[0]}", *line[1:]] for line in lines]
    for row in results["baselines"]:
        of = f"DW4, {row['field']}, {row['samples']} samples in {row['training']} orientation(s), -log p"
        rows.append(
            [of, "same, permuted, moved", ", ".join(f"{row[key]:.2f}" for key in ("same", "permuted", "moved"))]
        )
    report(name, "equivariant flows", ("", "asked", "measured"), rows, results)


if __name__ == "__main__":
    main()
