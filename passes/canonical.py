"""Nodes that bring an attention call's operands into canonical form: `[B, heads, rows, channels]`, and one mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    letters = "".join(dims).replace("1", "")
    held = list(HEADED)
    if not _heads_together(letters):
        node = graph.call_method("unflatten", (node, 1, (heads // groups, groups)))
        held[1:2] = ["k", "g"]
    wanted = [token for token in _tokens(letters, held)]
    node = _permuted(graph, node, [held.index(token) for token in wanted])
    for i, name in enumerate(dims):
        if name == "1":
            node = graph.call_method("unsqueeze", (node, i))
            continue
        count = len(_tokens(name, held))
        if count > 1:
            node = graph.call_method("flatten", (node, i, i + count - 1))
    return node


def _heads_together(letters: str) -> bool:
    return "kg" in letters


def _tokens(letters: str, held: Sequence[str]) -> list[str]:
    """Letters as the dimensions that hold them: `kg` is one where it is together."""
    found, rest = [], letters
    while rest:
        token = "kg" if rest.startswith("kg") and "kg" in held else rest[0]
        found.append(token)
        rest = rest[len(token) :]
    return found


def _headed(graph: Graph, node: Node, dims: Dims, target: Dims, heads: int, groups: int) -> Node:
    """Split, order and merge dimensions until they are `target`, whose heads are together."""
    if dims == target:
        return node
    held: list[str] = []
    for i, name in reversed(list(enumerate(dims))):
        if name == "1":
            node = graph.call_method("squeeze", (node, i))
            continue
        parts = _tokens(name, ["kg"])
        if len(parts) > 1:
            node = graph.call_method("unflatten", (node, i, _split(parts, heads, groups)))
        held = parts + held
    if "kg" not in held:
        for letter in ("g", "k"):  # a missing one has size 1
            if letter not in held:
                node = graph.call_method("unsqueeze", (node, 0))
                held.insert(0, letter)
    if "b" not in held:
        node = graph.call_method("unsqueeze", (node, 0))
        held.insert(0, "b")
    order = [target[0], *(["kg"] if "kg" in held else ["k", "g"]), *target[2:]]
    node = _permuted(graph, node, [held.index(token) for token in order])
    return node if "kg" in held else graph.call_method("flatten", (node, 1, 2))


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
        bias = _bias(graph, node, term)
        total = bias if total is None else graph.call_function(torch.add, (total, bias))
    return total


def _bias(graph: Graph, node: Node, term: ScoreTerm) -> Node:
    """A term as something to add. What replaces a score is so negative that the score does not matter beside it."""
    if term.kind == "keep":
        return graph.call_function(torch.where, (node, 0.0, float("-inf")))
    if term.kind == "fill":
        values = (0.0, term.value) if term.inverted else (term.value, 0.0)
        return graph.call_function(torch.where, (node, *values))
    return node if term.value == 1.0 else graph.call_function(torch.mul, (node, term.value))


def _headed_term(graph: Graph, node: Node, term: ScoreTerm, heads: int, groups: int) -> Node:
    """A term in the dimensions of canonical scores; sizes of 1 go on broadcasting."""
    value = fake(term.node)
    assert value is not None
    if term.dims == SCORES or value.dim() == 0:
        return node
    dims = list(term.dims[len(term.dims) - value.dim() :])
    sizes: dict[str, Any] = dict(zip(dims, value.shape, strict=True))
    if "bkg" in dims and known_equal(sizes["bkg"], 1):
        node = graph.call_method("unsqueeze", (node, dims.index("bkg")))
        dims[dims.index("bkg") : dims.index("bkg") + 1] = ["b", "kg"]
    if "k" in dims and "g" in dims and not (known_equal(sizes["k"], 1) and known_equal(sizes["g"], 1)):
        full = [{"k": heads // groups, "g": groups}.get(name, -1) for name in dims]
        node = graph.call_method("expand", (node, *full))
    missing = [name for name in ("r", "t") if not any(name in held for held in dims)]
    for name in reversed(missing):
        node = graph.call_method("unsqueeze", (node, 0))
        dims.insert(0, name)
    return _headed(graph, node, tuple(dims), SCORES, heads, groups)


def with_sinks(graph: Graph, out: Node, lse: Node, sinks: Node) -> tuple[Node, Node]:
    """Attention output and log-sum-exp `[B, Hq, R]` once the sinks' columns, which have no values, take part."""
    logits = graph.call_function(torch.logsumexp, (graph.call_method("float", (sinks,)), -1))
    total = graph.call_function(torch.logaddexp, (lse, logits))
    share = graph.call_function(torch.exp, (graph.call_function(torch.sub, (lse, total)),))
    share = graph.call_method("unsqueeze", (share, -1))
    scaled = graph.call_function(torch.mul, (out, share))
    return graph.call_method("type_as", (scaled, out)), total
