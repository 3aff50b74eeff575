"""Schedules of training: the tables of the TOML file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ...core.compilation.programs import CompilationMode
from ...core.configuration import StrictModel
from ...core.training.objective import CosineStage

Method = Literal["force_matching", "flow_matching", "noised_force_matching"]


class Stage(CosineStage):
    """One training stage.

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: frames a step.
        patience: stop after so many evaluations on held-out frames without improvement; 0 never stops. The parameters
            that were best on held-out frames are kept in any case.
    """

    steps: PositiveInt = 4000
    batch: PositiveInt = 256
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: PositiveFloat = 1e-5
    average: float = Field(default=0.998, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 20.0
    patience: NonNegativeInt = 0


class NoiseConfiguration(StrictModel):
    """Noised force matching (Durumeric et al., arXiv 2407.01286): the force field of the density smeared by a Gaussian.

    Attributes:
        width: nm, standard deviation of the noise on every bead coordinate.
        force_share: fraction of the mapped force in the label; the rest is the noise's own force ``kT (R - R') /
            width^2``. Both have the same average; 0 needs no forces.
    """

    width: PositiveFloat = 0.005
    force_share: float = Field(default=1.0, ge=0.0, le=1.0)


class CoarseTrainingConfiguration(StrictModel):
    """Training of a coarse-grained force field.

    Attributes:
        method: ``force_matching`` on mapped forces, ``flow_matching`` on those of a flow that learned the frames without
            forces, or ``noised_force_matching``.
        teacher: maximum likelihood of the flow (flow-matching only).
        student: force matching of the network.
        samples: number of samples of the teacher that the student learns from.
        contrast: weight of noise-contrastive estimation in the loss, next to the force error (flow-matching only; see
            :mod:`~flowbridge.forcefields.training.noise_contrastive`); 0 for forces alone, as in arXiv 2203.11167.
        largest_mean_square_force: (kT/nm)^2; samples of the teacher above it are left out, and counted.
        noise: settings of noised force matching.
        held_out: fraction of frames for evaluation, which do not train.
        checkpoint_interval: steps between checkpoints.
        log_interval: steps between points of the curve and evaluations on held-out frames, by which the best parameters
            are chosen: a flow overfits a thousand frames within a hundred steps.
        compilation: whether steps are compiled; auto: where a stage has 3000 of them or more.
    """

    method: Method = "flow_matching"
    teacher: Stage = Field(default_factory=Stage)
    student: Stage = Field(default_factory=lambda: Stage(steps=8000, learning_rate=3e-3))
    samples: PositiveInt = 100_000
    contrast: NonNegativeFloat = 2.0
    largest_mean_square_force: PositiveFloat = 1.5e5
    noise: NoiseConfiguration = Field(default_factory=NoiseConfiguration)
    held_out: float = Field(default=0.1, gt=0.0, lt=0.9)
    checkpoint_interval: PositiveInt = 500
    log_interval: PositiveInt = 50
    compilation: CompilationMode = "auto"
