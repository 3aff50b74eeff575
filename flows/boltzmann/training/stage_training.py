"""One stage of training under Lightning: a schedule, averaged parameters, and checkpoints that resume to the same numbers."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from ....core.errors import ConvergenceError
from ...transforms.merging import MergingSchedule, restart_merged
from ...transforms.rank_one_matrix import rank_one_matrices
from .processes import Processes


class StageSchedule(Protocol):
    """Steps, learning rates, decay of the average, and the largest norm of a gradient."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""

    @property
    def learning_rate(self) -> float:
        """Peak of the cosine schedule."""

    @property
    def final_learning_rate(self) -> float:
        """Its end."""

    @property
    def average(self) -> float:
        """Decay of the exponential moving average of the parameters."""

    @property
    def gradient_clip(self) -> float:
        """Largest norm of the gradient."""


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Return the learning rate of a cosine schedule from ``start`` at step 0 to ``end`` at ``steps``."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


Tensors = tuple[Tensor, ...] | list[Tensor]


def averaging(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an exponential moving average of all parameters that starts fast: the first steps are forgotten early."""

    def update(averages: Tensors, current: Tensors, count: Tensor | int) -> None:
        weight = min(decay, (1.0 + int(count)) / (10.0 + int(count)))
        torch._foreach_lerp_(averages, current, 1.0 - weight)

    return update


class StageTraining(lightning.LightningModule):
    """What all stages share: optimiser, schedule, averaged parameters, training curve.

    Args:
        flow: trained in place.
        stage: its schedule.
        seed: of the batches.
        log_interval: steps between points of the training curve.
    """

    def __init__(
        self,
        flow: nn.Module,
        stage: StageSchedule,
        seed: int,
        log_interval: int,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.averaged = AveragedModel(flow, multi_avg_fn=averaging(stage.average)).requires_grad_(False)
        self.stage = stage
        self.seed = seed
        self.log_interval = log_interval
        self.processes = Processes.of_this_training()
        self.curve: list[dict[str, float]] = []
        self.merging: MergingSchedule | None = None
        self._merging_state: dict[str, Any] | None = None

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return the generator of the current step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step + offset)

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch that all processes of a training draw alike.

        The parts are equally large, so that the mean of their gradients is the gradient of the whole batch.
        """
        return batch[self.global_rank :: self.processes.number]

    def whole(self, part: Tensor) -> Tensor:
        """Return the parts ``(B / processes,)`` of all processes, ``(B,)``."""
        if self.processes.number == 1:
            return part
        gathered = self.all_gather(part)
        if not isinstance(gathered, Tensor):
            raise TypeError(f"gathering tensors gave a {type(gathered).__name__}")
        return gathered.flatten()

    def configure_optimizers(self) -> Any:
        """Adam with a cosine schedule, one scheduler tick a step."""
        stage = self.stage
        trained = [parameter for parameter in self.flow.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=stage.learning_rate, betas=(0.9, 0.99), fused=True)
        if rank_one_matrices(self.flow):
            self.merging = MergingSchedule(self.flow, optimiser)
            if self._merging_state is not None:
                self.merging.load_state_dict(self._merging_state)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: (
                cosine(stage.learning_rate, stage.final_learning_rate, step, stage.steps) / stage.learning_rate
            ),
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and update the averaged parameters: at the end of the batch the checkpoint is written before any hook."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        self.averaged.update_parameters(self.flow)
        restart_merged(self.averaged.module, self.flow)

    def after_step(self) -> None:
        """Do what a stage does to its parameters after each step; nothing here."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limit the norm of the gradient; raises ConvergenceError where it is not finite, before it reaches the parameters."""
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), gradient_clip_val or math.inf)
        if not torch.isfinite(norm):
            raise ConvergenceError(
                f"the gradient of step {self.global_step} of {type(self).__name__} is not finite: the training has diverged. "
                "Lower the learning rate of this stage, train longer by likelihood first, or give more frames"
            )

    def finish(self) -> None:
        """Leave the averaged parameters in the flow, and no perturbation that waits for its merge."""
        self.flow.load_state_dict(self.averaged.module.state_dict())
        for matrix in rank_one_matrices(self.flow):
            matrix.merge()

    def record(self, **values: float) -> None:
        """Add a point to the training curve and the progress bar."""
        if self.global_step % self.log_interval == 0:
            self.curve.append({"step": float(self.global_step), **values})
        self.log_dict(values, prog_bar=True, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the curve, and where merges of perturbations are in their cycle."""
        checkpoint["curve"] = self.curve
        checkpoint["merging"] = None if self.merging is None else self.merging.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the curve, and the cycle of merges, which the optimiser is not there for yet."""
        self.curve = checkpoint["curve"]
        self._merging_state = checkpoint.get("merging")  # older checkpoints have none


class _Steps(IterableDataset[int]):
    """An endless stream; each step makes its own batch."""

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield step
            step += 1


def run_stage(
    module: StageTraining, name: str, checkpoint_interval: int, folder: Path, show_progress: bool
) -> list[dict[str, float]]:
    """Run one stage from its last checkpoint and leave the averaged parameters in the flow; return its curve."""
    if not module.stage.steps:
        return []
    stage_folder = folder / name
    checkpoints = ModelCheckpoint(
        dirpath=stage_folder,
        filename="step",
        every_n_train_steps=min(checkpoint_interval, module.stage.steps),
        save_top_k=1,
        enable_version_counter=False,
    )
    callbacks: list[lightning.Callback] = [checkpoints]
    if show_progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    last = stage_folder / "step.ckpt"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # A loader of step numbers needs no workers, and a stage may be resumed at its very end.
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(isinstance\\(treespec|LeafSpec).*")
        trainer = lightning.Trainer(
            max_steps=module.stage.steps,
            accelerator="cpu",
            **module.processes.trainer_arguments(),
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=show_progress,
            enable_model_summary=False,
            gradient_clip_val=module.stage.gradient_clip,
            default_root_dir=stage_folder,
        )
        trainer.fit(
            module,
            DataLoader(_Steps(), batch_size=None),
            ckpt_path=str(last) if last.is_file() else None,
            weights_only=False,  # our own checkpoint of this very run, with optimiser state; models for use are .flow
        )
    module.finish()
    return module.curve
