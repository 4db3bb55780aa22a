"""A graph before and after the rewrite as readable lines, which say what became of each site's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile.passes import RewrittenGraph, Site

_SHOWN = 6
"""Members of a list that are written out."""


@dataclass(frozen=True)
class GraphLine:
    """A node.

    Attributes:
        name: of the node; a node of the rewritten graph with the name of an original one is its copy.
        text: the node as an assignment, with the shape and dtype of its value.
        site: name of the rewritten site that it belongs to, if any.
        role: what it is in the site: ``"cache"`` (the dense cache or its update), ``"attention"`` or ``"view"`` in the
            original graph, ``"buffer"`` (an input from the store) or ``"op"`` in the rewritten one.
    """

    name: str
    text: str
    site: str | None = None
    role: str = ""


@dataclass(frozen=True)
class GraphText:
    """Both graphs, their nodes in order."""

    before: tuple[GraphLine, ...]
    after: tuple[GraphLine, ...]

    @property
    def removed(self) -> frozenset[str]:
        """Names of the original nodes that the rewritten graph lacks."""
        return frozenset(line.name for line in self.before) - frozenset(line.name for line in self.after)

    @property
    def added(self) -> frozenset[str]:
        """Names of the nodes that only the rewritten graph has."""
        return frozenset(line.name for line in self.after) - frozenset(line.name for line in self.before)


def graph_text(gm: GraphModule, rewritten: RewrittenGraph) -> GraphText:
    """The lines of a graph and of its rewritten copy."""
    members: dict[Node, tuple[str, str]] = {}
    for found in rewritten.sites:
        for node, role in _members(found.site):
            members.setdefault(node, (found.site.name, role))
    before = [GraphLine(node.name, _text(node), *members.get(node, (None, ""))) for node in gm.graph.nodes]
    known = {line.name for line in before}
    return GraphText(tuple(before), tuple(_after(rewritten, known)))


def _members(site: Site) -> list[tuple[Node, str]]:
    found: list[tuple[Node, str]] = []
    for update in (site.key, site.value):
        found += [(node, "cache") for node in (update.past, update.result, *update.sources, *update.nodes) if node]
    for read in site.reads:
        found += [(node, "attention") for node in (*read.attention.nodes, read.attention.output)]
        found += [(node, "view") for node in (*read.key_views, *read.value_views)]
    return found


def _after(rewritten: RewrittenGraph, known: set[str]) -> list[GraphLine]:
    inputs = rewritten.gm.graph.find_nodes(op="placeholder")
    sites: dict[Node, str] = {inputs[i]: s.site.name for s in rewritten.sites for i in s.buffer_inputs}
    lines = []
    for node in rewritten.gm.graph.nodes:
        role = ""
        if node.op == "placeholder":
            role = "buffer" if node in sites else ""
        elif node.name not in known:
            # New nodes of a site are those that its buffers lead to.
            found = [sites[used] for used in node.all_input_nodes if used in sites]
            if found:
                sites[node], role = found[0], "op"
        lines.append(GraphLine(node.name, _text(node), sites.get(node), role))
    return lines


def _text(node: Node) -> str:
    if node.op == "placeholder":
        text = f"{node.name} = input"
    elif node.op == "output":
        return f"return {_argument(node.args[0])}"
    elif node.op == "get_attr":
        text = f"{node.name} = self.{node.target}"
    else:
        arguments = [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())]
        text = f"{node.name} = {_target(node)}({', '.join(arguments)})"
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, torch.Tensor):
        text += f"  # [{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"
    return text


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    told = str(node.target)  # of an operator its name, of a function something in angle brackets
    return getattr(node.target, "__name__", told) if told.startswith("<") else told


def _argument(value: Any) -> str:
    if isinstance(value, slice):
        ends = ["" if end is None else _argument(end) for end in (value.start, value.stop)]
        return ":".join(ends) + ("" if value.step is None else f":{_argument(value.step)}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = [*map(_argument, value[:_SHOWN])]
        return f"[{', '.join(shown)}{f', and {len(value) - _SHOWN} more' if len(value) > _SHOWN else ''}]"
    return repr(value)
