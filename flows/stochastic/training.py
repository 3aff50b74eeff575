"""Training of stochastic flows by their path losses, in stages, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from ..boltzmann.training.checkpoint_files import load_checkpoint, save_checkpoint
from .stochastic_flow import StochasticFlow, path_kullback_leibler, path_likelihood

_SEEDS = 1_000_003  # between the batches of one step and those of the next


@dataclass(frozen=True)
class PathStage:
    """One stage: ``likelihood_weight J_ML + kullback_leibler_weight J_KL``, minimised by Adam.

    Attributes:
        steps: optimiser steps.
        batch: paths a step, of each loss.
        learning_rate: of Adam.
        likelihood_weight: of the loss of data.
        kullback_leibler_weight: of the loss of the flow's own paths.
        gradient_norm: larger gradients are shortened to it; None: never.
    """

    steps: int
    batch: int
    learning_rate: float = 1e-3
    likelihood_weight: float = 1.0
    kullback_leibler_weight: float = 0.0
    gradient_norm: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.learning_rate > 0.0:
            raise ConfigurationError(f"steps, batch and learning_rate must be positive, got {self}")
        weights = (self.likelihood_weight, self.kullback_leibler_weight)
        if min(weights) < 0.0 or max(weights) == 0.0:
            raise ConfigurationError(f"the weights of the losses must not be negative or both zero, got {weights}")


def train_paths(
    flow: StochasticFlow,
    data: Tensor | None,
    stages: Sequence[PathStage],
    seed: int,
    *,
    checkpoint: Path | None = None,
    checkpoint_interval: int = 100,
    report: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train in place and return the loss of each step.

    Random numbers of a step depend on the seed and its number only, so a run that was interrupted goes on from its checkpoint
    to the same numbers.

    Args:
        flow: the flow.
        data: configurations ``(F, D)``; None where no stage has a likelihood.
        stages: one after the other; each begins with a fresh Adam.
        seed: of batches and paths.
        checkpoint: a file that is written on the way and read at the start if it is there; None for none.
        checkpoint_interval: steps between checkpoints.
        report: called after each step with its number, from 0 over all stages, and its loss.

    Raises:
        NonFiniteEnergyError: when a loss is not finite.
        ModelFileError: when the checkpoint belongs to something else.
    """
    if data is None and any(stage.likelihood_weight for stage in stages):
        raise ConfigurationError("a stage with a likelihood needs data: give some, or set its likelihood_weight to 0")
    losses: list[float] = []
    first, done, plan = 0, 0, [asdict(stage) for stage in stages]
    if checkpoint is not None and checkpoint.is_file():
        first, done, losses = _resume(checkpoint, flow, plan, seed)
    for index in range(first, len(stages)):
        stage = stages[index]
        optimiser = torch.optim.Adam(flow.parameters(), lr=stage.learning_rate)
        begin = done if index == first else 0
        if begin and checkpoint is not None:
            load_checkpoint(checkpoint, flow, optimiser)
        for step in range(begin, stage.steps):
            generator = torch.Generator().manual_seed(seed * _SEEDS + len(losses))
            loss = _loss(flow, data, stage, generator)
            optimiser.zero_grad()
            loss.backward()
            if stage.gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(flow.parameters(), stage.gradient_norm)
            optimiser.step()
            losses.append(float(loss.detach()))
            if report is not None:
                report(len(losses) - 1, losses[-1])
            if checkpoint is not None and ((step + 1) % checkpoint_interval == 0 or step + 1 == stage.steps):
                progress = {"plan": plan, "seed": seed, "stage": index, "step": step + 1, "losses": losses}
                save_checkpoint(checkpoint, flow, optimiser, progress)
    return losses


def _resume(
    checkpoint: Path, flow: StochasticFlow, plan: list[dict[str, object]], seed: int
) -> tuple[int, int, list[float]]:
    """Put the flow where a checkpoint left it; return stage, steps of that stage, and all losses so far."""
    progress = load_checkpoint(checkpoint, flow, torch.optim.Adam(flow.parameters()))
    if progress["plan"] != plan or progress["seed"] != seed:
        raise ConfigurationError(
            f"{checkpoint}: was written for other stages or another seed ({progress['seed']}); remove it to begin anew"
        )
    return int(progress["stage"]), int(progress["step"]), [float(value) for value in progress["losses"]]


def _loss(flow: StochasticFlow, data: Tensor | None, stage: PathStage, generator: torch.Generator) -> Tensor:
    total = torch.zeros(())
    if stage.likelihood_weight and data is not None:
        chosen = torch.randint(len(data), (stage.batch,), generator=generator)
        total = total + stage.likelihood_weight * path_likelihood(flow, data[chosen], generator)
    if stage.kullback_leibler_weight:
        total = total + stage.kullback_leibler_weight * path_kullback_leibler(flow, stage.batch, generator)
    return total
