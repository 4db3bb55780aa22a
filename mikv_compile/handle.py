"""``KVTensor``: what a model's cache object holds instead of a dense K or V."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from mikv_compile import _compat
from mikv_compile.errors import MikvError
from mikv_compile.plan import LayerPlan
from mikv_compile.store import LayerStore, Role

log = logging.getLogger(__name__)
aten = torch.ops.aten


class KVTensor(torch.Tensor):
    """Handle of the keys or values of one layer.

    Shape [B, H_kv, T, D], dtype and device are those of the dense tensor that it stands for, so a model's cache code
    runs unchanged. Reordering, selecting and repeating along the batch, cropping from the end, copying and moving to
    another device work on the compressed data. Any other operation sees the dequantized values, and is counted
    (``store.fallbacks``); writing into a handle raises.
    """

    store: LayerStore | None
    """The layer's store; None while a compiler looks at a fake handle."""
    role: Role
    _plan: LayerPlan
    anchor: torch.Tensor

    __torch_function__ = _compat.no_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, store: LayerStore, role: Role, length: int | None = None) -> KVTensor:
        """Handle of the first ``length`` tokens of a store (all of them by default)."""
        site = store.site
        dim = site.key_dim if role == "key" else site.value_dim
        shape = (site.batch, site.kv_heads, store.length if length is None else length, dim)
        self = _compat.make_wrapper(cls, shape, site.dtype, store.device)
        self.store, self.role, self.anchor, self._plan = store, role, store.anchor, store.plan
        store.register(self)
        # The length changes in every step: without this, the second step compiles once more.
        _compat.mark_dynamic(self, 2)
        return self

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan; also known of a fake handle."""
        return self._plan

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The dense tensor: [B, H_kv, T, D] in the model's dtype."""
        return self._real_store("dequantize").dequantize(self.role, self.shape[2])

    def _is_view(self) -> bool:
        """Never: autograd marks what slicing returns as a view, but a handle has no storage to be a view of."""
        return False

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _refused("assignment to a slice")

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Repeat batch rows on the compressed data; torch would split the operation into views and a copy."""
        if self.store is not None and isinstance(repeats, int) and dim in (0, -4):
            store = self.store

            def make() -> LayerStore:
                rows = store.site.batch * repeats
                return store.map(lambda b: b.repeat_interleave(repeats, dim=0), rows, store.device)

            return _rebound(self, store.derive(("repeat", repeats), self.role, make))
        return super().repeat_interleave(repeats, dim=dim, **kwargs)

    def _real_store(self, operation: str) -> LayerStore:
        if self.store is None:
            raise _compat.traced_elsewhere(operation)
        return self.store

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.store is None:
            return f"KVTensor({self.role}, {tuple(self.shape)}, fake)"
        return (
            f"KVTensor({self.role}, {tuple(self.shape)}, {self.dtype}, tiers={self.plan.format}, "
            f"nbytes={self.store.nbytes} of key and value)"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Role, LayerPlan, torch.dtype]]:
        return ["anchor"], (self.role, self.plan, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: tuple[Role, LayerPlan, torch.dtype], outer_size: Any, outer_stride: Any
    ) -> KVTensor:
        role, plan, dtype = context
        self = _compat.make_wrapper(KVTensor, outer_size, dtype, inner["anchor"].device, outer_stride)
        self.store, self.role, self.anchor, self._plan = None, role, inner["anchor"], plan
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
        _refuse_writes(func, args, kwargs)
        if first is not None and first.store is not None and func.is_view:
            # A view of dequantized values: writing into it would be lost as well.
            return func(_dequantized(first, func), *args[1:], **kwargs).as_subclass(DequantizedView)

        args, kwargs = _compat.tree_map_only(KVTensor, lambda handle: _dequantized(handle, func), (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVTensor:
        store = self._real_store("deepcopy")
        if id(store) not in memo:
            memo[id(store)] = store.copy()
            memo[id(memo[id(store)])] = memo[id(store)]
        made = KVTensor(memo[id(store)], self.role, self.shape[2])
        memo[id(self)] = made
        return made

    def __copy__(self) -> KVTensor:
        return KVTensor(self._real_store("copy"), self.role, self.shape[2])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MikvError("a compressed KV cache cannot be pickled; save what handle.dequantize() returns")


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
                raise _refused(name)
        with _compat.plain_functions():
            result = func(*args, **(kwargs or {}))

        def keep_views(value: torch.Tensor) -> torch.Tensor:
            return value.as_subclass(DequantizedView if value._base is not None else torch.Tensor)

        return _compat.tree_map_only(torch.Tensor, keep_views, result)


_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


def _dequantized(handle: KVTensor, func: Any) -> torch.Tensor:
    if handle.store is None:
        return _compat.fake_dense(handle)
    handle.store.count_fallback(str(func))
    log.info("%s reads a compressed cache: dequantized", func)
    return handle.dequantize()


def _refused(operation: str) -> MikvError:
    return MikvError(
        f"{operation} writes into a compressed KV cache outside a compiled call. Write before the cache is compressed, "
        "or replace the layer's tensors by handle.dequantize() first"
    )


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    """A write into dequantized values would be lost."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, KVTensor):
            raise _refused(str(func))
    if isinstance(kwargs.get("out"), KVTensor):
        raise _refused(str(func))


def _rebound(handle: KVTensor, store: LayerStore) -> KVTensor:
    return KVTensor(store, handle.role, handle.shape[2])


def _same(handle: KVTensor, *_: Any, **__: Any) -> KVTensor:
    return KVTensor(handle._real_store("alias"), handle.role, handle.shape[2])


def _clone(handle: KVTensor, **_: Any) -> KVTensor:
    store = handle._real_store("clone")
    return _rebound(handle, store.derive("clone", handle.role, store.copy))


def _index_select(handle: KVTensor, dim: int, index: torch.Tensor) -> KVTensor | None:
    """Beam search: reorder and select along the batch."""
    if dim not in (0, -4):
        return None
    store = handle._real_store("index_select")
    rows = index.to(store.device)
    rows = torch.where(rows < 0, rows + store.site.batch, rows)

    def make() -> LayerStore:
        return store.map(lambda b: b.index_select(0, rows), rows.shape[0], store.device)

    return _rebound(handle, store.derive(_identity(index), handle.role, make))


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
    first, *rest = indices
    if any(i is not None for i in rest) or first is None or first.dim() != 1:
        return None
    return _index_select(handle, 0, first.nonzero()[:, 0] if first.dtype == torch.bool else first)


def _slice(
    handle: KVTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> KVTensor | None:
    """Crop from the end, or a range of batch rows."""
    size = handle.shape[dim]
    start, end, _ = slice(start, end, step).indices(size)
    if start == 0 and end == size and step == 1:
        return _same(handle)
    store = handle._real_store("slice")
    if dim in (2, -2) and start == 0 and step == 1 and end > 0:
        return KVTensor(store, handle.role, end)
    if dim in (0, -4):
        rows = torch.arange(start, end, step, device=store.device)

        def make() -> LayerStore:
            return store.map(lambda b: b.index_select(0, rows), rows.shape[0], store.device)

        return _rebound(handle, store.derive(("rows", start, end, step), handle.role, make))
    return None


def _to_copy(handle: KVTensor, *, dtype: Any = None, device: Any = None, **_: Any) -> KVTensor | None:
    """Move to another device; a change of dtype needs the dense values."""
    if dtype not in (None, handle.dtype):
        return None
    store = handle._real_store("to")
    target = torch.device(device) if device is not None else store.device

    def make() -> LayerStore:
        return store.map(lambda b: b.to(target, copy=True), store.site.batch, target)

    return _rebound(handle, store.derive(("to", target), handle.role, make))


_HANDLED: dict[Any, Callable[..., KVTensor | None]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten._to_copy.default: _to_copy,
}
