"""What each operation between the softmax and the product with the values does to the probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from mikv_compile.passes.axes import Layout, view_layout
from mikv_compile.passes.constants import constant
from mikv_compile.passes.node_utils import argument, fake, known_equal, operation, shape_of
from mikv_compile.passes.score_steps import Scores, Unsupported
from mikv_compile.passes.views import NotAView, is_cast, view_input


def dropout_problem(node: Node) -> str | None:
    """Why a dropout changes its input; None if it does nothing."""
    probability = argument(node, 1, "p", 0.5)
    training = argument(node, 2, "train", node.kwargs.get("training", True))
    if training is False or constant(probability) == 0:
        return None
    return f"dropout with p={probability} changes the output at random; call `model.eval()`"


@dataclass
class Probabilities:
    """The probabilities after some steps behind the softmax."""

    layout: Layout
    sinks: Scores | None
    """The scores with their sink column, while it has not been cut off."""

    def step(self, node: Node, source: Node) -> None:
        """Take in one step; `source` is the node before."""
        if operation(node) == "dropout":
            problem = dropout_problem(node)
            if problem:
                raise Unsupported(problem)
            return
        if view_input(node) is source and is_cast(node):
            value, before = fake(node), fake(source)
            if value is None or before is None or not value.dtype.is_floating_point or value.device != before.device:
                raise Unsupported(f"the attention probabilities are cast by `{node.name}` to {value and value.dtype}")
            return
        if self.sinks is not None and _is_slice(node):
            self._cut_sinks(node, source)
            return
        try:
            if view_input(node) is not source or self.sinks is not None:
                raise NotAView(f"`{node.name}`")
            self.layout = view_layout(node, self.layout)
        except NotAView as problem:
            raise Unsupported(
                f"the attention probabilities are changed between softmax and the values: {problem}"
            ) from None

    def _cut_sinks(self, node: Node, source: Node) -> None:
        """`probabilities[..., :-n]`, or `[..., n:]` where the sinks come first."""
        assert self.sinks is not None
        before, after, column = shape_of(source), shape_of(node), shape_of(self.sinks.sinks)
        bounds = _last_slice(node, len(self.layout))
        if before is None or after is None or column is None or bounds is None or len(before) != len(after):
            raise Unsupported(f"`{node.name}` does not cut exactly the sink column off the probabilities")
        same = all(known_equal(x, y) for x, y in zip(before[:-1], after[:-1], strict=True))
        start, whole = bounds[0] or 0, known_equal(after[-1] + column[-1], before[-1])
        right = known_equal(start, column[-1]) if self.sinks.sinks_first else known_equal(start, 0)
        if not (same and whole and right):
            raise Unsupported(f"`{node.name}` does not cut exactly the sink column off the probabilities")
        self.sinks = None


def _is_slice(node: Node) -> bool:
    return operation(node) in ("getitem", "slice", "narrow")


def _last_slice(node: Node, rank: int) -> tuple[Any, Any] | None:
    """Start and stop of a slice of the last dimension, step 1; None if the node does something else."""
    name = operation(node)
    if name in ("slice", "narrow"):
        dim, start = argument(node, 1, "dim", 0), argument(node, 2, "start")
        if not isinstance(dim, int) or dim % rank != rank - 1 or argument(node, 4, "step", 1) != 1:
            return None
        return (start, None) if _is_size(start) else None
    index = argument(node, 1, "index")
    items = list(index) if isinstance(index, tuple | list) else [index]
    *others, last = items
    if not isinstance(last, slice) or last.step not in (None, 1) or not _is_size(last.start):
        return None
    if len(items) != rank and Ellipsis not in items:
        return None
    plain = all(x is Ellipsis or x == slice(None) for x in others)
    return (last.start, last.stop) if plain and others.count(Ellipsis) <= 1 else None


def _is_size(value: object) -> bool:
    return value is None or (isinstance(value, int) and value >= 0)
