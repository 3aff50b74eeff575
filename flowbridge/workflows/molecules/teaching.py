"""What ``flowbridge teach`` does: a builder learns from a database of molecules, and on some formulas from their energies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ...calculators.molecule_evaluator import EvaluatorSettings, MoleculeEvaluator
from ...core.errors import ConfigurationError
from ...core.execution.executors import Executor
from ...core.execution.progress import track
from ...core.model_files.files import save
from ...flows.molecules.bonds import find_bonds
from ...flows.molecules.builder import MoleculeBuilder
from ...flows.molecules.configuration import BuilderConfiguration
from ...flows.molecules.formulas import Formula
from ...flows.molecules.graph_features import graph_features
from ...flows.molecules.molecule_sets import MoleculeSet
from ...flows.molecules.training.imitation import ImitationStage, imitate
from ...flows.molecules.training.isomer_energies import IsomerEnergies
from ...flows.molecules.training.reinforcement import Reinforcement, ReinforcementStage, Round
from .building import load_builder
from .isomer_database import StoredIsomer, read_isomers
from .novelty import Taught

COARSE_RELAXATION = EvaluatorSettings(force=0.2)
"""For rewards: it takes out the strain that molecules are built with, for some ten evaluations each."""


@dataclass(frozen=True)
class ImitationRequest:
    """A builder to be made of a database.

    Attributes:
        database: of relaxed molecules.
        output: model file to write; checkpoints lie next to it.
        stage: of the training.
        configuration: of the builder.
        energy_scale: eV; a molecule that much above the lowest of its formula is shown 1/e as often; None for all alike.
        seed: of the batches.
    """

    database: Path
    output: Path
    stage: ImitationStage
    configuration: BuilderConfiguration
    energy_scale: float | None = None
    seed: int = 1


def teach(request: ImitationRequest, show_progress: bool = False) -> MoleculeBuilder:
    """Train a builder by imitation and write its model file; a stopped call goes on to the same numbers when repeated.

    Raises:
        ConfigurationError: for a database that cannot be read or is empty.
        ConvergenceError: when the training diverges.
    """
    isomers = read_isomers(request.database)
    builder = MoleculeBuilder(request.configuration)
    molecules = MoleculeSet.of((isomer.numbers, isomer.positions) for isomer in isomers)
    checkpoints = request.output.with_suffix(".checkpoints")
    imitate(
        builder,
        molecules,
        request.stage,
        checkpoints,
        weights=_weights(isomers, request.energy_scale),
        seed=request.seed,
        show_progress=show_progress,
    )
    builder.carry(isomer_energies(isomers))
    provenance: dict[str, Any] = {
        **Taught.of((isomer.smiles, isomer.numbers, isomer.positions) for isomer in isomers).provenance(),
        "formulas": sorted({str(isomer.formula) for isomer in isomers}),
        "imitation": request.stage.model_dump(mode="json"),
        "energy_scale": request.energy_scale,
        "seed": request.seed,
    }
    request.output.parent.mkdir(parents=True, exist_ok=True)
    save(builder.eval(), request.output, provenance=provenance)
    return builder


def isomer_energies(isomers: Sequence[StoredIsomer]) -> IsomerEnergies:
    """Return what the energies of relaxed molecules say about the parts of their graphs; those without a graph say nothing."""
    searches = [find_bonds(each.numbers, each.positions) for each in isomers]
    clear = [(each, found.bonds) for each, found in zip(isomers, searches, strict=True) if found.fault is None]
    return IsomerEnergies.fit(
        [each.formula for each, _ in clear],
        [graph_features(each.numbers, bonds) for each, bonds in clear],
        [each.energy for each, _ in clear],
    )


def _weights(isomers: Sequence[StoredIsomer], scale: float | None) -> Tensor:
    lowest: dict[Formula, float] = {}
    for isomer in isomers:
        lowest[isomer.formula] = min(isomer.energy, lowest.get(isomer.formula, math.inf))
    above = torch.tensor([isomer.energy - lowest[isomer.formula] for isomer in isomers], dtype=torch.float64)
    return torch.ones_like(above) if scale is None else torch.exp(-above / scale)


@dataclass(frozen=True)
class ReinforcementRequest:
    """A builder to be drawn towards low energies.

    Attributes:
        model: file of the builder to begin with; the one that comes with flowbridge when None.
        output: model file to write; checkpoint and evaluations lie next to it.
        formulas: that it is trained on.
        calculator: see :data:`~flowbridge.calculators.molecule_evaluator.CalculatorSource`; a string.
        relax: reward energies after a :data:`COARSE_RELAXATION`, some ten times the evaluations of single points.
        stage: of the training.
        seed: random seed.
    """

    model: Path | None
    output: Path
    formulas: tuple[Formula, ...]
    calculator: str
    relax: bool
    stage: ReinforcementStage
    seed: int = 1


def strengthen(request: ReinforcementRequest, executor: Executor | None = None) -> list[Round]:
    """Train a builder by reinforcement, write its model file and return the curve; as resumable as :func:`teach`.

    Raises:
        ModelFileError, ConfigurationError: for a model, calculator or formulas that cannot be used.
        ConvergenceError: when the training diverges.
    """
    builder, taught = load_builder(request.model)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    evaluator = MoleculeEvaluator(
        request.calculator,
        COARSE_RELAXATION if request.relax else EvaluatorSettings(relax=False),
        executor=executor,
        file=request.output.with_suffix(".evaluations.sqlite"),
    )
    training = Reinforcement(builder, request.formulas, evaluator, request.stage, seed=request.seed)
    curve: list[Round] = []
    for current in track(
        training.rounds(request.output.with_suffix(".checkpoint")), "reinforcement", request.stage.iterations
    ):
        curve.append(current)
    provenance: dict[str, Any] = {
        **taught.provenance(),
        "reinforced_on": [str(formula) for formula in request.formulas],
        "calculator": evaluator.description,
        "reinforcement": request.stage.model_dump(mode="json"),
        "seed": request.seed,
    }
    save(builder.eval(), request.output, provenance=provenance)
    return curve


def teach_and_print(
    request: ImitationRequest | None, reinforcement: ReinforcementRequest | None, executor: Executor | None = None
) -> None:
    """Do what the command line asks for and print the ends of the curves.

    Raises:
        ConfigurationError: when neither is asked for.
    """
    console = Console()
    if request is None and reinforcement is None:
        raise ConfigurationError("nothing to learn from: give a DATABASE to imitate, or --reinforce FORMULA")
    if request is not None:
        teach(request, console.is_terminal)
        console.print(f"{request.output}: taught by imitation of {request.database}", markup=False)
    if reinforcement is not None:
        curve = strengthen(reinforcement, executor)
        console.print(f"{reinforcement.output}: reinforced on {_names(reinforcement.formulas)}", markup=False)
        for number in sorted({0, len(curve) // 2, len(curve) - 1}) if curve else []:
            reward, valid, above, _ = curve[number]
            console.print(
                f"  round {number + 1}: reward {reward:.3f}, {100 * valid:.0f} % valid, {above:.3f} eV an atom above the best"
            )


def _names(formulas: Sequence[Formula]) -> str:
    return ", ".join(str(formula) for formula in formulas)
