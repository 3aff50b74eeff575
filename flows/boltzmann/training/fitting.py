"""Run the training stages of a Boltzmann generator, with checkpoints that resume to the same numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....core.energy import BatchedEnergy
from ....core.errors import ConfigurationError, NonFiniteEnergyError
from ....core.training import trainer
from ....core.training.processes import Processes
from ..generator import BoltzmannGenerator
from ..molecule_coordinates import Coordinates
from .compiled_gradients import compilation_of
from .configuration import TrainingConfiguration
from .coverage import coverage_biases, find_basins
from .modules import LikelihoodTraining, RefinementTraining
from .target import CoverageBias, TargetDensity

_COVERAGE_SAMPLES = 20_000


@dataclass(frozen=True)
class TrainingData:
    """Frames with energies and forces: ``(F, N, 3)`` nm, ``(F,)`` kJ/mol, ``(F, N, 3)`` kJ/mol/nm."""

    positions: Tensor
    energies: Tensor
    forces: Tensor

    def __post_init__(self) -> None:
        if self.positions.shape != self.forces.shape or len(self.energies) != len(self.positions):
            raise ConfigurationError(
                f"positions {tuple(self.positions.shape)}, energies {tuple(self.energies.shape)} and forces "
                f"{tuple(self.forces.shape)} do not belong together"
            )


@dataclass(frozen=True)
class TrainingResult:
    """Training curves by stage, the biases that kept rare basins covered, and the basins' populations."""

    curves: dict[str, list[dict[str, float]]]
    biases: tuple[CoverageBias, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {"curves": self.curves, "biases": [asdict(bias) for bias in self.biases]}


def train(
    model: BoltzmannGenerator,
    data: TrainingData,
    energy: BatchedEnergy,
    settings: TrainingConfiguration,
    folder: Path,
    seed: int,
    show_progress: bool = True,
    held_out: Tensor | None = None,
) -> TrainingResult:
    """Train a generator in place: maximum likelihood, then refinement on its own samples.

    Under ``torchrun`` all its processes call this with the same arguments; each takes its share of every batch.

    Args:
        model: from :meth:`BoltzmannGenerator.untrained`; holds the averaged parameters afterwards.
        data: training frames.
        energy: batched energies of the target.
        settings: schedules and weights.
        folder: where checkpoints go; training continues from those it finds.
        seed: of all batches.
        show_progress: show a bar for each stage.
        held_out: positions ``(H, N, 3)`` nm of frames that are not trained on: maximum likelihood keeps the parameters under
            which they are likeliest, and stops where that gets worse.

    Raises:
        ConfigurationError: when a batch cannot be shared equally among the processes.
        ConvergenceError: when the likelihood of a batch is not finite.
        NonFiniteEnergyError: when more than half of the flow's samples have no finite energy before refinement.
    """
    temperature = model.metadata.temperature
    if temperature is None:
        raise ConfigurationError("the generator has no temperature to train at")
    processes = Processes.of_this_training()
    processes.require_equal_shares(
        {
            "likelihood.batch": settings.likelihood.batch,
            "refinement.batch": settings.refinement.batch,
            "refinement.final_batch": settings.refinement.final_batch,
        }
    )
    dtype = model.flow.dtype
    target = TargetDensity(model.coordinates, energy, temperature)
    coordinates, value = target.from_forces(data.positions, data.energies, data.forces)
    frames = Coordinates(*(part.to(dtype) for part in coordinates))
    gradient = Coordinates(*(part.to(dtype) for part in value.gradient))
    likelihood = LikelihoodTraining(
        model.flow, settings.likelihood, frames, gradient, seed, settings.log_interval,
        compilation_of(settings.compilation, settings.likelihood.steps),
        None if held_out is None else Coordinates(*(part.to(dtype) for part in model.coordinates.inverse(held_out)[0])),
    )  # fmt: skip
    interval = settings.checkpoint_interval
    curves = {"likelihood": trainer.train(likelihood, folder / "likelihood", interval, show_progress)}
    biases: tuple[CoverageBias, ...] = ()
    if settings.refinement.steps:
        # Every process has found them, but energies may round differently on another machine.
        biases = processes.agree(_coverage(model, coordinates, target, settings, seed))
        biased = TargetDensity(model.coordinates, energy, temperature, biases)
        refinement = RefinementTraining(
            model.flow, settings.refinement, biased, frames, seed, settings.log_interval,
            compilation_of(settings.compilation, settings.refinement.steps),
        )  # fmt: skip
        curves["refinement"] = trainer.train(refinement, folder / "refinement", interval, show_progress)
    return TrainingResult(curves, biases)


def _coverage(
    model: BoltzmannGenerator,
    frames: Coordinates,
    target: TargetDensity,
    settings: TrainingConfiguration,
    seed: int,
) -> tuple[CoverageBias, ...]:
    """Return the biases that keep rare basins covered, from reweighted samples of the flow as it is."""
    core = len(model.coordinates.layout.circular) - model.coordinates.layout.rotors
    basins = find_basins(frames.circular.numpy(), core)
    with torch.no_grad():
        latent = model.flow.sample_latent(_COVERAGE_SAMPLES, torch.Generator().manual_seed(seed))
        samples, _ = model.flow(latent)
        log_weights = target(samples).log_density - model.flow.log_prob(samples).double()
    finite = torch.isfinite(log_weights)
    if float(finite.double().mean()) < 0.5:
        raise NonFiniteEnergyError(
            f"only {int(finite.sum())} of {_COVERAGE_SAMPLES} samples of the flow have a finite energy after maximum "
            "likelihood: train longer, or give more frames"
        )
    weights = torch.exp(log_weights[finite] - log_weights[finite].max())
    return coverage_biases(
        basins,
        samples.circular[finite].numpy(),
        weights.numpy(),
        settings.refinement.coverage,
        settings.refinement.coverage_limit,
    )
