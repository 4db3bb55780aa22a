"""Sizes of a tensor that leaves the graph, made again from constants and the graph's symbolic integer inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from mikv_compile.passes.node_utils import argument, fake, is_attribute, is_op


class NotExpressible(Exception):
    """A size that no constant and no graph input gives; the message says which."""


def metadata_value(node: Node) -> Any:
    """What a metadata node (see `is_metadata`) returns, read from the fake of the tensor it asks about."""
    value = fake(argument(node, 0, "input"))
    if value is None:
        raise NotExpressible(f"`{node.name}` asks about a tensor of unknown shape")
    if is_op(node, "size"):
        dim = argument(node, 1, "dim")
        if dim is None:
            return tuple(value.shape)
        if not isinstance(dim, int):
            raise NotExpressible(f"`{node.name}` asks for a dimension that is not a constant")
        return value.shape[dim]
    if is_attribute(node, "shape"):
        return tuple(value.shape)
    if is_attribute(node, "dtype"):
        return value.dtype
    if is_attribute(node, "device"):
        return value.device
    if is_op(node, "numel", "nelement", torch.numel):
        return functools.reduce(operator.mul, value.shape, 1)
    if is_op(node, "dim", "ndimension") or is_attribute(node, "ndim"):
        return value.dim()
    return value.shape[0]  # len()


class SizeMaker:
    """Turns maybe symbolic values into constants or nodes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._inputs: dict[Any, Node] = {}
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(value, torch.SymInt):
                self._inputs.setdefault(value.node.expr, node)

    def check(self, value: Any) -> None:
        """Raise `NotExpressible` if `make` would."""
        self._convert(value, lambda function, left, right: left)

    def make(self, value: Any) -> Any:
        """`value` with every symbolic integer replaced by a node, created at the graph's insertion point."""
        return self._convert(value, self._create)

    def _create(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        node = self._graph.call_function(function, (left, right))
        values = [item.meta["example_value"] if isinstance(item, Node) else item for item in (left, right)]
        node.meta["example_value"] = function(*values)
        return node

    def _convert(self, value: Any, create: Callable[..., Any]) -> Any:
        if isinstance(value, tuple):
            return tuple(self._convert(item, create) for item in value)
        if isinstance(value, torch.SymInt):
            return self._convert_expression(value.node.expr, create)
        return value

    def _convert_expression(self, expression: Any, create: Callable[..., Any]) -> Any:
        """A sympy expression of sums, products and powers of graph inputs."""
        if expression.is_Integer:
            return int(expression)  # a sympy constant, not a symbolic integer
        if expression in self._inputs:
            return self._inputs[expression]
        if expression.is_Add or expression.is_Mul:
            function = operator.add if expression.is_Add else operator.mul
            terms = [self._convert_expression(term, create) for term in expression.args]
            return functools.reduce(lambda left, right: create(function, left, right), terms)
        if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            base = self._convert_expression(expression.base, create)
            return functools.reduce(lambda left, right: create(operator.mul, left, right), [base] * int(expression.exp))
        raise NotExpressible(f"the size {expression} of the cache is used, and no graph input gives it")


def replace_by_value(node: Node, value: Any) -> None:
    """Put `value` (a constant, a node or a tuple of them) where `node` is used, and erase `node`."""
    for user in list(node.users):
        user.args = map_aggregate(user.args, lambda item: value if item is node else item)
        user.kwargs = map_aggregate(user.kwargs, lambda item: value if item is node else item)
    node.graph.erase_node(node)
