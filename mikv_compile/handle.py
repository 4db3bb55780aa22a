"""``KVTensor``: what a model's cache object holds instead of a dense K or V."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from mikv_compile import _compat
from mikv_compile.errors import MikvError
from mikv_compile.plan import LayerPlan
from mikv_compile.preallocated import followed_range, padded, set_item, view_of, write_through
from mikv_compile.store import LayerStore, Role, shape_in, to_layout

log = logging.getLogger(__name__)
Context = tuple[Role, LayerPlan, torch.dtype, str, bool]
"""What a graph knows of a fake handle: role, plan, dtype, layout and whether it is preallocated."""

aten = torch.ops.aten


class KVTensor(torch.Tensor):
    """Handle of the keys or values of one layer.

    Shape, dtype and device are those of the dense tensor that it stands for, so a model's cache code runs unchanged.
    ``kv_layout`` names its dimensions: a permutation of "BHTD", or of "BTD" for a store with one head.

    A handle shows a range of tokens, which stays the same. Reordering, selecting and repeating along the batch, slicing
    a range of tokens, copying and moving to another device work on the compressed data. Any other operation sees the
    dequantized values, and is counted (``store.fallbacks``); writing into such a handle raises.

    With a ``capacity``, it stands for a preallocated cache instead: its token dimension has this size, it shows what
    its store holds at the time, with zeros behind, and it can be written to; see :mod:`mikv_compile.preallocated`.
    """

    store: LayerStore | None
    """The layer's store; None while a compiler looks at a fake handle."""
    role: Role
    kv_layout: str
    is_preallocated: bool
    """True if its size is fixed; also known of a fake handle."""
    _plan: LayerPlan
    _range: tuple[int, int] | None
    anchor: torch.Tensor

    __torch_function__ = _compat.no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        store: LayerStore,
        role: Role,
        layout: str = "BHTD",
        start: int | None = None,
        stop: int | None = None,
        capacity: int | None = None,
    ) -> KVTensor:
        """Handle of the tokens at absolute positions [start, stop) of a store (all that are to be seen by default).

        With a capacity and a stop, the handle goes on showing these tokens; with a capacity alone it follows its store.

        Raises:
            MikvError: for a layout that the store cannot have, or a range that it does not hold.
        """
        follows = capacity is not None and stop is None
        start = store.start if start is None else start
        stop = store.end if stop is None else stop
        if capacity is None and not store.base <= start <= stop <= store.end:
            raise MikvError(f"positions {start} to {stop} are not in a store of {store.base} to {store.end}")
        shape = shape_in(store, role, layout, stop - start if capacity is None else capacity)
        self = _compat.make_wrapper(cls, shape, store.site.dtype, store.device)
        self.store, self.role, self.anchor, self._plan = store, role, store.anchor, store.plan
        self.kv_layout, self.is_preallocated = layout, capacity is not None
        self._range = None if follows else (start, stop)
        store.register(self)
        if capacity is None:
            # The length changes in every step: without this, the second step compiles once more.
            _compat.mark_dynamic(self, layout.index("T"))
        return self

    def grown(self) -> KVTensor:
        """The handle of a growing cache after its store was appended to, with the same start.

        Cheaper than a new one, which matters for every layer in every step: what the tracer noted on this one holds.
        """
        assert self.store is not None and self._range is not None
        store, (start, _) = self.store, self._range
        shape = list(self.shape)
        shape[self.kv_layout.index("T")] = store.end - start
        made = _compat.make_wrapper(KVTensor, shape, store.site.dtype, store.device)
        made.__dict__.update(self.__dict__)
        made._range = (start, store.end)
        store.register(made)
        return made

    def show(self, store: LayerStore) -> None:
        """Show the same tokens of another store from now on. Only for a growing cache.

        Raises:
            MikvError: if the store does not hold them, or has other dimensions.
        """
        assert self.store is not None and self._range is not None
        start, stop = self._range
        if store.site != self.store.site or not store.base <= start <= stop <= store.end:
            raise MikvError("the two stores do not hold the same tokens of the same layer")
        self.store, self.anchor, self._plan = store, store.anchor, store.plan
        store.register(self)

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan; also known of a fake handle."""
        return self._plan

    @property
    def capacity(self) -> int | None:
        """Size of the token dimension of a preallocated cache, else None; also known of a fake handle."""
        return self.shape[self.kv_layout.index("T")] if self.is_preallocated else None

    @property
    def range(self) -> tuple[int, int]:
        """Absolute positions (start, stop) of the tokens that it shows. A preallocated one follows its store."""
        if self._range is not None:
            return self._range
        assert self.capacity is not None
        return followed_range(self._real_store("the range"), self.role, self.capacity)

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The dense tensor, in this handle's layout and the model's dtype.

        Raises:
            EvictedTokensError: if the plan has evicted tokens.
        """
        store = self._real_store("dequantize")
        if self.is_preallocated:
            return padded(self)
        return to_layout(store.dequantize(self.role, *self.range), self.kv_layout)

    def _is_view(self) -> bool:
        """Never: autograd marks what slicing returns as a view, but a handle has no storage to be a view of."""
        return False

    def __setitem__(self, index: Any, value: Any) -> None:
        if not self.is_preallocated:
            raise refused("assignment to a slice")
        if self.store is None:
            super().__setitem__(index, value)
        else:
            self._detach_range()
            set_item(self, index, value)

    def _detach_range(self) -> None:
        """Before a write to a preallocated cache that shows fixed tokens: give it a store of its own to follow."""
        if not self.is_preallocated or self._range is None:
            return
        shared, (start, stop) = self._real_store("a write"), self._range
        own = shared.copy().crop(stop - shared.base)
        own.start, self.store, self._range = start, own, None
        own.register(self)

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Repeat batch rows on the compressed data; torch would split the operation into views and a copy."""
        if self.store is not None and isinstance(repeats, int) and dim is not None and self._is_batch(dim):
            store = self.store

            def make() -> LayerStore:
                rows = store.site.batch * repeats
                return store.map(lambda b: b.repeat_interleave(repeats, dim=0), rows, store.device)

            return self._rebound(store.derive(("repeat", repeats), self.role, make))
        return super().repeat_interleave(repeats, dim=dim, **kwargs)

    def _is_batch(self, dim: int) -> bool:
        return dim % self.dim() == self.kv_layout.index("B")

    def _rebound(self, store: LayerStore) -> KVTensor:
        """The same part of another store."""
        start, stop = self._range or (None, None)
        return KVTensor(store, self.role, self.kv_layout, start, stop, self.capacity)

    def _real_store(self, operation: str) -> LayerStore:
        if self.store is None:
            raise _compat.traced_elsewhere(operation)
        return self.store

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.store is None:
            return f"KVTensor({self.role}, {tuple(self.shape)}, fake)"
        return (
            f"KVTensor({self.role}, {self.kv_layout} {tuple(self.shape)}, {self.dtype}, tiers={self.plan.format}, "
            f"nbytes={self.store.nbytes} of key and value)"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Context]:
        return ["anchor"], (self.role, self.plan, self.dtype, self.kv_layout, self.is_preallocated)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: Context, outer_size: Any, outer_stride: Any
    ) -> KVTensor:
        role, plan, dtype, layout, is_preallocated = context
        self = _compat.make_wrapper(KVTensor, outer_size, dtype, inner["anchor"].device, outer_stride)
        self.store, self.role, self.anchor, self._plan = None, role, inner["anchor"], plan
        self.kv_layout, self.is_preallocated, self._range = layout, is_preallocated, None
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], KVTensor) else None
        if first is not None and first.store is not None:
            done = _HANDLED.get(func)
            result = None if done is None else done(first, *args[1:], **kwargs)
            if result is not None:
                return result
        written = _written(func, args, kwargs)
        if any(not handle.is_preallocated for handle in written):
            raise refused(str(func))
        for handle in written:
            if handle.store is not None:
                handle._detach_range()
        if written:
            return write_through(func, args, kwargs, written)
        if first is not None and first.store is not None and func.is_view:
            if first.is_preallocated:
                return view_of(first, func, args, kwargs)
            # Views of dequantized values: writing into them would be lost as well.
            views = func(dequantized(first, func), *args[1:], **kwargs)
            return _compat.tree_map_only(torch.Tensor, lambda view: view.as_subclass(DequantizedView), views)

        args, kwargs = _compat.tree_map_only(KVTensor, lambda handle: dequantized(handle, func), (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVTensor:
        store = self._real_store("deepcopy")
        if id(store) not in memo:
            memo[id(store)] = store.copy()
            memo[id(memo[id(store)])] = memo[id(store)]
        made = self._rebound(memo[id(store)])
        memo[id(self)] = made
        return made

    def __copy__(self) -> KVTensor:
        return self._rebound(self._real_store("copy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MikvError("a compressed KV cache cannot be pickled; mikv_compile.save_cache writes caches to files")


class DequantizedView(torch.Tensor):
    """A view of a handle's dequantized values that can be read, and refuses writes, which would not reach the store."""

    def _is_view(self) -> bool:
        """Never for a compiler: it would look for a base that holds the values."""
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], DequantizedView):
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place or name == "__setitem__" or name in _IN_PLACE_OPERATORS:
                raise refused(name)
        with _compat.plain_functions():
            result = func(*args, **(kwargs or {}))

        def keep_views(value: torch.Tensor) -> torch.Tensor:
            return value.as_subclass(DequantizedView if value._base is not None else torch.Tensor)

        return _compat.tree_map_only(torch.Tensor, keep_views, result)


_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


def dequantized(handle: KVTensor, func: Any) -> torch.Tensor:
    """The dense values for ``func``, which is counted; of a fake handle, a fake tensor."""
    if handle.store is None:
        return _compat.fake_dense(handle)
    handle.store.count_fallback(str(func))
    log.info("%s reads a compressed cache: dequantized", func)
    return handle.dequantize()


def refused(operation: str) -> MikvError:
    """The error for a write that would be lost."""
    return MikvError(
        f"{operation} writes into a compressed KV cache outside a compiled call. Write before the cache is compressed, "
        "or replace the layer's tensors by handle.dequantize() first"
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[KVTensor]:
    """The handles that an operation writes into."""
    found: list[KVTensor] = []
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            _compat.tree_map_only(KVTensor, found.append, given.get(argument.name))
    return found


def _same(handle: KVTensor, *_: Any, **__: Any) -> KVTensor:
    return handle._rebound(handle._real_store("alias"))


def _clone(handle: KVTensor, **_: Any) -> KVTensor:
    store = handle._real_store("clone")
    return handle._rebound(store.derive("clone", handle.role, store.copy))


def _index_select(handle: KVTensor, dim: int, index: torch.Tensor) -> KVTensor | None:
    """Beam search: reorder and select along the batch."""
    if not handle._is_batch(dim):
        return None
    store = handle._real_store("index_select")
    rows = index.to(store.device).reshape(-1)
    rows = torch.where(rows < 0, rows + store.site.batch, rows)

    def make() -> LayerStore:
        return store.map(lambda b: b.index_select(0, rows), rows.shape[0], store.device)

    return handle._rebound(store.derive(_identity(index), handle.role, make))


def _identity(index: torch.Tensor) -> object:
    """Equal for the same rows.

    On a GPU for the same tensor only, as reading values would wait for the device; the tensor is part of the answer, so
    that its address is not used again.
    """
    if index.device.type == "cpu":
        return ("index", *index.tolist())
    if index.is_inference():
        return object()  # it keeps no count of writes, so nothing tells whether it has changed
    return ("index", _Held(index), index._version)


class _Held:
    """A tensor that is equal to itself only."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]


def _index(handle: KVTensor, indices: list[torch.Tensor | None]) -> KVTensor | None:
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not handle._is_batch(given[0]):
        return None
    rows = indices[given[0]]
    assert rows is not None
    if rows.dim() != 1:
        return None
    return _index_select(handle, given[0], rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)


def _slice(
    handle: KVTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor | None:
    """A range of tokens, or of batch rows."""
    size = handle.shape[dim]
    start, end, _ = slice(start, end, step).indices(size)
    if handle.is_preallocated:
        return None  # a view of it has to follow what is written later
    if start == 0 and end == size and step == 1:
        return _same(handle)
    store = handle._real_store("slice")
    if dim % handle.dim() == handle.kv_layout.index("T") and step == 1:
        first = handle.range[0]
        return KVTensor(store, handle.role, handle.kv_layout, first + start, first + max(start, end))
    if handle._is_batch(dim):
        rows = torch.arange(start, end, step, device=store.device)

        def make() -> LayerStore:
            return store.map(lambda b: b.index_select(0, rows), rows.shape[0], store.device)

        return handle._rebound(store.derive(("rows", start, end, step), handle.role, make))
    return None


def _to_copy(handle: KVTensor, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor | None:
    """Move to another device; a change of dtype needs the dense values."""
    store = handle._real_store("to")
    target = torch.device(device) if device is not None else store.device
    if target.type == "meta":
        return torch.empty(handle.shape, dtype=dtype or handle.dtype, device=target)  # nothing there can be read
    if dtype not in (None, handle.dtype):
        return None

    def make() -> LayerStore:
        return store.map(lambda b: b.to(target, copy=True), store.site.batch, target)

    return handle._rebound(store.derive(("to", target), handle.role, make))


_HANDLED: dict[Any, Callable[..., torch.Tensor | None]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten._to_copy.default: _to_copy,
}
