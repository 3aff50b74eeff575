"""Settings of private training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ...core.configuration import StrictModel


class PrivateTraining(StrictModel):
    """Settings of private training.

    Attributes:
        method: ``dp_mac`` (feed-forward networks, force fields on invariant features) or ``dp_sgd`` (anything).
        steps: noisy answers.
        batch: units a step, on average: each takes part with probability ``batch / units``.
        clip: norm that contributions are clipped to, one for all blocks or one each (DP-MAC: each layer, then each curvature).
        adaptive_quantile: move the norms towards this quantile of the contributions' norms; None keeps ``clip``. A hundredth of
            the noise budget pays for the counts.
        adaptive_rate: rate of that movement.
        learning_rate: peak of the cosine schedule of Adam.
        final_learning_rate: its end, as a fraction of the peak.
        average: decay of the moving average of the parameters that is kept; 0 keeps the last ones. It is computed from released
            steps, so it costs nothing.
        order: 1, or 2 for curvatures (DP-MAC).
        damping: added to curvatures.
        coordinate_steps: steps on auxiliary coordinates (DP-MAC); None for what suits the network.
        coordinate_rate: their learning rate; None likewise.
    """

    method: Literal["dp_mac", "dp_sgd"] = "dp_sgd"
    steps: PositiveInt = 200
    batch: PositiveInt = 256
    clip: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    adaptive_quantile: float | None = Field(default=None, gt=0.0, lt=1.0)
    adaptive_rate: PositiveFloat = 0.2
    learning_rate: PositiveFloat = 0.01
    final_learning_rate: float = Field(default=0.1, gt=0.0, le=1.0)
    average: float = Field(default=0.0, ge=0.0, lt=1.0)
    order: Literal[1, 2] = 1
    damping: NonNegativeFloat = 0.1
    coordinate_steps: NonNegativeInt | None = None
    coordinate_rate: PositiveFloat | None = None
