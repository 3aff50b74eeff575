"""What data that are not trained on say about a training: which parameters to keep, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class HeldOutTracker:
    """Follows a loss on held-out data and keeps the parameters under which it was lowest.

    Args:
        patience: evaluations in a row without improvement after which training is to stop; 0 never stops.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.best = math.inf
        self.waited = 0
        self._parameters: dict[str, Tensor] | None = None

    def update(self, value: float, module: nn.Module) -> None:
        """Take in the loss of a module, and keep its parameters and buffers if it is the lowest so far."""
        if value < self.best:
            self.best, self.waited = value, 0
            self._parameters = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        else:
            self.waited += 1

    @property
    def finished(self) -> bool:
        """Whether training is to stop."""
        return 0 < self.patience <= self.waited

    def restore(self, module: nn.Module) -> None:
        """Give a module the best parameters; leave it alone where nothing was evaluated."""
        if self._parameters is not None:
            module.load_state_dict(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to repeat the same numbers."""
        return {"best": self.best, "waited": self.waited, "parameters": self._parameters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.best, self.waited = float(state["best"]), int(state["waited"])
        self._parameters = state["parameters"]
