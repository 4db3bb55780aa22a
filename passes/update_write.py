"""Preallocated cache: new tokens are written at their places, in one of the many spellings that torch has for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from mikv_compile.passes.node_utils import (
    argument,
    fake,
    is_metadata,
    known_equal,
    operation,
    output_positions,
    rank,
    same_kind,
    same_shape,
    shape_of,
    value_of,
    writes_in_place,
)
from mikv_compile.passes.records import CacheUpdate
from mikv_compile.passes.report import Declined
from mikv_compile.passes.update_cat import LAYOUTS, is_allocated, is_cached_tensor
from mikv_compile.passes.views import aliases, in_place_writers, is_alias, slice_bounds, view_input


@dataclass(frozen=True)
class _Write:
    """Tokens `new` written into `target` along `dim`, at an integer, a node of an integer, or a node of columns."""

    target: Node
    dim: int
    position: Any
    new: Node
    nodes: tuple[Node, ...]
    rows: tuple[int, Any] | None = None
    """The dimension of the batch and where a slice `[:stop]` of it ends; None: all rows are written."""


def recognize(node: Node) -> CacheUpdate | Declined | None:
    """Recognize a write of new tokens into a cached tensor, in place or as a copy that the graph returns.

    A cache that is allocated by zeros in this graph is born here.
    """
    try:
        write = _as_write(node)
        if write is None:
            return None
        write = _without_row_views(write)
        root = _root(write.target)
        if root is None:
            return None
        return _update(node, write, root)
    except _NotSupported as reason:
        return Declined(node.name, "find cache updates", str(reason)) if _writes_into_a_cache(node) else None


class _NotSupported(Exception):
    """Why a write into a cached tensor cannot be taken over."""


def _writes_into_a_cache(node: Node) -> bool:
    """Whether it is a cached tensor that `node` writes into, directly or through a slice; only that is reported."""
    target = argument(node, 0, "input", node.kwargs.get("self"))
    sliced = view_input(target) if operation(node) == "copy" else None
    return _root(target) is not None or (sliced is not None and _root(sliced) is not None)


def _update(node: Node, write: _Write, root: Node) -> CacheUpdate:
    dims = rank(root)
    layout = LAYOUTS[dims].get(write.dim % dims)  # type: ignore[index,operator]
    shape, new_shape = shape_of(root), shape_of(write.new)
    if layout is None or shape is None or new_shape is None or len(new_shape) != len(shape):
        raise _NotSupported(f"writes along dim={write.dim}, which is not where a cache has its tokens")
    token_dim = layout.index("T")
    if not same_kind(root, write.new):
        raise _NotSupported("cache and new tokens differ in dtype or device; the write converts one of them")
    if not fake(root).dtype.is_floating_point:  # type: ignore[union-attr]
        raise _NotSupported("the cached numbers are not floating point")
    rows = _rows(write, layout, shape, new_shape)
    full = [i for i, letter in enumerate(layout) if letter != "T" and (letter != "B" or rows is None)]
    if any(not known_equal(shape[i], new_shape[i]) for i in full):
        raise _NotSupported(_PART)
    in_place = writes_in_place(node)
    if rows is not None and not (in_place and is_cached_tensor(root)):
        raise _NotSupported("some rows are written of a cache that is not written in place, or allocated in this graph")
    if in_place_writers(root) != ([node] if in_place else []):
        raise _NotSupported("this graph writes more than once into the cache")
    if in_place:
        sources = tuple(sorted(member for member in aliases(root) if is_alias_of(member, root)))
        value = node if fake(node) is not None and node.all_input_nodes[0] is write.target else root
    else:
        sources, value = (), node
    born = root.op != "placeholder"
    outputs = tuple(sorted({p for n in {value, root, *sources, node} for p in output_positions(n)}))
    if not in_place and not outputs:
        raise _NotSupported("the graph does not return the updated cache, so nothing keeps it")
    if born and not outputs:
        raise _NotSupported("the graph does not return the cache that it allocates")
    readers = dict.fromkeys(user for n in {root, value, *sources} for user in n.users)
    return CacheUpdate(
        result=value,
        past=None if born else root,
        new=write.new,
        layout=layout,
        kind="write",
        outputs=outputs,
        metadata_users=tuple(sorted(user for user in readers if is_metadata(user))),
        sources=tuple(dict.fromkeys(sources)),
        written=node if in_place else None,
        position=write.position,
        tail=True,
        capacity=shape[token_dim],
        rows=rows,
        nodes=tuple(sorted({node, *write.nodes})),
    )


_PART = "the new tokens fill only a part of the cache's batch, heads or channels"


def _rows(write: _Write, layout: str, shape: tuple[Any, ...], new_shape: tuple[Any, ...]) -> Any:
    """How many rows are written, once it is sure that there is a new one for each; None: all of them."""
    if write.rows is None:
        return None
    dim, stop = write.rows
    if layout[dim] != "B" or not known_equal(stop, new_shape[dim]):
        raise _NotSupported(_PART)
    return None if known_equal(stop, shape[dim]) else stop


def _without_row_views(write: _Write) -> _Write:
    """A write into `cache[:rows]` as one into the cache."""
    source, bounds = view_input(write.target), slice_bounds(write.target)
    if write.rows is not None or source is None or not bounds or len(bounds) > 1 or is_alias(write.target):
        return write
    ((dim, (start, stop)),) = bounds.items()
    if start not in (None, 0) or not isinstance(write.dim, int) or dim == write.dim % (rank(source) or 1):
        return write
    return replace(write, target=source, rows=(dim, stop), nodes=(*write.nodes, write.target))


def _tokens_and_rows(dims: list[int], count: int) -> tuple[int, int | None]:
    """Which of the dimensions that a write selects from are those of the tokens and of the batch.

    Where both could be meant, as in `[:a, :b]`, the batch comes first.
    """
    if len(dims) == 1:
        return dims[0], None
    for tokens, rows in ((dims[1], dims[0]), (dims[0], dims[1])) if len(dims) == 2 else ():
        if LAYOUTS[count].get(tokens, "").find("B") == rows:
            return tokens, rows
    raise _NotSupported(_PART)


def is_alias_of(node: Node, root: Node) -> bool:
    """Whether a node is the whole cached tensor under another name."""
    while node is not root:
        source = view_input(node)
        if source is None or not is_alias(node):
            return False
        node = source
    return True


def _root(target: Node) -> Node | None:
    """The cached tensor that `target` is: a graph input, or zeros made in this graph."""
    while (source := view_input(target)) is not None and is_alias(target):
        target = source
    if is_cached_tensor(target) or is_allocated(target):
        return target
    return None


def _as_write(node: Node) -> _Write | None:
    """The write that a node does, whatever it writes into; None if it does none along one dimension."""
    target = argument(node, 0, "input", node.kwargs.get("self"))
    if not isinstance(target, Node) or rank(target) not in LAYOUTS:
        return None
    name = operation(node)
    if name == "index_copy":
        dim, index, new = (argument(node, i, name) for i, name in ((1, "dim"), (2, "index"), (3, "source")))
        return _Write(target, dim, _columns(index, new, dim), new, ()) if isinstance(new, Node) else None
    if name in ("setitem", "index_put"):
        return _indexed(node, target)
    if name == "slice_scatter":
        new, dim = argument(node, 1, "src"), argument(node, 2, "dim", 0)
        start, stop = argument(node, 3, "start"), argument(node, 4, "end")
        if argument(node, 5, "step", 1) != 1 or not isinstance(new, Node):
            return None
        return _Write(target, dim, _start(target, dim, start, stop, new), new, ())
    if name == "scatter":
        return _scattered(node, target)
    if name == "copy":
        return _copied(node, target)
    return None


def _indexed(node: Node, target: Node) -> _Write | None:
    """`cache[:, :, index] = new` and `index_put`: one dimension is indexed, the others are whole."""
    new = argument(node, 2, "values")
    index = argument(node, 1, "indices")
    if not isinstance(new, Node) or rank(new) != rank(target) or argument(node, 3, "accumulate", False) is not False:
        return None
    if operation(node) == "index_put" and isinstance(index, tuple | list):
        index = tuple(slice(None) if item is None else item for item in index)  # None is a new axis in brackets only
    items = _spread(index, rank(target))
    shape = shape_of(target)
    if items is None or shape is None:
        return None
    chosen = [i for i, item in enumerate(items) if not _is_whole(item, shape[i])]
    if not chosen or (len(chosen) > 1 and _root(target) is None):
        return None
    dim, batch = _tokens_and_rows(chosen, len(items))
    item, rows = items[dim], None
    if batch is not None:
        rows = batch, _stop_of_prefix(items[batch])
    if isinstance(item, slice):
        return _Write(target, dim, _start(target, dim, item.start, item.stop, new), new, (), rows)
    return _Write(target, dim, _columns(item, new, dim), new, (), rows)


def _stop_of_prefix(item: Any) -> Any:
    """Where a slice `[:stop]` ends."""
    if not isinstance(item, slice) or item.step not in (None, 1) or item.start not in (None, 0):
        raise _NotSupported(_PART)
    return value_of(item.stop)


def _spread(index: Any, dims: int | None) -> list[Any] | None:
    """What is written of each dimension; None if the index adds dimensions or fits no tensor of `dims`."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    if any(item is None for item in items) or sum(item is Ellipsis for item in items) > 1 or dims is None:
        return None
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * (dims - len(items) + 1)
    return items if len(items) == dims else None


def _is_whole(item: Any, size: Any) -> bool:
    """Whether an index takes all of a dimension of `size`."""
    if not isinstance(item, slice) or item.step not in (None, 1) or item.start not in (None, 0):
        return False
    if item.stop is None:
        return True
    return known_equal(value_of(item.stop), size)


def _start(target: Node, dim: int, start: Any, stop: Any, new: Node) -> Any:
    """Where the slice `[start:stop]` of `dim` begins, once it is sure that it is as long as the new tokens.

    That also excludes steps, and slices that end behind the cache or count from its end.
    """
    shape, new_shape = shape_of(target), shape_of(new)
    assert shape is not None and new_shape is not None
    begin = 0 if start is None else value_of(start)
    end = shape[dim] if stop is None or (isinstance(stop, int) and stop > 2**60) else value_of(stop)
    if isinstance(begin, torch.Tensor) or isinstance(end, torch.Tensor):
        raise _NotSupported("the slice that is written is bounded by a tensor")
    if isinstance(begin, int) and begin < 0:
        raise _NotSupported("the write counts from the end of the cache")
    if not known_equal(end - begin, new_shape[dim]):
        raise _NotSupported("the slice that is written is not surely as long as the new tokens")
    return begin


def _columns(index: Any, new: Any, dim: Any) -> Node:
    """`index`, once it is sure that it holds one column for each new token along `dim`."""
    value = fake(index)
    if value is None or value.dtype not in (torch.int64, torch.int32) or value.dim() > 1:
        raise _NotSupported("the tokens are not written at a one-dimensional index of integers")
    count = value.shape[0] if value.dim() else 1
    new_shape = shape_of(new)
    if not isinstance(dim, int) or new_shape is None or not known_equal(count, new_shape[dim]):
        raise _NotSupported("there is not surely one column for each new token")
    return index


def _scattered(node: Node, target: Node) -> _Write | None:
    """`scatter(dim, index.expand_as(new), new)`: all rows, heads and channels go to the same columns."""
    dim, index, new = (argument(node, i, name) for i, name in ((1, "dim"), (2, "index"), (3, "src")))
    if not isinstance(new, Node) or not isinstance(index, Node) or "reduce" in node.kwargs:
        return None
    base = index
    views: list[Node] = []
    while (source := view_input(base)) is not None and rank(base) != 1:
        views.insert(0, base)
        base = source
    dims = rank(target)
    if rank(base) != 1 or dims is None or not isinstance(dim, int) or not _vary_only_along(base, views, dim % dims):
        raise _NotSupported("the tokens of different rows or heads are not surely written at the same columns")
    if not same_shape(index, new):
        raise _NotSupported("the index covers only a part of the new tokens' batch, heads or channels")
    return _Write(target, dim, _columns(base, new, dim), new, ())


def _vary_only_along(columns: Node, views: list[Node], dim: int) -> bool:
    """Whether what `views` make of one-dimensional columns differs along `dim` only.

    Views that expand keep the columns where they are, counted from the right; all others have to show them as the one
    dimension that is larger than 1.
    """
    size = shape_of(columns)[0]  # type: ignore[index]
    place = -1  # the dimension of the columns, counted from the right
    for view in views:
        shape = shape_of(view)
        if shape is None:
            return False
        if operation(view) not in ("expand", "expand_as", "broadcast_to"):
            larger = [i - len(shape) for i, length in enumerate(shape) if not known_equal(length, 1)]
            if len(larger) > 1:
                return False
            place = larger[0] if larger else place
        if len(shape) < -place or not (known_equal(shape[place], size) or known_equal(size, 1)):
            return False
    return bool(views) and (known_equal(size, 1) or place == dim - len(shape_of(views[-1])))  # type: ignore[arg-type]


def _copied(node: Node, target: Node) -> _Write | None:
    """`cache[:, :, a:b].copy_(new)`, `cache[:rows, :, a:b].copy_(new)` and `cache.narrow(2, a, n).copy_(new)`."""
    new = argument(node, 1, "src")
    source, bounds = view_input(target), slice_bounds(target)
    if source is None or not bounds or not isinstance(new, Node) or rank(new) != rank(target):
        return None
    if len(bounds) > 1 and _root(source) is None:
        return None
    dim, batch = _tokens_and_rows(sorted(bounds), rank(target) or 0)
    start, stop = bounds[dim]
    rows = None if batch is None else (batch, _stop_of_prefix(slice(*bounds[batch])))
    return _Write(source, dim, _start(source, dim, start, stop, new), new, (target,), rows)
