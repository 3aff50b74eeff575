"""Processes that ``torchrun`` started for one training: who they are, their shares of a batch, what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        number: of processes on all machines.
        here: of processes on this machine.
        rank: which of them this is, from 0.
    """

    number: int = 1
    here: int = 1
    rank: int = 0

    @classmethod
    def of_this_training(cls) -> Processes:
        """Return what ``torchrun`` says; one process without it."""
        if not torch.distributed.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")))

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

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part ``(B / number, ...)`` of a batch ``(B, ...)`` that all processes draw alike.

        The parts are equally large, so that the mean of their gradients is the gradient of the whole batch.
        """
        return batch[self.rank :: self.number]

    def whole(self, part: Tensor) -> Tensor:
        """Return the parts ``(B / number,)`` of all processes, ``(B,)``; without gradients where there are several."""
        if self.number == 1:
            return part
        _connect()
        parts = [torch.empty_like(part) for _ in range(self.number)]
        torch.distributed.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their means over all processes."""
        if self.number == 1:
            return
        _connect()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            chosen = [gradient for gradient in gradients if gradient.dtype == dtype]
            together = torch.cat([gradient.flatten() for gradient in chosen])
            torch.distributed.all_reduce(together)
            together /= self.number
            for gradient, mean in zip(chosen, together.split([one.numel() for one in chosen]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def agree(self, result: Result) -> Result:
        """Return what the first process has."""
        if self.number == 1:
            return result
        _connect()
        shared: list[Any] = [result]
        torch.distributed.broadcast_object_list(shared)
        agreed: Result = shared[0]
        return agreed

    def begin_alike(self, step: int, module: nn.Module) -> None:
        """Wait for all processes, and give them the first one's parameters and buffers.

        Args:
            step: that this process is about to begin.
            module: what is trained.

        Raises:
            ConfigurationError: when another process has resumed from another step.
        """
        first = self.agree(step)
        if first != step:
            raise ConfigurationError(
                f"process {self.rank} begins at step {step}, the first process at step {first}: they see different "
                "checkpoints. Give all processes a folder on a file system that they share"
            )
        if self.number > 1:
            module.load_state_dict(self.agree(module.state_dict()))
            torch.distributed.barrier()


def local_processes() -> int:
    """Return how many processes of this training run on this machine; 1 without torchrun."""
    return Processes.of_this_training().here


def is_main_process() -> bool:
    """Return whether this process does what is done once: simulate, write, report."""
    return Processes.of_this_training().rank == 0


def _connect() -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
