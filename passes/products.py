"""The two products of attention written out: matmul, bmm, baddbmm and einsum, all seen as one labelled contraction."""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass

import torch
from torch.fx import Node

from mikv_compile.passes.constants import constant
from mikv_compile.passes.node_utils import argument, fake, operation, rank, same_kind, same_shape, writes_in_place
from mikv_compile.passes.views import is_cast, op_name, permutation, view_input

PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "einsum")
MATMUL_TARGETS = (torch.matmul, torch.bmm, operator.matmul, torch.Tensor.matmul, "matmul", "__matmul__", "bmm")
_MAX_VIEWS = 6  # copies and reshapes between a transpose and the product that the decompositions put there


@dataclass(eq=False)
class Operand:
    """A factor of a product: its node, a letter for each dimension, and the nodes stripped from it."""

    node: Node
    letters: str
    nodes: tuple[Node, ...] = ()
    scale: float = 1.0


@dataclass
class Product:
    """`left` times `right`, summed over the letters that `letters` lacks; `alpha * product + beta * bias`."""

    node: Node
    left: Operand
    right: Operand
    letters: str
    """The dimensions of the result."""
    alpha: float = 1.0
    bias: Node | None = None
    beta: float = 1.0


def read_product(node: Node) -> Product | str | None:
    """The product that a node computes, a problem with it, or None if it is no product of two tensors."""
    name = operation(node)
    if name not in PRODUCTS:
        return None
    if node.kwargs.get("out") is not None:
        return f"`{node.name}` writes its result into another tensor (`out=`)"
    if name == "einsum":
        return _read_einsum(node)
    if name == "baddbmm":
        return _read_baddbmm(node)
    left, right = argument(node, 0, "input"), argument(node, 1, "mat2" if name in ("bmm", "mm") else "other")
    return _labelled(node, left, right)


def _labelled(node: Node, left: object, right: object) -> Product | None:
    """Matrix product: the last two dimensions are multiplied, those before are shared and may broadcast."""
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    left_rank, right_rank, count = rank(left), rank(right), rank(node)
    if left_rank is None or right_rank is None or count is None or min(left_rank, right_rank) < 2:
        return None
    batch = string.ascii_lowercase[: count - 2]
    return Product(
        node,
        Operand(left, batch[count - left_rank :] + "xy"),
        Operand(right, batch[count - right_rank :] + "yz"),
        batch + "xz",
    )


def _read_baddbmm(node: Node) -> Product | str | None:
    left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    product = _labelled(node, left, right)
    alpha, beta = constant(node.kwargs.get("alpha", 1)), constant(node.kwargs.get("beta", 1))
    if product is None:
        return None
    if alpha is None or beta is None:
        return f"alpha and beta of `{node.name}` are not plain numbers"
    product.alpha, product.beta = alpha, beta
    bias = argument(node, 0, "input")
    if beta != 0 and constant(bias) != 0:
        product.bias = bias
    return product


def _read_einsum(node: Node) -> Product | str | None:
    """An einsum of two tensors; an ellipsis stands for dimensions that both may share."""
    equation, operands = argument(node, 0, "equation"), list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or any(rank(x) is None for x in operands):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    spread = [
        rank(x) - len(term.replace("...", "")) if "..." in term else 0  # type: ignore[operator]
        for x, term in zip(operands, terms, strict=True)
    ]
    free = [letter for letter in string.ascii_letters if letter not in equation]
    most = max(spread)
    shared = "".join(free[:most])
    terms = [term.replace("...", shared[most - count :]) for term, count in zip(terms, spread, strict=True)]
    if not arrow:
        letters = "".join(terms).replace(shared, "") if shared else "".join(terms)
        result = ("..." if shared else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    result = result.replace("...", shared)
    if any(len(set(term)) != len(term) for term in (*terms, result)):
        return f"`{node.name}` takes a diagonal"
    left, right = (Operand(x, term) for x, term in zip(operands, terms, strict=True) if isinstance(x, Node))
    return Product(node, left, right, result)


def scalar_factor(node: Node) -> tuple[Node, float] | None:
    """`(x, s)` if `node` is `x * s` or `x / s` for a number s, in the shape and dtype of x, and a new tensor."""
    name = operation(node)
    if name not in ("mul", "div") or node.kwargs.get("rounding_mode") is not None or writes_in_place(node):
        return None
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    tensor, factor = left, constant(right)
    if name == "mul" and (factor is None or not isinstance(left, Node)):
        tensor, factor = right, constant(left)
    if factor is None or not factor or not isinstance(tensor, Node) or rank(tensor) in (None, 0):
        return None
    if not same_kind(tensor, node) or not same_shape(tensor, node):
        return None
    return tensor, 1 / factor if name == "div" else factor


def is_upcast(node: Node) -> bool:
    """Whether a node casts to a floating point type that holds every value of the source's."""
    source = view_input(node)
    if source is None or not (is_cast(node) or op_name(node) == "to"):
        return False
    before, after = fake(source), fake(node)
    if before is None or after is None or before.device != after.device:
        return False
    return before.dtype == after.dtype or widens(before.dtype, after.dtype)


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every value of a floating point type is exact in another, wider one."""
    if not before.is_floating_point or not after.is_floating_point:
        return False
    return torch.finfo(after).bits > torch.finfo(before).bits


def strip_factors(operand: Operand, user: Node, *, factors: bool = True) -> Operand:
    """Take upcasts, and plain factors if wanted, off an operand, as long as nothing else reads them."""
    node, nodes, scale = operand.node, list(operand.nodes), operand.scale
    user = nodes[-1] if nodes else user
    while set(node.users) == {user}:
        factor = scalar_factor(node) if factors else None
        source = view_input(node)
        if factor is not None:
            following, scale = factor[0], scale * factor[1]
        elif source is not None and is_upcast(node):
            following = source
        else:
            break
        nodes.append(node)
        user, node = node, following
    return Operand(node, operand.letters, tuple(nodes), scale)


def strip_transpose(operand: Operand, user: Node) -> Operand:
    """Take the last transpose, and copies and no-op expands behind it, off an operand that only `user` reads."""
    node, nodes = operand.node, list(operand.nodes)
    user = nodes[-1] if nodes else user
    for _ in range(_MAX_VIEWS):
        source = view_input(node)
        if source is None or set(node.users) != {user}:
            return operand
        nodes.append(node)
        order = permutation(node)
        if order is not None:
            letters = [""] * len(order)
            for place, letter in zip(order, operand.letters, strict=True):
                letters[place] = letter
            return Operand(source, "".join(letters), tuple(nodes), operand.scale)
        if not (same_shape(node, source) and same_kind(node, source)) or op_name(node) == "getitem":
            return operand
        user, node = node, source
    return operand
