"""Functions of a flow and of tensors as compiled programs: the same numbers in a fraction of the time.

A flow is thousands of small tensor operations, and torch spends more time on calling them than the processor on computing
them. A program belongs to one batch size. Parameters, and the matrices into which perturbations are merged, are among its
inputs, so it serves a flow during its training and any other flow of the same design. Programs are cached like those of
potentials.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core.compilation.functions import Comparable, CompiledFunction, FunctionRecipe, Results
from ...core.compilation.programs import get_or_build, resolved
from ...core.errors import CompilationError
from ..transforms.rank_one_matrix import MERGED, RankOneMatrix
from ..transforms.root_finding import bounded_iterations
from .coordinate_flow import CoordinateFlow, FlowResult
from .molecule_coordinates import Coordinates

FlowFunction = Callable[..., tuple[Tensor, ...]]
"""Takes a flow (or another module) and tensors, returns fresh tensors, and never branches on values. Messages show its name."""


class CompiledFlowFunction:
    """A function of a flow and of tensors, compiled where the mode asks for it and compilation works.

    Args:
        flow: the flow; its parameters are read at every call.
        function: the function.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
        comparable: see :class:`~flowbridge.core.compilation.functions.FunctionRecipe`.
    """

    def __init__(
        self, flow: nn.Module, function: FlowFunction, mode: str, comparable: Comparable | None = None
    ) -> None:
        self._flow, self._function, self._mode = flow, function, resolved(mode)
        self._comparable = comparable
        self._programs: dict[tuple[torch.Size, ...], CompiledFunction | None] = {}

    @property
    def compiles(self) -> bool:
        """Whether a compiled program is used where there is one."""
        return self._mode != "never"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results; the first call with new shapes finds or compiles a program.

        Raises:
            CompilationError: where the mode is ``always`` and the function cannot be compiled.

        Warns:
            UserWarning: why there is no program, where the mode is ``auto``.
        """
        if not self.compiles:
            return self._function(self._flow, *tensors)
        parameters = [parameter.detach().contiguous() for parameter in changed_by_training(self._flow).values()]
        arguments = [tensor.detach().contiguous() for tensor in tensors]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._programs:
            self._programs[shapes] = self._program(parameters, arguments)
        program = self._programs[shapes]
        return self._function(self._flow, *tensors) if program is None else program(*parameters, *arguments)

    def _program(self, parameters: list[Tensor], arguments: list[Tensor]) -> CompiledFunction | None:
        # The check runs at other parameters and at the batch in another order.
        other = [0.999 * parameter for parameter in parameters]
        other += [tensor.flip(0) if tensor.dim() else tensor for tensor in arguments]
        name = f"{self._function.__name__.replace('_', ' ')} of a batch of {len(arguments[0])}"
        recipe = FunctionRecipe(
            self._of_tensors(), name, [*parameters, *arguments], other, torch.get_num_threads(), self._comparable
        )
        try:
            return get_or_build(recipe, build=self._mode != "cached")
        except CompilationError as error:
            if self._mode == "always":
                raise
            warnings.warn(f"going on without compiled code, at half the speed: {error}", stacklevel=4)
            return None

    def _of_tensors(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return the function of parameters and tensors."""
        applied = _Applied(self._flow, self._function)
        names = list(changed_by_training(applied))
        trained = sum(1 for _ in applied.parameters())

        def evaluate(*values: Tensor) -> tuple[Tensor, ...]:
            leaves = [
                value.detach().requires_grad_(place < trained) for place, value in enumerate(values[: len(names)])
            ]
            exchanged = dict(zip(names, leaves, strict=True))
            results: tuple[Tensor, ...] = torch.func.functional_call(applied, exchanged, values[len(names) :])
            return tuple(result.detach() for result in results)

        return evaluate


def changed_by_training(module: nn.Module) -> dict[str, Tensor]:
    """Return by name the parameters of a module, then the buffers that its training changes."""
    names = {part: name for name, part in module.named_modules() if isinstance(part, RankOneMatrix)}
    merged = {f"{name}.{buffer}": getattr(part, buffer) for part, name in names.items() for buffer in MERGED}
    return {**dict(module.named_parameters()), **merged}


class _Applied(nn.Module):
    """A flow with a function, as a module whose parameters can be exchanged."""

    def __init__(self, flow: nn.Module, function: FlowFunction) -> None:
        super().__init__()
        self.flow, self.function = flow, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(self.flow, *tensors)


ITERATIONS = {torch.float32: 10, torch.float64: 12}
"""Iterations of root finding in compiled sampling: more than 99 of 100 configurations of trained flows need no more."""


def sampling(flow: CoordinateFlow, circular: Tensor, stiff: Tensor) -> tuple[Tensor, ...]:
    """Map latent variables to coordinates with a bounded number of iterations.

    Returns:
        Circular and stiff coordinates, log-determinants ``(B,)``, and for which configurations all roots were found.
    """
    with torch.no_grad(), bounded_iterations(ITERATIONS[circular.dtype]) as bounded:
        coordinates, log_det = flow(Coordinates(circular, stiff))
        return (*coordinates, log_det, bounded.converged(len(stiff)))


def _comparable(found: Results, expected: Results) -> tuple[Results, Results]:
    """Leave out configurations whose roots one of two results lacks, and whole turns between angles."""
    both = found[3] & expected[3]
    a, b = ([part[both] for part in result[:3]] for result in (found, expected))
    a[0] = a[0] - (a[0] - b[0]).round()
    return a, b


class CompiledSampling:
    """The direction latent -> coordinates of a flow, without gradients, compiled where the mode asks for it.

    Args:
        flow: the flow; its parameters are read at every call.
        mode: a :data:`~flowbridge.core.compilation.programs.CompilationMode`.
    """

    def __init__(self, flow: CoordinateFlow, mode: str) -> None:
        self._flow = flow
        self._sampling = CompiledFlowFunction(flow, sampling, mode, _comparable)

    def __call__(self, latent: Coordinates) -> FlowResult:
        """Return ``flow(latent)``; each batch size has its own program.

        Raises:
            ConvergenceError: where a root cannot be found.
        """
        with torch.no_grad():
            if not self._sampling.compiles:
                result: FlowResult = self._flow(latent)
                return result
            circular, stiff, log_det, converged = self._sampling(*latent)
            if not bool(converged.all()):
                # A few need more iterations than the program has.
                late = ~converged
                (circular[late], stiff[late]), log_det[late] = self._flow(Coordinates(*(part[late] for part in latent)))
            return FlowResult(Coordinates(circular, stiff), log_det)
