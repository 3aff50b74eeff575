"""The architecture of flows of rigid bodies, as stored in model files, and their training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ...core.configuration import StrictModel


class RigidFlowConfiguration(StrictModel):
    """Coupling layers of positions and orientations (arXiv 2301.11355).

    Attributes:
        repetitions: number of layers of positions and orientations in turn; 0 leaves the harmonic map alone.
        halves: move the bodies in two halves, each given the other half, instead of all at once. Of one body, whose
            orientation nothing else conditions, it is without effect.
        orientations: ``moebius``, symmetrised Moebius maps, or ``convex_gradient``, gradients of convex functions.
        moebius_steps: Moebius maps of one coupling.
        components: quadratic forms of one convex function.
        first_exponent: exponent of the power means of those forms before training; with small ones densities fall off
            fast around their modes, with large ones they learn faster.
        least_exponent: lower bound of the exponent in training, less than the first: 1, or down to 1/2.
        closed: direction that is closed form with ``convex_gradient``: ``inverse`` (data to latent) for densities that are to
            be used as potentials, ``forward`` for maps of samples.
        channels: width of the transformers.
        heads: attention heads.
        blocks: blocks of attention and network.
        seed: random seed of the initial parameters.
    """

    repetitions: NonNegativeInt = 4
    halves: bool = False
    orientations: Literal["moebius", "convex_gradient"] = "moebius"
    moebius_steps: PositiveInt = 2
    components: PositiveInt = 6
    first_exponent: float = Field(default=2.0, gt=0.5)
    least_exponent: float = Field(default=1.0, ge=0.5)
    closed: Literal["inverse", "forward"] = "inverse"
    channels: PositiveInt = 32
    heads: PositiveInt = 8
    blocks: PositiveInt = 2
    seed: int = 0

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> RigidFlowConfiguration:
        if self.channels % self.heads:
            raise ValueError(f"channels = {self.channels} is not a multiple of heads = {self.heads}")
        return self

    @model_validator(mode="after")
    def _exponents_are_ordered(self) -> RigidFlowConfiguration:
        if not self.least_exponent < self.first_exponent:
            raise ValueError(
                f"least_exponent = {self.least_exponent} must be less than first_exponent = {self.first_exponent}"
            )
        return self


class RigidFlowTraining(StrictModel):
    """Training by the mean work (learned free-energy perturbation) or by likelihood.

    Attributes:
        steps: optimiser steps.
        batch: samples a step.
        learning_rate: learning rate of the networks, peak of the cosine schedule.
        harmonic_learning_rate: learning rate of the harmonic map, in units of the fluctuations; 0 keeps it as it is.
        final_share: last learning rate over the first.
        gradient_clip: largest norm of the networks' gradient, and of the harmonic map's.
        average: decay of the exponential moving average of the parameters.
        checkpoint_interval: steps between checkpoints, and between evaluations on held-out samples.
    """

    steps: NonNegativeInt = 2000
    batch: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    harmonic_learning_rate: NonNegativeFloat = 0.0
    final_share: float = Field(default=0.01, gt=0.0, le=1.0)
    gradient_clip: PositiveFloat = 10.0
    average: float = Field(default=0.99, ge=0.0, lt=1.0)
    checkpoint_interval: PositiveInt = 250
