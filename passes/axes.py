"""Which axis of the attention is where in the scores, through every view of them.

Each dimension of the scores is a tuple of axes, outermost first. Views move axes, merge several into one dimension, or
cut one into parts (`[B * H, R, T]` seen as `[B, H, R, T]`). An axis gets its name, one of b, k, g, r, t, d, only at the
end, when all cuts are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Node

from mikv_compile.passes.node_utils import known_equal, same_shape, shape_of
from mikv_compile.passes.records import Dims
from mikv_compile.passes.views import _COPIES, _EXPANDS, _RESHAPES, NotAView, _apply, op_name, view_input

MAX_BATCH_AXES = 3  # b, k, g


class Axis:
    """One axis of a product of attention. Compared by identity: comparing symbolic sizes would add guards."""

    def __init__(self, size: Any, *, flat: bool = False) -> None:
        self.size = size
        self.flat = flat
        """Whether it is the only batch axis, which may hold batch and heads."""
        self.parts: tuple[Axis, ...] = ()
        """What a view cut it into, outermost first."""
        self.name = "?"

    def leaves(self) -> tuple[Axis, ...]:
        """The uncut axes it consists of."""
        return tuple(leaf for part in self.parts for leaf in part.leaves()) if self.parts else (self,)


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The uncut axes of a dimension."""
    return tuple(leaf for axis in axes for leaf in axis.leaves())


def dim_name(axes: Iterable[Axis]) -> str:
    """The name of a dimension in a record."""
    return "".join(leaf.name for leaf in leaves(axes)) or "1"


def layout_names(layout: Layout) -> Dims:
    """The names of all dimensions; all axes must have names."""
    return tuple(dim_name(dim) for dim in layout)


def view_layout(node: Node, layout: Layout) -> Layout:
    """The layout after one view of the scores; raises `NotAView`."""
    name = op_name(node)
    source = view_input(node)
    shape = shape_of(node)
    if name is None or source is None or shape is None:
        raise NotAView(f"`{node.name}` is not a view")
    if name in _COPIES:
        return layout
    if name in _EXPANDS:
        if not same_shape(node, source):
            raise NotAView(f"`{node.name}` repeats the scores")
        return layout
    if name in _RESHAPES or name == "squeeze":
        return _regroup(node, layout, shape)
    if name in ("repeat", "repeat_interleave"):
        raise NotAView(f"`{node.name}` repeats the scores")
    return _apply(node, layout, shape_of(source), shape)  # type: ignore[arg-type, return-value]


def _regroup(node: Node, layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout after view or reshape, matched from the right, where rows and tokens are."""
    cannot = NotAView(f"`{node.name}` cuts the dimensions of the scores in a way that cannot be followed")
    axes = list(leaves(axis for dim in layout for axis in dim))
    sizes = list(shape)
    result: list[Dim] = []
    last: Axis | None = None
    while sizes:
        if not axes:  # only outer dimensions of size 1 are left
            if not all(known_equal(size, 1) for size in sizes):
                raise cannot
            if last is not None and last.flat:  # a batch of one before the heads
                outer = [Axis(1) for _ in sizes]
                inner = Axis(last.size)
                last.parts = (*outer, inner)
                result = [leaves(dim) if inner not in leaves(dim) else (inner,) for dim in result]
                result.extend((axis,) for axis in reversed(outer))
            else:
                result.extend(() for _ in sizes)
            break
        axis = axes.pop()
        if known_equal(sizes[-1], 1) and not known_equal(axis.size, 1) and not axis.flat:
            sizes.pop()
            result.append(())
            axes.append(axis)
            continue
        last = axis
        count = _matching(axis.size, sizes)
        if count == 1:
            sizes.pop()
            result.append((axis,))
        elif count:
            axis.parts = tuple(Axis(size) for size in sizes[-count:])
            del sizes[-count:]
            result.extend((part,) for part in reversed(axis.parts))
        else:
            count = _matching(sizes.pop(), [*(a.size for a in axes), axis.size])
            if not count:
                raise cannot
            group = (*axes[len(axes) + 1 - count :], axis)
            del axes[len(axes) + 1 - count :]
            result.append(group)
    if any(not known_equal(axis.size, 1) for axis in axes):
        raise cannot
    result.reverse()
    if axes and result:
        result[0] = (*axes, *result[0])
    return tuple(result)


def _matching(size: Any, factors: Sequence[Any]) -> int:
    """How many factors, from the last on, have the product `size` for sure; 0 if none do."""
    product: Any = 1
    for count, factor in enumerate(reversed(factors), start=1):
        product = product * factor
        if known_equal(product, size):
            return count
    return 0


def name_axes(batch: Sequence[Axis], rows: Sequence[Axis], *, rows_outer_first: bool = True) -> str | None:
    """Name the batch axes and the query's own axes (rows, and heads that share keys); a problem if there are too many.

    `rows_outer_first`: of two query axes the first is g, the query heads of one KV head, and the second r.
    """
    row_leaves, batch_leaves = leaves(rows), leaves(batch)
    if len(row_leaves) > 2 or len(batch_leaves) > MAX_BATCH_AXES or len(row_leaves) + len(batch_leaves) > 4:
        return "the scores have more dimensions than batch, KV heads, query groups, rows and tokens"
    if len(row_leaves) == 2:
        names = ["g", "r"] if rows_outer_first else ["r", "g"]
        batch_names = {0: [], 1: ["bk"], 2: ["b", "k"]}[len(batch_leaves)]
    else:
        names = ["r"] * len(row_leaves)
        batch_names = {0: [], 1: ["bkg"], 2: ["b", "kg"], 3: ["b", "k", "g"]}[len(batch_leaves)]
    for axis, name in zip((*row_leaves, *batch_leaves), (*names, *batch_names), strict=True):
        axis.name = name
    return None
