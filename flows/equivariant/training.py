"""Training of continuous flows: by optimal-transport flow matching, by maximum likelihood and by path gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from ...core.compilation.programs import CompilationMode
from ...core.configuration import StrictModel
from ...core.errors import ConfigurationError
from ...core.training.objective import CosineStage, StageObjective
from ...core.training.processes import Processes
from ...core.training.streams import random_stream
from ...core.training.trainer import train
from .alignment import Coupled, couple
from .continuous_flow import ContinuousFlow
from .fields.compiled_field import compiled
from .mean_free import without_mean
from .ordinary_equations import displaced_times, runge_kutta
from .path_training import PathGradientStage, PathGradientTraining, ReducedEnergy

_POOL_OFFSET = 700_000_001  # separates the random streams of couplings and batches


class FlowMatchingStage(CosineStage):
    """Regression of the field on straight lines from prior points to samples (arXiv 2210.02747, 2306.15030).

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: lines a step.
        alignment: whether a line joins a prior point with the permuted and rotated image of a sample that is nearest to it; for
            a field without these symmetries it must be off.
        group: prior points and samples among which partners are assigned.
        pool: lines that are made at once.
        pool_uses: how often each is used, at one random time after another, before new ones are made.
    """

    steps: NonNegativeInt = 4000
    batch: PositiveInt = 256
    learning_rate: PositiveFloat = 4e-3
    final_learning_rate: PositiveFloat = 2e-5
    alignment: bool = True
    group: PositiveInt = 8
    pool: PositiveInt = 10_240
    pool_uses: PositiveInt = 4
    average: float = Field(default=0.999, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 50.0


class LikelihoodStage(CosineStage):
    """Maximum likelihood, differentiated through the steps of the solver ("discretise, then optimise").

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: samples a step.
        solver_steps: of the Runge-Kutta rule from data to prior; one of them is cut in two at random.
        smoothness: weight of the solver's defect, which keeps the field one that few steps solve.
    """

    steps: NonNegativeInt = 300
    batch: PositiveInt = 64
    solver_steps: PositiveInt = 6
    smoothness: NonNegativeFloat = 1.0
    learning_rate: PositiveFloat = 5e-4
    final_learning_rate: PositiveFloat = 1e-5
    average: float = Field(default=0.99, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 20.0


class ContinuousFlowTraining(StrictModel):
    """Stages, one after the other.

    Attributes:
        matching: flow matching.
        likelihood: maximum likelihood, in any number of stages; none by default.
        path: path gradients, which need the target's energy, in any number of stages; none by default.
        compilation: of the field. Compiled code pays where a batch is more work than torch's calls: two or three times as fast
            for LJ13, nothing for DW4.
        checkpoint_interval: steps between checkpoints.
        log_interval: steps between points of the training curve.
    """

    matching: FlowMatchingStage = Field(default_factory=FlowMatchingStage)
    likelihood: tuple[LikelihoodStage, ...] = ()
    path: tuple[PathGradientStage, ...] = ()
    compilation: CompilationMode = "never"
    checkpoint_interval: PositiveInt = 500
    log_interval: PositiveInt = 25


class FlowMatchingTraining(StageObjective):
    """Flow matching of a continuous flow.

    Args:
        flow: trained in place.
        stage: schedule.
        samples: ``(S, N, D)`` in reduced lengths, without their centres, in the flow's dtype.
        seed: of couplings and batches.
        log_interval: steps between points of the training curve.
        compilation: of the field.
    """

    stage: FlowMatchingStage
    module: ContinuousFlow
    recorded = "squared_error"

    def __init__(
        self,
        flow: ContinuousFlow,
        stage: FlowMatchingStage,
        samples: Tensor,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(flow, stage, seed, log_interval)
        self.field = compiled(flow.field, compilation)
        if stage.pool % stage.group or stage.pool < stage.batch:
            raise ConfigurationError(
                f"a pool of {stage.pool} lines must be a multiple of the group of {stage.group}, and hold a batch of "
                f"{stage.batch}"
            )
        self.samples = samples
        self._pool: Coupled | None = None
        self._pool_number = -1

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the field on one batch of lines, at evenly spread random times."""
        stage = self.stage
        lines = self._lines()
        chosen = self.processes.share(torch.randint(len(lines.start), (stage.batch,), generator=generator))
        start, end = lines.start[chosen], lines.end[chosen]
        time = (torch.rand(1, generator=generator) + torch.arange(stage.batch) / stage.batch) % 1.0
        time = self.processes.share(time.to(start.dtype))
        fraction = time[:, None, None]
        velocity = self.field(time, (1.0 - fraction) * start + fraction * end)
        return (velocity - (end - start)).square().sum((1, 2)).mean()

    def _lines(self) -> Coupled:
        """Return the pool of the current step, which is a function of the seed and its number alone."""
        stage = self.stage
        number = self.step // max(1, stage.pool * stage.pool_uses // stage.batch)
        if self._pool is None or number != self._pool_number:
            generator = random_stream(self.seed, number, _POOL_OFFSET)
            chosen = torch.randint(len(self.samples), (stage.pool,), generator=generator)
            start = self.module.prior.sample(stage.pool, generator, self.samples.dtype)
            end = self.samples[chosen]
            self._pool = couple(start, end, stage.group) if stage.alignment else Coupled(start, end)
            self._pool_number = number
        return self._pool


class ContinuousLikelihoodTraining(StageObjective):
    """Maximum likelihood of a continuous flow; arguments as for :class:`FlowMatchingTraining`."""

    stage: LikelihoodStage
    module: ContinuousFlow
    loss_name = "likelihood"
    loss_advice = "lower the learning rate, or take more solver steps"

    def __init__(
        self,
        flow: ContinuousFlow,
        stage: LikelihoodStage,
        samples: Tensor,
        seed: int,
        log_interval: int,
        compilation: str = "never",
    ) -> None:
        super().__init__(flow, stage, seed, log_interval)
        self.field = compiled(flow.field, compilation)
        self.samples = samples

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the mean negative log-likelihood of one batch, and the weighted defect of the solver."""
        chosen = self.processes.share(torch.randint(len(self.samples), (self.stage.batch,), generator=generator))
        times = displaced_times(self.stage.solver_steps, generator)
        latent, divergence, defect = runge_kutta(self.field, self.samples[chosen], times[::-1])
        nll = -(self.module.prior.log_prob(latent) + divergence).mean()
        self.record(nll=float(nll.detach()))
        return nll + self.stage.smoothness * defect.mean()


def train_continuous_flow(
    flow: ContinuousFlow,
    samples: Tensor,
    settings: ContinuousFlowTraining,
    folder: Path,
    *,
    energy: ReducedEnergy | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, list[dict[str, float]]]:
    """Train a flow in place on samples, and return the curves of its stages.

    Under ``torchrun`` all its processes call this with the same arguments; each takes its share of every batch.

    Args:
        flow: any continuous flow, equivariant or not.
        samples: ``(S, N, D)`` in reduced lengths.
        settings: of the stages.
        folder: where checkpoints go; training goes on from those it finds, to the same numbers.
        energy: of the target in kT; path gradients need it.
        seed: of all random numbers.
        show_progress: show a bar for each stage.

    Raises:
        ConfigurationError: when stages of path gradients are asked for without an energy, or when a batch cannot be shared
            equally among the processes.
        ConvergenceError: when the training diverges.
        ValueError: when the samples are not of the flow's particles, or not finite.
    """
    expected = (flow.prior.count, flow.prior.dimension)
    if samples.dim() != 3 or tuple(samples.shape[1:]) != expected or not torch.isfinite(samples).all():
        raise ValueError(f"samples must be finite, (samples, {expected[0]}, {expected[1]}), got {tuple(samples.shape)}")
    if settings.path and energy is None:
        raise ConfigurationError("path gradients need the target's reduced energy: give it, or leave their stages out")
    Processes.of_this_training().require_equal_shares(
        {
            "matching.batch": settings.matching.batch,
            **{f"likelihood.{number}.batch": stage.batch for number, stage in enumerate(settings.likelihood)},
            **{f"path.{number}.batch": stage.batch for number, stage in enumerate(settings.path)},
        }
    )
    centred = without_mean(samples.double()).to(flow.dtype)
    stages = _stages(flow, centred, settings, energy, seed)
    # Each stage is made when the one before it is done: its averages start from the parameters that are there.
    interval = settings.checkpoint_interval
    return {name: train(stage, folder / name, interval, show_progress) for name, stage in stages}


def _stages(
    flow: ContinuousFlow, samples: Tensor, settings: ContinuousFlowTraining, energy: ReducedEnergy | None, seed: int
) -> Iterator[tuple[str, StageObjective]]:
    interval, mode = settings.log_interval, settings.compilation
    yield "matching", FlowMatchingTraining(flow, settings.matching, samples, seed, interval, mode)
    for number, likelihood in enumerate(settings.likelihood):
        training = ContinuousLikelihoodTraining(flow, likelihood, samples, seed + number, interval, mode)
        yield f"likelihood-{number + 1}", training
    if energy is not None:
        for number, path in enumerate(settings.path):
            yield f"path-{number + 1}", PathGradientTraining(flow, path, samples, energy, seed + number, interval, mode)
