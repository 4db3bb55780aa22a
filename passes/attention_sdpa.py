"""`scaled_dot_product_attention` in all its forms: the function, ATen's overloads, the fused kernels behind them."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import argument, as_number, fake, is_op, known_equal, operation, rank, shape_of
from mikv_compile.passes.records import Attention, Dims, ScoreTerm
from mikv_compile.passes.report import Declined

SDPA_TARGETS = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
# Names of the arguments behind query, key and value that may be given by position, in order.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    "_scaled_dot_product_attention_math": ("attn_mask", "dropout_p", "is_causal", "dropout_mask"),
    "_scaled_dot_product_flash_attention_for_cpu": ("dropout_p", "is_causal"),
    "_scaled_dot_product_flash_attention": ("dropout_p", "is_causal", "return_debug_mask"),
    "_scaled_dot_product_efficient_attention": ("attn_mask", "compute_log_sumexp", "dropout_p", "is_causal"),
    "_scaled_dot_product_cudnn_attention": ("attn_mask", "compute_log_sumexp", "dropout_p", "is_causal"),
    "_scaled_dot_product_fused_attention_overrideable": ("attn_mask", "dropout_p", "is_causal"),
}
# Dimensions of the query for each number of dimensions.
_QUERY_DIMS: dict[int, Dims] = {
    2: ("r", "d"),
    3: ("bkg", "r", "d"),
    4: ("b", "kg", "r", "d"),
    5: ("b", "k", "g", "r", "d"),
}


def recognize(node: Node) -> Attention | Declined | None:
    """Recognize one SDPA node; query `[..., R, D]`, key `[..., T, D]`, value `[..., T, Dv]` of 2 to 5 dimensions."""
    names = _ARGUMENTS.get(operation(node) or "")
    if names is None:
        return None

    def decline(reason: str) -> Declined:
        return Declined(node.name, "canonicalize", reason)

    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if rank(operand) not in _QUERY_DIMS or rank(operand) != rank(query):
            return decline(
                f"{name} has {rank(operand)} dimensions; query, key and value must have the same number, 2 to 5"
            )
    query_dims = _QUERY_DIMS[rank(query)]  # type: ignore[index]
    given = _arguments(node, names)
    dropout, is_causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    mask, enable_gqa = given.get("attn_mask"), given.get("enable_gqa", False)
    if as_number(dropout) != 0 or given.get("dropout_mask") is not None:
        return decline(f"dropout_p={dropout} changes the output at random; call `model.eval()`")
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        return decline("is_causal and enable_gqa must be plain True or False")
    if mask is not None and is_causal:
        return decline("both attn_mask and is_causal are given, which torch forbids")
    terms: tuple[ScoreTerm, ...] = ()
    if mask is not None:
        mask_value = fake(mask)
        if mask_value is None or not (mask_value.dtype == torch.bool or mask_value.dtype.is_floating_point):
            return decline("attn_mask is not a bool or floating point tensor")
        if mask_value.dim() > len(query_dims):
            return decline(f"attn_mask has {mask_value.dim()} dimensions; at most {len(query_dims)} are supported")
        kind: Literal["keep", "add"] = "keep" if mask_value.dtype == torch.bool else "add"
        terms = (ScoreTerm(kind, mask, dims=(*query_dims[:-1], "t")),)
    scale = _scale(given.get("scale"), query)
    if isinstance(scale, str):
        return decline(scale)
    output = _first_result(node)
    if isinstance(output, str):
        return decline(output)
    if output is not node and len(query_dims) == 4:  # the fused kernels take fewer KV heads without saying so
        heads = shape_of(key)[1]  # type: ignore[index]
        enable_gqa = enable_gqa or not (known_equal(heads, 1) or known_equal(heads, shape_of(query)[1]))  # type: ignore[index]
    if enable_gqa and len(query_dims) != 4:
        return decline("enable_gqa is supported for [batch, heads, tokens, head_dim] only")
    if not _same_rows(query, output):
        return decline("the query does not surely have the batch, heads and rows of the output")
    key_dims, value_dims = (_shared_dims(operand, query_dims) for operand in (key, value))
    return Attention(
        output=output,
        nodes=_nodes(node, output),
        query=query,
        key=key,
        value=value,
        terms=terms,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        form="sdpa",
        query_dims=query_dims,
        key_dims=key_dims,
        value_dims=value_dims,
        output_dims=query_dims,
    )


def _arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments behind query, key and value by name."""
    given = dict(zip(names, node.args[3:], strict=False))
    given.update(node.kwargs)
    if "attn_bias" in given:
        given["attn_mask"] = given["attn_bias"]
    return given


def _scale(given: object, query: Node) -> float | str:
    """The scale, or why it is unknown."""
    if given is None:
        head_dim = fake(query).shape[-1]  # type: ignore[union-attr]
        if not isinstance(head_dim, int):
            return "the default scale needs a fixed head_dim, and it is symbolic here; pass `scale=`"
        return 1.0 / math.sqrt(head_dim)
    number = as_number(given)
    return f"scale is {given!r}, not a plain number" if number is None else float(number)


def _first_result(node: Node) -> Node | str:
    """The node that holds the attention output: the first result of a kernel that has several."""
    if fake(node) is not None or operation(node) == "scaled_dot_product_attention":
        return node
    results = [user for user in node.users if is_op(user, operator.getitem)]
    outputs = [user for user in results if user.args[1] == 0]
    others = [user for user in results if user.args[1] != 0 and user.users]
    if len(outputs) != 1 or len(results) != len(node.users) or others:
        return f"more than the output of `{node.name}` is used"
    return outputs[0]


def _nodes(node: Node, output: Node) -> tuple[Node, ...]:
    """The call, its unused results, and its output."""
    return (output,) if output is node else (node, *sorted(user for user in node.users if user is not output), output)


def _same_rows(query: Node, output: Node) -> bool:
    before, after = shape_of(query), shape_of(output)
    if before is None or after is None or len(before) != len(after):
        return False
    return all(known_equal(x, y) for x, y in zip(before[:-1], after[:-1], strict=True))


def _shared_dims(operand: Node, query_dims: Dims) -> Dims:
    """Names of the dimensions of key or value; the query heads of one KV head are 1 there if they broadcast."""
    shape = shape_of(operand)
    dims = (*query_dims[:-2], "t", "d")
    return tuple("1" if name == "g" and known_equal(size, 1) else name for name, size in zip(dims, shape, strict=True))  # type: ignore[arg-type]
