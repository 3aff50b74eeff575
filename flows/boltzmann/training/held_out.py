"""What frames that are not trained on say about a flow: when to stop, and which parameters to keep."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinate_flow import CoordinateFlow
from ..molecule_coordinates import Coordinates

_MOST = 1024  # frames: the error of their mean is far below what over-training costs


class HeldOutLikelihood:
    """Follows the likelihood of held-out frames and keeps the best parameters.

    Args:
        data: coordinates of the frames, in the flow's dtype; an even choice of them is used where there are many.
        patience: looks without improvement after which training is to stop; 0 never stops.
    """

    def __init__(self, data: Coordinates, patience: int) -> None:
        count = len(data.stiff)
        chosen = torch.linspace(0, count - 1, min(count, _MOST)).round().long()
        self.data = Coordinates(data.circular[chosen], data.stiff[chosen])
        self.patience = patience
        self.best = math.inf
        self.waited = 0
        self._parameters: dict[str, Tensor] | None = None

    def look(self, flow: nn.Module) -> float:
        """Return ``-mean log q`` of the held-out frames under a flow; keep its parameters if it is the lowest so far."""
        if not isinstance(flow, CoordinateFlow):
            raise TypeError(f"expected a CoordinateFlow, got a {type(flow).__name__}")
        with torch.no_grad():
            value = float(-flow.log_prob(self.data).double().mean())
        if value < self.best:
            self.best, self.waited = value, 0
            self._parameters = copy.deepcopy(flow.state_dict())
        else:
            self.waited += 1
        return value

    @property
    def finished(self) -> bool:
        """Whether training is to stop."""
        return 0 < self.patience <= self.waited

    def restore(self, flow: CoordinateFlow) -> bool:
        """Give a flow the best parameters, and return whether there were any."""
        if self._parameters is not None:
            flow.load_state_dict(self._parameters)
        return self._parameters is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on with the same numbers."""
        return {"best": self.best, "waited": self.waited, "parameters": self._parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.best, self.waited, self._parameters = state["best"], state["waited"], state["parameters"]
