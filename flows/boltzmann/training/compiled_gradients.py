"""Compiled gradients for training, and the loss that hands them to an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....core.compilation.programs import resolved
from ..compiled_functions import CompiledFlowFunction
from ..coordinate_flow import CoordinateFlow
from .objectives import LossGradients

GradientFunction = Callable[..., LossGradients]
"""One of the functions of :mod:`flowbridge.flows.boltzmann.training.objectives`: a flow and tensors in, losses and
gradients out."""


_LONG = 3000  # steps; compiling costs one or two minutes, and saves 10 to 30 milliseconds a step of alanine dipeptide


def compilation_of(mode: str, steps: int) -> str:
    """Return whether a stage is compiled: with ``auto`` where it is long enough for the compiler's time to pay.

    Not by what the cache holds: compiled and interpreted sums round differently, and a seed should give one model.
    """
    chosen = resolved(mode)
    return "never" if chosen == "auto" and steps < _LONG else chosen


class GradientEvaluator:
    """Evaluates a gradient function, compiled where the mode asks for it and compilation works.

    Args:
        flow: trained flow; its parameters are read at every call.
        function: the function.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(self, flow: CoordinateFlow, function: GradientFunction, mode: str) -> None:
        def flat(flow: CoordinateFlow, *tensors: Tensor) -> tuple[Tensor, ...]:
            result = function(flow, *tensors)
            return (*result.losses, *result.by_parameter)

        flat.__name__ = function.__name__
        self._count = sum(1 for _ in flow.parameters())
        self._evaluate = CompiledFlowFunction(flow, flat, mode)

    def __call__(self, *tensors: Tensor) -> LossGradients:
        """Return losses and gradients; see :class:`~flowbridge.flows.boltzmann.compiled_functions.CompiledFlowFunction`."""
        results = self._evaluate(*tensors)
        return LossGradients(results[: -self._count], results[-self._count :])


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *values: Tensor) -> Tensor:
        ctx.save_for_backward(*values[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        return (None, None, *torch._foreach_mul(slopes, gradients[0]), *(None for _ in slopes))


def with_gradients(loss: Tensor, flow: nn.Module, gradients: tuple[Tensor, ...]) -> Tensor:
    """Return a scalar of the value of ``loss`` that, differentiated once, has these gradients by the flow's parameters."""
    parameters = list(flow.parameters())
    result: Tensor = _Given.apply(loss.detach(), len(parameters), *parameters, *gradients)
    return result
