"""The contract of stochastic kernels: a random move and the ratio of backward and forward probabilities.

Every kernel here is its own reversal: the backward kernel is the same kernel (velocities are drawn at the start of a
move and dropped at its end, and their distribution does not tell forward from backward). So one method serves both directions
of a path, and the log-ratio changes its sign with the direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import ConfigurationError
from .distributions import InterpolatedEnergy, ReducedEnergy


class Moved(NamedTuple):
    """Result of a kernel.

    Attributes:
        value: moved configurations ``(B, D)``.
        log_ratio: ``log q(new -> old) - log q(old -> new)``, ``(B,)``; with velocities, of the joint probabilities.
        acceptance: fraction of proposals accepted ``(B,)``; None for kernels that accept all.
    """

    value: Tensor
    log_ratio: Tensor
    acceptance: Tensor | None = None


class Kernel(nn.Module):
    """A random move with respect to an energy that it is given.

    Args:
        step: size of a step, in the units of the coordinates (for dynamics: of time, masses being one).
        steps: number of steps.
        learned: whether training may change the step.
        scale: ``(D,)`` factors of the step by coordinate; all one where None.
    """

    log_step: Tensor
    scale: Tensor | None

    def __init__(self, step: float, steps: int, *, learned: bool = False, scale: Tensor | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise ConfigurationError(f"a kernel needs at least one step, got {steps}")
        if not 0.0 < step < float("inf"):
            raise ConfigurationError(f"the step of a kernel must be a positive number, got {step}")
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0.0)).all()):
            raise ConfigurationError("the scale of a kernel must be positive in every coordinate")
        value = torch.tensor(step, dtype=torch.float64).log()
        if learned:
            self.log_step = nn.Parameter(value)
        else:
            self.register_buffer("log_step", value)
        self.register_buffer("scale", scale)
        self.steps = steps

    def steps_of(self, value: Tensor) -> Tensor:
        """Return the step by coordinate, ``(D,)`` or 0-dimensional, in the dtype of ``value``."""
        step = self.log_step.exp()
        return (step if self.scale is None else step * self.scale).to(value.dtype)

    def forward(self, value: Tensor, energy: InterpolatedEnergy, generator: torch.Generator) -> Moved:
        """Move configurations ``(B, D)``; differentiable with the random numbers and decisions held fixed."""
        raise TypeError(f"{type(self).__name__} defines no move")


def energy_change(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after - before`` ``(B,)``: the log-ratio of any kernel with detailed balance.

    Where the energy was infinite before, no way leads back: the ratio is ``-inf``, also where it is infinite still.
    """
    impossible = torch.isposinf(before)
    # Replaced before the subtraction: inf - inf is not a number, and its derivative would spoil the others'.
    first = torch.where(impossible, torch.zeros_like(before), before)
    change = torch.where(impossible, torch.zeros_like(after), after) - first
    return torch.where(impossible, torch.full_like(change, -torch.inf), change)


def gradient_of(energy: ReducedEnergy, value: Tensor) -> Tensor:
    """Return the gradient ``(B, D)`` of an energy; itself differentiable where gradients are being recorded."""
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        point = value if value.requires_grad else value.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(point).sum(), point, create_graph=record)
    return gradient


def normal_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers of the shape and dtype of ``value``."""
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)


def accepted(log_probability: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each of ``(B,)`` log-probabilities whether a uniform number falls below; NaN never does."""
    uniform = torch.rand(log_probability.shape, generator=generator, dtype=log_probability.dtype)
    return uniform.log() < log_probability.detach()
