"""The part of a graph that computes where new tokens are written, cut out so that it can run before the graph does."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from mikv_compile.passes.node_utils import fake, writes_in_place
from mikv_compile.passes.views import aliases, view_input

_MAX_NODES = 64


class NotSeparable(Exception):
    """Columns that depend on more than a few cheap operations on the graph's inputs; the message says on what."""


def cut_out(columns: Node) -> tuple[GraphModule, list[int]]:
    """A module that computes `columns` alone, and which of the graph's inputs it takes.

    Raises:
        NotSeparable: if floating point tensors, random numbers or values that change in between take part.
    """
    needed: set[Node] = set()
    todo = [columns]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        _check(node, columns)
        needed.add(node)
        if len(needed) > _MAX_NODES:
            raise NotSeparable("the columns of the new tokens take too much to compute")
        todo += node.all_input_nodes
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in sorted(needed):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[columns])
    inputs = columns.graph.find_nodes(op="placeholder")
    module = GraphModule(columns.graph.owning_module or torch.nn.Module(), graph)
    return module, [i for i, node in enumerate(inputs) if node in needed]


def _check(node: Node, columns: Node) -> None:
    """Refuse nodes that cannot run apart from the graph, or whose value changes before the columns are read."""
    value = fake(node)
    if value is not None and value.dtype.is_floating_point and node.op == "placeholder":
        raise NotSeparable(f"the columns of the new tokens depend on the floating point tensor `{node.name}`")
    if node.op not in ("placeholder", "call_function", "call_method", "get_attr"):
        raise NotSeparable(f"the columns of the new tokens depend on `{node.name}`")
    if node.op != "placeholder" and (writes_in_place(node) or "rand" in str(node.target)):
        raise NotSeparable(f"the columns of the new tokens depend on `{node.name}`")
    if value is None:
        return
    shared = aliases(node)
    last = _last_reader(columns) if columns in shared else columns
    for alias in shared:
        for user in alias.users:
            if writes_in_place(user) and user.args[0] is alias and user < last:
                raise NotSeparable(f"`{user.name}` changes the columns of the new tokens in place before they are used")


def _last_reader(columns: Node) -> Node:
    """The last node that reads `columns`, itself or through views, and does not write there."""
    last, todo, seen = columns, [columns], {columns}
    while todo:
        node = todo.pop()
        for user in node.users:
            if not (writes_in_place(user) and user.args[0] is node):
                last = max(last, user)
            if view_input(user) is node and user not in seen:
                seen.add(user)
                todo.append(user)
    return last
