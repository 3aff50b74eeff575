"""Shape a recorded graph for the compiler: what is computed stays the same, where it lies in memory does not.

What comes out of a matrix library has a fixed order in memory, and what is computed from it follows that order. Potentials
are written with the batch first, so neighbours in memory are the coordinates of one configuration, in groups of awkward
numbers, some of them permuted: nothing that fills vector registers. With the batch last in memory every operation of a
configuration is one vector operation for several configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_aten = torch.ops.aten

SMALLEST_BATCH = 16
"""From this batch size on graphs are laid out with the batch last."""


def spell_out_matrix_vector_products(graph: GraphModule) -> None:
    """Write products of a single row with a matrix as multiplication and sum.

    A call of a matrix library costs microseconds for a row, ten times its arithmetic; spelled out, the product is fused
    with what surrounds it.
    """

    def product(make: _Maker, row: Node, matrix: Node) -> Node:
        column = make(_aten.permute.default, row, [1, 0])
        return make(_aten.sum.dim_IntList, make(_aten.mul.Tensor, column, matrix), [0], True)

    _rewrite_products(graph, 1, product)


def put_the_batch_last(graph: GraphModule, batch: int) -> None:
    """Let products, concatenations, stacks and copies of a batch lie in memory with the batch last; shapes stay as they are."""

    def product(make: _Maker, rows: Node, matrix: Node) -> Node:
        turned = make(_aten.mm.default, make(_aten.permute.default, matrix, [1, 0]), _last(make, rows))
        return _first(make, turned, 2)

    _rewrite_products(graph, batch, product)
    for node, dimension in _joined(graph, _aten.cat.default, batch):
        make = _Maker(graph.graph, node)
        parts = [_last(make, part) for part in node.args[0]]  # type: ignore[union-attr]
        joined = make(_aten.cat.default, parts, dimension - 1)
        _replace(graph.graph, node, _first(make, joined, len(_shape(node))))
    for node, dimension in _joined(graph, _aten.stack.default, batch):
        make = _Maker(graph.graph, node)
        parts = [_last(make, part) for part in node.args[0]]  # type: ignore[union-attr]
        # The new dimension outermost: what is stacked was computed, and will be used, one after the other.
        stacked = make(_aten.stack.default, parts, 0)
        order = [*range(1, len(_shape(node)) - 1)]
        order.insert(dimension - 1, 0)
        _replace(graph.graph, node, make(_aten.permute.default, stacked, [len(_shape(node)) - 1, *order]))

    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not _aten.clone.default or _shape(node)[:1] != (batch,):
            continue
        is_result = any(user.op == "output" for user in node.users)  # whoever reads it relies on its order
        if node.kwargs.get("memory_format") is torch.contiguous_format and not is_result:
            # A copy that makes a view possible, recorded where the batch came first.
            make = _Maker(graph.graph, node)
            copied = make(_aten.clone.default, _last(make, node.args[0]), memory_format=torch.contiguous_format)
            _replace(graph.graph, node, _first(make, copied, len(_shape(node))))


class _Maker:
    """Inserts calls before a node."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph, self._node = graph, node

    def __call__(self, target: Callable[..., object], *arguments: object, **options: object) -> Node:
        with self._graph.inserting_before(self._node):
            return self._graph.call_function(target, arguments, options)  # type: ignore[arg-type]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _last(make: _Maker, node: Any) -> Node:
    rank = len(_shape(node))
    return make(_aten.permute.default, node, [*range(1, rank), 0])


def _first(make: _Maker, node: Node, rank: int) -> Node:
    return make(_aten.permute.default, node, [rank - 1, *range(rank - 1)])


def _joined(graph: GraphModule, target: object, batch: int) -> list[tuple[Node, int]]:
    """Return the nodes that join parts of a batch along another dimension, and that dimension."""
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not target or len(_shape(node)) < 2:
            continue
        dimension = int(node.args[1] if len(node.args) > 1 else 0) % len(_shape(node))
        if dimension and _shape(node)[0] == batch:
            found.append((node, dimension))
    return found


def _rewrite_products(graph: GraphModule, rows: int, product: Callable[[_Maker, Node, Node], Node]) -> None:
    """Replace products ``(rows, k) @ (k, n)``, with or without a bias."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in (_aten.mm.default, _aten.addmm.default):
            continue
        if node.kwargs or _shape(node)[0] != rows:
            continue
        bias, left, right = (None, *node.args) if node.target is _aten.mm.default else node.args
        make = _Maker(graph.graph, node)
        result = product(make, left, right)
        _replace(graph.graph, node, result if bias is None else make(_aten.add.Tensor, result, bias))


def _replace(graph: Graph, node: Node, new: Node) -> None:
    new.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
