"""Walk back from an attention operand to the cached tensor it shows, and prove which element is where.

Every dimension of a view is written as a product of axes of the cached tensor `[B, H, T, D]` and of repeats, outermost
first. `x[:, :, None].expand(B, H, n, T, D).reshape(B, H * n, T, D)` gives `(B) (H, n) (T) (D)`: each head n times in a
row, while `x.repeat(1, n, 1, 1)` gives `(B) (n, H) (T) (D)`. Axes of size 1 hold no information and are left out.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Mapping
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
    value_of,
    var_arguments,
    writes_in_place,
)
from mikv_compile.passes.records import Dims

_COPIES = {"contiguous", "clone", "detach", "alias"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_EXPANDS = {"expand", "expand_as", "broadcast_to"}
_RESHAPES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
_OTHERS = {"t", "unsqueeze", "squeeze", "permute", "repeat", "repeat_interleave", "narrow", "slice"}
_METHODS = _COPIES | _CASTS | _EXPANDS | _RESHAPES | _SWAPS | _OTHERS
_ATEN_NAMES = {"_unsafe_view": "view", "_to_copy": "to", "lift_fresh": "alias"}
_FUNCTIONS = {getattr(torch, name): name for name in sorted(_METHODS) if callable(getattr(torch, name, None))}


@dataclass(frozen=True, eq=False)  # compared by identity: comparing symbolic sizes would add guards
class Axis:
    """One factor of a dimension: an axis of the cached tensor ("B", "H", "T", "D") or a repeat ("repeat")."""

    name: str
    size: Any
    stop: Any = None
    """Where a slice `[:stop]` of the tokens ends; None for all of them."""


Layout = tuple[tuple[Axis, ...], ...]


class NotAView(Exception):
    """The walk met something that is not a plain view; the message says what."""


@dataclass(frozen=True)
class ViewPath:
    """An operand shown to be a view of the cached tensor `source`, with what each of its dimensions holds."""

    source: Node
    layout: Layout
    views: tuple[Node, ...]
    """The nodes between, in graph order."""
    rows: Any
    """How many rows of the batch it shows: the first ones, in their order."""


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


def trace_to_source(operand: Node, sources: Mapping[Node, str]) -> ViewPath:
    """Walk back from `operand` to one of `sources`, cached tensors with their layouts, such as "BHTD".

    Raises `NotAView` if anything but views, plain copies and repeats lies between.
    """
    path: list[Node] = []
    node = operand
    while node not in sources:
        source = view_input(node)
        if source is None and node.op == "placeholder":
            if in_place_writers(node):
                raise NotAView(f"it comes from the input `{node.name}`, which is written in a way that is not known")
            why = "which this graph only reads; compile the call that fills it as well"
            raise NotAView(f"it comes from the input `{node.name}`, {why}")
        if source is None:
            raise NotAView(f"it comes from `{node.name}`, which is not a recognized cache update or a view of one")
        if not same_kind(node, source):
            raise NotAView(f"it goes through the cast `{node.name}` ({_kind(source)} to {_kind(node)})")
        path.append(node)
        node = source
    path.reverse()
    shape = shape_of(node)
    if shape is None or len(shape) != len(sources[node]):
        raise NotAView(f"the shape of `{node.name}` is unknown")
    layout: Layout = tuple(_axes(name, size) for name, size in zip(sources[node], shape, strict=True))
    for view in path:
        layout = _apply(view, layout, shape_of(view_input(view)), shape_of(view))
    rows = next((axis.size for dim in layout for axis in dim if axis.name == "B"), 1)
    return ViewPath(node, layout, tuple(path), rows)


def match_dims(layout: Layout, dims: Dims) -> tuple[int, Axis | None]:
    """How often each head of the cache is repeated in an operand whose dimensions should be `dims`, and its tokens.

    The letters are those of :data:`~mikv_compile.passes.records.Dims`. Heads must be interleaved: `kg` holds each KV
    head several times in a row. The axis of the tokens is None if there is one token for sure.

    Raises:
        NotAView: if the dimensions hold something else.
    """
    if len(layout) != len(dims):
        raise NotAView(f"it has {len(layout)} dimensions instead of {len(dims)}")
    repeats, tokens = 1, None
    for axes, letters in zip(layout, dims, strict=True):
        left = list(axes)
        if "k" in letters and any(axis.name == "H" for axis in axes) and letters[0] == "k" and axes[0].name != "H":
            raise NotAView("the heads are tiled (0 1 0 1), not repeated in a row (0 0 1 1); use repeat_interleave")
        for letter in letters:
            wanted = {"b": "B", "k": "H", "t": "T", "d": "D"}.get(letter)
            if wanted is not None and left and left[0].name == wanted:
                axis = left.pop(0)
                tokens = axis if wanted == "T" else tokens
            while letter == "g" and left and left[0].name == "repeat":
                repeats *= left.pop(0).size
        if left:
            held = " x ".join(axis.name for axis in axes)
            raise NotAView(f"after the views between, the dimension for {letters!r} holds {held} of the cache")
    return repeats, tokens


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
    if name in ("narrow", "slice"):
        return _narrow(node, layout, in_shape, out_shape)
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
        if item.step in (None, 1) and known_equal(in_shape[used], out_shape[len(result)]):
            result.append(layout[used])
        else:
            result.append(_prefix(node, item, layout[used], out_shape[len(result)]))
        used += 1
    return tuple(result)


def _narrow(node: Node, layout: Layout, in_shape: tuple[Any, ...], out_shape: tuple[Any, ...]) -> Layout:
    """The layout after `x.narrow(dim, 0, length)`, and after ATen's `slice(x, dim, 0, stop)`."""
    dim = _dim(node, argument(node, 1, "dim", 0), len(layout))
    result = list(layout)
    if not known_equal(in_shape[dim], out_shape[dim]):
        result[dim] = _prefix(node, slice(argument(node, 2, "start"), None), layout[dim], out_shape[dim])
    return tuple(result)


def _prefix(node: Node, item: slice, axes: tuple[Axis, ...], size: Any) -> tuple[Axis, ...]:
    """The dimension after `[:stop]` of the tokens or of the batch, which caches of fixed size are read with."""
    if item.step not in (None, 1) or item.start not in (None, 0):
        raise NotAView(f"`{node.name}` takes only a slice of the cache")
    if len(axes) == 1 and axes[0].name == "B":
        return _axes("B", size)
    if len(axes) != 1 or axes[0].name != "T" or axes[0].stop is not None:
        raise NotAView(f"`{node.name}` takes only a slice of the cache")
    return (Axis("T", size, stop=size),)


_ALIASING = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "detach", "alias"}


def is_alias(node: Node) -> bool:
    """Whether a node is its input under another name: the same memory and shape."""
    source = view_input(node)
    copied = node.kwargs.get("copy") or any(item is True for item in node.args[2:])
    return source is not None and op_name(node) in _ALIASING and same_kind(node, source) and not copied


def _is_copy(node: Node) -> bool:
    """Whether a node has memory of its own for sure."""
    source = view_input(node)
    return op_name(node) in ("clone", "repeat", "repeat_interleave") or (
        source is not None and not same_kind(node, source)
    )


def aliases(root: Node) -> list[Node]:
    """`root` and all nodes that may share memory with it, as far as views tell; `contiguous` and `reshape` may."""
    while (source := view_input(root)) is not None and not _is_copy(root):
        root = source
    found, todo = {root: None}, [root]
    while todo:
        for user in todo.pop().users:
            if user not in found and view_input(user) in found and not _is_copy(user):
                found[user] = None
                todo.append(user)
    return list(found)


def in_place_writers(root: Node) -> list[Node]:
    """Every node that writes into a tensor or a view of it, in graph order."""
    found = [user for member in aliases(root) for user in member.users if writes_in_place(user) and user.args]
    return sorted(dict.fromkeys(user for user in found if user.args[0] in aliases(root)))


def slice_bounds(node: Node) -> dict[int, tuple[Any, Any]] | None:
    """`{dim: (start, stop)}`, maybe symbolic, if a node takes slices of some dimensions and all of the others."""
    source = view_input(node)
    shape = shape_of(source)
    if source is None or shape is None:
        return None
    name = op_name(node)
    if name == "narrow":
        dim, start, out = argument(node, 1, "dim"), value_of(argument(node, 2, "start")), shape_of(node)
        if not isinstance(dim, int) or isinstance(start, torch.Tensor) or out is None:
            return None
        return {dim % len(shape): (start, start + out[dim % len(shape)])}
    if name == "slice":
        dim, start, stop = (argument(node, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "end")))
        whole = isinstance(stop, int) and stop > 2**60
        bounds = value_of(start), None if whole else value_of(stop)
        return None if argument(node, 4, "step", 1) != 1 else {(dim or 0) % len(shape): bounds}
    if name != "getitem":
        return None
    index = argument(node, 1, "index")
    items = list(index) if isinstance(index, tuple | list) else [index]
    if any(not isinstance(item, slice) and item is not Ellipsis for item in items) or items.count(Ellipsis) > 1:
        return None
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    if len(items) != len(shape) or any(item.step not in (None, 1) for item in items):
        return None
    bounds_of = {i: (value_of(item.start), value_of(item.stop)) for i, item in enumerate(items)}
    return {i: bounds for i, bounds in bounds_of.items() if any(bound is not None for bound in bounds)}


def slice_of_tokens(node: Node, layout: str) -> tuple[Any, Any] | None:
    """`(start, stop)` if a node takes a slice of the tokens of a tensor in `layout`; None otherwise."""
    bounds = slice_bounds(node)
    return None if bounds is None or len(bounds) != 1 else bounds.get(layout.index("T"))
