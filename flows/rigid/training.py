"""Training by the mean work (learned free-energy perturbation), with checkpoints that resume to the same numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError, ConvergenceError, NonFiniteEnergyError
from ..boltzmann.training.checkpoint_files import load_checkpoint, save_checkpoint
from ..boltzmann.training.stage_training import averaging, cosine
from .configuration import RigidFlowTraining
from .crystal import CrystalCoordinates, RigidBijection
from .harmonic import HarmonicBase, HarmonicMap, UniformBase
from .works import Ensemble, carried, selected, summary, works_of

Draw = Callable[[int, torch.Generator], tuple[CrystalCoordinates, Tensor]]
"""``(count, generator) -> (coordinates, reduced potentials (count,))`` of samples of the base."""

HeldOut = TypeVar("HeldOut")

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

    def look(averaged: RigidBijection, frames: Frames) -> float:
        return summary(works_of(averaged, frames.coordinates, frames.reduced, target)).mean

    return _train(flow, loss, settings, folder, seed, _looking(look, held_out), progress)


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

    def look(averaged: RigidBijection, coordinates: CrystalCoordinates) -> float:
        with torch.no_grad():
            return float(negative_log_likelihood(averaged, coordinates))

    return _train(flow, loss, settings, folder, seed, _looking(look, held_out), progress)


def with_random_signs(coordinates: CrystalCoordinates, generator: torch.Generator) -> CrystalCoordinates:
    """Return the same orientations with quaternions of random sign: nothing may depend on the ones they come with."""
    displacements, orientations = coordinates
    signs = torch.randint(2, orientations.shape[:2], generator=generator).to(orientations) * 2.0 - 1.0
    return CrystalCoordinates(displacements, orientations * signs.unsqueeze(-1))


def _looking(
    look: Callable[[RigidBijection, HeldOut], float], held_out: HeldOut | None
) -> Callable[[RigidBijection], float] | None:
    """Return how well a flow does on what is held out; None where nothing is."""
    return None if held_out is None else lambda flow: look(flow, held_out)


def _train(
    flow: RigidBijection,
    loss: Callable[[int, torch.Generator], Tensor],
    settings: RigidFlowTraining,
    folder: Path,
    seed: int,
    look: Callable[[RigidBijection], float] | None,
    progress: Progress | None,
) -> TrainingCurve:
    trainer = _Trainer(flow, settings, folder, look)
    window: list[float] = []
    for step in range(trainer.first, settings.steps):
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        trainer.update(value, step)
        window.append(float(value.detach()))
        if progress is not None:
            progress(step + 1, settings.steps)
        if (step + 1) % settings.checkpoint_interval == 0 or step + 1 == settings.steps:
            trainer.record(step + 1, sum(window) / len(window))
            window = []
    trainer.finish()
    return trainer.curve


class _Trainer:
    """Optimiser, averages, best parameters so far and curve: what a checkpoint holds."""

    def __init__(
        self,
        flow: RigidBijection,
        settings: RigidFlowTraining,
        folder: Path,
        look: Callable[[RigidBijection], float] | None,
    ) -> None:
        self.flow, self.settings, self.look = flow, settings, look
        self.file = folder / "training.ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        self.averaged = torch.optim.swa_utils.AveragedModel(flow, multi_avg_fn=averaging(settings.average))
        self.groups = _parameter_groups(flow, settings)
        self.optimiser = torch.optim.Adam(
            [{"params": parameters, "lr": rate} for parameters, rate in self.groups], betas=(0.9, 0.99)
        )
        self.curve = TrainingCurve()
        self.first = 0
        self.best = copy.deepcopy(flow)
        self.best_value = math.inf
        self.kept = nn.ModuleDict({"flow": flow, "averaged": self.averaged, "best": self.best})
        if self.file.is_file():
            self._resume()
        else:
            self._keep_the_best()

    def update(self, loss: Tensor, step: int) -> None:
        """Take one optimiser step down the gradient of ``loss``; raises ConvergenceError where that is not finite."""
        self.optimiser.zero_grad()
        loss.backward()
        share = cosine(1.0, self.settings.final_share, step, self.settings.steps)
        for group, (parameters, rate) in zip(self.optimiser.param_groups, self.groups, strict=True):
            group["lr"] = rate * share
            norm = nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
            if not bool(torch.isfinite(norm)):
                raise ConvergenceError(
                    f"the gradient of step {step} is not finite: the training has diverged. Lower the learning rates"
                )
        self.optimiser.step()
        self.averaged.update_parameters(self.flow)

    def record(self, done: int, loss: float) -> None:
        """Add to the curve, look at what is held out, write the checkpoint."""
        self.curve.steps.append(done)
        self.curve.loss.append(loss)
        self._keep_the_best()
        progress = {
            "done": done,
            "curve": asdict(self.curve),
            "best": self.best_value if math.isfinite(self.best_value) else None,
            "settings": self.settings.model_dump(mode="json"),
        }
        save_checkpoint(self.file, self.kept, self.optimiser, progress)

    def finish(self) -> None:
        """Leave the best parameters in the flow where something was held out, and else the averaged ones."""
        chosen = self.averaged.module if self.look is None else self.best
        self.flow.load_state_dict(chosen.state_dict())

    def _keep_the_best(self) -> None:
        if self.look is None:
            return
        value = self.look(cast(RigidBijection, self.averaged.module))
        self.curve.held_out.append(value)
        if value < self.best_value:
            self.best_value = value
            self.best.load_state_dict(self.averaged.module.state_dict())

    def _resume(self) -> None:
        progress = load_checkpoint(self.file, self.kept, self.optimiser)
        if progress["settings"] != self.settings.model_dump(mode="json"):
            raise ConfigurationError(
                f"{self.file} is the checkpoint of a training with other settings: choose another folder, or remove it"
            )
        self.first = progress["done"]
        self.curve = TrainingCurve(**progress["curve"])
        self.best_value = math.inf if progress["best"] is None else progress["best"]


def _parameter_groups(flow: RigidBijection, settings: RigidFlowTraining) -> list[tuple[list[nn.Parameter], float]]:
    """Return parameters with their learning rates; harmonic maps without one are kept."""
    maps = [module for module in flow.modules() if isinstance(module, HarmonicMap)]
    harmonic = [parameter for module in maps for parameter in module.parameters()]
    known = {id(parameter) for parameter in harmonic}
    networks = [parameter for parameter in flow.parameters() if id(parameter) not in known]
    for parameter in harmonic:
        parameter.requires_grad_(settings.harmonic_learning_rate > 0.0)
    groups = [(networks, settings.learning_rate), (harmonic, settings.harmonic_learning_rate)]
    trained = [(parameters, rate) for parameters, rate in groups if parameters and rate > 0.0]
    if not trained:
        raise ConfigurationError("there is nothing to train: no coupling layers, and harmonic_learning_rate is 0")
    return trained
