"""The training loop of every method: an objective, its optimiser, averages, held-out data, and checkpoints that resume exactly.

It stands on torch alone. What a training framework would do for us is the loop below; what we need besides, none of the usual
ones does: resumption to the same numbers from files that are not unpickled, a random stream for each step, a process that a
signal ends and that then says so. They take seconds to import, and change more often than this does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError, ConvergenceError, ModelFileError
from ..execution.progress import progress_bar
from .checkpoints import checkpoint_in, read_checkpoint, write_checkpoint
from .held_out import HeldOutTracker
from .objective import Objective


class Trainer:
    """Trains the module of an objective, step by step.

    Args:
        objective: what a method brings.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        plan = objective.plan
        self.optimiser: torch.optim.Optimizer = torch.optim.Adam(
            objective.parameters, lr=plan.learning_rate, betas=plan.betas, fused=plan.fused
        )
        self._rates = [group["lr"] for group in self.optimiser.param_groups]
        self.averaged: nn.Module | None = None
        if plan.decay is not None:
            self.averaged = copy.deepcopy(objective.module).requires_grad_(False)
        self._updates = 0
        self.held_out = HeldOutTracker(plan.patience)
        objective.begin(self.optimiser)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or held-out data have ended the training."""
        return self.objective.step >= self.objective.plan.steps or self.held_out.finished

    def steps(self, checkpoint: Path | None = None, interval: int = 100) -> Iterator[int]:
        """Go through all steps that are left, and yield after each how many are done.

        Args:
            checkpoint: file to go on from where it exists, to the same numbers, and to write on the way.
            interval: steps between checkpoints; the last one comes at the end.

        Raises:
            ConvergenceError: when the training diverges.
            ConfigurationError, ModelFileError: when the checkpoint is of another training, or of an earlier version.
        """
        objective = self.objective
        if checkpoint is not None and checkpoint.is_file():
            self.resume(checkpoint)
        objective.processes.begin_alike(objective.step, objective.module)
        while not self.finished:
            self.advance()
            due = objective.step % interval == 0 or self.finished
            if checkpoint is not None and due and objective.processes.rank == 0:
                self.save(checkpoint)
            yield objective.step

    def advance(self) -> None:
        """Do one step; raises ConvergenceError where loss or gradient are not finite, before it reaches the parameters."""
        objective = self.objective
        if objective.step % objective.evaluation_interval == 0 and (objective.step or objective.evaluates_start):
            self._evaluate()
        if objective.step in objective.plan.restarts:
            self.optimiser.state.clear()
        factor = objective.plan.schedule(objective.step)
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for loss in objective.losses(objective.stream()):
            if loss is not None:
                if objective.loss_advice is not None and not bool(torch.isfinite(loss)):
                    raise ConvergenceError(
                        f"the {objective.loss_name} of step {objective.step} of {objective.name} is {loss.item()}: "
                        f"{objective.loss_advice}"
                    )
                if objective.recorded is not None:
                    objective.record(**{objective.recorded: float(loss.detach())})
                self.optimiser.zero_grad()
                loss.backward()
            self._update()
        objective.step += 1

    def finish(self) -> None:
        """Leave in the module the parameters that are kept: the best on held-out data, else the averages or the last."""
        objective = self.objective
        if self.averaged is not None:
            objective.module.load_state_dict(self.averaged.state_dict())
        self._evaluate()
        self.held_out.restore(objective.module)
        objective.finish()

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        write_checkpoint(
            path,
            {
                "identity": self.objective.identity(),
                "step": self.objective.step,
                "curve": self.objective.curve,
                "module": self.objective.module.state_dict(),
                "averaged": None if self.averaged is None else self.averaged.state_dict(),
                "updates": self._updates,
                "optimiser": self.optimiser.state_dict(),
                "held_out": self.held_out.state_dict(),
                "objective": self.objective.state_dict(),
            },
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same training.

        Raises:
            ConfigurationError: when it is of a training with other settings.
            ModelFileError: when it cannot be read, or is of another module or optimiser.
        """
        stored, objective = read_checkpoint(path), self.objective
        changes = _differences(stored.get("identity", {}), objective.identity())
        if changes:
            raise ConfigurationError(f"{path}: {objective.refusal('; '.join(changes))}")
        try:
            objective.module.load_state_dict(stored["module"])
            if (self.averaged is None) != (stored["averaged"] is None):
                raise ValueError("only one of the two has averages")
            if self.averaged is not None:
                self.averaged.load_state_dict(stored["averaged"])
            self.optimiser.load_state_dict(stored["optimiser"])
            self.held_out.load_state_dict(stored["held_out"])
            objective.load_state_dict(stored["objective"])
            objective.step, objective.curve, self._updates = stored["step"], stored["curve"], stored["updates"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{path}: the checkpoint is of another module or optimiser ({error}); use the settings it was written with, or "
                "remove it to start again"
            ) from error

    def _update(self) -> None:
        objective = self.objective
        for group in self.optimiser.param_groups:
            objective.processes.average_gradients(group["params"])
            norm = nn.utils.clip_grad_norm_(group["params"], objective.plan.gradient_clip(objective.step))
            if not bool(torch.isfinite(norm)):
                raise ConvergenceError(
                    f"the gradient of step {objective.step} of {objective.name} is not finite: the training has "
                    f"diverged. {objective.advice}"
                )
        self.optimiser.step()
        objective.after_update()
        if self.averaged is not None and objective.plan.decay is not None:
            self._average(self.averaged, 1.0 - objective.plan.decay(self._updates))
            objective.after_average(self.averaged)
        self._updates += 1

    @torch.no_grad()
    def _average(self, averaged: nn.Module, weight: float) -> None:
        module = self.objective.module
        torch._foreach_lerp_(list(averaged.parameters()), [one.detach() for one in module.parameters()], weight)
        for kept, current in zip(averaged.buffers(), module.buffers(), strict=True):
            kept.copy_(current)

    def _evaluate(self) -> None:
        objective = self.objective
        module = objective.module if self.averaged is None else self.averaged
        value = objective.held_out_loss(module)
        if value is not None:
            # Rounding may differ between machines, but all processes have to stop after the same step.
            value = objective.processes.agree(value)
            objective.curve.append({"step": float(objective.step), objective.held_out_name: value})
            self.held_out.update(value, module)


def train(
    objective: Objective, folder: Path, checkpoint_interval: int, show_progress: bool = False
) -> list[dict[str, float]]:
    """Train the module of an objective to the end, going on from the checkpoint in a folder; return the training curve.

    Nothing happens where the objective has no steps.

    Args:
        objective: what a method brings.
        folder: of this training alone; its name is that of the progress bar.
        checkpoint_interval: steps between checkpoints.
        show_progress: show a bar on a terminal.

    Raises:
        ConvergenceError: when the training diverges.
        ConfigurationError, ModelFileError: when the folder holds a checkpoint of another training, or of an earlier version.
    """
    if not objective.plan.steps:
        return []
    trainer, checkpoint = Trainer(objective), checkpoint_in(folder)
    with progress_bar(folder.name, objective.plan.steps, show_progress and objective.processes.rank == 0) as bar:
        for done in trainer.steps(checkpoint, checkpoint_interval):
            bar.update(done, ", ".join(f"{name} {value:.4g}" for name, value in objective.latest.items()))
    trainer.finish()
    return objective.curve


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between the identities of two trainings, in words."""
    found = []
    for name in sorted({*theirs, *ours}):
        there, now = theirs.get(name), ours.get(name)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            found += _differences(there, now, f"{prefix}{name}.")
        elif there != now:
            found.append(f"{prefix}{name} {there} there, {now} now")
    return found
