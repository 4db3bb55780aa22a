"""Growing cache: `torch.cat([past, new], dim=2)`, as Hugging Face's `DynamicCache` writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mikv_compile.passes.attention_eager import MATMUL_TARGETS
from mikv_compile.passes.attention_sdpa import SDPA_TARGETS
from mikv_compile.passes.node_utils import (
    argument,
    fake,
    is_metadata,
    is_op,
    known_equal,
    names,
    output_positions,
    rank,
    same_kind,
    same_shape,
    shape_of,
)
from mikv_compile.passes.records import CacheUpdate
from mikv_compile.passes.report import Declined
from mikv_compile.passes.views import view_input

CAT_TARGETS = (torch.cat, torch.concat, torch.concatenate)
TOKEN_DIM = 2


def recognize(node: Node) -> CacheUpdate | Declined | None:
    """Recognize a concatenation of past `[B, H, T, D]` and new `[B, H, S, D]` whose result the graph returns.

    An empty past (`torch.tensor([])` or T == 0) makes a cache that is born here. Concatenations that do not look like
    a cache (rotary embeddings, sinks) give None.
    """
    if not is_op(node, *CAT_TARGETS):
        return None
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not _looks_like_cache(node, tensors):
        return None

    def decline(reason: str) -> Declined:
        return Declined(node.name, "find cache updates", reason)

    if len(tensors) != 2:
        return decline(f"{len(tensors)} tensors are concatenated; a cache update has two, [past, new]")
    if not isinstance(dim, int) or dim % 4 != TOKEN_DIM:
        return decline(f"concatenates along dim={dim}; only caches of layout [batch, heads, tokens, head_dim] (dim=2)")
    past, new = tensors
    born = is_empty(past)
    if is_empty(new) or past is new or not (born or _is_cached_tensor(past)):
        return decline("the cached tensor does not come first; only cat([past, new]) is supported")
    if not same_kind(node, new) or (not born and not same_kind(past, new)):
        return decline("past and new tokens differ in dtype or device; the concatenation converts one of them")
    if born and not same_shape(node, new):
        return decline("the result does not have the shape of the new tokens although the past is empty")
    outputs = output_positions(node)
    if not outputs:
        return decline(_why_not_returned(node))
    dense_users = [] if born else [user for user in past.users if user is not node and not is_metadata(user)]
    if dense_users:
        return decline(f"the values of the cached tensor `{past.name}` are also read by {names(dense_users)}")
    readers = dict.fromkeys(([] if born else list(past.users)) + list(node.users))
    return CacheUpdate(
        result=node,
        past=None if born else past,
        new=new,
        dim=TOKEN_DIM,
        kind="cat",
        outputs=outputs,
        metadata_users=tuple(sorted(user for user in readers if is_metadata(user))),
    )


def is_empty(node: object) -> bool:
    """Whether a node is a past without tokens: a 1-D tensor of no elements, or `[B, H, 0, D]`."""
    shape = shape_of(node)
    if shape is None or len(shape) not in (1, 4):
        return False
    return known_equal(shape[0] if len(shape) == 1 else shape[TOKEN_DIM], 0)


def _is_cached_tensor(node: object) -> bool:
    """Whether a node is a 4-D graph input that is not a weight."""
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and rank(node) == 4
        and not isinstance(fake(node), torch.nn.Parameter)
    )


def _looks_like_cache(node: Node, tensors: Any) -> bool:
    """Whether this is worth a report: cached or empty tensors joined to something returned or attended to."""
    if not isinstance(tensors, list | tuple) or rank(node) != 4:
        return False
    if not any(is_empty(tensor) or _is_cached_tensor(tensor) for tensor in tensors):
        return False
    return bool(output_positions(node)) or _feeds_attention(node)


def _feeds_attention(node: Node) -> bool:
    """Whether a node's value reaches an SDPA or a matrix product through views only."""
    seen = {node}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if is_op(user, *SDPA_TARGETS, *MATMUL_TARGETS):
                return True
            if user not in seen and view_input(user) is not None:
                seen.add(user)
                todo.append(user)
    return False


def _why_not_returned(node: Node) -> str:
    """The reason to give when the whole result is not an output: a sliding window keeps only its end."""
    sliced = [user for user in node.users if view_input(user) is not None and output_positions(user)]
    if sliced:
        return f"only a slice of the result is kept as the cache ({names(sliced)}); sliding windows are not supported"
    return "the graph does not return the result, so no cache keeps it"
