"""Compiled functions of tensors, for whoever evaluates the same function of the same shapes thousands of times."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CompilationError
from ..execution.machine import machine
from .identity import program_digest
from .programs import PACKAGE, largest_difference

TensorFunction = Callable[..., tuple[Tensor, ...]]
"""Tensors in, fresh tensors out; records no gradients, and decides nothing by the values of its arguments."""

Results = Sequence[Tensor]

Comparable = Callable[[Results, Results], tuple[Results, Results]]
"""From two results, the parts that have to agree to rounding (angles, say, only but for whole turns)."""

_CHECK = "check.safetensors"
_TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-9}
"""Of a result relative to its largest element: rounding of sums over a batch."""


class CompiledFunction:
    """A function of tensors as compiled code, for the shapes and dtypes it was made with; results are fresh tensors.

    Args:
        package: file of the program.
    """

    def __init__(self, package: Path) -> None:
        # As in compiled_potential: what aoti_load_package wraps, without importing the compiler.
        self._run = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, -1).boxed_run

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate; the inputs must be contiguous, and have the shapes and dtypes that the program was made with."""
        return tuple(self._run(list(inputs)))


class FunctionRecipe:
    """How a function of tensors becomes a program, for one set of shapes and a number of threads.

    Args:
        function: the function.
        name: what users are told that is compiled.
        example: arguments to record it with.
        other: arguments of the same shapes, at which the program is checked.
        threads: number of threads of the program.
        comparable: what of two results has to agree; all of them as they are where None.
    """

    def __init__(
        self,
        function: TensorFunction,
        name: str,
        example: Sequence[Tensor],
        other: Sequence[Tensor],
        threads: int,
        comparable: Comparable | None = None,
    ) -> None:
        self.function, self.name, self.threads = function, name, threads
        self.example, self.other = list(example), list(other)
        self._comparable = comparable or _as_they_are

    def __str__(self) -> str:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return self.name

    def description(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return {**self.outline(), "program": program_digest(self._traced)}

    def outline(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return {
            "function": self.name,
            "inputs": [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in self.example],
            "threads": self.threads,
            "torch": str(torch.__version__),
            "machine": machine(),
        }

    def options(self) -> dict[str, Any]:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return {"cpp.threads": self.threads}

    def exported(self) -> ExportedProgram:
        """See :class:`~flowbridge.core.compilation.programs.Recipe`."""
        return self._traced

    @cached_property
    def _traced(self) -> ExportedProgram:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about its own internals
                graph = make_fx(self.function, tracing_mode="real")(*self.example)
                graph.graph.eliminate_dead_code()
                graph.recompile()
                return torch.export.export(graph, tuple(self.example))
        except Exception as error:
            raise CompilationError(
                f"{self.name} cannot be recorded as a fixed graph: {type(error).__name__}: {error}"
            ) from error

    def finish(self, folder: Path) -> None:
        """Compare fresh code with torch where it was not recorded, with the results of another call still held."""
        made = CompiledFunction(folder / PACKAGE)
        expected = self.function(*self.other)
        found = made(*self.other)
        made(*self.example)  # must not write to the results of the earlier call
        worst = self._difference(found, expected)
        if worst > 1.0:
            raise CompilationError(
                f"compiled and interpreted results of {self.name} differ by {worst:.1e} of what rounding explains"
            )
        tensors = {f"input {number}": tensor for number, tensor in enumerate(self.other)}
        tensors |= {f"output {number}": tensor for number, tensor in enumerate(expected)}
        stored = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(stored, folder / _CHECK)

    def loaded(self, folder: Path) -> CompiledFunction | None:
        """Load a program and run it once on what it was checked with; None if it fails or gives anything else."""
        check = safetensors.torch.load_file(folder / _CHECK)
        made = CompiledFunction(folder / PACKAGE)
        found = made(*(check[f"input {number}"] for number in range(len(self.example))))
        expected = [check[f"output {number}"] for number in range(len(found))]
        return made if self._difference(found, expected) <= 1.0 else None

    def _difference(self, found: Results, expected: Results) -> float:
        """Return the largest difference in units of what is allowed for the least precise of the arguments."""
        found, expected = self._comparable(found, expected)
        limit = max(_TOLERANCE.get(tensor.dtype, 0.0) for tensor in self.example)
        return max(largest_difference(a, b) for a, b in zip(found, expected, strict=True)) / limit


def _as_they_are(found: Results, expected: Results) -> tuple[Results, Results]:
    return found, expected
