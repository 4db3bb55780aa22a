"""Growing cache: `torch.cat([past, new], dim)`, the whole of it kept, or the newest tokens only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import (
    argument,
    fake,
    is_metadata,
    known_equal,
    names,
    operation,
    output_positions,
    rank,
    same_kind,
    same_shape,
    shape_of,
)
from mikv_compile.passes.records import CacheUpdate
from mikv_compile.passes.report import Declined
from mikv_compile.passes.views import in_place_writers, slice_of_tokens, view_input

LAYOUTS = {4: {2: "BHTD", 1: "BTHD", 0: "TBHD", 3: "BHDT"}, 3: {1: "BTD"}}
"""By rank and the dimension that tokens are written along."""


def recognize(node: Node) -> CacheUpdate | Declined | None:
    """Recognize a concatenation of past and new tokens that a cache keeps.

    An empty past (`torch.tensor([])`, or no tokens) makes a cache that is born here. What is kept may be a slice of the
    newest tokens, returned or copied back into a preallocated cache, as sliding windows do. Concatenations that do not
    look like a cache (rotary embeddings, sinks) give None.
    """
    if operation(node) != "cat":
        return None
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    dims = rank(node)
    layout = LAYOUTS[dims].get(dim % dims) if isinstance(dim, int) and dims in LAYOUTS else None
    if not _looks_like_cache(node, tensors, layout):
        return None

    def decline(reason: str) -> Declined:
        return Declined(node.name, "find cache updates", reason)

    if len(tensors) != 2:
        return decline(f"{len(tensors)} tensors are concatenated; a cache update has two, [past, new]")
    if layout is None:
        return decline(f"concatenates along dim={dim} of {dims}, which is not where a cache has its tokens")
    past, new = tensors
    born = is_empty(past, layout)
    cached, first, position = (None, 0, None) if born else _cached(past, layout)
    if is_empty(new, layout) or past is new or not (born or cached is not None):
        return decline("the cached tensor does not come first; only cat([past, new]) is supported")
    if not same_kind(node, new) or (cached is not None and not same_kind(cached, new)):
        return decline("past and new tokens differ in dtype or device; the concatenation converts one of them")
    if not fake(new).dtype.is_floating_point:  # type: ignore[union-attr]
        return decline("the cached numbers are not floating point")
    if born and not same_shape(node, new):
        return decline("the result does not have the shape of the new tokens although the past is empty")
    kept = _kept(node, cached, layout)
    if kept is None:
        return decline("the graph does not return the result, so no cache keeps it")
    outputs, keep, written, nodes = kept
    capacity = None if written is None else shape_of(cached)[layout.index("T")]  # type: ignore[index]
    if (first != 0 or position is not None) and written is None:
        return decline("a part of the cache is dropped before new tokens are appended")
    if cached is not None and in_place_writers(cached) != ([] if written is None else [written]):
        return decline(f"the cached tensor is also written in place by {names(in_place_writers(cached))}")
    readers = dict.fromkeys([*(cached.users if cached is not None else ()), *node.users])
    return CacheUpdate(
        result=node,
        past=cached,
        new=new,
        layout=layout,
        kind="cat",
        outputs=outputs,
        metadata_users=tuple(sorted(user for user in readers if is_metadata(user))),
        written=written,
        first=first,
        position=position,
        keep=keep,
        capacity=capacity,
        nodes=tuple(sorted({node, *nodes, *([past] if past is not cached and not born else [])})),
    )


def is_empty(node: object, layout: str = "BHTD") -> bool:
    """Whether a node is a past without tokens: a 1-D tensor of no elements, or no elements along the tokens."""
    shape = shape_of(node)
    if shape is None or len(shape) not in (1, len(layout)):
        return False
    return known_equal(shape[0] if len(shape) == 1 else shape[layout.index("T")], 0)


def is_cached_tensor(node: object) -> bool:
    """Whether a node is a graph input of 3 or 4 dimensions that is not a weight."""
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and rank(node) in (3, 4)
        and not isinstance(fake(node), torch.nn.Parameter)
    )


def is_allocated(node: object) -> bool:
    """Whether a node is zeros of 3 or 4 dimensions, as a preallocated cache begins."""
    return operation(node) in ("zeros", "zeros_like", "new_zeros") and rank(node) in LAYOUTS


def _cached(past: Node, layout: str) -> tuple[Node | None, Any, Any]:
    """The cached tensor behind `past`, and which of its columns `past` is: `[first:position]`."""
    if is_cached_tensor(past):
        return past, 0, None
    source = view_input(past) if isinstance(past, Node) else None
    cut = slice_of_tokens(past, layout) if source is not None and is_cached_tensor(source) else None
    if cut is None:
        return None, 0, None
    return source, cut[0] or 0, cut[1]


def _kept(
    node: Node, cached: Node | None, layout: str
) -> tuple[tuple[int, ...], int | None, Node | None, tuple[Node, ...]] | None:
    """What the cache keeps of the result: output positions, how many tokens, the write into `cached`, nodes of it."""
    whole = output_positions(node)
    if whole:
        return whole, None, None, ()
    for user in node.users:
        cut = slice_of_tokens(user, layout)
        if cut is None or not isinstance(cut[0], int) or cut[0] >= 0 or cut[1] is not None:
            continue
        if output_positions(user) and set(user.users) == {node.graph.output_node()}:
            return output_positions(user), -cut[0], None, (user,)
        writes = [copy for copy in user.users if operation(copy) == "copy" and copy.args[0] is cached]
        if cached is None or len(writes) != 1 or set(user.users) != set(writes):
            continue
        if known_equal(shape_of(cached)[layout.index("T")], -cut[0]):  # type: ignore[index]
            return (), -cut[0], writes[0], (user, writes[0])
    return None


def _looks_like_cache(node: Node, tensors: Any, layout: str | None) -> bool:
    """Whether this is worth a report: cached or empty tensors joined to something returned or attended to."""
    if not isinstance(tensors, list | tuple) or rank(node) not in LAYOUTS:
        return False
    known = layout or "BHTD"[-(rank(node) or 4) :]
    if not any(is_empty(tensor, known) or is_cached_tensor(tensor) for tensor in tensors):
        return layout is not None and _cached(tensors[0], layout)[0] is not None and feeds_attention(node)
    returned = any(output_positions(user) for user in node.users if slice_of_tokens(user, known) is not None)
    return bool(output_positions(node)) or returned or feeds_attention(node)


def feeds_attention(node: Node) -> bool:
    """Whether a node's value reaches an SDPA or a matrix product through views only."""
    seen = {node}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if operation(user) in ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"):
                return True
            if user not in seen and view_input(user) is not None:
                seen.add(user)
                todo.append(user)
    return False
