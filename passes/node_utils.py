"""Small questions about one FX node, used by all recognizers."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from mikv_compile._compat import statically_known_true

_METADATA_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "__len__"})
_METADATA_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
_METADATA_FUNCTIONS = (torch.numel, builtins.len)
_INPLACE_OPERATORS = tuple(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
)


# One name for operations that torch spells in several ways; in-place forms lose their underscore.
_SAME_OPERATION = {
    "iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "truediv": "div", "itruediv": "div", "true_divide": "div", "divide": "div", "rtruediv": "rdiv",
    "concat": "cat", "concatenate": "cat", "special_softmax": "softmax", "negative": "neg", "clip": "clamp",
}  # fmt: skip
# Operations whose functions in torch, torch.nn.functional and operator are told by name; views have their own table.
_OPERATIONS = (
    "matmul", "mm", "bmm", "baddbmm", "einsum", "softmax", "scaled_dot_product_attention", "add", "sub", "rsub",
    "mul", "div", "truediv", "true_divide", "multiply", "subtract", "divide", "neg", "negative", "tanh",
    "masked_fill", "where", "cat", "concat", "concatenate", "max", "maximum", "amax", "clamp", "clamp_min",
    "clip", "dropout", "iadd", "isub", "imul", "itruediv", "full", "full_like", "zeros", "zeros_like", "ones",
    "ones_like", "scalar_tensor", "tensor", "pow", "exp", "log", "relu", "sigmoid", "abs", "nan_to_num", "pad",
    "narrow", "detach", "getitem", "topk", "scatter", "index_fill", "masked_scatter", "softplus",
    "index_copy", "index_put", "slice_scatter", "roll", "setitem",
)  # fmt: skip
_FUNCTIONS = {
    function: _SAME_OPERATION.get(name, name)
    for module in (torch, F, operator)
    for name in _OPERATIONS
    if (function := getattr(module, name, None)) is not None and callable(function)
}
_FUNCTIONS.update({torch.special.softmax: "softmax", torch.Tensor.matmul: "matmul"})


_ATEN_TYPES = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))


def aten_name(target: object) -> str | None:
    """`softmax` for `torch.ops.aten.softmax.int` and `torch.ops.aten.softmax`; None for everything else."""
    if not isinstance(target, _ATEN_TYPES):
        return None
    namespace, name = str(target).split(".")[:2]
    return name if namespace == "aten" else None


def operation(node: object) -> str | None:
    """The name of what a node calls, the same for a method, a function, an operator, their in-place forms and ATen.

    None for calls of anything that is not torch's own.
    """
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.op == "call_method":
        name: str | None = str(node.target)
        if name.startswith("__") and name.endswith("__"):  # type: ignore[union-attr]
            name = name[2:-2]  # type: ignore[index]
    else:
        name = aten_name(node.target)
    if name is not None:
        name = name if name.startswith("_") or not name.endswith("_") else name[:-1]
        return _SAME_OPERATION.get(name, name)
    try:
        return _FUNCTIONS.get(node.target)  # type: ignore[call-overload]
    except TypeError:  # a target that cannot be hashed
        return None


def is_op(node: object, *targets: object) -> bool:
    """Whether `node` calls one of `targets`: functions, or method names given as strings.

    An ATen overload counts as the function or method of its name.
    """
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    name = aten_name(node.target)
    if name is not None:
        return any(target in (name, node.target) or getattr(target, "__name__", None) == name for target in targets)
    wanted_type_is_str = node.op == "call_method"
    return any(isinstance(target, str) == wanted_type_is_str and node.target == target for target in targets)


def is_attribute(node: object, name: str) -> bool:
    """Whether `node` is `getattr(tensor, name)`."""
    return is_op(node, builtins.getattr) and len(node.args) > 1 and node.args[1] == name  # type: ignore[attr-defined]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """The argument of a call, given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def var_arguments(node: Node, name: str) -> tuple[Any, ...]:
    """The arguments after the tensor of `x.f(1, 2)`, `x.f((1, 2))` or `x.f(name=(1, 2))`."""
    rest = node.args[1:] or (node.kwargs.get(name, ()),)
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        return tuple(rest[0])
    return tuple(rest)


def fake(node: object) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value, or None if the node holds no tensor or is unknown."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def value_of(item: object) -> Any:
    """The (maybe symbolic or fake) value behind an argument of a node."""
    return item.meta.get("example_value", item.meta.get("val")) if isinstance(item, Node) else item


def shape_of(node: object) -> tuple[Any, ...] | None:
    """The (maybe symbolic) shape of a node's value, or None."""
    value = fake(node)
    return None if value is None else tuple(value.shape)


def rank(node: object) -> int | None:
    """The number of dimensions of a node's value, or None."""
    value = fake(node)
    return None if value is None else value.dim()


def is_number(value: object) -> bool:
    """Whether `value` is a plain Python number: not a bool, not symbolic, not a node."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value: object) -> int | float | None:
    """The number that a plain number or a symbolic float of the graph is, otherwise None.

    Dynamo makes a float attribute symbolic once it has seen two values of it, as in two models of one class. A scale is
    a constant of the model, so it is guarded on: another value compiles another graph.
    """
    if is_number(value):
        return value  # type: ignore[return-value]
    symbolic = value.meta.get("example_value") if isinstance(value, Node) else None
    return symbolic.node.guard_float("", 0) if isinstance(symbolic, torch.SymFloat) else None


def known_equal(a: Any, b: Any) -> bool:
    """Whether two maybe symbolic sizes are equal for sure; adds no guard."""
    return statically_known_true(a == b)


def known_different(a: Any, b: Any) -> bool:
    """Whether two maybe symbolic sizes differ for sure; adds no guard."""
    return statically_known_true(a != b)


def same_shape(a: Node, b: Node) -> bool:
    """Whether the values of two nodes have the same shape for sure."""
    left, right = shape_of(a), shape_of(b)
    return (
        left is not None
        and right is not None
        and len(left) == len(right)
        and all(known_equal(x, y) for x, y in zip(left, right, strict=True))
    )


def same_kind(a: Node, b: Node) -> bool:
    """Whether the values of two nodes have the same dtype and device."""
    left, right = fake(a), fake(b)
    return left is not None and right is not None and left.dtype == right.dtype and left.device == right.device


def is_metadata(node: Node) -> bool:
    """Whether a node reads the size, dtype or device of a tensor, and not its values."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    if is_op(node, *_METADATA_FUNCTIONS):
        return True
    return any(is_attribute(node, name) for name in _METADATA_ATTRIBUTES)


def writes_in_place(node: Node) -> bool:
    """Whether a node changes one of its arguments; errs on the side of True."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None and node.op == "call_function":
        return bool(schema.is_mutable)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return is_op(node, *_INPLACE_OPERATORS) or (
        node.op in ("call_method", "call_function")
        and isinstance(name, str)
        and name.endswith("_")
        and not name.endswith("__")
    )


def output_values(graph: Graph) -> tuple[Any, ...]:
    """The graph's flat output tuple; empty if the graph returns something else."""
    values = graph.output_node().args[0]
    return tuple(values) if isinstance(values, tuple | list) else ()


def output_positions(node: Node) -> tuple[int, ...]:
    """Where a node's value appears in its graph's output tuple."""
    return tuple(i for i, value in enumerate(output_values(node.graph)) if value is node)


def source_name(node: Node | None) -> str | None:
    """Where Dynamo found a placeholder's value, such as `L['past'].layers[0].keys`; None if unknown."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", None)
    if callable(name):  # a method up to torch 2.9, a property since
        name = name()
    return name if isinstance(name, str) else None


def names(nodes: Iterable[Node]) -> str:
    """Node names for a message: `a`, `b`."""
    return ", ".join(f"`{node.name}`" for node in nodes)
