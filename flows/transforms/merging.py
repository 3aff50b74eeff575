"""The schedule by which training merges perturbations, and the optimiser state that each merge resets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigurationError
from ...core.training.objective import StageObjective
from .rank_one_matrix import MergeLimits, RankOneMatrix, rank_one_matrices


class MergingSchedule:
    """Merges the perturbations of all :class:`RankOneMatrix` of a module while an optimiser trains it.

    It hangs on the optimiser's ``step``, whichever optimiser of torch (or of its interface) that is. After a merge u goes on
    in the direction it had, so the optimiser keeps what it knows of u; v is a new random direction, and its state goes back to
    what it was before the first step. LBFGS, whose one state mixes all parameters, forgets everything. The same holds for
    merges that happen elsewhere, such as on ``module.eval()``.

    After every step, perturbations that would take a determinant over zero or below its limit are shortened; ``held_back``
    counts how often.

    Build it right after the optimiser. To continue from a checkpoint, build module, optimiser and schedule, and load the state
    of all three; the next step is then the one that would have come.

    Args:
        module: module with the matrices.
        optimiser: optimiser that trains them.
        every: optimiser steps between merges.
        correct_every: merges of a matrix between corrections of its inverse.
        limits: see :class:`MergeLimits`.

    Raises:
        ConfigurationError: when there is no such matrix, or the optimiser has already made steps.
    """

    def __init__(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        every: int = 10,
        correct_every: int = 50,
        limits: MergeLimits | None = None,
    ) -> None:
        if every < 1 or correct_every < 1:
            raise ConfigurationError(f"merges and corrections come every 1 or more, got {every} and {correct_every}")
        self.matrices = rank_one_matrices(module)
        if not self.matrices:
            raise ConfigurationError(f"a {type(module).__name__} holds no RankOneMatrix, so there is nothing to merge")
        self.optimiser = optimiser
        self.every = every
        self.correct_every = correct_every
        self.limits = limits or MergeLimits()
        self.steps = 0
        self.held_back = 0
        self.postponed = [0] * len(self.matrices)
        self._seen = [int(matrix.merges) for matrix in self.matrices]
        self._fresh = [_fresh_state(optimiser, matrix.v) for matrix in self.matrices]
        self._hooks = (
            optimiser.register_step_pre_hook(lambda *_: self._forget()),
            optimiser.register_step_post_hook(lambda *_: self._after_step()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the schedule in its cycle: numbers and lists of numbers."""
        return {
            "steps": self.steps,
            "held_back": self.held_back,
            "postponed": list(self.postponed),
            "merges": list(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that :meth:`state_dict` returned.

        Raises:
            ConfigurationError: when it belongs to another number of matrices.
        """
        if len(state["merges"]) != len(self.matrices):
            raise ConfigurationError(
                f"the state is of {len(state['merges'])} matrices, the module has {len(self.matrices)}"
            )
        self.steps = int(state["steps"])
        self.held_back = int(state["held_back"])
        self.postponed = [int(value) for value in state["postponed"]]
        self._seen = [int(value) for value in state["merges"]]

    def close(self) -> None:
        """Remove the hooks from the optimiser."""
        for hook in self._hooks:
            hook.remove()

    def _after_step(self) -> None:
        self.steps += 1
        self.held_back += sum(matrix.hold_back(self.limits) for matrix in self.matrices)
        if self.steps % self.every:
            return
        for index, matrix in enumerate(self.matrices):
            self._merge(index, matrix)
        self._forget()

    def _merge(self, index: int, matrix: RankOneMatrix) -> None:
        if matrix.merge(self.limits):
            self.postponed[index] = 0
            if int(matrix.merges) % self.correct_every == 0:
                matrix.correct_inverse()
        elif self.postponed[index] < self.limits.patience:
            self.postponed[index] += 1
        else:
            matrix.merge_directly()
            self.postponed[index] = 0

    def _forget(self) -> None:
        """Reset the state of the directions that have changed since the last call."""
        for index, matrix in enumerate(self.matrices):
            if int(matrix.merges) == self._seen[index]:
                continue
            self._seen[index] = int(matrix.merges)
            if isinstance(self.optimiser, torch.optim.LBFGS):
                self.optimiser.state.clear()
                continue
            self.optimiser.state.pop(matrix.v, None)
            if self._fresh[index]:
                self.optimiser.state[matrix.v] = copy.deepcopy(self._fresh[index])


def restart_merged(average: nn.Module, module: nn.Module) -> None:
    """Apply the merges of a module to moving averages of its parameters; call it after each update of the averages.

    An average of u from before a merge belongs to a matrix without the perturbation: with the merged one it would count twice.
    The perturbation starts again in the average where it has just started in the module.

    Args:
        average: a copy of the module that holds the averages, and the module's own matrices (as
            :class:`torch.optim.swa_utils.AveragedModel` copies buffers).
        module: trained module.
    """
    for averaged, trained in zip(rank_one_matrices(average), rank_one_matrices(module), strict=True):
        if not bool(trained.u.any()):
            averaged.u.detach().zero_()
            averaged.v.detach().copy_(trained.v.detach())


class MergingObjective(StageObjective):
    """A stage of training whose module may hold :class:`RankOneMatrix`: their perturbations are merged as they are trained."""

    _merging: MergingSchedule | None = None

    def begin(self, optimiser: torch.optim.Optimizer) -> None:
        """Schedule the merges."""
        if rank_one_matrices(self.module):
            self._merging = MergingSchedule(self.module, optimiser)

    def after_average(self, averaged: nn.Module) -> None:
        """See :func:`restart_merged`."""
        restart_merged(averaged, self.module)

    def finish(self) -> None:
        """Leave no perturbation that waits for its merge."""
        for matrix in rank_one_matrices(self.module):
            matrix.merge()

    def state_dict(self) -> dict[str, Any]:
        """Return where in their cycle the merges are."""
        return {**super().state_dict(), "merging": None if self._merging is None else self._merging.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        if self._merging is not None:
            self._merging.load_state_dict(state["merging"])


def _fresh_state(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the state of a parameter before the first step: empty for most optimisers, not for Adagrad."""
    state = dict(optimiser.state.get(parameter, {}))
    moved = any(float(value) > 0.0 for key, value in state.items() if key == "step")
    if moved or (state and "step" not in state):
        raise ConfigurationError(
            "the optimiser has already made steps: build the MergingSchedule right after the optimiser, then load states"
        )
    return copy.deepcopy(state)
