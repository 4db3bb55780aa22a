"""`torch.nn.functional.scaled_dot_product_attention`, every argument by position or by keyword."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import argument, as_number, fake, is_op, rank
from mikv_compile.passes.records import Attention, ScoreTerm
from mikv_compile.passes.report import Declined

SDPA_TARGETS = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def recognize(node: Node) -> Attention | Declined | None:
    """Recognize one SDPA node; query `[B, Hq, R, D]`, key `[B, Hk, T, D]`, value `[B, Hk, T, Dv]`."""
    if not is_op(node, *SDPA_TARGETS):
        return None

    def decline(reason: str) -> Declined:
        return Declined(node.name, "canonicalize", reason)

    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if rank(operand) != 4:
            return decline(f"{name} has {rank(operand)} dimensions; only [batch, heads, tokens, head_dim] is supported")
    mask = argument(node, 3, "attn_mask")
    dropout = argument(node, 4, "dropout_p", 0.0)
    is_causal = argument(node, 5, "is_causal", False)
    scale = argument(node, 6, "scale")
    enable_gqa = argument(node, 7, "enable_gqa", False)

    if as_number(dropout) != 0:
        return decline(f"dropout_p={dropout} changes the output at random; call `model.eval()`")
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        return decline("is_causal and enable_gqa must be plain True or False")
    if mask is not None and is_causal:
        return decline("both attn_mask and is_causal are given, which torch forbids")
    if mask is not None:
        mask_value = fake(mask)
        if mask_value is None or not (mask_value.dtype == torch.bool or mask_value.dtype.is_floating_point):
            return decline("attn_mask is not a bool or floating point tensor")
        if mask_value.dim() > 4:
            return decline(f"attn_mask has {mask_value.dim()} dimensions; at most 4 are supported")
    if scale is None:
        head_dim = fake(query).shape[-1]  # type: ignore[union-attr]
        if not isinstance(head_dim, int):
            return decline("the default scale needs a fixed head_dim, and it is symbolic here; pass `scale=`")
        scale = 1.0 / math.sqrt(head_dim)
    number = as_number(scale)
    if number is None:
        return decline(f"scale is {scale!r}, not a plain number")
    terms = () if mask is None else (ScoreTerm("keep" if mask_value.dtype == torch.bool else "add", mask),)
    return Attention(
        output=node,
        nodes=(node,),
        query=query,
        key=key,
        value=value,
        terms=terms,
        scale=float(number),
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        form="sdpa",
    )
