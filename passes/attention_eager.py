"""Attention written out: `matmul(softmax(matmul(q, k^T) * scale + mask), v)`.

The walk starts at the softmax and goes back along the definitions to the first product (`_Scores`) and on along the
uses to the second (`_Probabilities`). What lies between may come in any order that keeps the meaning. Both walks note
the first thing that is not supported and go on, so that only real attention is reported as declined.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.fx import Node

from mikv_compile.passes.node_utils import argument, as_number, fake, is_op, names, output_positions, rank, same_kind
from mikv_compile.passes.records import Attention, ScoreTerm
from mikv_compile.passes.report import Declined
from mikv_compile.passes.views import is_cast, is_key_transpose, is_noop_cast, view_input

MATMUL_TARGETS = (torch.matmul, torch.bmm, operator.matmul, torch.Tensor.matmul, "matmul", "__matmul__", "bmm")
# Products that are not in a form this file reads; knowing them gives a reason instead of silence.
_OTHER_PRODUCTS = (torch.baddbmm, "baddbmm", torch.einsum, torch.functional.einsum)
_SOFTMAX_TARGETS = (F.softmax, torch.softmax, "softmax")
_ADD_TARGETS = (torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__")
_MUL_TARGETS = (torch.mul, torch.multiply, operator.mul, "mul", "__mul__", "__rmul__")
_MUL_INPLACE_TARGETS = (operator.imul, "mul_")
_DIV_TARGETS = (torch.div, torch.true_divide, operator.truediv, "div", "__truediv__")
_DIV_INPLACE_TARGETS = (operator.itruediv, "div_")
_FILL_TARGETS = (torch.masked_fill, "masked_fill", "masked_fill_", torch.where, "where")
_TANH_TARGETS = (torch.tanh, F.tanh, "tanh")
_CAT_TARGETS = (torch.cat, torch.concat, torch.concatenate)
_SUB_TARGETS = (torch.sub, operator.sub, "sub")
_DROPOUT_TARGETS = (F.dropout, torch.dropout)
_MAX_DEPTH = 10  # nodes between product and softmax; bounds the search where both sides of an addition are tried


def recognize(node: Node) -> Attention | Declined | None:
    """Recognize the attention around one softmax over the last dimension of scores `[B, Hq, R, T]`."""
    if not is_op(node, *_SOFTMAX_TARGETS) or not _over_last_dim(node):
        return None
    scores_node = argument(node, 0, "input")
    if not isinstance(scores_node, Node):
        return None
    scores = _walk_scores(scores_node, node)
    probabilities = _walk_probabilities(node)
    if scores is None or probabilities is None:
        return None  # no product on both sides: a router or a classifier, not attention
    output = probabilities.product

    def decline(reason: str) -> Declined:
        return Declined(output.name, "canonicalize", reason)

    for problem in (scores.problem, probabilities.problem):
        if problem is not None:
            return decline(problem)
    query, key_transposed = (argument(scores.product, i, name) for i, name in enumerate(("input", "other")))
    value = argument(output, 1, "other")
    for name, operand in (("query", query), ("key", key_transposed), ("value", value)):
        if rank(operand) != 4:
            return decline(f"{name} has {rank(operand)} dimensions; only [batch, heads, tokens, head_dim] is supported")
    query, query_scale, query_nodes = _strip_scale(query, scores.product)
    key_side = _strip_key(key_transposed, scores.product)
    if key_side is None:
        return decline("the key operand is not a transposed [batch, heads, tokens, head_dim] tensor")
    key, key_scale, key_nodes = key_side
    if not same_kind(output, query):
        return decline("the output does not have the dtype of the query")
    if scores.mask is not None:
        mask = fake(scores.mask)
        if mask is None or not mask.dtype.is_floating_point or mask.dim() > 4:
            return decline(f"the term `{scores.mask.name}` added to the scores is not a floating point mask")
    idiom = {*query_nodes, *key_nodes, scores.product, *scores.nodes, node, *probabilities.nodes, output}
    return Attention(
        output=output,
        nodes=tuple(sorted(idiom)),
        query=query,
        key=key,
        value=value,
        terms=() if scores.mask is None else (ScoreTerm("add", scores.mask),),
        scale=scores.scale * query_scale * key_scale,
        is_causal=False,
        enable_gqa=False,
        form="eager",
    )


def _over_last_dim(softmax: Node) -> bool:
    dim = argument(softmax, 1, "dim")
    dims = rank(softmax)
    return isinstance(dim, int) and (dim == -1 or (dims is not None and dim == dims - 1))


@dataclass
class _Scores:
    """The way back from the softmax to the first product."""

    product: Node
    scale: float = 1.0
    mask: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    problem: str | None = None


@dataclass
class _Probabilities:
    """The way on from the softmax to the second product."""

    product: Node
    nodes: list[Node] = field(default_factory=list)
    problem: str | None = None


def _only_user(node: Node, user: Node, what: str) -> str | None:
    """A problem if anything but `user` reads `node`."""
    others = [other for other in node.users if other is not user]
    if not others:
        return None
    if output_positions(node):
        return f"the attention {what} are returned by the graph; call the model without output_attentions"
    return f"the attention {what} are also read by {names(others)}"


def _walk_scores(node: Node, user: Node, depth: int = 0) -> _Scores | None:
    """Walk back from `node`, which `user` reads, to the product; None if there is none."""
    if depth > _MAX_DEPTH:
        return None
    if is_op(node, *MATMUL_TARGETS):
        return _Scores(node, problem=_only_user(node, user, "scores"))
    if is_op(node, *_OTHER_PRODUCTS):
        return _Scores(node, problem=f"`{node.name}` computes the scores in a form that is not supported yet")
    step = _score_step(node, depth + 1)
    if step is None:
        return None
    found, own_problem = step
    problem = _only_user(node, user, "scores")
    found.nodes.append(node)
    found.problem = found.problem or problem or own_problem
    return found


def _score_step(node: Node, depth: int) -> tuple[_Scores, str | None] | None:
    """One step of the walk: what lies before `node`, changed by what `node` does, and a problem with `node`."""
    first = argument(node, 0, "input")
    scale = _scalar_factor(node, inplace=True)
    if scale is not None:
        tensor, factor = scale
        found = _walk_scores(tensor, node, depth)
        if found is None:
            return None
        if found.mask is not None:
            return found, f"`{node.name}` scales the mask together with the scores"
        found.scale *= factor
        return found, None
    if is_op(node, *_ADD_TARGETS):
        return _add_step(node, depth)
    if is_op(node, *_MUL_TARGETS, *_MUL_INPLACE_TARGETS, *_DIV_TARGETS, *_DIV_INPLACE_TARGETS):
        return _stop(node, depth, f"the scores are scaled by `{node.name}`, which is not a plain number")
    if is_op(node, *_FILL_TARGETS):
        return _stop(node, depth, f"masking by `{node.name}` (masked_fill or where) is not supported yet")
    if is_op(node, *_TANH_TARGETS):
        return _stop(node, depth, "the scores are soft-capped (tanh), which is not supported yet")
    if is_op(node, *_CAT_TARGETS):
        return _stop(node, depth, "a sink column is concatenated to the scores, which is not supported yet")
    if is_op(node, *_SUB_TARGETS):
        return _stop(node, depth, f"`{node.name}` subtracts something from the scores, which is not supported yet")
    if isinstance(first, Node) and is_noop_cast(node):
        found = _walk_scores(first, node, depth)
        return None if found is None else (found, None)
    if isinstance(first, Node) and is_cast(node):
        return _stop(node, depth, f"the scores are cast by `{node.name}` before softmax; use `softmax(..., dtype=...)`")
    if view_input(node) is not None:
        return _stop(node, depth, f"`{node.name}` reshapes or slices the scores before the softmax")
    return None


def _stop(node: Node, depth: int, problem: str) -> tuple[_Scores, str] | None:
    """Go on from a node that is not supported, only to learn whether a product lies before it."""
    inputs = [value for value in node.all_input_nodes if rank(value) is not None]
    for value in inputs:
        found = _walk_scores(value, node, depth)
        if found is not None:
            found.problem = found.problem if is_op(node, *_SUB_TARGETS) and found.problem else problem
            return found, problem
    return None


def _add_step(node: Node, depth: int) -> tuple[_Scores, str | None] | None:
    """An addition: one side leads to the product, the other is the mask."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    sides = [(a, b) for a, b in ((left, right), (right, left)) if isinstance(a, Node)]
    walked = [(found, other) for a, other in sides if (found := _walk_scores(a, node, depth)) is not None]
    if not walked:
        return None
    found, mask = walked[0]
    if len(walked) == 2:
        return found, f"`{node.name}` adds two products; scores with a second term are not supported yet"
    if not isinstance(mask, Node) or rank(mask) is None or node.kwargs.get("alpha", 1) != 1:
        return found, f"`{node.name}` adds something to the scores that is not a mask tensor"
    if found.mask is not None:
        return found, "two terms are added to the scores (a mask and a position bias); add them up before"
    found.mask = mask
    return found, None


def _scalar_factor(node: Node, *, inplace: bool) -> tuple[Node, float] | None:
    """`(x, s)` if `node` is `x * s` or `x / s` for a plain number s that keeps the dtype of x."""
    mul = _MUL_TARGETS + (_MUL_INPLACE_TARGETS if inplace else ())
    div = _DIV_TARGETS + (_DIV_INPLACE_TARGETS if inplace else ())
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if is_op(node, *mul):
        tensor, factor = (left, as_number(right)) if as_number(right) is not None else (right, as_number(left))
    elif is_op(node, *div) and "rounding_mode" not in node.kwargs:
        divisor = as_number(right)
        tensor, factor = left, (1.0 / divisor if divisor else None)
    else:
        return None
    if not isinstance(tensor, Node) or factor is None or not same_kind(tensor, node):
        return None
    return tensor, float(factor)


def _walk_probabilities(softmax: Node) -> _Probabilities | None:
    """Walk on from the softmax to the product with the values; None if there is none."""
    nodes: list[Node] = []
    problem: str | None = None
    node = softmax
    while True:
        following = [(user, why) for user in node.users if (why := _probability_step(node, user)) is not None]
        if not following:
            return None
        product = next((pair for pair in following if _is_product(node, pair[0])), None)
        user, why = product or following[0]
        problem = problem or _only_user(node, user, "probabilities") or (why or None)
        if product is not None:
            return _Probabilities(user, nodes, problem)
        nodes.append(user)
        node = user


def _is_product(node: Node, user: Node) -> bool:
    return is_op(user, *MATMUL_TARGETS, *_OTHER_PRODUCTS) and node in user.all_input_nodes


def _probability_step(node: Node, user: Node) -> str | None:
    """Whether `user` may stand between the softmax and the values: None no, "" yes, else a problem."""
    if is_op(user, *MATMUL_TARGETS):
        is_left = argument(user, 0, "input") is node and argument(user, 1, "other") is not node
        return "" if is_left else "the probabilities are the right side of the product with the values"
    if is_op(user, *_OTHER_PRODUCTS):
        return f"`{user.name}` multiplies with the values in a form that is not supported yet"
    if is_op(user, *_DROPOUT_TARGETS):
        return _dropout_problem(user)
    if user.op not in ("call_function", "call_method") or view_input(user) is not node:
        return None
    if is_noop_cast(user) or is_cast(user):
        return ""  # back to the dtype of the values; the product checks that they agree
    return f"`{user.name}` slices or reshapes the probabilities (attention sinks do); this is not supported yet"


def _dropout_problem(user: Node) -> str:
    p = argument(user, 1, "p", 0.5)
    training = argument(user, 2, "train" if is_op(user, torch.dropout) else "training", True)
    if training is False or as_number(p) == 0:
        return ""
    return f"dropout with p={p} changes the output at random; call `model.eval()`"


def _strip_scale(node: Node, user: Node) -> tuple[Node, float, list[Node]]:
    """The operand behind `operand * number`, the number, and the nodes stripped, if only `user` reads them."""
    scale = _scalar_factor(node, inplace=False)
    if scale is None or set(node.users) != {user}:
        return node, 1.0, []
    return scale[0], scale[1], [node]


def _strip_key(node: Node, user: Node) -> tuple[Node, float, list[Node]] | None:
    """Strip the transpose, and a scalar factor before or after it, from the key operand `[B, H, D, T]`."""
    node, outer, nodes = _strip_scale(node, user)
    user = nodes[-1] if nodes else user
    while is_noop_cast(node) and set(node.users) == {user}:
        nodes.append(node)
        user, node = node, node.all_input_nodes[0]
    if not is_key_transpose(node):
        return None
    if set(node.users) != {user}:
        return None
    nodes.append(node)
    key, inner, inner_nodes = _strip_scale(node.all_input_nodes[0], node)
    return key, outer * inner, nodes + inner_nodes
