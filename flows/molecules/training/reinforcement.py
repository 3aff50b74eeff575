"""Reinforcement: a builder is drawn towards low energies, within a trust region and not too far from what it imitated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ....core.configuration import StrictModel
from ....core.errors import ConfigurationError
from ....core.training.objective import Objective, Plan
from ....core.training.trainer import Trainer
from ..bonds import find_bonds
from ..builder import BuiltMolecules, MoleculeBuilder
from ..formulas import Formula
from ..graph_features import graph_key
from ..molecule_sets import MoleculeSet
from ..partial_molecules import Placements
from .evaluation import GeometryEvaluator

_SMALLEST_DEVIATION = 1e-3  # of rewards; where all are alike there is nothing to learn


class ReinforcementStage(StrictModel):
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of whole molecules.

    Attributes:
        iterations: rounds of building, evaluating and learning.
        molecules: built in a round, dealt evenly to the formulas.
        epochs: how often a round's choices are gone through.
        batch: choices of one optimiser step.
        clip: ratios of probabilities further than this from 1 are not rewarded.
        imitation: weight of the divergence from the builder that the training began with.
        energy_scale: eV; a molecule that much above the reference of its formula is worth 1/e of one at the reference.
        novelty: how much more a molecule is worth when it is the first of its kind, as a share; the bonus falls with the square
            root of how many of its kind have been built in the training.
        learning_rate: of Adam.
        gradient_clip: largest norm of the gradient.
    """

    iterations: NonNegativeInt = 40
    molecules: PositiveInt = 128
    epochs: PositiveInt = 2
    batch: PositiveInt = 256
    clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    imitation: NonNegativeFloat = 0.05
    energy_scale: PositiveFloat = 2.0
    novelty: NonNegativeFloat = 0.0
    learning_rate: PositiveFloat = 2e-4
    gradient_clip: PositiveFloat = 1.0


@dataclass(frozen=True)
class Rewards:
    """What molecules are worth.

    Attributes:
        values: ``(B,)``, ``exp(-(E - reference) / scale)`` of a valid molecule, with its bonus, 0 of any other.
        energies: ``(B,)`` in eV, NaN where there is none.
        valid: ``(B,)``, whether a molecule is connected, neutral, and with the usual valences.
    """

    values: Tensor
    energies: Tensor
    valid: Tensor


class Round(NamedTuple):
    """One round of the curve: mean reward, valid share, mean energy above the reference (eV an atom), divergence."""

    reward: float
    valid: float
    above: float
    divergence: float


class References:
    """The lowest energy of a valid molecule of each formula, in eV: given, or the lowest so far."""

    def __init__(self, energies: dict[str, float] | None = None) -> None:
        self.energies = dict(energies or {})

    def update(self, formula: Formula, energies: Iterable[float]) -> float:
        """Take in energies of valid molecules and return the reference."""
        name = str(formula)
        self.energies[name] = min([self.energies.get(name, math.inf), *energies])
        return self.energies[name]


class Visits:
    """How many valid molecules of each formula and graph have been built, and the bonus for new ones.

    Args:
        novelty: of the stage.
        counts: to go on from.
    """

    def __init__(self, novelty: float = 0.0, counts: dict[str, int] | None = None) -> None:
        self.novelty = novelty
        self.counts = Counter(counts or {})

    def bonus(self, formula: Formula, graph: str) -> float:
        """Count one molecule and return what it is worth more, as a factor."""
        if not self.novelty:
            return 1.0
        self.counts[f"{formula} {graph}"] += 1
        return 1.0 + self.novelty / math.sqrt(self.counts[f"{formula} {graph}"])


def reward(
    built: BuiltMolecules,
    formulas: Sequence[Formula],
    evaluator: GeometryEvaluator,
    references: References,
    scale: float,
    visits: Visits | None = None,
) -> Rewards:
    """Evaluate molecules and return what they are worth.

    Args:
        built: B molecules.
        formulas: of each.
        evaluator: whatever energy is to be low.
        references: of each formula; lowered by what is found.
        scale: eV.
        visits: gives the bonus for new molecules; none where it is None.
    """
    visits = visits or Visits()
    molecules = [built.molecule(index) for index in range(len(formulas))]
    energies = np.full(len(formulas), np.nan)
    valid = np.zeros(len(formulas), dtype=bool)
    bonus = np.ones(len(formulas))
    for index, ((numbers, _), verdict) in enumerate(zip(molecules, evaluator(molecules), strict=True)):
        if verdict.energy is not None:
            energies[index] = verdict.energy
            found = find_bonds(numbers, verdict.positions)
            valid[index] = found.fault is None
            if valid[index] and visits.novelty:
                bonus[index] = visits.bonus(formulas[index], graph_key(numbers, found.bonds))
    values = np.zeros(len(formulas))
    for formula in dict.fromkeys(formulas):
        rows = np.array([each == formula for each in formulas]) & valid
        reference = references.update(formula, energies[rows].tolist())
        values[rows] = bonus[rows] * np.exp((reference - energies[rows]) / scale)
    return Rewards(torch.from_numpy(values), torch.from_numpy(energies), torch.from_numpy(valid))


def advantages(rewards: Tensor, formulas: Sequence[Formula]) -> Tensor:
    """Return rewards ``(B,)`` less the mean of their formula, over the deviation of all."""
    values = torch.zeros_like(rewards)
    for formula in dict.fromkeys(formulas):
        rows = torch.tensor([each == formula for each in formulas])
        values[rows] = rewards[rows] - rewards[rows].mean()
    return values / values.std().clamp(min=_SMALLEST_DEVIATION)


class Choices(NamedTuple):
    """All choices of built molecules: molecule and row ``(C,)`` of each, and its log-probability ``(C,)`` when it was made."""

    molecules: Tensor
    steps: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, built: BuiltMolecules) -> Choices:
        """Return the choices, from small partial molecules to large ones."""
        there = torch.arange(built.elements.shape[1]).unsqueeze(1) < built.counts
        steps, molecules = torch.nonzero(there, as_tuple=True)
        return cls(molecules, steps, built.log_probs[molecules, steps])

    def select(self, rows: Tensor) -> Choices:
        """Return some of them."""
        return Choices(*(field[rows] for field in self))


def choices_log_probs(builder: MoleculeBuilder, built: BuiltMolecules, choices: Choices) -> Tensor:
    """Return log-probabilities ``(C,)`` that a builder gives choices."""
    molecules = MoleculeSet(built.positions, built.elements, built.counts).select(choices.molecules)
    made = Placements(*(field[choices.molecules, choices.steps] for field in built.placements))
    made = made._replace(element=built.elements[choices.molecules, choices.steps])
    return builder.choice_log_probs(molecules.states(choices.steps), made)


def clipped_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's surrogate ``(C,)``: no gain from ratios of probabilities outside ``1 - clip .. 1 + clip``."""
    return torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


class Reinforcement(Objective):
    """Training of one builder on several formulas at once, in rounds.

    Args:
        builder: trained in place.
        formulas: that molecules are built of; the builder sees its bag and so acts for each of them.
        evaluator: the energy.
        stage: the schedule.
        seed: of all random numbers.
        references: energies that rewards are relative to; the lowest found where not given.

    Raises:
        ConfigurationError: for no formulas, or fewer than two molecules of each.
    """

    module: MoleculeBuilder
    loss_advice = "lower the learning rate"

    def __init__(
        self,
        builder: MoleculeBuilder,
        formulas: Sequence[Formula],
        evaluator: GeometryEvaluator,
        stage: ReinforcementStage,
        *,
        seed: int = 0,
        references: dict[str, float] | None = None,
    ) -> None:
        if not formulas or stage.molecules < 2 * len(formulas):
            raise ConfigurationError(
                f"{stage.molecules} molecules a round for {len(formulas)} formulas: at least one formula is needed, and two "
                "molecules of each"
            )
        plan = Plan(stage.iterations, stage.learning_rate, gradient_clip=lambda step: stage.gradient_clip)
        settings = {"stage": stage.model_dump(mode="json"), "formulas": [str(formula) for formula in formulas]}
        super().__init__(builder, plan, seed, settings=settings)
        self.evaluator, self.stage = evaluator, stage
        self.formulas = [formulas[index % len(formulas)] for index in range(stage.molecules)]
        self.imitated = deepcopy(builder).requires_grad_(False)
        self.references = References(references)
        self.visits = Visits(stage.novelty)
        self._trainer = Trainer(self)

    def run(self, checkpoint: Path | None = None) -> list[Round]:
        """Go through all rounds and return the curve; see :meth:`rounds`."""
        return list(self.rounds(checkpoint))

    def rounds(self, checkpoint: Path | None = None) -> Iterator[Round]:
        """Go through all rounds, yielding what each gave.

        Args:
            checkpoint: file to go on from where it exists, to the same numbers, and to write after every round. The rounds that
                it holds are yielded, too.

        Raises:
            ConvergenceError: when the training diverges.
            ModelFileError: when the checkpoint is of another training.
        """
        if checkpoint is not None and checkpoint.exists():
            self._trainer.resume(checkpoint)
        yield from [_round(point) for point in self.curve]
        for _ in self._trainer.steps(checkpoint, interval=1):
            yield _round(self.curve[-1])

    def losses(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Build and evaluate molecules; yield the losses of what is learned from them, and record the round."""
        self.module.eval()
        built = self.module.sample(self.formulas, self.stage.molecules, generator)
        rewards = reward(built, self.formulas, self.evaluator, self.references, self.stage.energy_scale, self.visits)
        advantage, choices = advantages(rewards.values, self.formulas), Choices.of(built)
        with torch.no_grad():
            parts = torch.arange(len(choices.steps)).split(self.stage.batch)
            before = torch.cat([choices_log_probs(self.imitated, built, choices.select(part)) for part in parts])
        divergences: list[Tensor] = []  # of a choice from the imitation, nats
        for _ in range(self.stage.epochs):
            divergences = []
            for part in torch.randperm(len(choices.steps), generator=generator).split(self.stage.batch):
                now = choices_log_probs(self.module, built, choices.select(part))
                yield self._loss(now, choices.select(part), advantage, before[part])
                divergences.append((now - before[part]).detach().mean())
        atoms = built.counts[rewards.valid]
        lowest = torch.tensor([self.references.energies[str(f)] for f in self.formulas])[rewards.valid]
        above = (rewards.energies[rewards.valid] - lowest) / atoms
        self.record(
            reward=float(rewards.values.mean()),
            valid=float(rewards.valid.double().mean()),
            above=float(above.mean()) if len(above) else math.inf,
            divergence=float(torch.stack(divergences).mean()),
        )

    def _loss(self, now: Tensor, choices: Choices, advantage: Tensor, before: Tensor) -> Tensor:
        stage = self.stage
        gain = clipped_objective((now - choices.log_probs).exp(), advantage[choices.molecules], stage.clip)
        # An estimate of the divergence that is never negative (Schulman's third); its ratio is of the imitated builder.
        divergence = (before - now).clamp(max=20.0).exp() - 1.0 - (before - now)
        return -gain.mean() + stage.imitation * divergence.mean()

    def state_dict(self) -> dict[str, Any]:
        """Return the reference energies, and how many molecules of each kind have been built."""
        return {"references": self.references.energies, "visits": dict(self.visits.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.references = References(state["references"])
        self.visits = Visits(self.stage.novelty, state["visits"])


def _round(point: Mapping[str, float]) -> Round:
    return Round(*(point[name] for name in Round._fields))
