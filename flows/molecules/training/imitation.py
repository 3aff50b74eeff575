"""Imitation: a builder learns by maximum likelihood from finished molecules taken apart."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ....core.errors import ConfigurationError
from ....core.training.objective import CosineStage, StageObjective
from ....core.training.trainer import train
from ..builder import MoleculeBuilder
from ..molecule_sets import MoleculeSet

_TERMS = ("focus", "element", "distance", "angle", "torsion")
_PARTS = 4  # of a batch, from small states to large ones, so that little is computed for rows of no atom


class ImitationStage(CosineStage):
    """Maximum likelihood of single steps of random build orders.

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: partial molecules a step.
        heavy: share of them that place an atom other than hydrogen; the rest is drawn evenly from all steps.
    """

    steps: NonNegativeInt = 6000
    batch: PositiveInt = 256
    heavy: float = Field(default=0.5, ge=0.0, le=1.0)
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate: PositiveFloat = 2e-5
    average: float = Field(default=0.998, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 10.0


class ImitationTraining(StageObjective):
    """One stage of imitation.

    Args:
        builder: trained in place.
        stage: its schedule.
        molecules: to imitate.
        weights: ``(B,)``, how often each is drawn.
        seed: of the batches.
        log_interval: steps between points of the training curve.
    """

    stage: ImitationStage
    module: MoleculeBuilder
    loss_name = "likelihood"
    loss_advice = "lower the learning rate"

    def __init__(
        self,
        builder: MoleculeBuilder,
        stage: ImitationStage,
        molecules: MoleculeSet,
        weights: Tensor,
        seed: int,
        log_interval: int,
    ) -> None:
        super().__init__(builder, stage, seed, log_interval)
        self.molecules = molecules
        self.weights = weights

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the mean negative log-likelihood of the choices of one batch."""
        chosen = torch.multinomial(self.weights, self.stage.batch, replacement=True, generator=generator)
        molecules = self.molecules.select(chosen)
        molecules = molecules.permuted(molecules.draw_orders(generator).rows)
        steps = self._steps(molecules, generator)
        by_size = steps.argsort()
        terms = sum(
            imitation_terms(self.module, molecules.select(rows), steps[rows], generator).sum(1)
            for rows in by_size.chunk(_PARTS)
        )
        terms = -torch.as_tensor(terms) / self.stage.batch
        loss: Tensor = terms.sum()
        self.record(nll=float(loss.detach()), **dict(zip(_TERMS, terms.detach().tolist(), strict=True)))
        return loss

    def _steps(self, molecules: MoleculeSet, generator: torch.Generator) -> Tensor:
        heavy = ((molecules.elements != 0) & molecules.there).sum(1)
        among_heavy = (torch.rand(len(heavy), generator=generator) < self.stage.heavy) & (heavy > 0)
        limit = torch.where(among_heavy, heavy, molecules.counts)
        share = torch.rand(len(heavy), generator=generator, dtype=torch.float64)
        return torch.minimum((share * limit).long(), limit - 1)


def imitation_terms(
    builder: MoleculeBuilder, molecules: MoleculeSet, steps: Tensor, generator: torch.Generator
) -> Tensor:
    """Return log-densities ``(5, B)`` of the choices that place row ``steps`` ``(B,)`` of each molecule.

    The focus is one of the placed atoms that it is bonded to, evenly drawn; the nearest where it is bonded to none.
    """
    state = molecules.states(steps)
    index = torch.arange(len(steps))
    rows = state.placed.shape[1]
    bonded = molecules.bonds[index, steps][:, :rows] & state.placed
    away = torch.linalg.vector_norm(state.positions - molecules.positions[index, steps].unsqueeze(1), dim=-1)
    nearest = torch.zeros_like(bonded)
    nearest[index, away.masked_fill(~state.placed, torch.inf).argmin(1)] = True
    weights = torch.where(bonded.any(1, keepdim=True), bonded, nearest).double()
    focus = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return builder.choice_parts(state, molecules.placements(steps, state, focus))


def imitate(
    builder: MoleculeBuilder,
    molecules: MoleculeSet,
    stage: ImitationStage,
    folder: Path,
    *,
    weights: Tensor | None = None,
    seed: int = 0,
    checkpoint_interval: int = 500,
    log_interval: int = 25,
    show_progress: bool = False,
) -> list[dict[str, float]]:
    """Train a builder in place on molecules and return the training curve.

    Args:
        builder: any builder.
        molecules: finished ones, each connected by its bonds.
        stage: the schedule.
        folder: where checkpoints go; training goes on from those it finds, to the same numbers.
        weights: ``(B,)``, how often each molecule is drawn; all alike when None.
        seed: of all random numbers.
        checkpoint_interval: steps between checkpoints.
        log_interval: steps between points of the curve.
        show_progress: show a bar.

    Raises:
        ConvergenceError: when the training diverges.
        ConfigurationError: for weights that do not fit, are negative, or all zero.
    """
    if weights is None:
        weights = torch.ones(len(molecules.counts), dtype=torch.float64)
    if (
        weights.shape != molecules.counts.shape
        or not bool((weights >= 0).all())
        or not 0 < float(weights.sum()) < math.inf
    ):
        raise ConfigurationError(
            f"weights must be {len(molecules.counts)} numbers, not negative and not all zero, got {tuple(weights.shape)}"
        )
    training = ImitationTraining(builder, stage, molecules, weights, seed, log_interval)
    return train(training, folder / "imitation", checkpoint_interval, show_progress)
