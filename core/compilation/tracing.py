"""Record a potential's energy and forces as one graph of tensor operations, and shape it for the compiler."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CompilationError
from ..potential import Potential

_aten = torch.ops.aten


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
    inputs += [torch.tensor(potential.facts.global_parameters[name], dtype=torch.float64) for name in parameters]

    def evaluate(*values: Tensor) -> tuple[Tensor, Tensor]:
        box, rest = (None, values[1:]) if cell is None else (values[1], values[2:])
        # A global parameter is a number to a potential; while it is recorded it is a tensor that behaves like one.
        named: dict[str, float] = dict(zip(parameters, rest, strict=True))  # type: ignore[arg-type]
        energy, forces = potential.energy_and_forces(values[0], box, **named)
        return energy.double(), forces.double()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own internals
            graph = make_fx(evaluate, tracing_mode="real")(*inputs)
            if len(positions) == 1:
                _spell_out_matrix_vector_products(graph)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            return torch.export.export(graph, tuple(inputs))
    except Exception as error:
        raise CompilationError(
            f"a {type(potential).__name__} cannot be recorded as a fixed graph: {type(error).__name__}: {error}"
        ) from error


def _spell_out_matrix_vector_products(graph: GraphModule) -> None:
    """Write products of a single row with a matrix as multiplication and sum.

    A call of a matrix library costs microseconds for a row, ten times its arithmetic; spelled out, the product is fused
    with what surrounds it.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (_aten.mm.default, _aten.addmm.default):
            continue
        if node.kwargs or node.meta["tensor_meta"].shape[0] != 1:
            continue
        bias, row, matrix = (None, *node.args) if node.target is _aten.mm.default else node.args
        with graph.graph.inserting_before(node):
            column = graph.graph.call_function(_aten.permute.default, (row, [1, 0]))
            product = graph.graph.call_function(_aten.mul.Tensor, (column, matrix))
            result = graph.graph.call_function(_aten.sum.dim_IntList, (product, [0], True))
            if bias is not None:
                result = graph.graph.call_function(_aten.add.Tensor, (result, bias))
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
