"""Molecules of held-out formulas: what builders find for their energy evaluations, against enumeration and simpler ways.

    python -m benchmarks.science.molecules                # ten formulas, six ways, 1000 evaluations each, three seeds
    python -m benchmarks.science.molecules --seeds 1
    python -m benchmarks.science.molecules --small        # seconds: everything runs, little is found

Every way builds the same number of molecules. What is no valid molecule as built, and what is built again, costs no evaluation;
each isomer is relaxed, first with MMFF94, whose lowest geometry goes first, then with GFN2-xTB, whose evaluations are counted,
and from two other geometries where evaluations are left. Isomers are taken in the order in which they were built, or ranked by
the energies that the shipped builder learned of its training set's graphs. The reference is the relaxation of all enumerated
isomers from one geometry each. "Low" are isomers within 1 eV of the lowest enumerated one.
Everything evaluated is kept in the output folder, and the command goes on from there. The builder that comes with flowbridge
is the imitation; the reinforced ones are trained on other formulas with energies after a coarse relaxation of what is valid as
built. Those evaluations are counted apart.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowbridge.calculators.molecule_evaluator import MoleculeEvaluator
from flowbridge.core.execution.progress import track
from flowbridge.flows.molecules.bonds import find_bonds
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.training.evaluation import Evaluation, Geometry
from flowbridge.flows.molecules.training.isomer_energies import IsomerEnergies
from flowbridge.flows.molecules.training.reinforcement import Reinforcement, ReinforcementStage
from flowbridge.workflows.molecules.building import load_builder
from flowbridge.workflows.molecules.isomer_database import IsomerRequest, StoredIsomer, make_isomers, read_isomers
from flowbridge.workflows.molecules.novelty import Taught
from flowbridge.workflows.molecules.results import IsomerResults
from flowbridge.workflows.molecules.search import Candidates, Search
from flowbridge.workflows.molecules.teaching import COARSE_RELAXATION

from ..harness import report, study
from .molecule_proposals import Proposals, all_isomers, from_builder, random_isomers, random_placement

HELD_OUT = ("C4H8O", "C3H6O2", "C5H8", "C3H7NO", "C3H5FO", "C5H10O", "C6H10", "C4H8O2", "C7H14", "C6H12O")
"""Five to seven heavy atoms; no isomer of them is among what the builder was taught with."""

PRACTICE = ("C4H6O", "C4H10O", "C3H5NO", "C3H8O2", "C4H7N", "C5H12O", "C4H6O2", "C4H7FO", "C6H12", "C5H9N")
"""Formulas that builders are reinforced on, none of them held out."""

BOTH, IMITATION, ALONE = "imitation and reinforcement", "imitation", "reinforcement"
PLACEMENT, RANDOM, ALL = "random placement", "RDKit's random isomers", "all enumerated isomers"
WAYS = (BOTH, IMITATION, ALONE, PLACEMENT, RANDOM, ALL)
ORDERS = ("as built", "ranked")
_LOW = 1.0  # eV
_SAME = 0.02  # eV; a better conformer of the same isomer is no other minimum


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        formulas: held out.
        practice: reinforced on.
        built: molecules of each formula, way and seed.
        budgets: evaluations of energies for each formula and way, at which is counted what was found.
        starts: geometries that each isomer is relaxed from at most.
        reinforcement: its stage.
    """

    formulas: tuple[str, ...] = HELD_OUT
    practice: tuple[str, ...] = PRACTICE
    built: int = 500
    budgets: tuple[int, ...] = (400, 1000)
    starts: int = 3
    reinforcement: ReinforcementStage = field(
        default_factory=lambda: ReinforcementStage(
            iterations=40, molecules=100, learning_rate=1e-4, energy_scale=0.5, imitation=0.1, novelty=1.0
        )
    )


SMALL = Plan(
    formulas=("C2H6O",),
    practice=("CH4O",),
    built=10,
    budgets=(30, 60),
    reinforcement=ReinforcementStage(iterations=1, molecules=4),
)


@dataclass(frozen=True)
class ValidAsBuilt:
    """An evaluator that hands only molecules that are valid as built to another one: the others cost no evaluation."""

    evaluator: MoleculeEvaluator

    def __call__(self, molecules: Sequence[Geometry]) -> list[Evaluation]:
        """See :class:`~flowbridge.flows.molecules.training.evaluation.Evaluator`."""
        faults = [find_bonds(*molecule).fault for molecule in molecules]
        verdicts = iter(self.evaluator([each for each, fault in zip(molecules, faults, strict=True) if fault is None]))
        return [
            next(verdicts) if fault is None else Evaluation(None, positions, 0, fault)
            for (_, positions), fault in zip(molecules, faults, strict=True)
        ]


def reinforced(begin: MoleculeBuilder, plan: Plan, seed: int, folder: Path) -> list[list[float]]:
    """Reinforce a builder in place and return the curve."""
    evaluator = ValidAsBuilt(MoleculeEvaluator("gfn2", COARSE_RELAXATION, file=folder.parent / "rewards.sqlite"))
    formulas = [Formula.parse(text) for text in plan.practice]
    training = Reinforcement(begin, formulas, evaluator, plan.reinforcement, seed=seed)
    rounds = training.rounds(folder / f"reinforcement-{seed}.safetensors")
    return [list(values) for values in track(rounds, folder.name, plan.reinforcement.iterations)]


def searched(
    candidates: Candidates,
    formula: Formula,
    plan: Plan,
    taught: Taught,
    energies: IsomerEnergies | None,
    evaluator: MoleculeEvaluator,
) -> dict[int, tuple[int, IsomerResults]]:
    """Relax candidates and return the evaluations spent and what was found, at each budget."""
    found: dict[int, tuple[int, IsomerResults]] = {}
    isomers = IsomerResults(taught)
    search = Search(formula, evaluator, isomers, energies, plan.starts)
    for budget in plan.budgets:
        for _ in search.run(candidates, budget):
            pass
        found[budget] = (search.spent, isomers.copy())
    return found


def summary(candidates: Candidates, spent: int, found: IsomerResults, reference: list[StoredIsomer]) -> dict[str, Any]:
    """Return what was found, against the enumerated isomers of the formula."""
    lowest = min(isomer.energy for isomer in reference)
    best = found.ranked[0].energy if found.isomers else math.nan
    energies = sorted(isomer.energy for isomer in reference)
    return {
        "built": candidates.built,
        "valid_as_built": candidates.valid,
        "isomers_as_built": len(candidates.isomers),
        "evaluations": spent,
        "relaxed": found.evaluated,
        "valid": found.valid,
        "isomers": len(found.isomers),
        "novel": sum(isomer.novel for isomer in found.ranked),
        "novel_geometries": sum(isomer.novel_geometry for isomer in found.ranked),
        "enumerated": len(reference),
        "low": sum(isomer.energy < lowest + _LOW for isomer in found.ranked),
        "enumerated_low": sum(isomer.energy < lowest + _LOW for isomer in reference),
        "gap": best - lowest if found.isomers else None,
        "rank": 1 + int(np.searchsorted(energies, best - _SAME)) if found.isomers else None,
        "not_enumerated": sorted(set(found.isomers) - {isomer.smiles for isomer in reference}),
        "faults": dict(found.faults.most_common()),
    }


def ways(plan: Plan, seed: int, folder: Path) -> tuple[dict[str, Proposals], dict[str, Any]]:
    """Return the ways to propose molecules, and the curves of the reinforcements."""
    imitation, _ = load_builder(None)
    both, _ = load_builder(None)
    alone = MoleculeBuilder(imitation.settings.model_copy(update={"energy_features": ()}))
    curves = {
        BOTH: reinforced(both, plan, seed, folder / "both"),
        ALONE: reinforced(alone, plan, seed, folder / "alone"),
    }
    builders = (from_builder(builder) for builder in (both, imitation, alone))
    proposals = (*builders, random_placement, random_isomers, all_isomers)
    return dict(zip(WAYS, proposals, strict=True)), curves


Results = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Results by way, order, budget and formula."""


def compared(plan: Plan, seed: int, folder: Path, enumerated: Sequence[StoredIsomer]) -> tuple[Results, dict[str, Any]]:
    """Run all ways with one seed and return what they found, and the curves of the reinforcements."""
    builder, taught = load_builder(None)
    proposals, curves = ways(plan, seed, folder)
    evaluator = MoleculeEvaluator("gfn2", file=folder / "evaluations.sqlite")
    results: Results = {way: {order: {str(budget): {} for budget in plan.budgets} for order in ORDERS} for way in WAYS}
    for way in WAYS:
        for text in track(plan.formulas, f"{way}, seed {seed}", len(plan.formulas)):
            formula = Formula.parse(text)
            reference = [isomer for isomer in enumerated if isomer.formula == formula]
            candidates = Candidates()
            candidates.add(itertools.islice(proposals[way](formula, seed), plan.built))
            for order, energies in zip(ORDERS, (None, builder.energies), strict=True):
                for budget, (spent, found) in searched(candidates, formula, plan, taught, energies, evaluator).items():
                    results[way][order][str(budget)][text] = summary(candidates, spent, found, reference)
    return results, curves


def figures_of(each: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return sums and means over the formulas of one seed."""
    thousands = max(sum(r["evaluations"] for r in each), 1) / 1000.0
    gaps = [r["gap"] for r in each if r["gap"] is not None]
    return {
        "valid as built, %": 100 * sum(r["valid_as_built"] for r in each) / sum(r["built"] for r in each),
        "valid relaxed, %": 100 * sum(r["valid"] for r in each) / max(sum(r["relaxed"] for r in each), 1),
        "isomers": sum(r["isomers"] for r in each) / thousands,
        "low": sum(r["low"] for r in each) / thousands,
        "minima": float(sum(r["rank"] == 1 for r in each)),
        "gap, eV": float(np.mean(gaps)) if gaps else math.nan,
    }


def table_row(name: str, seeds: Sequence[Mapping[str, float]]) -> list[str]:
    """Return one line of the table: means over seeds, with the standard error of the low isomers."""
    means = {key: float(np.mean([each[key] for each in seeds])) for key in seeds[0]}
    low = f"{means['low']:.1f}"
    if len(seeds) > 1:
        low += f" ± {np.std([each['low'] for each in seeds], ddof=1) / math.sqrt(len(seeds)):.1f}"
    gap = "none" if math.isnan(means["gap, eV"]) else f"{means['gap, eV']:.2f}"
    return [
        name,
        f"{means['valid as built, %']:.0f}",
        f"{means['valid relaxed, %']:.0f}",
        f"{means['isomers']:.1f}",
        low,
        ", ".join(f"{each['minima']:.0f}" for each in seeds),
        gap,
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, and write the results."""
    parser = study(__doc__.splitlines()[0], "runs/molecules")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = SMALL if options.small else Plan()
    name = "molecules_small" if options.small else "molecules"
    folder = options.output / ("small" if options.small else "comparison")
    folder.mkdir(parents=True, exist_ok=True)
    make_isomers(IsomerRequest(tuple(Formula.parse(text) for text in plan.formulas)), folder / "enumerated.db")
    enumerated = read_isomers(folder / "enumerated.db")
    results: dict[int, Results] = {}
    curves: dict[int, Any] = {}
    for seed in options.seeds:
        results[seed], curves[seed] = compared(plan, seed, folder, enumerated)
        (folder / f"results-{seed}.json").write_text(json.dumps(results[seed], indent=1))
    rows = []
    for budget, order, way in itertools.product(plan.budgets, ORDERS, WAYS):
        seeds = [figures_of(list(results[seed][way][order][str(budget)].values())) for seed in options.seeds]
        rows.append(table_row(f"{budget}, {order}: {way}", seeds))
    columns = ["", "valid built %", "relaxed %", "isomers", "low", "minima by seed", "gap eV"]
    title = f"{len(plan.formulas)} held-out formulas; isomers for 1000 evaluations"
    report(name, title, columns, rows, {"seeds": options.seeds, "results": results, "curves": curves})


if __name__ == "__main__":
    main()
