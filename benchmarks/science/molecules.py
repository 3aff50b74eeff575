"""Molecules of held-out formulas: what builders find for their energy evaluations, against enumeration and simpler ways.

    python -m benchmarks.science.molecules              # ten formulas, five ways, 400 evaluations each: ten minutes of CPU
    python -m benchmarks.science.molecules --evaluations 1000
    python -m benchmarks.science.molecules --small      # seconds: everything runs, little is found

Every way proposes molecules, which GFN2-xTB relaxes until the evaluations are spent. The reference is the relaxation of
all enumerated isomers. "Low" are isomers within 1 eV of the lowest enumerated one. Everything evaluated is kept in the
output folder, and the command goes on from there. The builder that comes with flowbridge is the imitation; the
reinforced ones are trained on other formulas with single-point energies, which are counted apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowbridge.calculators.molecule_judge import JudgeSettings, MoleculeJudge
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.reinforcement import Reinforcement, ReinforcementStage

from flowbridge.molecules.building import Harvest, load_builder
from flowbridge.molecules.isomer_database import IsomerRequest, StoredIsomer, make_isomers, read_isomers
from flowbridge.workflows.progress import track

from ..harness import report
from .molecule_proposals import Proposals, from_builder, random_isomers, random_placement

HELD_OUT = ("C4H8O", "C3H6O2", "C5H8", "C3H7NO", "C3H5FO", "C5H10O", "C6H10", "C4H8O2", "C7H14", "C6H12O")
"""Five to seven heavy atoms; no isomer of them is among what the builder was taught with."""

PRACTICE = ("C4H6O", "C4H10O", "C3H5NO", "C3H8O2", "C4H7N", "C5H12O", "C4H6O2", "C4H7FO", "C6H12", "C5H9N")
"""Formulas that builders are reinforced on, none of them held out."""

WAYS = ("imitation and reinforcement", "imitation", "reinforcement", "random placement", "RDKit's random isomers")
_LOW = 1.0  # eV
_SAME = 0.02  # eV; a better conformer of the same isomer is no other minimum


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        formulas: held out.
        practice: reinforced on.
        evaluations: of energies for each formula and way.
        reinforcement: its stage.
    """

    formulas: tuple[str, ...] = HELD_OUT
    practice: tuple[str, ...] = PRACTICE
    evaluations: int = 400
    reinforcement: ReinforcementStage = field(
        default_factory=lambda: ReinforcementStage(
            iterations=40, molecules=100, learning_rate=1e-4, energy_scale=1.5, imitation=0.05
        )
    )


SMALL = Plan(
    formulas=("C2H6O",),
    practice=("CH4O",),
    evaluations=60,
    reinforcement=ReinforcementStage(iterations=1, molecules=4),
)


def reinforced(begin: MoleculeBuilder, plan: Plan, seed: int, folder: Path) -> list[list[float]]:
    """Reinforce a builder in place and return the curve."""
    judge = MoleculeJudge("gfn2", JudgeSettings(relax=False), file=folder.parent / "single_points.sqlite")
    formulas = [Formula.parse(text) for text in plan.practice]
    training = Reinforcement(begin, formulas, judge, plan.reinforcement, seed=seed)
    rounds = training.rounds(folder / f"reinforcement-{seed}.safetensors")
    return [list(values) for values in track(rounds, folder.name, plan.reinforcement.iterations)]


def searched(propose: Proposals, formula: Formula, plan: Plan, seed: int, known: frozenset[str], file: Path) -> Harvest:
    """Relax proposals until the evaluations are spent: those of a stopped run count as if they had been made now."""
    judge = MoleculeJudge("gfn2", file=file)
    found, spent = Harvest(known), 0
    for molecule in propose(formula, seed):
        judgement = judge([molecule])[0]
        found.add(molecule[0], judgement)
        spent += judgement.evaluations
        if spent >= plan.evaluations or found.judged >= plan.evaluations:  # what is hopeless costs none
            return found
    return found


def summary(found: Harvest, reference: list[StoredIsomer]) -> dict[str, Any]:
    """Return what was found, against the enumerated isomers of the formula."""
    lowest = min(isomer.energy for isomer in reference)
    low = {isomer.smiles for isomer in reference if isomer.energy < lowest + _LOW}
    best = found.ranked[0].energy if found.isomers else math.nan
    energies = sorted(isomer.energy for isomer in reference)
    return {
        "built": found.judged,
        "valid": found.valid,
        "isomers": len(found.isomers),
        "novel": sum(isomer.novel for isomer in found.ranked),
        "enumerated": len(reference),
        "low": sum(isomer.energy < lowest + _LOW for isomer in found.ranked),
        "enumerated_low": len(low),
        "gap": best - lowest,
        "rank": 1 + int(np.searchsorted(energies, best - _SAME)) if found.isomers else None,
        "not_enumerated": sorted(set(found.isomers) - {isomer.smiles for isomer in reference}),
        "faults": dict(found.faults.most_common()),
    }


def ways(plan: Plan, seed: int, folder: Path) -> tuple[dict[str, Proposals], dict[str, Any]]:
    """Return the ways to propose molecules, and the curves of the reinforcements."""
    imitation, _ = load_builder(None)
    both, _ = load_builder(None)
    alone = MoleculeBuilder(imitation.settings)
    curves = {
        "imitation and reinforcement": reinforced(both, plan, seed, folder / "both"),
        "reinforcement": reinforced(alone, plan, seed, folder / "alone"),
    }
    proposals = (from_builder(both), from_builder(imitation), from_builder(alone), random_placement, random_isomers)
    return dict(zip(WAYS, proposals, strict=True)), curves


def table_row(way: str, results: Mapping[str, Mapping[str, Any]], evaluations: int) -> list[str]:
    """Return one line of the table: sums and means over formulas."""
    each = list(results.values())
    built, valid = sum(r["built"] for r in each), sum(r["valid"] for r in each)
    thousands = len(each) * evaluations / 1000.0
    gaps = [r["gap"] for r in each if math.isfinite(r["gap"])]
    return [
        way,
        f"{100 * valid / max(built, 1):.0f}",
        f"{sum(r['isomers'] for r in each) / thousands:.1f}",
        f"{sum(r['low'] for r in each) / thousands:.1f}",
        f"{sum(r['rank'] == 1 for r in each)} of {len(each)}",
        f"{np.mean(gaps):.2f}" if gaps else "none",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in seconds")
    parser.add_argument("--evaluations", type=int, help="for each formula and way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/molecules"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = SMALL if options.small else Plan()
    if options.evaluations is not None:
        plan = Plan(evaluations=options.evaluations)
    name = "molecules_small" if options.small else "molecules"
    folder = options.output / ("small" if options.small else "comparison")
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [Formula.parse(text) for text in plan.formulas]
    make_isomers(IsomerRequest(tuple(held_out)), folder / "enumerated.db")
    enumerated = read_isomers(folder / "enumerated.db")
    _, known = load_builder(None)
    proposals, curves = ways(plan, options.seed, folder)
    results: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        results[way] = {}
        for formula in track(held_out, way, len(held_out)):
            found = searched(proposals[way], formula, plan, options.seed, known, folder / "judgements.sqlite")
            results[way][str(formula)] = summary(found, [i for i in enumerated if i.formula == formula])
    columns = ["", "valid %", "isomers", "low", "minima", "gap eV"]
    title = f"{len(held_out)} held-out formulas, {plan.evaluations} evaluations each; isomers for 1000 evaluations"
    rows = [table_row(way, results[way], plan.evaluations) for way in WAYS]
    report(
        name,
        title,
        columns,
        rows,
        {"evaluations": plan.evaluations, "seed": options.seed, "ways": results, "curves": curves},
    )


if __name__ == "__main__":
    main()
