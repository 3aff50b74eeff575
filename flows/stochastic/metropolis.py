"""Metropolis Monte Carlo with normal proposals."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributions import InterpolatedEnergy
from .kernels import Kernel, Moved, accepted, energy_change, normal_like


class MetropolisKernel(Kernel):
    """Steps of Metropolis Monte Carlo (Metropolis et al. 1953) with symmetric normal proposals.

    Detailed balance holds for every step, so the log-ratio of any number of them is the change of the energy. The gradient
    takes the decisions as given: an accepted displacement is the step times a fixed number.

    Args:
        step: standard deviation of a proposal.
        steps: number of proposals.
        learned: whether training may change the step.
        scale: ``(D,)`` factors of the step by coordinate; all one where None.
    """

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """See :meth:`Kernel.forward`; the energy is differentiated at both ends only, not in between."""
        step = self.steps_of(value)
        displacement = torch.zeros_like(value)
        count = torch.zeros(len(value), dtype=value.dtype)
        with torch.no_grad():
            start = current = energy(value)
            for _ in range(self.steps):
                proposed = displacement + normal_like(value, generator)
                proposed_energy = energy(value + step * proposed)
                taken = accepted(current - proposed_energy, generator)
                displacement = torch.where(taken.unsqueeze(1), proposed, displacement)
                current = torch.where(taken, proposed_energy, current)
                count += taken
        moved = value + step * displacement
        if torch.is_grad_enabled():
            start, current = energy(value), energy(moved)
        return Moved(moved, energy_change(start, current), count / self.steps)
