"""Schedules and weights of training: the tables of the TOML file."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ....core.compilation.programs import CompilationMode
from ....core.configuration import StrictModel
from ....core.training.objective import CosineStage


class LikelihoodStage(CosineStage):
    """Maximum likelihood on the training frames, with force matching where its weight is positive.

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: frames a step.
        force_weight: weight of force matching in whitened latent coordinates (needs second derivatives).
        patience: number of log intervals without a likelier held-out set after which training stops; 0 never stops.
    """

    steps: NonNegativeInt = 400
    batch: PositiveInt = 512
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate: PositiveFloat = 2e-5
    force_weight: NonNegativeFloat = 0.0
    average: float = Field(default=0.998, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 20.0
    patience: NonNegativeInt = 3


class RefinementStage(CosineStage):
    """Energy-based refinement on the flow's own samples.

    Attributes, besides those of :class:`~flowbridge.core.training.objective.CosineStage`:
        batch: samples a step.
        path_weight: weight of the path-gradient loss.
        reverse_kl_weight: weight of the plain reverse Kullback-Leibler loss (its gradient has variance at the optimum).
        likelihood_weight: weight of maximum likelihood on training frames.
        coverage: least population of a basin under the training target; rarer basins are raised to it by a bias that
            the importance weights take out again. 0 switches it off.
        coverage_limit: largest factor by which the bias may raise a basin.
        final_batch: batch size of the last ``final_share`` of the steps, where the noise of the gradient is what is left.
    """

    steps: NonNegativeInt = 1500
    batch: PositiveInt = 512
    final_batch: PositiveInt | None = None
    final_share: float = Field(default=0.25, ge=0.0, le=1.0)
    learning_rate: PositiveFloat = 7e-4
    final_learning_rate: PositiveFloat = 1e-5
    path_weight: NonNegativeFloat = 1.0
    reverse_kl_weight: NonNegativeFloat = 0.0
    likelihood_weight: NonNegativeFloat = 0.0
    coverage: float = Field(default=0.007, ge=0.0, lt=0.5)
    coverage_limit: PositiveFloat = 8.0
    average: float = Field(default=0.998, ge=0.0, lt=1.0)
    gradient_clip: PositiveFloat = 5.0


class TrainingConfiguration(StrictModel):
    """All stages of training."""

    likelihood: LikelihoodStage = Field(default_factory=LikelihoodStage)
    refinement: RefinementStage = Field(default_factory=RefinementStage)
    checkpoint_interval: PositiveInt = Field(default=200, description="steps between checkpoints")
    log_interval: PositiveInt = Field(default=25, description="steps between entries of the training curve")
    compilation: CompilationMode = Field(
        default="auto", description="whether steps are compiled; auto: where a stage has 3000 of them or more"
    )
