"""The compressed keys and values of one layer, behind its two handles."""

from __future__ import annotations

import contextlib
import logging
import operator
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from mikv_compile.errors import EvictedTokensError, MikvError, UnusableCacheError
from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.formats import BUFFERS_PER_TIER, Orders, StoreBuffers, TierBuffers, buffer_shapes
from mikv_compile.kernels.ranking import unobserved
from mikv_compile.kernels.rotation import as_given
from mikv_compile.kernels.store_ops import append, compress
from mikv_compile.plan import SLOT_STEP, CacheShape, LayerPlan

if TYPE_CHECKING:
    from mikv_compile.handle import KVTensor
    from mikv_compile.preallocated import PreallocatedKV

log = logging.getLogger(__name__)

Role = Literal["key", "value"]

DROP_STEP = 64
"""Tokens leave a store's front at least this many at a time."""

INTERRUPTED = (
    "an error interrupted the step that was moving this cache's tokens between tiers, so it may hold half of a step; "
    "start again from the prompt"
)


def _follows(handle: KVTensor | PreallocatedKV) -> bool:
    """Whether a handle shows whatever its store holds, instead of the same tokens forever."""
    return handle.is_preallocated and getattr(handle, "_range", None) is None


class Bookkeeping(NamedTuple):
    """What a store knows of its buffers, apart from plan and sizes; names are those of :class:`LayerStore`."""

    base: int
    start: int
    length: int
    counts: tuple[int, ...]
    exact_from: int
    """Tokens from this position on, relative to ``base``, are in tier 0 of every (batch row, KV head)."""
    recycled: tuple[int, int]
    """What may be overwritten of the last tier; see :meth:`~mikv_compile.plan.LayerPlan.recycling`."""


class Checkpoint(NamedTuple):
    """What a call that only appends changes of a store: new tokens lie behind the used slots."""

    counts: tuple[int, ...]
    length: int
    exact_from: int
    recycled: tuple[int, int]
    scores: torch.Tensor | None
    """[B, H_kv, counts[0]], where the call's attention adds to them."""


class LayerStore:
    """Rectangular tiers of one layer: every (batch row, KV head) holds the same number of tokens in a tier.

    Attributes:
        plan: what is kept; see :class:`~mikv_compile.plan.LayerPlan`.
        site: B, H_kv, head dimensions and dtype of the dense cache that this stands for.
        buffers: flat list as in :func:`~mikv_compile.kernels.formats.buffer_names`.
        base: absolute position of the first token that is physically kept. The buffers' positions, ``length`` and
            ``counts`` are relative to it; handles and the methods that take positions use absolute ones.
        start: absolute position of the first token that is still meant to be seen; ``base <= start``.
        length: tokens seen. counts: slots in use per tier; ``length - sum(counts)`` tokens were evicted.
        recompressed: times that cropping had to read and compress the tokens again.
        fallbacks: times that something read the dense cache, by operation.
    """

    def __init__(self, plan: LayerPlan, site: CacheShape, device: torch.device, counts: tuple[int, ...] | None = None):
        self.plan, self.site, self.device = plan, site, device
        self.base = self.start = 0
        self.length = 0
        self.counts = (0,) * len(plan.tiers)
        self.fallbacks: dict[str, int] = {}
        self.recompressed = 0
        self.untouched = False
        self.changes = 0
        self._spoiled: str | None = None
        self._handles: dict[int, weakref.ref[KVTensor | PreallocatedKV]] = {}
        self._derived: tuple[object, Role, weakref.ref[LayerStore]] | None = None
        self._exact_from = 0
        self._recycled = (-1, 0)
        self._pending: dict[Role, tuple[int, torch.Tensor]] = {}
        self.capacities = plan.capacities(counts or self.counts)
        self.buffers = self._allocate(self.capacities)
        # Dynamo needs one real tensor to look at; a handle shows this one instead of all buffers, so that guards stay
        # few and growing a tier recompiles nothing.
        self.anchor = torch.empty(0, device=device)

    def _allocate(self, capacities: tuple[int, ...]) -> list[torch.Tensor]:
        s = self.site
        shapes = buffer_shapes(self.plan.format, s.batch, s.kv_heads, s.key_dim, s.value_dim, capacities, s.dtype)
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return [torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]

    # Growing and appending -------------------------------------------------------------------------------------------

    def prepare(self, new: int, first: int = 0, fresh: bool = False) -> Orders:
        """Decide what appending ``new`` tokens does and make room for it. Changes no token, so it may fail safely.

        Args:
            new: the call's own tokens.
            first: position, relative to ``base``, of the first token that the call sees.
            fresh: if the store is empty, fill it as a prompt does instead of passing all tokens through tier 0.
        """
        self.check_usable()
        self.settle()
        self.untouched = False
        if fresh and not self.length:
            orders = self.plan.fill(new)._replace(first=first, fresh=True)
            self._grow(orders.counts)
            return orders
        orders = self.plan.step(self.length, self.counts, new, self._recycled)._replace(first=first)
        self._grow((self.counts[0] + new, *orders.lower_counts))
        return orders

    def ends_with(self, *handles: KVTensor) -> bool:
        """Whether these handles show all that is stored, and nothing waits to be done.

        Then a call may append to the store as it is: no other handle can show tokens beyond.
        """
        shown = (self.base, self.end)
        settled = not (self._spoiled or self._pending)
        return settled and self.start == self.base and all(handle._range == shown for handle in handles)

    def make_room(self, counts: tuple[int, ...]) -> None:
        """Allocate slots for ``counts`` tokens per tier. Changes no token."""
        self.untouched = False
        if any(map(operator.gt, counts, self.capacities)):
            self._grow(counts)

    def advance(self, orders: Orders, counts: tuple[int, ...], new: int) -> None:
        """What :meth:`commit` does for a call that demotes nothing and leaves ``counts`` tokens in the tiers."""
        self.changes += 1
        self.counts, self.length, self._derived = counts, orders.length + new, None

    def _grow(self, counts: tuple[int, ...]) -> None:
        # A store that has no slots yet gets those of its first tokens, as LayerPlan.nbytes counts them.
        capacities = self.plan.capacities(counts, self.capacities if any(self.capacities) else None)
        if capacities == self.capacities:
            return
        s = self.site
        shapes = buffer_shapes(self.plan.format, s.batch, s.kv_heads, s.key_dim, s.value_dim, capacities, s.dtype)
        before = [b.shape[2] for b in self.buffers]
        try:
            # One buffer after the other: the old and the new one of each exist for a moment only.
            for i, (shape, dtype) in enumerate(shapes):
                if tuple(self.buffers[i].shape) != shape:
                    self._resize(i, shape, dtype)
            self.capacities = capacities
        except BaseException:
            self._shrink_back(before)
            raise

    def _resize(self, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Give buffer ``i`` more slots."""
        with torch.inference_mode(False):
            grown, old = torch.zeros(shape, dtype=dtype, device=self.device), self.buffers[i]
            grown[:, :, : old.shape[2]] = old
            self.buffers[i] = grown

    def _shrink_back(self, slots: list[int]) -> None:
        """After a growth that failed half-way: all buffers of a tier must have one size again."""
        try:
            for i, (buffer, count) in enumerate(zip(self.buffers, slots, strict=True)):
                if buffer.shape[2] != count:
                    with torch.inference_mode(False):
                        self.buffers[i] = buffer[:, :, :count].clone()
        except BaseException:
            self.spoil(INTERRUPTED)

    def checkpoint(self, orders: Orders, new: int) -> Checkpoint | None:
        """What undoes a call that was prepared; None for one that moves tokens between tiers, which nothing does."""
        if orders.victims:
            return None
        watch, scores = self.plan.format.watch, None
        if watch is not None and new >= watch.least and not orders.fresh:
            with torch.inference_mode(False):
                scores = self.buffers[-2][:, :, : self.counts[0]].clone()
        return Checkpoint(self.counts, self.length, self._exact_from, self._recycled, scores)

    def roll_back(self, checkpoint: Checkpoint | None) -> None:
        """A call failed: be as before it, or unusable."""
        if checkpoint is None:
            self.spoil(INTERRUPTED)
            return
        with self._intact():
            counts, self.length, self._exact_from, self._recycled, scores = checkpoint
            self.counts, self._derived = counts, None
            if scores is not None:
                self.buffers[-2][:, :, : counts[0]] = scores

    @contextlib.contextmanager
    def _intact(self) -> Iterator[None]:
        """Mark the store unusable if what runs here is interrupted: it changes more than one thing."""
        try:
            yield
        except BaseException:
            self.spoil(INTERRUPTED)
            raise

    def commit(self, orders: Orders, new: int) -> None:
        """The ops of a call have run: take over the fill that ``orders`` said."""
        if orders.fresh:
            self.filled(orders, new)
            return
        self.changes += 1
        if orders.victims:
            # A victim can be any unprotected token, so only tokens that were protected are surely still in tier 0.
            self._exact_from = orders.recent_from
        self.counts = (orders.counts[0] + new - orders.victims, *orders.lower_counts)
        self._recycled = self.plan.recycled(self._recycled, orders)
        self.length = orders.length + new
        self._derived = None
        self._trim()

    def filled(self, orders: Orders, length: int) -> None:
        """A prompt of ``length`` tokens has been compressed into this empty store as ``orders`` said."""
        self.changes += 1
        self._derived = None
        self.counts, self.length = orders.counts, length
        self._exact_from = orders.recent_from if sum(orders.counts[1:]) or self.evicted else 0
        self._recycled = self.plan.recycling(self.counts[-1])

    def _trim(self) -> None:
        """Give back tier 0's slots that a long chunk needed for one call."""
        wanted = self.plan.capacities((self.counts[0] + self.plan.flush_every, *self.counts[1:]))[0]
        if self.capacities[0] <= wanted + wanted // 4 + SLOT_STEP:
            return
        buffers = list(self.buffers)
        try:
            for i in (*range(BUFFERS_PER_TIER), len(buffers) - 2):
                if buffers[i].numel():
                    with torch.inference_mode(False):
                        buffers[i] = buffers[i][:, :, :wanted].clone()
        except (MemoryError, RuntimeError) as error:
            log.debug("no memory to make tier 0 smaller: %s", error)
            return
        self.__dict__.update(buffers=buffers, capacities=(wanted, *self.capacities[1:]))  # both or none

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append tokens outside of a compiled call: k [B, H_kv, T, D_k], v [B, H_kv, T, D_v].

        There are no queries, so the tokens count as new ones that nobody has attended to, except with a policy that
        looks at keys and values alone. The caller has made sure that no living handle of another branch is in the way
        (:meth:`continued_from`, :meth:`for_writing`).
        """
        new = k.shape[2]
        if not new:
            self.settle()
            return
        fmt = self.plan.format
        orders = self.prepare(new, self.start - self.base, fresh=True)
        k, v = (x.detach().to(self.device, self.site.dtype) for x in (k, v))
        before = self.checkpoint(orders, new)
        try:
            if orders.fresh:
                # The keys stand in for the queries: the balancer becomes 1.
                compress(k, k, v, unobserved(k, v, fmt), self.typed(), fmt, orders)
            else:
                append(k, v, None, self.typed(), fmt, orders)
            self.commit(orders, new)
        except BaseException:
            self.roll_back(before)
            raise

    def write(self, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Make k and v [B, H_kv, T, D] the tokens from an absolute ``position`` on, and the last ones.

        Tokens at later positions are dropped first (rewinding); a gap before ``position`` is filled with zeros, which
        is what an untouched part of a preallocated cache holds.

        Raises:
            MikvError: if tokens before ``position`` that are still to be seen have been dropped from the front.
        """
        self.check_usable()
        self.settle()
        if position < self.base:
            raise MikvError(
                f"tokens from position {position} on are written, but those before {self.base} have left the window; "
                "reset the cache first"
            )
        self.crop(position - self.base)
        gap = position - self.end
        if gap > 0:
            k, v = (torch.cat([x.new_zeros(*x.shape[:2], gap, x.shape[3]), x], 2) for x in (k, v))
        self.append(k, v)

    def clear(self) -> None:
        """Drop all tokens and give their memory back; also makes an unusable store usable again."""
        counts = (0,) * len(self.counts)
        capacities = self.plan.capacities(counts)
        buffers = self._allocate(capacities)
        with self._intact():
            self._derived, self._pending, self.untouched = None, {}, False
            self.base = self.start = self.length = self._exact_from = 0
            self._recycled, self.counts = (-1, 0), counts
            self.capacities, self.buffers = capacities, buffers
            self.changes += 1
            self._spoiled = None

    # Halves of a write ------------------------------------------------------------------------------------------------

    def end_of(self, role: Role) -> int:
        """Absolute position behind the last token of the keys or of the values; they differ between two writes."""
        if role not in self._pending:
            return self.end
        position, tokens = self._pending[role]
        return position + tokens.shape[2]

    def stage(self, role: Role, position: int, tokens: torch.Tensor) -> None:
        """Make ``tokens`` [B, H_kv, T, D] the keys, or the values, from an absolute ``position`` on, and the last ones.

        Eager code writes a layer's keys and then its values. The first half waits here, dense, and readers of its role
        see it; as soon as keys and values end at the same position again, both are compressed.
        """
        self.check_usable()
        if position < self.start:
            raise MikvError(f"position {position} is written, but tokens before {self.start} have left the window")
        with torch.inference_mode(False):
            tokens = torch.empty(tokens.shape, dtype=self.site.dtype, device=self.device).copy_(tokens.detach())
        before, waiting = self._pending.get(role, (self.end, tokens[:, :, :0]))
        if position >= before:
            gap = tokens.new_zeros(*tokens.shape[:2], max(position - before - waiting.shape[2], 0), tokens.shape[3])
            tokens = torch.cat([waiting[:, :, : position - before], gap, tokens], 2)
            position = before
        self._pending[role] = (position, tokens)
        self._derived, self.untouched = None, False
        self.changes += 1
        if len(self._pending) == 2 and self.end_of("key") == self.end_of("value"):
            self.settle()

    def settle(self) -> None:
        """Compress what waits.

        Raises:
            MikvError: if the other half of a write is still missing.
        """
        if not self._pending:
            return
        ends = self.end_of("key"), self.end_of("value")
        if ends[0] != ends[1]:
            raise MikvError(
                f"a layer's keys were written up to position {ends[0]} and its values up to {ends[1]}; write both "
                "before anything else uses the cache"
            )
        waiting = self._pending
        position = min(at for at, _ in waiting.values())
        if [at for at, _ in waiting.values()] == [position] * 2:
            k, v = waiting["key"][1], waiting["value"][1]
        else:
            k, v = self.dequantize("key", position), self.dequantize("value", position)
            self.count_fallback("write to keys or values alone")
        self._pending = {}
        if position <= self.start and not k.shape[2]:
            self.clear()
            return
        try:
            self.write(position, k, v)
        except BaseException:
            self._pending = waiting
            raise

    # State -----------------------------------------------------------------------------------------------------------

    def spoil(self, why: str) -> None:
        """Mark the store unusable: it may hold half of a step."""
        self._spoiled = why

    @property
    def is_spoiled(self) -> bool:
        """True when a call was interrupted while it wrote."""
        return self._spoiled is not None

    def check_usable(self) -> None:
        """Raise UnusableCacheError if a call was interrupted while it wrote."""
        if self._spoiled:
            raise UnusableCacheError(self._spoiled)

    @property
    def end(self) -> int:
        """Absolute position behind the last token."""
        return self.base + self.length

    @property
    def evicted(self) -> int:
        """Tokens per (batch row, KV head) that were dropped."""
        return self.length - sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: codes, scales, zeros, positions, scores, balancer, spare capacity, waiting writes."""
        waiting = [tokens for _, tokens in self._pending.values()]
        return sum(b.untyped_storage().nbytes() for b in (*self.buffers, *waiting))

    @property
    def coded_nbytes(self) -> int:
        """Bytes of the used slots' codes, scales and zeros alone: what papers count as the size of a cache."""
        total = 0
        for tier, count, capacity in zip(self.typed().tiers, self.counts, self.capacities, strict=True):
            total += sum(b.nbytes * count // capacity for side in (tier.key, tier.value) for b in side if capacity)
        return total

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense keys and values of the same length in the model's dtype."""
        return self.site.dense_nbytes(self.length)

    @property
    def bookkeeping(self) -> Bookkeeping:
        """What has to be known to go on with the same buffers."""
        return Bookkeeping(self.base, self.start, self.length, self.counts, self._exact_from, self._recycled)

    @bookkeeping.setter
    def bookkeeping(self, kept: Bookkeeping) -> None:
        self.base, self.start, self.length, self.counts, self._exact_from, self._recycled = kept
        self.changes += 1

    def typed(self) -> StoreBuffers:
        """The buffers, named."""
        return StoreBuffers.from_list(self.buffers)

    # Handles ---------------------------------------------------------------------------------------------------------

    def register(self, handle: KVTensor | PreallocatedKV) -> None:
        """Remember a living handle, to tell branches of a cache from its one continuation."""
        key, handles = id(handle), self._handles

        def forget(_: object) -> None:
            handles.pop(key, None)

        handles[key] = weakref.ref(handle, forget)

    def forget(self, handle: torch.Tensor) -> None:
        """The opposite of :meth:`register`, for an object that lives on as something else."""
        self._handles.pop(id(handle), None)

    def _others(self, mine: Collection[int] = ()) -> list[KVTensor | PreallocatedKV]:
        """Living handles that show a fixed range of tokens, except those with these ids."""
        alive = [(key, reference()) for key, reference in list(self._handles.items())]
        return [h for key, h in alive if h is not None and key not in mine and not _follows(h)]

    def _followers(self) -> list[KVTensor | PreallocatedKV]:
        """Living handles of preallocated caches that show this store."""
        alive = [reference() for reference in list(self._handles.values())]
        return [h for h in alive if h is not None and _follows(h) and h.store is self]

    def continued_from(self, handles: tuple[KVTensor | PreallocatedKV, ...]) -> LayerStore:
        """The store that a call may append to, given the handles that it was called with.

        This store itself, cropped to where the handles end, unless a living handle sees tokens beyond: those belong to
        another branch of the cache, and the call gets a cropped copy. Preallocated handles move on to the copy.
        The call sees positions from ``handles[0].range[0]`` on; give that less ``base`` to :meth:`prepare`.
        """
        self.check_usable()
        self.settle()
        stop = handles[0].range[1]
        if any(other.range[1] > stop for other in self._others({id(h) for h in handles})):
            return self.moved_on().crop(stop - self.base)
        return self.crop(stop - self.base)

    def for_writing(self, position: int) -> LayerStore:
        """The store in which tokens from an absolute ``position`` on may be replaced.

        This store itself, unless a living handle of another branch still shows such tokens; then a copy, to which
        preallocated handles move on.
        """
        return self.moved_on() if any(other.range[1] > position for other in self._others()) else self

    def moved_on(self) -> LayerStore:
        """A copy that this store's preallocated handles follow from now on."""
        return self.followed_by(self.copy())

    def followed_by(self, made: LayerStore) -> LayerStore:
        """Let this store's preallocated handles show another one, which is returned."""
        for handle in self._followers():
            self.forget(handle)
            handle.store = made
            made.register(handle)
        return made

    def emptied(self, site: CacheShape) -> LayerStore:
        """What preallocated handles show once they begin anew: this store, cleared, or a new one of other rows."""
        if site.batch == self.site.batch:
            self.clear()
            return self
        made = LayerStore(self.plan, site, self.device)
        made.fallbacks = dict(self.fallbacks)
        return self.followed_by(made)

    def widened(self, rows: int) -> LayerStore:
        """A copy with zeros in more rows, to which preallocated handles move on. Other rows stay as they are."""
        self.check_usable()
        have = self.site.batch

        def with_zeros(buffer: torch.Tensor) -> torch.Tensor:
            return torch.cat([buffer, buffer.new_zeros(rows - have, *buffer.shape[1:])])

        made = self.map(with_zeros, rows, self.device)
        stored = made.typed()
        for slots in (*(tier.positions for tier in stored.tiers), stored.scores):
            slots[have:] = slots[:1]
        if self.plan.format.is_balanced:
            stored.balancer[have:] = 1
        return self.followed_by(made)

    # Reading ---------------------------------------------------------------------------------------------------------

    def dequantize(self, role: Role, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The dense keys or values at absolute positions [start, stop), in token order.

        Args:
            role: keys or values.
            start, stop: by default all tokens that are meant to be seen.

        Returns:
            [B, H_kv, stop - start, D] in the model's dtype.

        Raises:
            EvictedTokensError: if tokens were evicted.
        """
        self.check_usable()
        start = self.start if start is None else start
        stop = self.end_of(role) if stop is None else stop
        compressed = self.end
        parts = []
        if role in self._pending:
            compressed, waiting = self._pending[role]
            parts = [waiting[:, :, max(start - compressed, 0) : max(stop - compressed, 0)]]
        if start < min(stop, compressed) or not parts:
            parts.insert(0, self._read_all(role)[:, :, start - self.base : min(stop, compressed) - self.base])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _read_all(self, role: Role) -> torch.Tensor:
        if self.evicted:
            raise EvictedTokensError(
                f"{self.evicted} of {self.length} tokens were evicted by the plan, so there is no dense cache to read. "
                "Use a plan that keeps all tokens (tiers whose last entry has no share), or leave the cache to "
                "compiled calls"
            )
        s = self.site
        dim = s.key_dim if role == "key" else s.value_dim
        dense = torch.empty(s.batch, s.kv_heads, self.length, dim, dtype=s.dtype, device=self.device)
        for i in range(len(self.counts)):
            *stored, positions = self._read_tier(i)
            k, v = as_given(self.plan.format, *stored)
            part = (k if role == "key" else v).to(s.dtype)
            dense.scatter_(2, positions[..., None].expand_as(part), part)
        return dense

    def _read_tier(self, i: int, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values as they are stored, maybe rotated, and their positions."""
        stored, fmt, s = self.typed(), self.plan.format, self.site
        tier = stored.tiers[i]
        if index is None:
            slots = torch.arange(self.counts[i], device=self.device)
            index = slots.expand(s.batch, s.kv_heads, -1)
        balancer = stored.balancer if fmt.is_balanced else None
        k, v = run("read_tokens", self.device, tier, fmt.tiers[i], index, s.key_dim, s.value_dim, balancer)
        return k, v, tier.positions.gather(2, index).long()

    def count_fallback(self, operation: str) -> None:
        """Note that ``operation`` needed the dense cache."""
        self.fallbacks[operation] = self.fallbacks.get(operation, 0) + 1

    # Copies ----------------------------------------------------------------------------------------------------------

    def _like(self, buffers: list[torch.Tensor], site: CacheShape, device: torch.device) -> LayerStore:
        other = object.__new__(LayerStore)
        other.__dict__.update(self.__dict__)
        other.site, other.device, other.buffers = site, device, buffers
        other.fallbacks = dict(self.fallbacks)
        other._handles = {}
        other._derived = None
        other.anchor = torch.empty(0, device=device)
        return other

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], batch: int, device: torch.device) -> LayerStore:
        """A store whose buffers are ``function`` of this one's; ``batch`` and ``device`` are what it makes of them."""
        s = self.site
        site = CacheShape(batch, s.kv_heads, s.key_dim, s.value_dim, s.dtype, s.layers)
        with torch.inference_mode(False):
            made = self._like([function(b) for b in self.buffers], site, device)
            made._pending = {role: (at, function(tokens)) for role, (at, tokens) in self._pending.items()}
            return made

    def derive(self, key: object, role: Role, make: Callable[[], LayerStore]) -> LayerStore:
        """``make()``, or what it made for the layer's other handle.

        A cache applies an operation to the keys and then to the values, and both must end up on one new store. It
        serves one such pair, as long as nothing has happened to it: the next one is independent.
        """
        if self._derived is not None:
            known, taken, reference = self._derived
            made = reference()
            self._derived = None
            if known == key and taken != role and made is not None and made.untouched:
                return made
        made = make()
        made.untouched = True
        self._derived = (key, role, weakref.ref(made))
        return made

    def copy(self) -> LayerStore:
        """An independent copy."""
        self.check_usable()
        return self.map(torch.clone, self.site.batch, self.device)

    def joined(self, values: LayerStore) -> LayerStore | None:
        """A copy with the values of another store, or None if its tokens do not lie in the same slots."""
        self.settle()
        values.settle()
        same = ("plan", "site", "counts", "length", "base")
        if any(getattr(self, name) != getattr(values, name) for name in same):
            return None
        mine, theirs, tiers = self.typed(), values.typed(), []
        for a, b, count in zip(mine.tiers, theirs.tiers, self.counts, strict=True):
            if not torch.equal(a.positions[:, :, :count], b.positions[:, :, :count]):
                return None
            tiers.append(TierBuffers(a.key, b.value, a.positions))
        if self.capacities != values.capacities:
            return None
        both = StoreBuffers(tuple(tiers), mine.scores, mine.balancer)
        return self._like(both.to_list(), self.site, self.device).copy()

    # Cropping --------------------------------------------------------------------------------------------------------

    def crop(self, length: int) -> LayerStore:
        """Drop tokens at positions >= ``length``, relative to ``base``, from the end, in place; returns self."""
        self.settle()
        if length >= self.length:
            return self
        self.untouched = False
        if length >= self._exact_from and length >= self.length - self.counts[0]:
            with self._intact():
                self._crop_tier0(length)
        else:
            self._rebuild(length)
        self.changes += 1
        self.start = min(self.start, self.base + length)
        self._derived = None
        return self

    def _crop_tier0(self, length: int) -> None:
        """All tokens to drop are in tier 0 of every (row, head), so the counts stay rectangular."""
        kept = self.counts[0] - (self.length - length)
        self._keep_in_tier0(self.typed().tiers[0].positions[:, :, : self.counts[0]] < length, kept)
        self.length = length

    def _keep_in_tier0(self, keep: torch.Tensor, kept: int) -> None:
        """Close tier 0 up over the ``kept`` slots per (row, head) where ``keep`` [B, H_kv, counts[0]] is true."""
        index = (~keep).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :kept]
        for i in (*range(BUFFERS_PER_TIER), len(self.buffers) - 2):
            buffer = self.buffers[i]
            if buffer.numel():
                wide = index if buffer.dim() == 3 else index[..., None].expand(-1, -1, -1, buffer.shape[3])
                self.buffers[i][:, :, :kept] = buffer.gather(2, wide)
        self.counts = (kept, *self.counts[1:])

    def drop_before(self, position: int) -> int:
        """Forget tokens before an absolute ``position``: those of a sliding window's front.

        Memory is given back once at least ``max(block, DROP_STEP)`` tokens can go, and whole blocks go at a time.
        Tokens that a living handle still shows stay. Plans without :attr:`~mikv_compile.plan.LayerPlan.is_fifo` keep
        their memory.

        Returns:
            How many tokens were physically dropped; ``base`` has grown by it.
        """
        self.check_usable()
        if self._pending:
            return 0
        # A preallocated handle shows as many as fit: its columns must not move because a call reads fewer of them.
        self.start = max(self.start, min([position, self.end, *(h.range[0] for h in self._followers())]))
        if not self.plan.is_fifo:
            return 0
        free = min([self.start, *(other.range[0] for other in self._others())]) - self.base
        lower = self.plan.format.tiers[1:]
        shift = 0
        if lower:
            shift = min(free, self.counts[1]) // lower[0].block * lower[0].block
            free = shift if shift < self.counts[1] else free
        if free < max(DROP_STEP, *(t.block for t in self.plan.format.tiers)):
            return 0
        self.untouched, self._derived = False, None
        with self._intact():
            if lower:
                self._shift_tier1(shift)
            high = free - shift
            if high:
                positions = self.typed().tiers[0].positions[:, :, : self.counts[0]]
                self._keep_in_tier0(positions >= free, self.counts[0] - high)
            for tier, count in zip(self.typed().tiers, self.counts, strict=True):
                tier.positions[:, :, :count] -= free
            self.base += free
            self.length -= free
            self._exact_from = max(self._exact_from - free, 0)
        self._trim()
        self.changes += 1
        return free

    def _shift_tier1(self, shift: int) -> None:
        """Move the tokens of tier 1 behind its ``shift`` oldest to the front; give back what is more than a bit."""
        kept = self.counts[1] - shift
        wanted = self.plan.capacities((self.counts[0], kept), (self.capacities[0], 0))[1]
        shrinks = self.capacities[1] > wanted + max(wanted // 4, 2 * self.plan.flush_every)
        for i in range(BUFFERS_PER_TIER, 2 * BUFFERS_PER_TIER):
            buffer = self.buffers[i]
            if not buffer.numel():
                continue
            per_slot = self.capacities[1] // buffer.shape[2]
            rest = buffer[:, :, shift // per_slot : self.counts[1] // per_slot]
            with torch.inference_mode(False):
                if shrinks:
                    self.buffers[i] = buffer.new_zeros(*buffer.shape[:2], wanted // per_slot, *buffer.shape[3:])
                self.buffers[i][:, :, : kept // per_slot] = rest.clone()
        self.counts = (self.counts[0], kept)
        if shrinks:
            self.capacities = (self.capacities[0], wanted)

    def _rebuild(self, length: int) -> None:
        """Crop into tokens that tiers hold unevenly: read what is left and compress it again.

        Where tokens were evicted, heads may be left with different numbers of tokens; each keeps as many as the head
        that has fewest, dropping the lowest tier's oldest, and sinks and window last.
        """
        s = self.site
        keys, values, places, ranks, scores = [], [], [], [], []
        for i in range(len(self.counts)):
            k, v, positions = self._read_tier(i)
            keys.append(k)
            values.append(v)
            places.append(positions)
            ranks.append(torch.full_like(positions, len(self.counts) - i))
            scored = i == 0 and self.plan.format.has_scores
            old = self.typed().scores[:, :, : self.counts[0]] if scored else torch.zeros_like(positions).float()
            scores.append(old)
        k, v = torch.cat(keys, 2), torch.cat(values, 2)
        position, rank = torch.cat(places, 2), torch.cat(ranks, 2)
        alive = position < length
        kept = int(alive.sum(dim=2).min())
        held = (position < self.plan.sinks) | (position >= self.plan.recent_from(length))
        # Order by (alive, held, tier, position), best last: the first `total - kept` are dropped or the surplus.
        worth = alive.long() * rank.masked_fill(held, len(self.counts) + 1) * (self.length + 1) + position
        order = worth.argsort(dim=2)[:, :, worth.shape[2] - kept :]
        order = order.gather(2, position.gather(2, order).argsort(dim=2))
        k = k.gather(2, order[..., None].expand(-1, -1, -1, s.key_dim))
        v = v.gather(2, order[..., None].expand(-1, -1, -1, s.value_dim))
        position, rank, held = (x.gather(2, order) for x in (position, rank, held))
        kept_scores = torch.cat(scores, 2).gather(2, order)

        orders = self.plan.fill(length, kept)
        balancer = self.typed().balancer.clone() if self.plan.format.is_balanced else None
        capacities = self.plan.capacities(orders.counts)
        buffers = self._allocate(capacities)
        stored = StoreBuffers.from_list(buffers)
        if balancer is not None:
            stored.balancer.copy_(balancer)
        score = rank.float().masked_fill(held, float("inf"))
        by_score = score.argsort(dim=2, stable=True)
        stop = kept
        for i, count in enumerate(orders.counts):
            # In plans that evict, the oldest lie at the end of the last tier, where tokens are overwritten first.
            oldest_last = i == len(orders.counts) - 1 > 0 and self.plan.evicts
            index = by_score[:, :, stop - count : stop].sort(dim=2, descending=oldest_last).values
            run(
                "write_tokens", self.device, stored.tiers[i], self.plan.format.tiers[i], 0,
                k, v, index, 0, position.to(torch.int32), balancer,
            )  # fmt: skip
            if i == 0 and self.plan.format.has_scores:
                stored.scores[:, :, :count] = kept_scores.gather(2, index)
            stop -= count
        with self._intact():
            self.buffers, self.capacities, self.counts, self.length = buffers, capacities, orders.counts, length
            self.recompressed += 1
            self._recycled = self.plan.recycling(orders.counts[-1])
            # A head that had lost some of the newest tokens has older ones in their place.
            self._exact_from = length if self.plan.evicts else self.plan.recent_from(length)


def shape_in(store: LayerStore, role: Role, layout: str, tokens: int, rows: int | None = None) -> tuple[int, ...]:
    """Shape of a layer's dense keys or values with ``tokens`` tokens, and ``rows`` instead of the store's own.

    Raises:
        MikvError: if the layout is not a permutation of "BHTD", or of "BTD" with one head.
    """
    site = store.site
    dim = site.key_dim if role == "key" else site.value_dim
    sizes = {"B": site.batch if rows is None else rows, "H": site.kv_heads, "T": tokens, "D": dim}
    if sorted(layout) != sorted("BHTD") and not (sorted(layout) == sorted("BTD") and site.kv_heads == 1):
        raise MikvError(
            f"layout {layout!r} is not a permutation of 'BHTD', nor of 'BTD' with one head (here: {site.kv_heads})"
        )
    return tuple(sizes[letter] for letter in layout)


def to_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view of x [B, H, T, D] with the dimensions in another order."""
    if "H" not in layout:
        x, have = x[:, 0], "BTD"
    else:
        have = "BHTD"
    return x.permute([have.index(letter) for letter in layout])


def from_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Inverse of :func:`to_layout`: a view [B, H, T, D]."""
    want = "BHTD" if "H" in layout else "BTD"
    x = x.permute([layout.index(letter) for letter in want])
    return x if "H" in layout else x[:, None]
