"""Numbers that a graph holds for sure: Python numbers, and tensors whose elements are all one constant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import argument, as_number, is_number, operation, writes_in_place
from mikv_compile.passes.views import op_name, view_input

_MAX_DEPTH = 8
# Attributes in which make_fx and export put the constants that a function made with torch.tensor.
_LIFTED = ("_tensor_constant", "lifted_tensor_")


def constant(value: object, depth: int = 0) -> float | None:
    """The number that every element of `value` is, a Python number, a symbolic float or a tensor; None if unknown."""
    number = as_number(value)
    if number is not None or not isinstance(value, Node) or depth > _MAX_DEPTH:
        return None if number is None else float(number)
    if value.op == "get_attr":
        return _lifted(value)
    if any(user.op != "output" and _writes(user, value) for user in value.users):
        return None
    name = operation(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0
    if name in ("full", "full_like"):
        return constant(argument(value, 1, "fill_value"), depth + 1)
    if name == "new_full":
        return constant(argument(value, 2, "fill_value"), depth + 1)
    if name in ("tensor", "scalar_tensor"):
        data = argument(value, 0, "data", value.kwargs.get("s"))
        return float(data) if is_number(data) else None
    if name == "neg":
        inner = constant(argument(value, 0, "input"), depth + 1)
        return None if inner is None else -inner
    if name in ("lift_fresh_copy", "detach") or (
        op_name(value) not in (None, "getitem") and view_input(value) is not None
    ):
        return _rounded(constant(argument(value, 0, "input"), depth + 1), value)
    return None


def _writes(user: Node, value: Node) -> bool:
    """Whether `user` may change the constant `value` in place."""
    return writes_in_place(user) and user.args[:1] == (value,) and operation(user) != "detach"


def _rounded(number: float | None, node: Node) -> float | None:
    """A number after a cast: only if it stays what it was, or infinite."""
    dtype = getattr(node.meta.get("example_value", node.meta.get("val")), "dtype", None)
    if number is None or dtype is None:
        return None
    stored = torch.tensor(number, dtype=dtype).item()
    return float(stored) if stored == number or math.isinf(stored) else None


def _lifted(node: Node) -> float | None:
    """The value of a scalar constant that the tracer put on the module."""
    owner: Any = node.graph.owning_module
    target = str(node.target)
    if owner is None or not target.startswith(_LIFTED):
        return None
    value = getattr(owner, target, None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dtype == torch.bool:
        return None
    try:
        return float(value.item())
    except Exception:  # a fake tensor has no value
        return None
