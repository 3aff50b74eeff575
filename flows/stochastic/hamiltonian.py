"""Hamiltonian Monte Carlo: leapfrog trajectories with fresh momenta, accepted by the Metropolis rule or all taken."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .distributions import InterpolatedEnergy, ReducedEnergy
from .kernels import Kernel, Moved, accepted, energy_change, gradient_of, normal_like


def leapfrog(value: Tensor, momentum: Tensor, energy: ReducedEnergy, step: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return position and momentum ``(B, D)`` after ``steps`` of leapfrog with unit masses; keeps volume and is reversible."""
    momentum = momentum - 0.5 * step * gradient_of(energy, value)
    for number in range(steps):
        value = value + step * momentum
        factor = 0.5 if number == steps - 1 else 1.0
        momentum = momentum - factor * step * gradient_of(energy, value)
    return value, momentum


class HamiltonianKernel(Kernel):
    """Trajectories of Hamiltonian dynamics (Duane et al. 1987), each with fresh momenta.

    With ``accept`` detailed balance holds and the log-ratio is the change of the potential energy; the gradient takes the
    decisions as given. Without, a trajectory is a map that keeps volume, and the log-ratio is the kinetic energy that was drawn
    minus the one that is dropped. Training needs second derivatives of the energy.

    Args:
        step: time step; with a scale s, coordinate i has the step ``e s_i``.
        steps: leapfrog steps of one trajectory.
        trajectories: number of trajectories.
        accept: whether each is accepted or rejected.
        learned: whether training may change the step.
        scale: ``(D,)`` factors of the step by coordinate; all one where None.
    """

    def __init__(
        self,
        step: float,
        steps: int,
        trajectories: int = 1,
        *,
        accept: bool = True,
        learned: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(step, steps, learned=learned, scale=scale)
        if trajectories < 1:
            raise ConfigurationError(f"a kernel needs at least one trajectory, got {trajectories}")
        self.trajectories = trajectories
        self.accept = accept

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """Move ``(B, D)`` by leapfrog steps; see :meth:`Kernel.forward`."""
        step = self.steps_of(value)
        log_ratio = value.new_zeros(len(value))
        if not self.accept:
            for _ in range(self.trajectories):
                momentum = normal_like(value, generator)
                value, final = leapfrog(value, momentum, energy, step, self.steps)
                log_ratio = log_ratio + 0.5 * (momentum.square() - final.square()).sum(-1)
            return Moved(value, log_ratio)
        return self._accepted_moves(value, energy, step, generator)

    def _accepted_moves(
        self, value: Tensor, energy: InterpolatedEnergy, step: Tensor, generator: torch.Generator
    ) -> Moved:
        start = value
        count = torch.zeros(len(value), dtype=value.dtype)
        for _ in range(self.trajectories):
            momentum = normal_like(value, generator)
            with torch.no_grad():
                proposed, final = leapfrog(value, momentum, energy, step, self.steps)
                kinetic = 0.5 * (momentum.square() - final.square()).sum(-1)
                taken = accepted(energy(value) - energy(proposed) + kinetic, generator)
            count += taken
            if torch.is_grad_enabled():
                # Again with derivatives, of accepted trajectories only: rejected ones may have left the region where anything
                # is finite, and must not reach the gradient.
                rows = torch.nonzero(taken).squeeze(1)
                followed, _ = leapfrog(value[rows], momentum[rows], energy, step, self.steps)
                value = value.index_put((rows,), followed)
            else:
                value = torch.where(taken.unsqueeze(1), proposed, value)
        return Moved(value, energy_change(energy(start), energy(value)), count / self.trajectories)
