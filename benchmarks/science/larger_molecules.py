"""Molecules larger than any that the builder was taught with: reinforcement against imitation.

    python -m benchmarks.science.larger_molecules          # nine and ten heavy atoms; minutes of one core, resumable
    python -m benchmarks.science.larger_molecules --small  # seconds

The builder that comes with flowbridge learned from at most seven heavy atoms. It is reinforced on the formulas by energies
of GFN2-xTB after a coarse relaxation. Before, between and after, molecules are built with seeds of their own and relaxed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbridge.calculators.molecule_evaluator import MoleculeEvaluator
from flowbridge.core.execution.progress import track
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.training.reinforcement import Reinforcement, ReinforcementStage
from flowbridge.workflows.figure_style import REWEIGHTED, drawn
from flowbridge.workflows.molecules.building import load_builder
from flowbridge.workflows.molecules.results import IsomerResults
from flowbridge.workflows.molecules.teaching import COARSE_RELAXATION

from ..harness import report, study


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        formulas: formulas of the molecules, in equal parts.
        count: molecules of an evaluation.
        every: rounds between evaluations.
        reinforcement: its stage.
    """

    formulas: tuple[str, ...] = ("C7H14O2", "C8H16O", "C7H13NO", "C8H14O2")
    count: int = 96
    every: int = 15
    reinforcement: ReinforcementStage = field(
        default_factory=lambda: ReinforcementStage(
            iterations=60, molecules=64, learning_rate=1e-4, energy_scale=1.0, imitation=0.05
        )
    )


SMALL = Plan(("C2H6O", "CH4O"), 4, 1, ReinforcementStage(iterations=1, molecules=4))


@dataclass(frozen=True)
class RelaxedMolecules:
    """Relaxed molecules after some rounds: which are valid ``(B,)``, and their energies ``(B,)`` in eV by formula."""

    rounds: int
    valid: list[bool]
    energies: list[float]
    formulas: list[str]


def evaluated(builder: MoleculeBuilder, rounds: int, plan: Plan, evaluator: MoleculeEvaluator) -> RelaxedMolecules:
    """Build with seeds of their own, relax, and return what came of it."""
    formulas = [Formula.parse(plan.formulas[index % len(plan.formulas)]) for index in range(plan.count)]
    built = builder.sample(formulas, plan.count, torch.Generator().manual_seed(90_000 + rounds))
    molecules = [built.molecule(index) for index in range(plan.count)]
    found, valid, energies = IsomerResults(), [], []
    for molecule in track(molecules, f"relaxing, round {rounds}", plan.count):
        verdict = evaluator([molecule])[0]
        valid.append(found.add(molecule[0], verdict) is not None)
        energies.append(verdict.energy if verdict.energy is not None and valid[-1] else math.nan)
    return RelaxedMolecules(rounds, valid, energies, [str(formula) for formula in formulas])


def above_lowest(evaluations: list[RelaxedMolecules]) -> list[np.ndarray]:
    """Return energies in eV an atom above the lowest that any evaluation found of the formula, valid molecules only."""
    lowest: dict[str, float] = {}
    for each in evaluations:
        for formula, energy in zip(each.formulas, each.energies, strict=True):
            if math.isfinite(energy):
                lowest[formula] = min(energy, lowest.get(formula, math.inf))
    return [
        np.array(
            [
                (energy - lowest[formula]) / sum(Formula.parse(formula).counts)
                for formula, energy in zip(each.formulas, each.energies, strict=True)
                if math.isfinite(energy)
            ]
        )
        for each in evaluations
    ]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def draw(points: list[dict[str, Any]], file: Path) -> None:
    """Draw validity and energies against rounds."""
    rounds = [point["rounds"] for point in points]
    with drawn(file, 3.2) as figure:
        panels = figure.subplots(1, 2)
        for axes, key, label in zip(
            panels, ("valid", "above"), ("valid after relaxation, %", "eV an atom above the lowest"), strict=True
        ):
            means, errors = zip(*(point[key] for point in points), strict=True)
            scale = 100.0 if key == "valid" else 1.0
            axes.errorbar(
                rounds, scale * np.array(means), scale * np.array(errors), color=REWEIGHTED, marker="o", capsize=3
            )
            axes.set(xlabel="rounds of reinforcement (0: imitation)", ylabel=label)
            axes.set_xticks(rounds)
            axes.set_ylim(bottom=0.0)
        panels[0].set_ylim(0.0, 100.0)


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, write results and figure."""
    parser = study(__doc__.splitlines()[0], "runs/molecules")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan, name = (SMALL, "larger_molecules_small") if options.small else (Plan(), "larger_molecules")
    folder = options.output / name
    folder.mkdir(parents=True, exist_ok=True)
    builder, _ = load_builder(None)
    relaxing = MoleculeEvaluator("gfn2", file=folder / "relaxed.sqlite")
    # Energies of molecules as built say more of their strain than of which isomers they are: rewards are of relaxed ones.
    rewarding = MoleculeEvaluator("gfn2", COARSE_RELAXATION, file=folder / "rewards.sqlite")
    formulas = [Formula.parse(text) for text in plan.formulas]
    evaluations = [evaluated(builder, 0, plan, relaxing)]
    for rounds in range(plan.every, plan.reinforcement.iterations + 1, plan.every):
        # A training of its own for each point, that goes on from the file of the last: the numbers are those of one.
        stage = plan.reinforcement.model_copy(update={"iterations": rounds})
        begin, _ = load_builder(None)
        training = Reinforcement(begin, formulas, rewarding, stage, seed=options.seed)
        curve = list(track(training.rounds(folder / "reinforcement.safetensors"), "reinforcement", rounds))
        evaluations.append(evaluated(begin, rounds, plan, relaxing))
    points = [
        {
            "rounds": each.rounds,
            "valid": mean_and_error(np.array(each.valid, dtype=float)),
            "above": mean_and_error(above),
        }
        for each, above in zip(evaluations, above_lowest(evaluations), strict=True)
    ]
    rows = []
    for point in points:
        cells = [(scale * point[key][0], scale * point[key][1]) for key, scale in (("valid", 100.0), ("above", 1.0))]
        rows.append([str(point["rounds"]), *(f"{mean:.3g} ± {error:.2g}" for mean, error in cells)])
    draw(points, folder / "larger_molecules.png")
    results = {
        "formulas": plan.formulas,
        "seed": options.seed,
        "points": [
            {"rounds": p["rounds"], **{k: [v if math.isfinite(v) else None for v in p[k]] for k in ("valid", "above")}}
            for p in points
        ],
        "curve": [list(values) for values in curve],
    }
    report(name, f"{', '.join(plan.formulas)}", ["rounds", "valid, %", "eV an atom above"], rows, results)


if __name__ == "__main__":
    main()
