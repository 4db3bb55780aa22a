"""The `flex_attention` higher-order op, where neither its score_mod nor its mask_mod does anything."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from mikv_compile.passes.constants import constant
from mikv_compile.passes.node_utils import argument, as_number, is_op, known_equal, rank, shape_of
from mikv_compile.passes.records import Attention
from mikv_compile.passes.report import Declined

_ADVICE = 'load the model with attn_implementation="sdpa"'
_WHOLE = 1 << 30
"""Block size of the mask that torch makes when none is given."""


def recognize(node: Node) -> Attention | Declined | None:
    """Recognize one flex_attention node; query `[B, Hq, R, D]`, key `[B, Hk, T, D]`, value `[B, Hk, T, Dv]`."""
    if not is_op(node, torch.ops.higher_order.flex_attention):
        return None

    def decline(reason: str) -> Declined:
        return Declined(node.name, "canonicalize", f"{reason}; {_ADVICE}")

    query, key, value = node.args[:3]
    score_mod, block_mask = argument(node, 3, "score_mod"), argument(node, 4, "block_mask")
    scale = as_number(argument(node, 5, "scale"))
    if any(rank(operand) != 4 for operand in (query, key, value)) or scale is None:
        return decline("flex_attention is supported for [batch, heads, tokens, head_dim] and a plain scale only")
    if not _is_identity(score_mod):
        return decline("flex_attention changes the scores by a score_mod, which is not supported")
    if not _masks_nothing(block_mask):
        return decline("flex_attention masks by a block_mask, which is not supported")
    results = [user for user in node.users if is_op(user, operator.getitem)]
    outputs = [user for user in results if user.args[1] == 0]
    if len(outputs) != 1 or len(results) != len(node.users) or any(r.users for r in results if r not in outputs):
        return decline(f"more than the output of `{node.name}` is used")
    heads, key_heads = shape_of(query)[1], shape_of(key)[1]  # type: ignore[index]
    return Attention(
        output=outputs[0],
        nodes=(node, *sorted(user for user in results if user not in outputs), outputs[0]),
        query=query,  # type: ignore[arg-type]
        key=key,  # type: ignore[arg-type]
        value=value,  # type: ignore[arg-type]
        terms=(),
        scale=float(scale),
        is_causal=False,
        enable_gqa=not known_equal(heads, key_heads),
        form="flex_attention",
    )


def _subgraph(node: object) -> GraphModule | None:
    """The graph of a score_mod or mask_mod."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    module = getattr(node.graph.owning_module, str(node.target), None)
    return module if isinstance(module, GraphModule) else None


def _result(module: GraphModule) -> object:
    result = module.graph.output_node().args[0]
    return result[0] if isinstance(result, tuple | list) and len(result) == 1 else result


def _is_identity(score_mod: object) -> bool:
    """Whether a score_mod returns its first argument."""
    module = _subgraph(score_mod)
    return module is not None and _result(module) is module.graph.find_nodes(op="placeholder")[0]


def _masks_nothing(block_mask: object) -> bool:
    """Whether a block mask is one block of everything, and its mask_mod is True everywhere."""
    if not isinstance(block_mask, tuple | list) or len(block_mask) < 7:
        return False
    module = _subgraph(block_mask[-1])
    whole = all(isinstance(size, int) and size >= _WHOLE for size in block_mask[-3:-1])
    blocks = constant(block_mask[2]) == 1 and constant(block_mask[3]) == 0
    return module is not None and whole and blocks and constant(_result(module)) == 1
