"""Training by several processes, as ``torchrun`` starts them: Lightning's distributed data parallelism."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ....core.errors import ConfigurationError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """How many processes train together.

    Attributes:
        number: on all machines.
        here: on this machine.
    """

    number: int = 1
    here: int = 1

    @classmethod
    def of_this_training(cls) -> Processes:
        """Return what ``torchrun`` says; one process without it."""
        if not torch.distributed.is_torchelastic_launched():
            return cls()
        return cls(int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))

    def trainer_arguments(self) -> dict[str, Any]:
        """Return what Lightning's Trainer has to know."""
        if self.number == 1:
            return {"devices": 1}
        return {"devices": self.here, "num_nodes": self.number // self.here, "strategy": "ddp"}

    def require_equal_shares(self, batches: Mapping[str, int | None]) -> None:
        """Refuse batches, by the names of their settings, that the processes cannot share equally.

        Raises:
            ConfigurationError: for the first such batch.
        """
        for label, batch in batches.items():
            if batch is not None and batch % self.number:
                raise ConfigurationError(
                    f"{self.number} processes cannot share batches of {batch} equally: make training.{label} a multiple of "
                    f"{self.number}"
                )

    def agree(self, result: Result) -> Result:
        """Return what the first process has."""
        if self.number == 1:
            return result
        shared: list[Any] = [result]
        torch.distributed.broadcast_object_list(shared)
        agreed: Result = shared[0]
        return agreed
