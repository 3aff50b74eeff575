"""The contract of learners, and the choice of one for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ....core.errors import ConfigurationError
from ....core.model import Model
from ...coarse_grained_force_field import CoarseGrainedForceField
from ..configuration import PrivateTraining
from ..units import UnitBatch, UnitData
from .auxiliary_coordinates import AuxiliaryCoordinates
from .auxiliary_force_matching import AuxiliaryForceMatching
from .clipping import Contributions
from .feed_forward import FeedForwardNetwork, refuse_unfit
from .force_matching import force_matching_gradients
from .sample_gradients import SampleGradients


class Learner(Protocol):
    """A trained model as a source of clipped sums: :class:`.AuxiliaryCoordinates`, :class:`.AuxiliaryForceMatching` or
    :class:`.SampleGradients`.
    """

    @property
    def method(self) -> Literal["dp_mac", "dp_sgd"]:
        """Name of the method in the ledger."""

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the tensors that are released in a step."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""

    def contributions(self, batch: UnitBatch, thresholds: list[float]) -> Contributions:
        """Return the clipped sums over the units of a batch, which may be empty."""

    def assign(self, means: list[Tensor], damping: float) -> None:
        """Turn noisy means into ``grad`` of the parameters."""


def learner_of(model: Model, data: UnitData, settings: PrivateTraining) -> Learner:
    """Return how units contribute to the training of a model.

    Raises:
        ConfigurationError: for models that need a learner of their own, and data that do not fit.
    """
    steps, rate = settings.coordinate_steps, settings.coordinate_rate
    coordinates: dict[str, Any] = {} if steps is None else {"coordinate_steps": steps}
    coordinates |= {} if rate is None else {"coordinate_rate": rate}
    if isinstance(model, FeedForwardNetwork):
        refuse_unfit(model, data.inputs, data.targets)
        if settings.method == "dp_mac":
            return AuxiliaryCoordinates(model, settings.order, **coordinates)
        return SampleGradients.of_network(model)
    if isinstance(model, CoarseGrainedForceField):
        if settings.method == "dp_sgd":
            return force_matching_gradients(model)
        return AuxiliaryForceMatching(model, order=settings.order, **coordinates)
    raise ConfigurationError(
        f"a {type(model).__name__} needs a learner that says how units contribute, such as SampleGradients(model, loss)"
    )
