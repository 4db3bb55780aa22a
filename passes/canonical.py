"""Nodes that bring an attention call's operands into canonical form: `[B, heads, rows, channels]`, and one mask.

What a dimension holds is written in the letters of :data:`~mikv_compile.passes.records.Dims`: a query of `("b", "k",
"gr", "d")` is split, permuted and merged until it is `("b", "kg", "r", "d")`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Graph, Node

from mikv_compile.passes.node_utils import fake, known_equal
from mikv_compile.passes.records import HEADED, Attention, Dims, ScoreTerm

SCORES: Dims = ("b", "kg", "r", "t")


def new_tokens(graph: Graph, node: Node, layout: str) -> Node:
    """Tokens in a cache's layout as `[B, H, S, D]`."""
    if "H" not in layout:
        node = graph.call_method("unsqueeze", (node, layout.index("T")))
        layout = layout.replace("T", "HT")
    return _permuted(graph, node, [layout.index(letter) for letter in "BHTD"])


def in_layout(graph: Graph, node: Node, layout: str) -> Node:
    """`[B, H, T, D]` as a cache's layout has it."""
    node = _permuted(graph, node, ["BHTD".index(letter) for letter in _with_heads(layout)])
    return node if "H" in layout else graph.call_method("squeeze", (node, layout.index("T")))


def _with_heads(layout: str) -> str:
    """A layout with a dimension of one head where it has none."""
    return layout if "H" in layout else layout.replace("T", "HT")


def _permuted(graph: Graph, node: Node, order: list[int]) -> Node:
    return node if order == sorted(order) else graph.call_method("permute", (node, *order))


def query(graph: Graph, node: Node, dims: Dims, heads: int, groups: int) -> Node:
    """A query whose dimensions are `dims` as `[B, Hq, R, D]`."""
    return _headed(graph, node, dims, HEADED, heads, groups)


def output(graph: Graph, node: Node, dims: Dims, heads: int, groups: int) -> Node:
    """An attention output `[B, Hq, R, Dv]` in the dimensions `dims` that the model expects."""
    if dims == HEADED:
        return node
    held = list(HEADED)
    if not any("kg" in name for name in dims):
        node = graph.call_method("unflatten", (node, 1, (heads // groups, groups)))
        held[1:2] = ["k", "g"]
    wanted = [part for name in dims for part in _parts(name)]
    gone = [part for part in held if part not in wanted]  # of size 1
    node = _permuted(graph, node, [held.index(part) for part in (*gone, *wanted)])
    for _ in gone:
        node = graph.call_method("squeeze", (node, 0))
    for i, name in enumerate(dims):
        count = len(_parts(name))
        if count == 0:
            node = graph.call_method("unsqueeze", (node, i))
        if count > 1:
            node = graph.call_method("flatten", (node, i, i + count - 1))
    return node


def _parts(name: str) -> list[str]:
    """The letters merged in a dimension; `kg` counts as one, and a dimension of size 1 has none."""
    return re.findall("kg|[bkgrtd]", name)


def _headed(
    graph: Graph, node: Node, dims: Dims, target: Dims, heads: int, groups: int, narrow: Collection[int] = ()
) -> Node:
    """Split, order and merge dimensions until they are `target`, whose heads are together.

    Letters that `dims` lacks have size 1. So has each dimension in `narrow`, which broadcasts along its letters.
    """
    if dims == target:
        return node
    held: list[str] = []
    broadcast: set[str] = set()
    for i, name in reversed(list(enumerate(dims))):
        parts = _parts(name)
        if not parts:
            node = graph.call_method("squeeze", (node, i))
        elif i in narrow:
            broadcast.update(parts)
            for _ in parts[1:]:
                node = graph.call_method("unsqueeze", (node, i))
        elif len(parts) > 1:
            node = graph.call_method("unflatten", (node, i, _split(parts, heads, groups)))
        held = parts + held
    order = [target[0], *(["kg"] if "kg" in held else ["k", "g"]), *target[2:]]
    for letter in order:
        if letter not in held:
            node = graph.call_method("unsqueeze", (node, 0))
            held.insert(0, letter)
            broadcast.add(letter)
    node = _permuted(graph, node, [held.index(letter) for letter in order])
    if "kg" in held:
        return node
    sizes = {"k": heads // groups, "g": groups}
    repeated = [letter for letter in sizes if letter in broadcast and sizes[letter] != 1]
    if len(repeated) == 1:  # merged with the other letter it cannot broadcast any more
        full = [sizes[letter] if letter in repeated else -1 for letter in order]
        node = graph.call_method("expand", (node, *full))
    return graph.call_method("flatten", (node, 1, 2))


def _split(parts: Sequence[str], heads: int, groups: int) -> tuple[int, ...]:
    """Sizes of a merged dimension's parts; the batch or the rows are what is left."""
    known = {"kg": heads, "k": heads // groups, "g": groups}
    return tuple(known.get(part, -1) for part in parts)


def mask(graph: Graph, attention: Attention, copies: Mapping[Node, Node], heads: int, groups: int) -> Node | None:
    """What the terms do to the scores as one mask, broadcastable to `[B, Hq, R, T]`: bool, or additive."""
    plain = attention.mask
    if plain is not None and attention.terms[0].dims == SCORES:
        return copies[plain]
    total: Node | None = None
    for term in attention.terms:
        node = _headed_term(graph, copies[term.node], term, heads, groups)
        if len(attention.terms) == 1 and plain is not None:
            return node
        total = _with_term(graph, total, node, term)
    return total


def _with_term(graph: Graph, total: Node | None, node: Node, term: ScoreTerm) -> Node:
    """What has to be added to the scores after one more term; `total` is what had to be before it.

    A number that replaces scores is so negative that the score does not matter beside it, so it may be added as well.
    """
    before = 0.0 if total is None else total
    if term.kind == "keep":
        return graph.call_function(torch.where, (node, before, float("-inf")))
    if term.kind == "fill":
        values = (before, term.value) if term.inverted else (term.value, before)
        return graph.call_function(torch.where, (node, *values))
    bias = node if term.value == 1.0 else graph.call_function(torch.mul, (node, term.value))
    return bias if total is None else graph.call_function(torch.add, (total, bias))


def _headed_term(graph: Graph, node: Node, term: ScoreTerm, heads: int, groups: int) -> Node:
    """A term in the dimensions of canonical scores; sizes of 1 go on broadcasting."""
    value = fake(term.node)
    assert value is not None
    if term.dims == SCORES or value.dim() == 0:
        return node
    dims = term.dims[len(term.dims) - value.dim() :]
    narrow = [i for i, size in enumerate(value.shape) if known_equal(size, 1)]
    return _headed(graph, node, dims, SCORES, heads, groups, narrow)


def with_sinks(graph: Graph, out: Node, lse: Node, sinks: Node) -> tuple[Node, Node]:
    """Attention output and log-sum-exp `[B, Hq, R]` once the sinks' columns, which have no values, take part."""
    logits = graph.call_function(torch.logsumexp, (graph.call_method("float", (sinks,)), -1))
    total = graph.call_function(torch.logaddexp, (lse, logits))
    share = graph.call_function(torch.exp, (graph.call_function(torch.sub, (lse, total)),))
    share = graph.call_method("unsqueeze", (share, -1))
    scaled = graph.call_function(torch.mul, (out, share))
    return graph.call_method("type_as", (scaled, out)), total
