"""Training by the mean work (learned free-energy perturbation), with checkpoints that resume to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigurationError, NonFiniteEnergyError
from ...core.training.checkpoints import checkpoint_in
from ...core.training.objective import Objective, Plan, cosine, warming_up
from ...core.training.trainer import Trainer
from .configuration import RigidFlowTraining
from .crystal import CrystalCoordinates, RigidBijection
from .harmonic import HarmonicBase, HarmonicMap, UniformBase
from .works import Ensemble, carried, selected, summary, works_of

Draw = Callable[[int, torch.Generator], tuple[CrystalCoordinates, Tensor]]
"""``(count, generator) -> (coordinates, reduced potentials (count,))`` of samples of the base."""

Progress = Callable[[int, int], object]
"""Called with the number of steps done and their total."""


@dataclass(frozen=True)
class Frames:
    """Samples of the base ensemble, such as frames of molecular dynamics.

    Attributes:
        coordinates: of S samples.
        reduced: ``(S,)``, ``U_a / kT_a``.
    """

    coordinates: CrystalCoordinates
    reduced: Tensor

    def __post_init__(self) -> None:
        if len(self.coordinates.displacements) != len(self.reduced) or not len(self.reduced):
            raise ConfigurationError(
                f"{len(self.coordinates.displacements)} configurations and {len(self.reduced)} potentials are no samples"
            )
        if not bool(torch.isfinite(self.reduced).all()):
            raise NonFiniteEnergyError(
                f"{int((~torch.isfinite(self.reduced)).sum())} of {len(self.reduced)} frames have no energy: leave them out"
            )

    def __len__(self) -> int:
        return len(self.reduced)

    def __getitem__(self, part: slice) -> Frames:
        return Frames(selected(self.coordinates, part), self.reduced[part])

    def draw(self, count: int, generator: torch.Generator) -> tuple[CrystalCoordinates, Tensor]:
        """Return ``count`` of the samples, drawn with repetition; each quaternion of random sign."""
        chosen = torch.randint(len(self), (count,), generator=generator)
        return with_random_signs(selected(self.coordinates, chosen), generator), self.reduced[chosen]


def draws_of(base: HarmonicBase | UniformBase) -> Draw:
    """Return how to draw from a base with a density."""

    def draw(count: int, generator: torch.Generator) -> tuple[CrystalCoordinates, Tensor]:
        coordinates = base.sample(count, generator)
        return coordinates, -base.log_prob(coordinates)

    return draw


@dataclass
class TrainingCurve:
    """What training went through, one entry a checkpoint.

    Attributes:
        steps: numbers of steps done.
        loss: mean over the steps since the entry before, kT or nats.
        held_out: the same of held-out frames with the averaged parameters, the start first; empty without such frames.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def train_by_work(
    flow: RigidBijection,
    draw: Draw,
    target: Ensemble,
    settings: RigidFlowTraining,
    folder: Path,
    seed: int,
    *,
    held_out: Frames | None = None,
    progress: Progress | None = None,
) -> TrainingCurve:
    """Train a flow in place to carry samples of a base to the target, by lowering the mean work.

    The mean work exceeds the free-energy difference by the Kullback-Leibler divergence of the carried samples from the
    target (arXiv 2301.11355; P. Wirnsberger et al., J. Chem. Phys. 153, 144112 (2020)). It is content with one of
    several modes: where the base does not lie over all of them, train by likelihood first. The flow holds averaged
    parameters afterwards: the last ones, or with held-out frames those of the checkpoint whose mean work on them was
    lowest, the start included: networks fit the noise of a few thousand frames.

    Args:
        flow: base -> target.
        draw: of the base: :meth:`Frames.draw`, or :func:`draws_of` a base with a density.
        target: where to.
        settings: schedule.
        folder: where the checkpoint is kept; training continues from the one it finds there.
        seed: of the batches, each of which depends on it and the number of its step only.
        held_out: samples of the base that ``draw`` does not give.
        progress: called after each step.

    Raises:
        NonFiniteEnergyError: when a carried sample has no energy.
        ConvergenceError: when a gradient is not finite.
    """

    def loss(step: int, generator: torch.Generator) -> Tensor:
        works = carried(flow, *draw(settings.batch, generator), target).works
        lost = int((~torch.isfinite(works)).sum())
        if lost:
            raise NonFiniteEnergyError(
                f"{lost} of {settings.batch} carried samples of step {step} have no finite energy: the map has left the "
                "crystal. Start closer to the target, or lower the learning rates"
            )
        return works.mean()

    def held_out_work(averaged: RigidBijection, frames: Frames) -> float:
        return summary(works_of(averaged, frames.coordinates, frames.reduced, target)).mean

    evaluate = None if held_out is None else partial(held_out_work, frames=held_out)
    return _train(flow, loss, settings, folder, seed, evaluate, progress)


def train_by_likelihood(
    flow: RigidBijection,
    base: HarmonicBase | UniformBase,
    frames: CrystalCoordinates,
    settings: RigidFlowTraining,
    folder: Path,
    seed: int,
    *,
    held_out: CrystalCoordinates | None = None,
    progress: Progress | None = None,
) -> TrainingCurve:
    """Train a flow in place to give samples ``frames`` of the target the greatest likelihood; no mode of them is left out.

    Other arguments as for :func:`train_by_work`; the curve has negative log-likelihoods instead of works.
    """

    def negative_log_likelihood(mapping: RigidBijection, coordinates: CrystalCoordinates) -> Tensor:
        latent, log_det = mapping.inverse(coordinates)
        return -(base.log_prob(latent) + log_det).mean()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(frames.displacements), (settings.batch,), generator=generator)
        return negative_log_likelihood(flow, with_random_signs(selected(frames, chosen), generator))

    evaluate = None if held_out is None else partial(negative_log_likelihood, coordinates=held_out)
    return _train(flow, loss, settings, folder, seed, evaluate, progress)


def with_random_signs(coordinates: CrystalCoordinates, generator: torch.Generator) -> CrystalCoordinates:
    """Return the same orientations with quaternions of random sign: nothing may depend on the ones they come with."""
    displacements, orientations = coordinates
    signs = torch.randint(2, orientations.shape[:2], generator=generator).to(orientations) * 2.0 - 1.0
    return CrystalCoordinates(displacements, orientations * signs.unsqueeze(-1))


def _train(
    flow: RigidBijection,
    loss: Callable[[int, torch.Generator], Tensor],
    settings: RigidFlowTraining,
    folder: Path,
    seed: int,
    held_out: Callable[[RigidBijection], float | Tensor] | None,
    progress: Progress | None,
) -> TrainingCurve:
    steps, interval = settings.steps, settings.checkpoint_interval
    plan = Plan(
        steps, settings.learning_rate, (0.9, 0.99), schedule=lambda step: cosine(1.0, settings.final_share, step, steps),
        gradient_clip=lambda step: settings.gradient_clip, decay=warming_up(settings.average),
    )  # fmt: skip
    objective = Objective(
        flow, plan, seed, evaluation_interval=interval, loss=loss, held_out_loss=held_out,
        parameters=_parameter_groups(flow, settings), settings=settings.model_dump(mode="json"), name="rigid bodies",
    )  # fmt: skip
    objective.evaluates_start = True
    trainer = Trainer(objective)
    for done in trainer.steps(checkpoint_in(folder), interval):
        if progress is not None:
            progress(done, steps)
    trainer.finish()
    losses = [point["loss"] for point in objective.curve if "loss" in point]
    parts = [losses[begin : begin + interval] for begin in range(0, steps, interval)]
    return TrainingCurve(
        [min(interval * (number + 1), steps) for number in range(len(parts))],
        [sum(part) / len(part) for part in parts],
        [point["held_out"] for point in objective.curve if "held_out" in point],
    )


def _parameter_groups(flow: RigidBijection, settings: RigidFlowTraining) -> list[dict[str, Any]]:
    """Return parameters with their learning rates, for Adam; harmonic maps without one are kept."""
    maps = [module for module in flow.modules() if isinstance(module, HarmonicMap)]
    harmonic = [parameter for module in maps for parameter in module.parameters()]
    known = {id(parameter) for parameter in harmonic}
    networks = [parameter for parameter in flow.parameters() if id(parameter) not in known]
    for parameter in harmonic:
        parameter.requires_grad_(settings.harmonic_learning_rate > 0.0)
    groups = [(networks, settings.learning_rate), (harmonic, settings.harmonic_learning_rate)]
    trained = [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters and rate > 0.0]
    if not trained:
        raise ConfigurationError("there is nothing to train: no coupling layers, and harmonic_learning_rate is 0")
    return trained
