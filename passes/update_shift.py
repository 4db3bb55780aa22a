"""Preallocated sliding window: all tokens move left to make room, or a prompt replaces the whole window."""

from __future__ import annotations

from torch.fx import Node

from mikv_compile.passes.node_utils import (
    argument,
    fake,
    is_metadata,
    known_equal,
    operation,
    output_positions,
    same_kind,
    same_shape,
    shape_of,
)
from mikv_compile.passes.records import CacheUpdate
from mikv_compile.passes.report import Declined
from mikv_compile.passes.update_cat import LAYOUTS, is_allocated, is_cached_tensor
from mikv_compile.passes.views import in_place_writers, slice_of_tokens, view_input


def recognize(node: Node) -> CacheUpdate | Declined | None:
    """Recognize `cache.copy_(x)` where x is the cache rolled by its new tokens, or the newest tokens of a prompt."""
    if operation(node) != "copy" or not isinstance(node.args[0], Node) or not isinstance(node.args[1], Node):
        return None
    cached, source = node.args[0], node.args[1]
    if not is_cached_tensor(cached) and not is_allocated(cached):
        return None
    if in_place_writers(cached) != [node] or not same_kind(cached, source):
        return None
    if not fake(cached).dtype.is_floating_point:  # type: ignore[union-attr]
        return None
    return _rolled(node, cached, source) or _replaced(node, cached, source)


def _rolled(node: Node, cached: Node, source: Node) -> CacheUpdate | None:
    """`x = cache.roll(-1, dim); x[:, :, [-1]] = new; cache.copy_(x)`."""
    if operation(source) != "roll" or argument(source, 0, "input") is not cached:
        return None
    shift, dim = argument(source, 1, "shifts"), argument(source, 2, "dims")
    shift = shift[0] if isinstance(shift, tuple | list) and len(shift) == 1 else shift
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    shape = shape_of(cached)
    if not isinstance(dim, int) or shift != -1 or shape is None:
        return None
    layout = LAYOUTS[len(shape)].get(dim % len(shape))
    users = [user for user in source.users if user is not node]
    if layout is None or len(users) != 1 or operation(users[0]) != "setitem" or users[0].args[0] is not source:
        return None
    write = users[0]
    index, new = write.args[1], write.args[2]
    token_dim = layout.index("T")
    if is_allocated(cached) or not write < node:
        return None  # zeros have nothing to keep; what is written behind the copy does not reach the cache
    if not isinstance(new, Node) or not isinstance(index, tuple) or not _is_last(index, token_dim):
        return None
    new_shape = shape_of(new)
    one_token = [1 if i == token_dim else size for i, size in enumerate(shape)]
    if new_shape is None or len(new_shape) != len(shape) or not same_kind(cached, new):
        return None
    if not all(known_equal(size, wanted) for size, wanted in zip(new_shape, one_token, strict=True)):
        return None
    return _update(node, cached, new, layout, "roll", first=1, result=node, nodes=(source, write))


def _is_last(index: tuple[object, ...], token_dim: int) -> bool:
    """Whether an index is whole but for the last column of the tokens."""
    if len(index) <= token_dim or any(item != slice(None) for i, item in enumerate(index) if i != token_dim):
        return False
    item = index[token_dim]
    if isinstance(item, slice):
        return item in (slice(-1, None), slice(-1, None, None))
    if isinstance(item, Node):
        return operation(item) == "tensor" and item.args[0] in ([-1], (-1,)) and not in_place_writers(item)
    return item in ([-1], (-1,))


def _replaced(node: Node, cached: Node, source: Node) -> CacheUpdate | None:
    """`cache.copy_(new[:, :, -window:])`: a prompt at least as long as the window."""
    shape = shape_of(cached)
    new = view_input(source)
    if shape is None or new is None or not same_shape(cached, source) or (is_allocated(cached) and not _kept(node)):
        return None
    for layout in LAYOUTS[len(shape)].values():
        cut = slice_of_tokens(source, layout)
        if cut is None or not isinstance(cut[0], int) or cut[1] is not None or operation(new) == "cat":
            continue
        if known_equal(shape[layout.index("T")], -cut[0]):
            return _update(node, cached, new, layout, "replace", position=0, result=new, nodes=(source,))
    return None


def _kept(node: Node) -> tuple[int, ...]:
    """Positions of the graph's output that hold the cache after `cache.copy_()`."""
    return tuple(sorted({*output_positions(node.args[0]), *output_positions(node)}))  # type: ignore[arg-type]


def _update(
    node: Node,
    cached: Node,
    new: Node,
    layout: str,
    kind: str,
    *,
    result: Node,
    nodes: tuple[Node, ...],
    first: int = 0,
    position: int | None = None,
) -> CacheUpdate:
    readers = dict.fromkeys([*cached.users, *result.users])
    capacity = shape_of(cached)[layout.index("T")]  # type: ignore[index]
    return CacheUpdate(
        result=result,
        past=None if is_allocated(cached) else cached,
        new=new,
        layout=layout,
        kind=kind,
        outputs=_kept(node),
        metadata_users=tuple(sorted(user for user in readers if is_metadata(user))),
        sources=(cached,) if kind == "roll" else (),
        written=node,
        first=first,
        position=position,
        keep=capacity,
        capacity=capacity,
        nodes=tuple(sorted({node, *nodes})),
    )
