"""Walk back from an attention operand to the cached tensor it shows, and prove which element is where.

Every dimension of a view is written as a product of axes of the cached tensor `[B, H, T, D]` and of repeats, outermost
first. `x[:, :, None].expand(B, H, n, T, D).reshape(B, H * n, T, D)` gives `(B) (H, n) (T) (D)`: each head n times in a
row, while `x.repeat(1, n, 1, 1)` gives `(B) (n, H) (T) (D)`. Axes of size 1 hold no information and are left out.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import (
    argument,
    aten_name,
    fake,
    is_attribute,
    is_number,
    known_equal,
    same_kind,
    shape_of,
    var_arguments,
)

_COPIES = {"contiguous", "clone", "detach", "alias"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_EXPANDS = {"expand", "expand_as", "broadcast_to"}
_RESHAPES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
_OTHERS = {"t", "unsqueeze", "squeeze", "permute", "repeat", "repeat_interleave"}
_METHODS = _COPIES | _CASTS | _EXPANDS | _RESHAPES | _SWAPS | _OTHERS
_ATEN_NAMES = {"_unsafe_view": "view", "_to_copy": "to", "lift_fresh": "alias"}
_FUNCTIONS = {getattr(torch, name): name for name in sorted(_METHODS) if callable(getattr(torch, name, None))}


@dataclass(frozen=True, eq=False)  # compared by identity: comparing symbolic sizes would add guards
class Axis:
    """One factor of a dimension: an axis of the cached tensor ("B", "H", "T", "D") or a repeat ("repeat")."""

    name: str
    size: Any


Layout = tuple[tuple[Axis, ...], ...]


class NotAView(Exception):
    """The walk met something that is not a plain view; the message says what."""


@dataclass(frozen=True)
class ViewPath:
    """An operand `[B, H * repeats, T, D]` shown to be the cached tensor `source` `[B, H, T, D]`, heads interleaved."""

    source: Node
    repeats: int
    views: tuple[Node, ...]
    """The nodes between, in graph order."""


def op_name(node: Node) -> str | None:
    """The name of a tensor method, however it is spelled; None for anything this module does not know."""
    if node.op == "call_method":
        return node.target if node.target in _METHODS else None  # type: ignore[return-value]
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return "getitem"
    if node.target is builtins.getattr:
        return "mT" if is_attribute(node, "mT") else None
    aten = aten_name(node.target)
    if aten is not None:
        aten = _ATEN_NAMES.get(aten, aten)
        return aten if aten in _METHODS | {"mT"} else None
    try:
        return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    except TypeError:  # a target that cannot be hashed
        return None


def view_input(node: Node) -> Node | None:
    """The tensor that `node` is a view, a plain copy or a cast of; None if it computes something."""
    if op_name(node) is None:
        return None
    source = argument(node, 0, "input", node.kwargs.get("self"))
    return source if isinstance(source, Node) and fake(source) is not None else None


def is_noop_cast(node: Node) -> bool:
    """Whether a node copies or casts a tensor and changes neither shape nor dtype nor device."""
    name = op_name(node)
    source = view_input(node)
    return source is not None and name in _COPIES | _CASTS and same_kind(node, source)


def is_cast(node: Node) -> bool:
    """Whether a node is a `to`, `type_as`, `float`, ... of any kind."""
    return view_input(node) is not None and op_name(node) in _CASTS


def permutation(node: object) -> tuple[int, ...] | None:
    """The order of dimensions that a transpose or permute of any spelling makes; None if it is something else."""
    if not isinstance(node, Node) or op_name(node) not in _SWAPS | {"permute", "mT", "t"}:
        return None
    source = view_input(node)
    shape = shape_of(source)
    if shape is None or len(shape) < 2:
        return None
    order: Layout = tuple((Axis(str(i), 2),) for i in range(len(shape)))
    try:
        return tuple(int(dim[0].name) for dim in _apply(node, order, shape, shape))
    except NotAView:
        return None


def trace_to_source(operand: Node, sources: Container[Node]) -> ViewPath:
    """Walk back from `operand` `[B, H * n, T, D]` to one of `sources` `[B, H, T, D]`.

    Raises `NotAView` if anything but views, plain copies and interleaved head repeats lies between.
    """
    path: list[Node] = []
    node = operand
    while node not in sources:
        source = view_input(node)
        if source is None:
            raise NotAView(f"it comes from `{node.name}`, which is not a recognized cache update or a view of one")
        if not same_kind(node, source):
            raise NotAView(f"it goes through the cast `{node.name}` ({_kind(source)} to {_kind(node)})")
        path.append(node)
        node = source
    path.reverse()
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        raise NotAView(f"`{node.name}` is not a 4-D tensor")
    layout: Layout = tuple(_axes(name, size) for name, size in zip("BHTD", shape, strict=True))
    start = layout
    for view in path:
        layout = _apply(view, layout, shape_of(view_input(view)), shape_of(view))
    return ViewPath(node, _head_repeats(start, layout), tuple(path))


def _kind(node: Node) -> str:
    value = fake(node)
    return "unknown" if value is None else f"{value.dtype} on {value.device}".removeprefix("torch.")


def _axes(name: str, size: Any) -> tuple[Axis, ...]:
    """One axis as a dimension; nothing if its size is 1 for sure."""
    return () if known_equal(size, 1) else (Axis(name, size),)


def _repeat(count: Any, node: Node) -> tuple[Axis, ...]:
    if isinstance(count, bool) or not isinstance(count, int):
        raise NotAView(f"`{node.name}` repeats a number of times that is not a constant")
    return _axes("repeat", count)


def _head_repeats(start: Layout, layout: Layout) -> int:
    """How often each head stands in a row if `layout` is `start` with interleaved heads; raises otherwise."""
    if len(layout) != 4 or any(layout[i] != start[i] for i in (0, 2, 3)):
        raise NotAView("its dimensions are not [batch, heads, tokens, head_dim] of the cache after the views between")
    heads = layout[1]
    if start[1]:
        if start[1][0] in heads[1:] and all(axis.name == "repeat" for axis in heads if axis != start[1][0]):
            raise NotAView("the heads are tiled (0 1 0 1), not repeated in a row (0 0 1 1); use repeat_interleave")
        if heads[:1] != start[1]:
            raise NotAView("its head dimension does not hold the heads of the cache")
        heads = heads[1:]
    if any(axis.name != "repeat" for axis in heads):
        raise NotAView("its head dimension holds more than repeated heads of the cache")
    repeats = 1
    for axis in heads:
        repeats *= axis.size
    return repeats


def _apply(node: Node, layout: Layout, in_shape: Any, out_shape: Any) -> Layout:
    """The layout after one view; `in_shape` and `out_shape` are the shapes around it."""
    name = op_name(node)
    if name is None or in_shape is None or out_shape is None:
        raise NotAView(f"the shape of `{node.name}` is unknown")
    if name in _COPIES | _CASTS:
        return layout
    if name in _RESHAPES:
        return _regroup(node, layout, out_shape)
    if name in _EXPANDS:
        return _expand(node, layout, out_shape)
    dims = list(layout)
    if name == "getitem":
        return _index(node, layout, in_shape, out_shape)
    if name in ("mT", "t"):
        dims[-1], dims[-2] = dims[-2], dims[-1]
        return tuple(dims)
    if name in _SWAPS:
        names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
        a, b = (_dim(node, argument(node, i + 1, names[i]), len(dims)) for i in range(2))
        dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)
    if name == "permute":
        return tuple(dims[_dim(node, dim, len(dims))] for dim in var_arguments(node, "dims"))
    if name == "unsqueeze":
        dims.insert(_dim(node, argument(node, 1, "dim"), len(dims) + 1), ())
        return tuple(dims)
    if name == "squeeze":
        return _squeeze(node, layout)
    if name == "repeat":
        return _tile(node, layout)
    if name == "repeat_interleave":
        dim = _dim(node, argument(node, 2, "dim"), len(dims))
        dims[dim] = dims[dim] + _repeat(argument(node, 1, "repeats"), node)
        return tuple(dims)
    raise NotAView(f"`{node.name}` is not a supported view")


def _dim(node: Node, dim: Any, count: int) -> int:
    if not isinstance(dim, int):
        raise NotAView(f"`{node.name}` names no constant dimension")
    return dim % count


def _regroup(node: Node, layout: Layout, out_shape: tuple[Any, ...]) -> Layout:
    """The layout after view or reshape: the same axes in the same order, cut into other dimensions."""
    axes = [axis for dim in layout for axis in dim]
    result: list[tuple[Axis, ...]] = []
    for size in out_shape:
        taken: list[Axis] = []
        product: Any = 1
        while not known_equal(product, size):
            if not axes:
                raise NotAView(f"`{node.name}` cuts the dimensions of the cache in a way that cannot be followed")
            taken.append(axes.pop(0))
            product = product * taken[-1].size
        result.append(tuple(taken))
    if axes:
        raise NotAView(f"`{node.name}` cuts the dimensions of the cache in a way that cannot be followed")
    return tuple(result)


def _expand(node: Node, layout: Layout, out_shape: tuple[Any, ...]) -> Layout:
    """The layout after expand: new leading dimensions and dimensions of size 1 become repeats."""
    aligned = ((),) * (len(out_shape) - len(layout)) + layout
    return tuple(
        dim or (() if known_equal(size, 1) else _repeat(size, node))
        for dim, size in zip(aligned, out_shape, strict=True)
    )


def _tile(node: Node, layout: Layout) -> Layout:
    """The layout after `repeat`: copies of the whole dimension one after the other, so the repeat is outermost."""
    counts = var_arguments(node, "repeats")
    if len(counts) < len(layout):
        raise NotAView(f"the arguments of `{node.name}` cannot be followed")
    aligned = ((),) * (len(counts) - len(layout)) + layout
    return tuple(_repeat(count, node) + dim for count, dim in zip(counts, aligned, strict=True))


def _squeeze(node: Node, layout: Layout) -> Layout:
    dims = var_arguments(node, "dim")
    gone = {_dim(node, dim, len(layout)) for dim in dims} if dims else set(range(len(layout)))
    return tuple(dim for i, dim in enumerate(layout) if i not in gone or dim)


def _index(node: Node, layout: Layout, in_shape: tuple[Any, ...], out_shape: tuple[Any, ...]) -> Layout:
    """The layout after `x[:, None, ...]`: only whole dimensions and new ones can be followed."""
    index = argument(node, 1, "index")
    items = list(index) if isinstance(index, tuple | list) else [index]
    if sum(item is Ellipsis for item in items) > 1 or any(is_number(item) or isinstance(item, Node) for item in items):
        raise NotAView(f"`{node.name}` selects a part of the cache")
    missing = len(layout) - sum(isinstance(item, slice) for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * missing
    result: list[tuple[Axis, ...]] = []
    used = 0
    for item in items:
        if item is None:
            result.append(())
            continue
        if not isinstance(item, slice):
            raise NotAView(f"`{node.name}` indexes the cache with something else than slices")
        whole = item.step in (None, 1) and known_equal(in_shape[used], out_shape[len(result)])
        if not whole:
            raise NotAView(f"`{node.name}` takes only a slice of the cache")
        result.append(layout[used])
        used += 1
    return tuple(result)
