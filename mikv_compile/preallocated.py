"""Preallocated caches: one tensor of a fixed size that the model keeps and writes into.

Two classes stand for such a tensor: :class:`PreallocatedKV`, into which :func:`take_over` turns a dense tensor in
place, and :class:`~mikv_compile.handle.KVTensor` with a ``capacity``, for caches that are born in a graph. Both follow
their store: columns 0, 1, ... show the tokens of :func:`followed_range`, and zeros lie behind them. The former may have
more rows than its store, as a model that allocates for its largest batch fills the first ones only; zeros are in the
others, and the store gets more rows once eager code writes something else there. Eager code sees what a dense tensor
would hold: reads dequantize (counted in ``store.fallbacks``), writes go to the store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

from mikv_compile import _compat
from mikv_compile.errors import MikvError
from mikv_compile.plan import LayerPlan
from mikv_compile.store import LayerStore, Role, from_layout, shape_in

log = logging.getLogger(__name__)
aten = torch.ops.aten

_compat.check_tensors_of_modules()  # a graph must not outlive the class of a tensor that it was compiled for


class Follower(Protocol):
    """A handle of a preallocated cache, of either class."""

    store: Any
    role: Role
    kv_layout: str

    @property
    def shape(self) -> torch.Size:
        """Of the dense tensor."""
        ...

    @property
    def range(self) -> tuple[int, int]:
        """Absolute positions that it shows."""
        ...


def followed_range(store: LayerStore, role: Role, capacity: int) -> tuple[int, int]:
    """Absolute positions [start, stop) that ``capacity`` columns show: the newest ones that are to be seen."""
    stop = store.end_of(role)
    return max(stop - capacity, min(store.start, stop)), stop


def padded(handle: Follower) -> torch.Tensor:
    """What the dense tensor would hold, in the handle's layout: its tokens, then zeros. A new tensor.

    Raises:
        EvictedTokensError: if the plan has evicted tokens.
    """
    start, stop = handle.range
    # An ordinary tensor even in inference mode: it counts the writes into it.
    with torch.inference_mode(False), torch.no_grad():
        dense = torch.zeros(handle.shape, dtype=handle.store.site.dtype, device=handle.store.device)
        if stop > start:
            tokens = handle.store.dequantize(handle.role, start, stop)
            from_layout(dense, handle.kv_layout)[: tokens.shape[0], :, : stop - start] = tokens
    return dense


# Writing -------------------------------------------------------------------------------------------------------------


def write_columns(handle: Follower, column: int, tokens: torch.Tensor) -> None:
    """Replace the columns from ``column`` on by tokens [B, H, T, D]; columns behind those stay as they are."""
    tokens = _in_rows(handle, tokens)
    start, stop = handle.range
    behind = start + column + tokens.shape[2]
    handle.store.for_writing(start + column)  # where that is a copy, the handle has moved on to it
    if behind < stop:
        handle.store.count_fallback("write in the middle")
        tokens = torch.cat([tokens, handle.store.dequantize(handle.role, behind, stop)], 2)
    handle.store.stage(handle.role, start + column, tokens)


def _in_rows(handle: Follower, tokens: torch.Tensor) -> torch.Tensor:
    """``tokens`` for the store's rows alone; those beyond hold zeros, or the store gets more rows first."""
    rows = handle.store.site.batch
    beyond = tokens[rows:].flatten(1).ne(0).any(1).nonzero()
    if beyond.numel():
        rows += int(beyond[-1]) + 1
        handle.store.widened(rows)  # the handle moves on to it
    return tokens[:rows]


def absorb(handle: Follower, dense: torch.Tensor) -> None:
    """Take over a changed dense form of the whole tensor."""
    start, stop = handle.range
    now, before = from_layout(dense, handle.kv_layout), from_layout(padded(handle), handle.kv_layout)
    same = (now == before) | (now.isnan() & before.isnan())
    changed = (~same).transpose(0, 2).flatten(1).any(1).nonzero()[:, 0]
    if not changed.numel():
        return
    first, last = int(changed[0]), int(changed[-1]) + 1
    write_columns(handle, first, now[:, :, first : max(last, stop - start)])


def _zero(handle: Follower) -> None:
    """Forget the tokens; the store is cleared when keys and values both have been."""
    store = handle.store
    if store.is_spoiled:
        store.clear()
        return
    start = handle.range[0]
    store.for_writing(start)
    handle.store.stage(handle.role, handle.store.start, _nothing(handle))


def _nothing(handle: Follower) -> torch.Tensor:
    store = handle.store
    return torch.empty(shape_in(store, handle.role, "BHTD", 0), dtype=store.site.dtype, device=store.device)


def _run_of(index: Any, size: int) -> tuple[int, int] | None:
    """(first, count) if an index along one dimension selects neighbours in ascending order, else None."""
    if isinstance(index, slice):
        first, stop, step = index.indices(size)
        return (first, max(stop - first, 0)) if step == 1 else None
    if isinstance(index, torch.Tensor):
        if index.dim() > 1 or index.dtype in (torch.bool, torch.uint8) or index.is_floating_point():
            return None
        chosen = index.reshape(-1).tolist()
    elif isinstance(index, int) and not isinstance(index, bool):
        chosen = [index]
    else:
        return None
    if not chosen:
        return 0, 0
    first = chosen[0] + size if chosen[0] < 0 else chosen[0]
    if first < 0 or first + len(chosen) > size or chosen != list(range(chosen[0], chosen[0] + len(chosen))):
        return None
    return (first, len(chosen)) if chosen[0] >= 0 or chosen[-1] < 0 else None


def _columns(handle: Follower, index: Any) -> tuple[int, int, bool] | None:
    """(first column, columns, one by number) if ``handle[index]`` is all of some neighbouring columns, else None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dims = len(handle.shape)
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (dims - len(parts) + 1)
    parts += [slice(None)] * (dims - len(parts))
    if len(parts) != dims:
        return None
    token_dim = handle.kv_layout.index("T")
    for dim, part in enumerate(parts):
        size = handle.shape[dim]
        if dim != token_dim and not (isinstance(part, slice) and part.indices(size) == (0, size, 1)):
            return None
    chosen = parts[token_dim]
    run = _run_of(chosen, handle.shape[token_dim])
    by_number = isinstance(chosen, int) or (isinstance(chosen, torch.Tensor) and not chosen.dim())
    return None if run is None else (*run, by_number)


def set_item(handle: Any, index: Any, value: Any) -> None:
    """``handle[index] = value``."""
    found = _columns(handle, index)
    if found is not None and _set_columns(handle, *found, value):
        return
    dense = _counted(handle, "setitem")
    dense[index] = value
    absorb(handle, dense)


def _set_columns(handle: Follower, first: int, count: int, by_number: bool, value: Any) -> bool:
    """Write ``value``, broadcast as setitem does, to whole columns; False if it does not fit."""
    dim = handle.kv_layout.index("T")
    shape = [count if i == dim else size for i, size in enumerate(handle.shape)]
    region = shape[:dim] + shape[dim + 1 :] if by_number else shape
    store = handle.store
    try:
        new = torch.as_tensor(value, dtype=store.site.dtype, device=store.device).expand(region)
    except (RuntimeError, TypeError, ValueError):
        return False
    if count:
        write_columns(handle, first, from_layout(new.reshape(shape), handle.kv_layout))
    return True


def _copy_into(view: PreallocatedView, value: Any) -> bool:
    """``view.copy_(value)``; False if the view is not all of some neighbouring columns."""
    return view.columns is not None and _set_columns(view.parent, *view.columns, by_number=False, value=value)


def _index_copy(handle: Any, dim: int, index: torch.Tensor, source: torch.Tensor) -> bool:
    """``handle.index_copy_(dim, index, source)``; False if it is not all of some neighbouring columns."""
    token_dim = handle.kv_layout.index("T")
    run = _run_of(index, handle.shape[token_dim]) if dim % len(handle.shape) == token_dim else None
    fits = [run[1] if run and i == token_dim else size for i, size in enumerate(handle.shape)]
    if run is None or list(source.shape) != fits or source.dtype != handle.dtype or (index < 0).any():
        return False
    if run[1]:
        write_columns(handle, run[0], from_layout(source, handle.kv_layout))
    return True


def _try_write(handle: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Writes that need no dense copy; False for all others."""
    if name == "zero_" or (name == "fill_" and args and not isinstance(args[0], torch.Tensor) and args[0] == 0):
        _zero(handle)
        return True
    if name == "index_copy_":
        given = {**dict(zip(("dim", "index", "source"), args, strict=False)), **kwargs}
        return len(given) == 3 and _index_copy(handle, **given)
    return False


def _counted(handle: Follower, operation: str) -> torch.Tensor:
    handle.store.count_fallback(operation)
    log.info("%s reads a compressed cache: dequantized", operation)
    return padded(handle)


# KVTensor with a capacity, below autograd ----------------------------------------------------------------------------


def write_through(func: Any, args: Any, kwargs: Any, written: list[Any]) -> Any:
    """An in-place operation of ``__torch_dispatch__`` on preallocated handles."""
    first = written[0]
    alone = first.store is not None and len(written) == 1 and args and args[0] is first
    if alone and _try_write(first, func._schema.name.split("::")[1], args[1:], kwargs):
        return first
    dense: dict[int, torch.Tensor] = {}

    def plain(handle: Any) -> torch.Tensor:
        if id(handle) not in dense:
            dense[id(handle)] = _compat.fake_dense(handle) if handle.store is None else _counted(handle, str(func))
        return dense[id(handle)]

    kind = type(first)
    plain_args, plain_kwargs = _compat.tree_map_only(kind, plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for handle in written:
        if handle.store is not None:
            absorb(handle, dense[id(handle)])
    known = {id(dense[id(handle)]): handle for handle in written}
    return _compat.tree_map_only(torch.Tensor, lambda t: known.get(id(t), t), result)


def view_of(handle: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """A view of a preallocated handle, of ``__torch_dispatch__``."""
    return _views(func, args, kwargs, func(_counted(handle, str(func)), *args[1:], **kwargs), handle)


# Eager operations on the classes below --------------------------------------------------------------------------------

_METADATA = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
     "is_floating_point", "is_complex", "is_signed", "is_tensor", "get_device", "__len__", "__hash__", "is_pinned",
     "is_shared", "is_inference", "_is_view", "is_same_size", "dim_order", "untyped_storage", "is_conj", "is_neg",
     "_is_zerotensor", "has_names", "_has_symbolic_sizes_strides")
)  # fmt: skip
"""Answered by the tensor object itself."""

_LOOKED_AT = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
"""Properties that are views; all other properties are metadata."""

_REFUSED = {
    "data_ptr": "there is no dense memory behind it",
    "storage": "there is no dense memory behind it",
    "_typed_storage": "there is no dense memory behind it",
    "__dlpack__": "there is no dense memory to share",
    "share_memory_": "there is no dense memory to share",
    "resize_": "its size is fixed",
    "resize_as_": "its size is fixed",
    "backward": "it has no gradients",
    "retain_grad": "it has no gradients",
    "register_hook": "it has no gradients",
}


def _refused(name: str, why: str) -> MikvError:
    return MikvError(f"{name} of a compressed KV cache: {why}; use cache.clone() of dense values, `cache + 0`, instead")


def _eager(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of eager code."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and attribute not in _LOOKED_AT:
            with _compat.plain_functions():
                return func(*args, **kwargs)
        if name == "__set__":
            _set_attribute(args[0], attribute, args[1])
            return None
    if name in _METADATA:
        with _compat.plain_functions():
            return func(*args, **kwargs)
    if name in _REFUSED:
        raise _refused(name, _REFUSED[name])
    first = args[0] if args else None
    if isinstance(first, PreallocatedKV):
        if _try_write(first, name, args[1:], kwargs):
            return first
        if name == "__setitem__":
            set_item(first, args[1], args[2])
            return None
        special = _COPIES.get(name)
        made = None if special is None else special(first, *args[1:], **kwargs)
        if made is not None:
            return made
    if isinstance(first, PreallocatedView) and name == "copy_" and len(args) > 1 and _copy_into(first, args[1]):
        return first
    return _on_dense(func, args, kwargs)


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run on dense values, and take over what was written into them."""
    parents: dict[int, tuple[Any, torch.Tensor]] = {}
    plains: list[tuple[Any, Any, torch.Tensor, int]] = []

    def dense_of(parent: Any) -> torch.Tensor:
        if id(parent) not in parents:
            parents[id(parent)] = parent, _counted(parent, getattr(func, "__name__", str(func)))
        return parents[id(parent)][1]

    def plain(seen: Any) -> torch.Tensor:
        if not isinstance(seen, PreallocatedKV | PreallocatedView):
            return seen
        for known, _, value, _ in plains:
            if known is seen:
                return value
        parent = seen.parent if isinstance(seen, PreallocatedView) else seen
        value = dense_of(parent)
        if isinstance(seen, PreallocatedView):
            value = seen.replay(value)
        plains.append((seen, parent, value, value._version))
        return value

    plain_args, plain_kwargs = _compat.tree_map_only(torch.Tensor, plain, (args, kwargs))
    shapes = {key: (dense.shape, dense.requires_grad) for key, (_, dense) in parents.items()}
    result = func(*plain_args, **plain_kwargs)
    for key, (_, dense) in parents.items():
        if (dense.shape, dense.requires_grad) != shapes[key]:
            raise _refused(getattr(func, "__name__", str(func)), "it changes more than values")
    written = {id(parent): parent for _, parent, value, version in plains if value._version != version}
    for key, parent in written.items():
        absorb(parent, parents[key][1])
    known = {id(value): seen for seen, _, value, _ in plains}
    if type(result).__module__ == "numpy" and hasattr(result, "flags"):
        result.flags.writeable = False  # what is written into a copy would be lost
    kept = _compat.tree_map_only(torch.Tensor, lambda t: known.get(id(t), t), result)
    if len(parents) != 1:
        return kept
    ((parent, dense),) = parents.values()
    return _views(func, args, kwargs, kept, parent, dense)


def _views(func: Any, args: Any, kwargs: Any, result: Any, parent: Any, dense: torch.Tensor | None = None) -> Any:
    """``result`` with tensors that share the dense values' memory turned into views that follow the parent."""
    flat, spec = _compat.tree_flatten(result)

    def replayed(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def replay(values: torch.Tensor) -> torch.Tensor:
            def swap(seen: Any) -> Any:
                if seen is parent:
                    return values
                return seen.replay(values) if isinstance(seen, PreallocatedView) and seen.parent is parent else seen

            new_args, new_kwargs = _compat.tree_map_only(torch.Tensor, swap, (args, kwargs))
            return _compat.tree_flatten(func(*new_args, **new_kwargs))[0][i]

        return replay

    for i, item in enumerate(flat):
        if not isinstance(item, torch.Tensor) or isinstance(item, PreallocatedKV | PreallocatedView) or item is parent:
            continue
        if dense is not None and not (item.numel() and _compat.shares_storage(item, dense)):
            continue
        view = item.as_subclass(PreallocatedView)
        view.parent, view.replay, view.columns = parent, replayed(i), _sliced(func, args, kwargs, parent)
        flat[i] = view
    return _compat.tree_unflatten(flat, spec)


def _sliced(func: Any, args: Any, kwargs: Any, parent: Any) -> tuple[int, int] | None:
    """(first, count) if a view is all of some columns of its parent."""
    name = getattr(func, "__name__", "")
    if kwargs or not args or args[0] is not parent:
        return None
    dim = parent.kv_layout.index("T")
    if name == "__getitem__":
        found = _columns(parent, args[1])
        return None if found is None or found[2] else found[:2]
    if name == "narrow" and args[1] % len(parent.shape) == dim and isinstance(args[2], int):
        return args[2] % max(parent.shape[dim], 1), args[3]
    return None


def _set_attribute(tensor: Any, attribute: str, value: Any) -> None:
    if attribute == "data" and isinstance(value, torch.Tensor) and value.shape == tensor.shape:
        tensor.copy_(value)
    elif not (attribute == "grad" and value is None) and not (attribute == "requires_grad" and not value):
        raise _refused(f"setting {attribute}", "this attribute is fixed")


def _batch_copy(
    handle: PreallocatedKV, key: object, make: Callable[[], LayerStore], rows: int | None = None
) -> PreallocatedKV:
    store = handle.store.derive(key, handle.role, make)
    return make_preallocated(store, handle.role, handle.kv_layout, handle.capacity, rows)


def _is_batch(handle: PreallocatedKV, dim: Any) -> bool:
    """Whether ``dim`` is that of the batch, all of whose rows the store has."""
    batch = handle.kv_layout.index("B")
    return isinstance(dim, int) and dim % len(handle.shape) == batch and handle.rows == handle.store.site.batch


def _clone(handle: PreallocatedKV, **_: Any) -> PreallocatedKV:
    return _batch_copy(handle, "clone", handle.store.copy, handle.rows)


def _index_select(handle: PreallocatedKV, dim: int, index: torch.Tensor) -> PreallocatedKV | None:
    """Beam search: reorder and select along the batch."""
    if not _is_batch(handle, dim) or not isinstance(index, torch.Tensor):
        return None
    store, rows = handle.store, index.to(handle.store.device).reshape(-1)
    key = ("index", *index.tolist()) if index.device.type == "cpu" and index.dim() else object()
    return _batch_copy(handle, key, lambda: store.map(lambda b: b.index_select(0, rows), len(rows), store.device))


def _repeat_interleave(
    handle: PreallocatedKV, repeats: Any = None, dim: Any = None, **kwargs: Any
) -> PreallocatedKV | None:
    if not _is_batch(handle, dim) or not isinstance(repeats, int) or kwargs:
        return None
    store = handle.store

    def make() -> LayerStore:
        return store.map(lambda b: b.repeat_interleave(repeats, dim=0), store.site.batch * repeats, store.device)

    return _batch_copy(handle, ("repeat", repeats), make)


def _to(handle: PreallocatedKV, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor | None:
    """Move to another device; a change of dtype needs the dense values."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    if len(args) > 3:
        return None
    device, dtype, _, memory_format = _compat.parse_to(*args, **kwargs)
    if memory_format not in (None, torch.preserve_format) or dtype not in (None, handle.dtype):
        return None
    store = handle.store
    target = store.device if device is None else device
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if target.type == "meta":
        return torch.empty(handle.shape, dtype=handle.dtype, device=target)  # nothing there can be read
    if target == store.device and not copy:
        return handle

    def make() -> LayerStore:
        return store.map(lambda b: b.to(target, copy=True), store.site.batch, target)

    return _batch_copy(handle, ("to", target), make, handle.rows)


_COPIES: dict[str, Callable[..., torch.Tensor | None]] = {
    "clone": _clone,
    "index_select": _index_select,
    "repeat_interleave": _repeat_interleave,
    "to": _to,
    "cpu": lambda handle, **_: _to(handle, "cpu"),
    "cuda": lambda handle, device=None, **_: _to(handle, "cuda" if device is None else device),
}


_eager_untraced = _compat.untraced(
    _eager, "it touches a compressed KV cache, which only graphs compiled with backend='mikv' can do"
)


class PreallocatedKV(torch.Tensor):
    """A preallocated cache tensor that was taken over in place: same object, shape, strides, dtype, device; no memory.

    A compiler sees the plain operations on it; eager code sees what the dense tensor would hold. Each plan, role and
    layout has a subclass: Dynamo guards on the class, so no graph meets a store of another plan.
    """

    _store: LayerStore
    role: Role
    kv_layout: str
    is_preallocated = True
    known: tuple[LayerPlan, Role, str]
    """Plan, role and layout, of the class: a graph knows them by its placeholder's type."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Where Dynamo traces this method, the graph gets the plain operation.
        if _compat.is_traced() and not _compat.must_run_eagerly():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _eager_untraced(func, args, kwargs)

    @property
    def store(self) -> LayerStore:
        """The layer's store."""
        return self._store

    @store.setter
    def store(self, store: LayerStore) -> None:
        self._store = store
        self.__class__ = _class_for(store.plan, self.role, self.kv_layout)

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan."""
        return self.store.plan

    @property
    def capacity(self) -> int:
        """Size of the token dimension."""
        return self.shape[self.kv_layout.index("T")]

    @property
    def rows(self) -> int:
        """Size of the batch dimension; the store may have fewer rows."""
        return self.shape[self.kv_layout.index("B")]

    @property
    def range(self) -> tuple[int, int]:
        """Absolute positions (start, stop) of the tokens that it shows, from column 0 on."""
        return followed_range(self.store, self.role, self.capacity)

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        """The dense tensor, with zeros behind the last token and the last row of the store.

        Raises:
            EvictedTokensError: if the plan has evicted tokens.
        """
        return padded(self)

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Refused; torch does not show this method to ``__torch_function__``."""
        raise _refused("set_", "its memory cannot be replaced")

    def __deepcopy__(self, memo: dict[int, Any]) -> PreallocatedKV:
        store = self.store
        if id(store) not in memo:
            memo[id(store)] = store.copy()
            memo[id(memo[id(store)])] = memo[id(store)]
        made = make_preallocated(memo[id(store)], self.role, self.kv_layout, self.capacity, self.rows)
        memo[id(self)] = made
        return made

    def __copy__(self) -> PreallocatedKV:
        return make_preallocated(self.store, self.role, self.kv_layout, self.capacity, self.rows)


@cache
def _class_for(plan: LayerPlan, role: Role, layout: str) -> type[PreallocatedKV]:
    about = {"__module__": __name__, "__doc__": PreallocatedKV.__doc__, "known": (plan, role, layout)}
    return type("PreallocatedKV", (PreallocatedKV,), about)


class PreallocatedView(torch.Tensor):
    """A view of a preallocated cache: it is computed again whenever it is used, and what is written into it arrives."""

    parent: Any
    replay: Callable[[torch.Tensor], torch.Tensor]
    columns: tuple[int, int] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _compat.is_traced() and not _compat.must_run_eagerly():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _eager_untraced(func, args, kwargs)

    def _is_view(self) -> bool:
        """Never for a compiler: it would look for a base that holds the values."""
        return False


# Making them ---------------------------------------------------------------------------------------------------------


def take_over(tensor: torch.Tensor, store: LayerStore, role: Role, layout: str = "BHTD") -> PreallocatedKV:
    """Turn a dense preallocated cache into a handle of a store, in place. Its values are gone, its memory is free.

    Whoever holds the tensor object (a cache object, a module's buffers) holds the handle afterwards. The storage
    shrinks to nothing and shape and strides stay, so graphs that were compiled for the tensor are compiled again once,
    for its class, and fake tensors made of it behave as before.

    Args:
        tensor: in ``layout``; an earlier handle moves to ``store``. It may have more rows than the store, which are
            zeros from then on.
        store: what it shows from now on.

    Raises:
        MikvError: if its size, dtype or device are not those of the store, or other tensors share its memory.
    """
    if not isinstance(tensor, PreallocatedKV) and type(tensor) is not torch.Tensor:
        raise MikvError(f"only plain tensors can be taken over, not {type(tensor).__name__}")
    wanted = None
    if tensor.dim() == len(layout):
        rows = max(store.site.batch, tensor.shape[layout.index("B")])
        wanted = shape_in(store, role, layout, tensor.shape[layout.index("T")], rows)
    if wanted != tuple(tensor.shape) or (tensor.dtype, tensor.device) != (store.site.dtype, store.device):
        raise MikvError(
            f"a cache tensor {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} in layout {layout} does not "
            f"belong to a store of {wanted} {store.site.dtype} on {store.device}"
        )
    if not isinstance(tensor, PreallocatedKV):
        if tensor.requires_grad:
            raise MikvError("a cache tensor that requires gradients cannot be taken over")
        if tensor.layout is not torch.strided or _compat.storage_is_shared(tensor):
            raise MikvError("the memory of a cache tensor is shared with other tensors, so it cannot be taken over")
    storage = tensor.untyped_storage() if not isinstance(tensor, PreallocatedKV) else None
    # The class comes last, so that an interrupt leaves either a dense tensor or a whole handle.
    tensor.__dict__.update(role=role, kv_layout=layout, _store=store)
    tensor.__class__ = _class_for(store.plan, role, layout)
    assert isinstance(tensor, PreallocatedKV)
    store.register(tensor)
    if storage is not None:
        storage.resize_(0)
    return tensor


def give_back(tensor: torch.Tensor) -> None:
    """Turn a taken-over tensor into the dense one that it stands for, in place, and leave it dense from now on."""
    if isinstance(tensor, PreallocatedKV):
        store, dense = tensor.store, padded(tensor)
        offset, strides = tensor.storage_offset(), tensor.stride()
        last = int(offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)))
        storage = tensor.untyped_storage()
        storage.resize_(int(last + 1) * dense.itemsize if dense.numel() else 0)
        # By a plain tensor in the same memory: this one is a handle until its memory holds the values, so that an
        # interrupt leaves either a whole handle or a dense tensor.
        plain = torch.empty(0, dtype=dense.dtype, device=dense.device)
        plain.set_(storage, offset, tensor.shape, strides).copy_(dense)
        tensor.__class__ = torch.Tensor  # type: ignore[assignment]
        store.forget(tensor)
        for name in ("_store", "role", "kv_layout"):
            tensor.__dict__.pop(name, None)
    tensor._mikv_stays_dense = True  # type: ignore[attr-defined]


def stays_dense(tensor: object) -> bool:
    """Whether a tensor was given back."""
    return getattr(tensor, "_mikv_stays_dense", False)


def make_preallocated(
    store: LayerStore, role: Role, layout: str, capacity: int, rows: int | None = None
) -> PreallocatedKV:
    """A new handle of a preallocated cache; ``rows`` if it has more of them than the store."""
    with torch.inference_mode(False):
        shape = shape_in(store, role, layout, capacity, rows)
        return take_over(torch.empty(shape, dtype=store.site.dtype, device=store.device), store, role, layout)
