"""Sizes that a graph knows only as symbols, read from the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from mikv_compile import _compat
from mikv_compile.errors import CannotServe


class SizeReader:
    """Evaluates sizes of a graph's fake tensors for the arguments that a call was given."""

    def __init__(self, graph: Graph) -> None:
        self._where: dict[Any, tuple[int, int | None]] = {}
        for i, node in enumerate(graph.find_nodes(op="placeholder")):
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    self._note(size, i, dim)
            else:
                self._note(value, i, None)

    def _note(self, size: Any, argument: int, dim: int | None) -> None:
        symbol = _compat.symbol_of(size)
        if symbol is not None and symbol.is_Symbol:
            self._where.setdefault(symbol, (argument, dim))

    def reader(self, size: Any) -> Callable[[Sequence[Any]], int] | None:
        """A function from a call's arguments to the value of ``size``, or None if the arguments do not tell it."""
        expression = _compat.symbol_of(size)
        if expression is None or expression.is_number:
            constant = int(size if expression is None else expression)
            return lambda _: constant
        symbols = sorted(expression.free_symbols, key=str)
        if any(s not in self._where for s in symbols):
            return None
        places = [self._where[s] for s in symbols]
        known: dict[tuple[int, ...], int] = {}

        def read(arguments: Sequence[Any]) -> int:
            values = tuple(int(arguments[i] if d is None else arguments[i].shape[d]) for i, d in places)
            if values not in known:
                known[values] = int(expression.subs(dict(zip(symbols, values, strict=True))))
            return known[values]

        return read


def columns_reader(module: GraphModule, inputs: Sequence[int]) -> Callable[[Sequence[Any], int], int]:
    """A function from a call's arguments, and the number of its new tokens, to the column where they begin.

    Args:
        module: computes the columns of the new tokens.
        inputs: which arguments of the call it takes.
    """

    def read(arguments: Sequence[Any], new: int) -> int:
        with torch.no_grad():
            columns = module(*(arguments[i] for i in inputs)).reshape(-1).tolist()
        if columns != list(range(columns[0], columns[0] + new)):
            raise CannotServe(f"new tokens are not written side by side, but at columns {columns[:8]}")
        return columns[0]

    return read
