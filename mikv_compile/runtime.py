"""The callable around a rewritten graph: handles to buffers before the call, buffers to handles after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mikv_compile.errors import CannotServe, MikvError
from mikv_compile.handle import KVTensor
from mikv_compile.kernels.formats import Orders
from mikv_compile.kernels.masks import StaleColumnsError
from mikv_compile.kernels.store_ops import compress
from mikv_compile.passes import RewrittenSite
from mikv_compile.plan import CacheShape, LayerPlan
from mikv_compile.preallocated import PreallocatedKV, absorb, give_back, stays_dense, take_over
from mikv_compile.store import Checkpoint, LayerStore, Role, from_layout

log = logging.getLogger(__name__)

Reader = Callable[[Sequence[Any]], int]
Handle = KVTensor | PreallocatedKV


@dataclass(frozen=True)
class SiteCall:
    """What the callable has to know of a rewritten site."""

    rewritten: RewrittenSite
    plan: LayerPlan
    batch: Reader
    new_tokens: Reader
    first: Reader
    """The first column of the past that the call sees; may be negative."""
    position: Callable[[Sequence[Any], int], int] | None
    """The column that the new tokens go to, given their number; None: behind the past's last one."""
    capacity: Reader | None
    """Columns of a preallocated cache; None for one that grows."""
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    layers: int

    @cached_property
    def appends(self) -> bool:
        """Whether the site's cache grows by what the call brings, and nothing of it is dropped."""
        update = self.rewritten.site.key
        whole = type(update.first) is int and update.first == 0 and update.keep is None and not update.tail
        grows = update.kind == "cat" and self.position is None and self.capacity is None
        return grows and whole and not self.rewritten.fills

    @property
    def layout(self) -> str:
        """What the dimensions of the cached tensors are."""
        return self.rewritten.site.key.layout

    @property
    def keep(self) -> int | None:
        """How many of the newest tokens stay cached; None: all."""
        keep = self.rewritten.site.key.keep
        return None if keep is None else int(keep)

    def shape(self, args: Sequence[Any]) -> CacheShape:
        """B, H_kv and head dimensions of this call."""
        return CacheShape(self.batch(args), self.kv_heads, self.key_dim, self.value_dim, self.dtype, self.layers)

    def pasts(self, args: Sequence[Any]) -> tuple[Any, Any]:
        """The cached keys and values of this call; None where they are born."""
        key, value = self.rewritten.key_input, self.rewritten.value_input
        return (None, None) if key is None or value is None else (args[key], args[value])


@dataclass
class _Step:
    """One site in one call."""

    site: SiteCall
    store: LayerStore
    orders: Orders
    new: int
    """Tokens that the store gets."""
    past: tuple[Any, Any]
    capacity: int | None = None
    """Columns of a preallocated cache."""
    before: LayerStore | None = None
    """The store with the tokens that this call drops, if it turns out to see them."""
    late: bool = False
    """The dense tensors are handed over after the call, as it may turn out to see what they hold behind its tokens."""
    undo: Checkpoint | None = None
    """What makes the store what it was if the call fails; None if nothing can."""
    counts: tuple[int, ...] | None = None
    """Tokens per tier afterwards, where the call only appends to a growing cache; see :class:`_Appends`."""


class _Appends:
    """The common case: one call after another on growing caches. Layers of one plan and length get the same orders."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, tuple[int, ...], int], tuple[Orders, tuple[int, ...]]] = {}

    def prepare(self, site: SiteCall, args: Sequence[Any]) -> _Step | None:
        """The step of a site, or None if its case is not that simple. Nothing has changed then."""
        if not site.appends:
            return None
        key, value = site.pasts(args)
        if type(key) is not KVTensor or type(value) is not KVTensor:
            return None
        store = key.store
        if store is None or value.store is not store or not store.ends_with(key, value):
            return None
        if store.site.batch != site.batch(args) or not store.length:
            return None
        new = site.new_tokens(args)
        at = (id(store.plan), store.length, store.counts, new)
        known = self._found.get(at)
        if known is None:
            orders = store.plan.step(store.length, store.counts, new)
            known = self._found[at] = orders, (store.counts[0] + new, *store.counts[1:])
        orders, counts = known
        if orders.victims:
            return None
        store.make_room(counts)
        return _Step(site, store, orders, new, (key, value), counts=counts)


class CompressedGraph:
    """Calls a rewritten graph with the buffers of its sites' stores, and returns handles in place of dense caches."""

    def __init__(
        self,
        function: Callable[..., Any],
        original: Callable[..., Any],
        kept_inputs: list[int],
        written_inputs: Sequence[int],
        asked_inputs: Sequence[int],
        sites: list[SiteCall],
    ) -> None:
        """Make the callable.

        Args:
            function: the rewritten graph, compiled.
            original: the graph as it was, for arguments that the rewritten one cannot serve.
            kept_inputs: positions of the original's inputs that the rewritten graph still takes.
            written_inputs: positions of the inputs that the original writes in place.
            asked_inputs: positions of the inputs of which only sizes are read.
            sites: the rewritten sites, in the order of their buffers.
        """
        self._function, self._original = function, original
        self._kept, self._written, self._asked = kept_inputs, frozenset(written_inputs), frozenset(asked_inputs)
        self._sites = sites
        self._warned = False

    @property
    def sites(self) -> list[SiteCall]:
        """The rewritten sites."""
        return self._sites

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph on Dynamo's arguments; the caller's handles stay as they were until it has succeeded."""
        appends = _Appends()
        try:
            steps = [appends.prepare(site, args) or self._prepare(site, args) for site in self._sites]
        except CannotServe as reason:
            return self._run_original(args, reason)
        inputs = [_shaped(args[i]) if i in self._asked else _dense(args[i]) for i in self._kept]
        dense = dict(zip(self._kept, inputs, strict=True))
        encoded: dict[Orders, torch.Tensor] = {}
        for step in steps:
            if step.orders not in encoded:
                encoded[step.orders] = step.orders.encode()
            inputs += [*step.store.buffers, encoded[step.orders]]
        for step in steps:
            step.undo = step.store.checkpoint(step.orders, step.new)
        strict = any(step.orders.stale for step in steps)
        written = {i: dense[i].clone() for i in self._written & dense.keys()} if strict else {}
        try:
            outputs = list(self._function(*inputs))
            for step in steps:
                _commit(step, outputs)
            self._write_back(args, dense)
            return tuple(outputs)
        except StaleColumnsError:
            _abandon([step for step in steps if step.before is None and not step.late])
            for step in steps:
                _keep_dense(step)
            for i, value in written.items():  # the graph runs again from the start
                dense[i].copy_(value)
            return self._run_original(args, CannotServe(_RING))
        except BaseException:
            _abandon(steps)
            raise

    def _prepare(self, site: SiteCall, args: Sequence[Any]) -> _Step:
        new = site.new_tokens(args)
        past = site.pasts(args)
        if site.rewritten.site.key.kind == "read":
            return _only_read(site, *past)
        _check_rows(site, *past, args)
        stale, before = 0, None
        if site.rewritten.fills:
            if site.position is not None and site.position(args, new) != 0:
                raise CannotServe("a cache that is allocated in this call is not filled from its start")
            new = new if site.keep is None else min(new, site.keep)
            store, seen = _emptied(site, *past, args), 0
        elif isinstance(past[0], Handle) and isinstance(past[1], Handle):
            _check_lengths(*past)
            stale = _stale_columns(site, past, args, new)
            before = past[0].store if stale else None
            store, seen = _continued(site, *past, args, new)
        else:
            stale = _stale_columns(site, past, args, new)
            store, seen = _compressed(site, *past, args, new), 0
        late = before is None and stale > 0
        if site.rewritten.site.key.written is not None and past[0] is not None and not late:
            _hand_over(past, store, site.layout)
        capacity = None if site.capacity is None else site.capacity(args)
        orders = store.prepare(new, seen, fresh=True)._replace(stale=stale)
        return _Step(site, store, orders, new, past, capacity, before, late)

    def _run_original(self, args: Sequence[Any], reason: CannotServe) -> tuple[Any, ...]:
        """Run the graph as it was, on dense tensors; preallocated caches take back what it wrote."""
        if not self._warned:
            log.warning("a call runs as the model wrote it: %s", reason)
            self._warned = True
        dense = {i: _dense(value) for i, value in enumerate(args)}
        outputs = self._original(*dense.values())
        self._write_back(args, dense)
        return tuple(outputs)

    def _write_back(self, args: Sequence[Any], dense: dict[int, Any]) -> None:
        for i in self._written & dense.keys():
            if isinstance(args[i], Handle) and args[i] is not dense[i]:
                absorb(args[i], dense[i])  # not copy_: torch calls backends with __torch_function__ off


def _commit(step: _Step, outputs: list[Any]) -> None:
    """Take over what the graph did to a store, and put its handles where the dense cache was returned."""
    site, store = step.site, step.store
    if step.counts is not None:
        store.advance(step.orders, step.counts, step.new)
        rewritten = site.rewritten
        for past, places in zip(step.past, (rewritten.key_outputs, rewritten.value_outputs), strict=True):
            for place in places:
                outputs[place] = past.grown()
        return
    if site.rewritten.site.key.kind == "read":
        return
    if step.late:
        _hand_over(step.past, store, site.layout)
    store.commit(step.orders, step.new)
    start = store.base + step.orders.first
    if site.keep is not None:
        start = max(start, store.end - site.keep)
    in_place = site.rewritten.site.key.written is not None and step.past[0] is not None
    positions = (site.rewritten.key_outputs, site.rewritten.value_outputs)
    for role, past, places in zip(_ROLES, step.past, positions, strict=True):
        for place in places:
            if in_place:
                outputs[place] = past
            elif site.rewritten.site.key.written is not None:
                outputs[place] = KVTensor(store, role, site.layout, capacity=step.capacity)
            elif step.capacity is not None:  # a changed copy: the one before goes on showing what it showed
                outputs[place] = KVTensor(store, role, site.layout, start, store.end, step.capacity)
            else:
                outputs[place] = KVTensor(store, role, site.layout, start)


_ROLES: tuple[Role, Role] = ("key", "value")

_RING = (
    "columns behind the new tokens hold older ones that attention sees, as in a ring buffer; the cache stays dense. "
    "Zero it before it is used again, or hide those columns by the mask"
)


def _check_lengths(key: Handle, value: Handle) -> None:
    """Leave a preallocated cache dense whose keys and values eager code has filled to different columns."""
    if isinstance(key, PreallocatedKV) and isinstance(value, PreallocatedKV):
        lengths = [handle.range[1] - handle.range[0] for handle in (key, value)]
        if lengths[0] != lengths[1]:
            give_back(key)
            give_back(value)
            raise CannotServe(
                f"keys were written up to column {lengths[0]} and values up to {lengths[1]}; both go dense"
            )


def _stale_columns(site: SiteCall, past: tuple[Any, Any], args: Sequence[Any], new: int) -> int:
    """How many columns behind the new tokens hold older ones that attention may see.

    Raises:
        CannotServe: if nothing tells whether it does.
    """
    update, reads = site.rewritten.site.key, site.rewritten.site.reads
    if not update.tail or (reads and not any(read.whole for read in reads)):
        return 0
    if any(map(stays_dense, past)):
        raise CannotServe(_RING)
    if isinstance(past[0], Handle):
        start, end = past[0].range
        stale = end - start - _columns(site, args, end - start, new)[1] - new
    else:
        dim = site.layout.index("T")
        behind = _columns(site, args, past[0].shape[dim], new)[1] + new
        rest = [x.narrow(dim, behind, x.shape[dim] - behind) for x in past]
        stale = rest[0].shape[dim] if any(bool(x.any()) for x in rest) else 0
    if stale > 0 and not reads:
        # Nothing tells what the model sees of them, so it gets them: exact, but each such call compresses again.
        raise CannotServe("columns behind the new tokens hold older ones, and the model reads the cache densely")
    return max(stale, 0)


def _keep_dense(step: _Step) -> None:
    """Undo what a call has done to a cache of which it saw columns that were dropped, and leave that cache dense."""
    if step.before is None and not step.late:
        return
    for tensor in step.past:
        if step.before is not None:
            tensor.store = step.before
            step.before.register(tensor)
        if not isinstance(tensor, KVTensor):
            give_back(tensor)


def _hand_over(past: tuple[Any, Any], store: LayerStore, layout: str) -> None:
    """Let the preallocated tensors that the model keeps show `store`; dense ones give their memory back."""
    for tensor, role in zip(past, _ROLES, strict=True):
        if not isinstance(tensor, Handle):
            try:
                take_over(tensor, store, role, layout)
            except MikvError as reason:
                raise CannotServe(str(reason)) from reason
        elif tensor.store is not store:
            tensor.store = store
            store.register(tensor)


def _emptied(site: SiteCall, key: Any, value: Any, args: Sequence[Any]) -> LayerStore:
    """An empty store: a new one, or that of a preallocated cache that the call fills from its start."""
    if not (isinstance(key, Handle) and isinstance(value, Handle)):
        return LayerStore(site.plan, site.shape(args), site.device)
    store = _joined(key, value)
    return store.for_writing(key.range[0]).emptied(site.shape(args))


def _check_rows(site: SiteCall, key: Any, value: Any, args: Sequence[Any]) -> None:
    """Where a cache has more rows than the call writes, the store will not have them: they must hold nothing.

    Two handles that were taken over may have anything there if the call begins anew; see :func:`_continued`.
    """
    rows, dim = site.batch(args), site.layout.index("B")
    both = isinstance(key, PreallocatedKV) and isinstance(value, PreallocatedKV)
    for past in (key, value):
        if past is None or past.shape[dim] == rows or both:
            continue
        if isinstance(past, Handle):
            raise CannotServe(f"{rows} rows are written into a compressed cache of {past.shape[dim]}")
        if past.narrow(dim, rows, past.shape[dim] - rows).any():
            raise CannotServe(f"the cache holds something in the rows behind the first {rows}, which the call writes")


def _dense(value: Any) -> Any:
    """A handle whose site was declined is read as the dense tensor that it stands for."""
    if not isinstance(value, Handle) or value.store is None:
        return value
    value.store.count_fallback("declined site")
    return value.dequantize()


def _shaped(value: Any) -> Any:
    """In place of a handle of which only sizes are read: a tensor that looks alike and holds nothing."""
    if not isinstance(value, Handle):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _columns(site: SiteCall, args: Sequence[Any], visible: int, new: int) -> tuple[int, int]:
    """The columns of the past that the call sees: `[first, stop)`, with the new tokens at `stop`."""
    # Where the model reads the past densely, it drops columns itself.
    first = site.first(args) if site.rewritten.site.reads else 0
    stop = visible if site.position is None else site.position(args, new)
    columns = visible if site.capacity is None else site.capacity(args)
    stop = max(stop + columns, 0) if stop < 0 else stop
    first = max(first + columns, 0) if first < 0 else first
    if site.capacity is not None and site.keep is None and stop + new > columns:
        raise MikvError(
            f"{new} tokens are written at column {stop} of a cache of {columns}; make the cache larger, or the "
            "prompt shorter"
        )
    return min(first, stop), stop


def _continued(site: SiteCall, key: Handle, value: Handle, args: Sequence[Any], new: int) -> tuple[LayerStore, int]:
    """The store that a call appends to, holding exactly the past that it sees, and the position that is seen first."""
    store = _joined(key, value)
    start, end = key.range
    first, stop = _columns(site, args, end - start, new)
    if store.site.batch != site.batch(args):
        if stop != 0 or site.capacity is None:
            raise CannotServe(f"{site.batch(args)} rows are written into a cache that holds {store.site.batch}")
        store = store.emptied(site.shape(args))
    elif site.capacity is None:
        store = store.continued_from((key, value))  # type: ignore[arg-type]
    elif site.rewritten.site.key.written is None and start + stop <= end:
        drops = start + stop < end
        store = store.copy() if drops else store.continued_from((key, value))  # type: ignore[arg-type]
        store.crop(start + stop - store.base)
    elif start + stop != end:
        drops = start + stop < end
        # The call may turn out to see what is dropped here: the store as it was must not change.
        store = store.moved_on() if drops else store.for_writing(start + stop)
        if stop == 0:
            store.clear()
        elif start + stop < end:
            store.crop(start + stop - store.base)
        else:  # columns between are as the model allocated them
            s = store.site
            gap = [torch.zeros(s.batch, s.kv_heads, start + stop - end, d) for d in (s.key_dim, s.value_dim)]
            store.append(*(x.to(store.device, s.dtype) for x in gap))
    else:
        store = store.for_writing(end)
    if stop == 0:
        start = store.start
    store.drop_before(start + first)
    return store, max(start + first - store.base, 0)


def _only_read(site: SiteCall, key: Any, value: Any) -> _Step:
    """A call that reads the cache and appends nothing."""
    store = _joined(key, value)
    store.check_usable()
    store.settle()
    start, end = key.range
    if end != store.end or key.shape[key.kv_layout.index("T")] != end - start:
        raise CannotServe("the call reads a part of what the cache holds")
    if key.shape[key.kv_layout.index("B")] != store.site.batch:
        raise CannotServe("the call reads rows that the cache does not hold")
    moves = (0,) * (len(store.counts) - 1)
    orders = Orders(store.length, 0, 0, store.counts, 0, moves, first=start - store.base)
    return _Step(site, store, orders, 0, (key, value))


def _joined(key: Handle, value: Handle) -> LayerStore:
    """The one store behind two handles."""
    assert key.store is not None and value.store is not None
    if key.range[1] - key.range[0] != value.range[1] - value.range[0]:
        raise MikvError(
            f"a layer's keys have {key.range[1] - key.range[0]} tokens and its values "
            f"{value.range[1] - value.range[0]}; crop both to the same length"
        )
    if key.store is value.store and key.range == value.range:
        return key.store
    # Keys and values went different ways, such as a copy of one of them.
    joined = key.store.joined(value.store) if key.range == value.range else None
    if joined is None:
        shape = max((key.store.site, value.store.site), key=lambda site: site.batch)
        k, v = (from_layout(_shown(handle), handle.kv_layout)[: shape.batch] for handle in (key, value))
        joined = _filled(key.store.plan, shape, k, v)
        joined.count_fallback("keys and values of different stores")
    return joined


def _shown(handle: Handle) -> torch.Tensor:
    """The dense tokens that a handle shows, without the unwritten columns of a preallocated cache."""
    start, end = handle.range
    return handle.dequantize().narrow(handle.kv_layout.index("T"), 0, end - start)


def _compressed(site: SiteCall, key: Any, value: Any, args: Sequence[Any], new: int) -> LayerStore:
    """A store filled from a dense cache that was made elsewhere. Without queries, the newest tokens count most."""
    token_dim = site.layout.index("T")
    first, stop = _columns(site, args, key.shape[token_dim], new)
    seen = stop - first
    if seen and site.plan.evicts:
        raise CannotServe(
            "the cache was filled before this call without scores, and the plan evicts; let the compiled model read "
            "the prompt as well, or choose a plan that keeps all tokens"
        )
    shape = site.shape(args)
    k, v = (from_layout(_plain(x).narrow(token_dim, first, seen), site.layout)[: shape.batch] for x in (key, value))
    return _filled(site.plan, shape, k, v)


def _plain(value: Any) -> torch.Tensor:
    return _dense(value).detach()


def _filled(plan: LayerPlan, shape: CacheShape, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
    """A new store of dense keys and values `[B, H, T, D]`, as if they were a prompt without scores."""
    length = key.shape[2]
    orders = plan.fill(length)
    store = LayerStore(plan, shape, key.device, orders.counts)
    if length:
        scores = torch.zeros(key.shape[:3], device=key.device)
        # The keys stand in for the queries: the balancer becomes 1.
        compress(key, key, value, scores, store.typed(), plan.format, orders)
        store.filled(orders, length)
    return store


def _abandon(steps: Sequence[_Step]) -> None:
    """A call failed: what it has appended is forgotten; where it may have moved tokens, the store is unusable."""
    for step in steps:
        step.store.roll_back(step.undo)
