"""A builder of molecules is drawn towards low energies of one formula by reinforcement, with GFN2-xTB as the evaluator.

    python examples/reinforce_builder.py [FORMULA] [ROUNDS] [FIGURE]

The builder that comes with flowbridge builds molecules, xTB gives their energies as they are, and the builder learns from what
was low and valid. What it builds before and after is relaxed, and compared with the lowest energy found. Needs RDKit and tblite
(pip install 'flowbridge[molecules]'); some minutes on one core.
"""

import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from flowbridge.calculators.molecule_evaluator import EvaluatorSettings, MoleculeEvaluator
from flowbridge.flows.molecules.builder import MoleculeBuilder
from flowbridge.flows.molecules.formulas import Formula
from flowbridge.flows.molecules.training.reinforcement import Reinforcement, ReinforcementStage, Round
from flowbridge.workflows.figure_style import MD, REWEIGHTED, drawn
from flowbridge.workflows.molecules.building import load_builder
from flowbridge.workflows.molecules.results import IsomerResults


def relaxed(builder: MoleculeBuilder, formula: Formula, count: int) -> tuple[IsomerResults, np.ndarray]:
    """Return the isomers among ``count`` molecules, and the relaxed energies in eV of all that are valid."""
    built = builder.sample(formula, count, torch.Generator().manual_seed(7))
    molecules = [built.molecule(index) for index in range(count)]
    verdicts = MoleculeEvaluator("gfn2")(molecules)
    found = IsomerResults()
    energies = [v.energy for (numbers, _), v in zip(molecules, verdicts, strict=True) if found.add(numbers, v)]
    return found, np.array(energies, dtype=float)


def draw(curve: list[Round], energies: dict[str, np.ndarray], file: Path) -> None:
    """Draw the rounds, and energies before and after."""
    lowest = min(float(values.min()) for values in energies.values() if len(values))
    with drawn(file, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        rounds = np.arange(1, len(curve) + 1)
        left.plot(rounds, [100 * r.valid for r in curve], color=MD, label="valid, %")
        left.plot(rounds, [100 * r.reward for r in curve], color=REWEIGHTED, label="reward, % of the best")
        left.set(xlabel="round", ylim=(0, 100), title="Molecules as they are built")
        left.legend(loc="lower right")
        edges = np.linspace(0.0, 6.0, 25)
        for (name, values), colour in zip(energies.items(), (MD, REWEIGHTED), strict=True):
            right.hist(values - lowest, edges, color=colour, alpha=0.65, label=name)
        right.set(xlabel="eV above the lowest", ylabel="molecules", title="Relaxed energies of valid molecules")
        right.legend()


def main(
    formula: str = "C5H10O", rounds: int = 40, figure: str = "reinforce_builder.png", count: int = 100
) -> dict[str, float]:
    """Reinforce, print what changed, and draw it."""
    wanted = Formula.parse(formula)
    builder, _ = load_builder(None)
    before = deepcopy(builder)
    stage = ReinforcementStage(iterations=rounds, molecules=min(96, count), learning_rate=5e-5, energy_scale=1.5)
    curve = Reinforcement(
        builder, [wanted], MoleculeEvaluator("gfn2", EvaluatorSettings(relax=False)), stage, seed=1
    ).run()
    energies, results = {}, {}
    for name, model in (("imitation", before), ("reinforced", builder)):
        found, energies[name] = relaxed(model, wanted, count)
        mean = float(energies[name].mean()) if len(energies[name]) else float("nan")
        results[name] = mean
        print(
            f"{name}: {found.valid} of {count} valid, {len(found.isomers)} isomers, mean energy {mean:.2f} eV; best: "
            f"{', '.join(isomer.smiles for isomer in found.ranked[:3])}"
        )
    draw(curve, energies, Path(figure))
    print(f"drawn in {figure}")
    return results


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:1], *(int(value) for value in arguments[1:2]), *arguments[2:3])
