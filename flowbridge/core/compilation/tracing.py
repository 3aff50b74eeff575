"""Record a potential's energy and forces as one graph of tensor operations, and shape it for the compiler."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CompilationError
from ..potential import Potential
from .layout import SMALLEST_BATCH, put_the_batch_last, spell_out_matrix_vector_products


def trace(potential: Potential, positions: Tensor, cell: Tensor | None, parameters: Sequence[str]) -> ExportedProgram:
    """Return the program ``(positions[, cell], *parameters) -> (energy, forces)`` of a potential at one batch size.

    Forces are those of :meth:`Potential.energy_and_forces`, whether by autograd or closed form: the derivative is part
    of the graph, so the compiler fuses across it. Tensors of the potential become constants of the program.

    Args:
        potential: on its device and in its dtype; its parameters must not ask for gradients.
        positions: ``(B, N, 3)``, an example of the shape and dtype the program is made for.
        cell: ``(B, 3, 3)`` for a periodic potential.
        parameters: names of global parameters, which become 0-dimensional float64 inputs in this order.

    Raises:
        CompilationError: when the evaluation depends on data in ways that no fixed graph can hold.
    """
    inputs = [positions, *(() if cell is None else (cell,))]
    inputs += [torch.tensor(potential.metadata.global_parameters[name], dtype=torch.float64) for name in parameters]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own internals
            if len(positions) >= SMALLEST_BATCH and positions.device.type == "cpu":
                # A potential may ask for views that need the batch first (``positions.view(...)``).
                with contextlib.suppress(Exception):
                    return _recorded(potential, inputs, cell is not None, parameters, batch_last=True)
            return _recorded(potential, inputs, cell is not None, parameters)
    except Exception as error:
        raise CompilationError(
            f"a {type(potential).__name__} cannot be recorded as a fixed graph: {type(error).__name__}: {error}"
        ) from error


def _recorded(
    potential: Potential, inputs: list[Tensor], has_cell: bool, parameters: Sequence[str], *, batch_last: bool = False
) -> ExportedProgram:
    def evaluate(*values: Tensor) -> tuple[Tensor, Tensor]:
        box, rest = (values[1], values[2:]) if has_cell else (None, values[1:])
        # A global parameter is a number to a potential; while it is recorded it is a tensor that behaves like one.
        named: dict[str, float] = dict(zip(parameters, rest, strict=True))  # type: ignore[arg-type]
        turned = values[0].permute(1, 2, 0).contiguous().permute(2, 0, 1) if batch_last else values[0]
        energy, forces = potential.energy_and_forces(turned, box, **named)
        return energy.double(), forces.double().contiguous()

    graph = make_fx(evaluate, tracing_mode="real")(*inputs)
    count = len(inputs[0])
    if batch_last:
        put_the_batch_last(graph, count)
    elif count == 1:
        spell_out_matrix_vector_products(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return torch.export.export(graph, tuple(inputs))
