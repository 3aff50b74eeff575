"""Langevin dynamics, overdamped and underdamped, with the exact ratio of backward and forward probabilities.

Energies are reduced, so kT is one; masses are one, which a kernel's scale can undo by coordinate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.errors import ConfigurationError
from .distributions import InterpolatedEnergy
from .kernels import Kernel, Moved, gradient_of, normal_like


class OverdampedLangevinKernel(Kernel):
    """``y' = y - e grad u(y) + sqrt(2 e) eta``, and ``log_ratio = (eta^2 - eta_back^2) / 2`` (arXiv 2002.06707, eq. 12-14).

    Nothing is rejected: the discretisation error is in the weights. Training needs second derivatives of the energy.

    Args:
        step: e; with a scale s, coordinate i has the step ``e s_i``.
        steps: number of steps.
        learned: whether training may change the step.
        scale: ``(D,)`` factors of the step by coordinate; all one where None.
    """

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """Move ``(B, D)`` by overdamped steps; see :meth:`Kernel.forward`."""
        step = self.steps_of(value)
        width = torch.sqrt(2.0 * step)
        log_ratio = value.new_zeros(len(value))
        gradient = gradient_of(energy, value)
        for _ in range(self.steps):
            noise = normal_like(value, generator)
            moved = value - step * gradient + width * noise
            gradient = gradient_of(energy, moved)
            back = (value - moved + step * gradient) / width
            log_ratio = log_ratio + 0.5 * (noise.square() - back.square()).sum(-1)
            value = moved
        return Moved(value, log_ratio)


class LangevinKernel(Kernel):
    """Langevin dynamics with velocities that are drawn at the start and dropped at the end of the kernel.

    The integrator is the one of Brooks, Bruenger and Karplus (1984); both of its noises can be read back from the two ends of a
    step, so the ratio is exact: with noises ``w1, w2`` forward, those of the way back are ``w2 - sqrt(g e) v'`` and
    ``w1 - sqrt(g e) v`` (arXiv 2002.06707, supplement).

    Args:
        step: e, of time; with a scale s, coordinate i has the step ``e s_i``.
        steps: number of steps.
        friction: g, per time.
        learned: whether training may change the step.
        scale: ``(D,)`` factors of the step by coordinate; all one where None.
    """

    def __init__(
        self, step: float, steps: int, friction: float, *, learned: bool = False, scale: Tensor | None = None
    ) -> None:
        super().__init__(step, steps, learned=learned, scale=scale)
        if not 0.0 < friction < math.inf:
            raise ConfigurationError(
                f"the friction must be positive, got {friction}: without friction, take a HamiltonianKernel"
            )
        self.friction = friction

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """Move ``(B, D)`` by steps with velocities; see :meth:`Kernel.forward`."""
        step = self.steps_of(value)
        damping = self.friction * step
        kick = torch.sqrt(damping)  # e/2 times sqrt(4 g / e)
        velocity = normal_like(value, generator)
        log_ratio = 0.5 * velocity.square().sum(-1)
        force = -gradient_of(energy, value)
        for _ in range(self.steps):
            first, second = normal_like(value, generator), normal_like(value, generator)
            half = velocity * (1.0 - 0.5 * damping) + 0.5 * step * force + kick * first
            value = value + step * half
            force = -gradient_of(energy, value)
            new = (half + 0.5 * step * force + kick * second) / (1.0 + 0.5 * damping)
            back_first, back_second = second - kick * new, first - kick * velocity
            log_ratio = log_ratio + 0.5 * (
                first.square() + second.square() - back_first.square() - back_second.square()
            ).sum(-1)
            velocity = new
        return Moved(value, log_ratio - 0.5 * velocity.square().sum(-1))
