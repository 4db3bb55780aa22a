"""The compressed keys and values of one layer, behind its two handles."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from mikv_compile.errors import EvictedTokensError, UnusableCacheError
from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.formats import BUFFERS_PER_TIER, Orders, StoreBuffers, TierBuffers, buffer_shapes
from mikv_compile.plan import SLOT_STEP, CacheShape, LayerPlan

if TYPE_CHECKING:
    from mikv_compile.handle import KVTensor

Role = Literal["key", "value"]


class LayerStore:
    """Rectangular tiers of one layer: every (batch row, KV head) holds the same number of tokens in a tier.

    Attributes:
        plan: what is kept; see :class:`~mikv_compile.plan.LayerPlan`.
        site: B, H_kv, head dimensions and dtype of the dense cache that this stands for.
        buffers: flat list as in :func:`~mikv_compile.kernels.formats.buffer_names`.
        length: tokens seen. counts: slots in use per tier; ``length - sum(counts)`` tokens were evicted.
        recompressed: times that cropping had to read and compress the tokens again.
        fallbacks: times that something read the dense cache, by operation.
    """

    def __init__(self, plan: LayerPlan, site: CacheShape, device: torch.device, counts: tuple[int, ...] | None = None):
        self.plan, self.site, self.device = plan, site, device
        self.length = 0
        self.counts = (0,) * len(plan.tiers)
        self.fallbacks: dict[str, int] = {}
        self.recompressed = 0
        self.untouched = False
        self._spoiled: str | None = None
        self._handles: dict[int, weakref.ref[KVTensor]] = {}
        self._derived: tuple[object, Role, weakref.ref[LayerStore]] | None = None
        self._exact_from = 0
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

    def prepare(self, new: int) -> Orders:
        """Decide what appending ``new`` tokens does and make room for it. Changes no token, so it may fail safely."""
        self.check_usable()
        self.untouched = False
        orders = self.plan.step(self.length, self.counts, new)
        moved = zip(self.counts[1:], orders.moves, strict=True)
        self._grow((self.counts[0] + new, *(count + move for count, move in moved)))
        return orders

    def _grow(self, counts: tuple[int, ...]) -> None:
        capacities = self.plan.capacities(counts, self.capacities)
        if capacities == self.capacities:
            return
        shaped = [torch.empty(0)] * len(self.buffers)
        s = self.site
        shapes = buffer_shapes(self.plan.format, s.batch, s.kv_heads, s.key_dim, s.value_dim, capacities, s.dtype)
        for i, (old, (shape, dtype)) in enumerate(zip(self.buffers, shapes, strict=True)):
            if tuple(old.shape) == shape:
                shaped[i] = old
                continue
            with torch.inference_mode(False):
                shaped[i] = torch.zeros(shape, dtype=dtype, device=self.device)
                shaped[i][:, :, : old.shape[2]] = old
        self.buffers, self.capacities = shaped, capacities

    def commit(self, orders: Orders, new: int) -> None:
        """The ops of a call have run: take over the fill that ``orders`` said."""
        first, *lower = orders.counts
        if orders.victims:
            # A victim can be any unprotected token, so only tokens that were protected are surely still in tier 0.
            self._exact_from = orders.recent_from
        moved = tuple(count + move for count, move in zip(lower, orders.moves, strict=True))
        self.counts = (first + new - orders.victims, *moved)
        self.length = orders.length + new
        self._derived = None
        self._trim()

    def filled(self, orders: Orders, length: int) -> None:
        """A prompt of ``length`` tokens has been compressed into this new store as ``orders`` said."""
        self.counts, self.length = orders.counts, length
        self._exact_from = orders.recent_from if sum(orders.counts[1:]) or self.evicted else 0

    def _trim(self) -> None:
        """Give back tier 0's slots that a long chunk needed for one call."""
        wanted = self.plan.capacities((self.counts[0] + self.plan.flush_every, *self.counts[1:]))[0]
        if self.capacities[0] <= wanted + wanted // 4 + SLOT_STEP:
            return
        for i in (*range(BUFFERS_PER_TIER), len(self.buffers) - 2):
            if self.buffers[i].numel():
                with torch.inference_mode(False):
                    self.buffers[i] = self.buffers[i][:, :, :wanted].clone()
        self.capacities = (wanted, *self.capacities[1:])

    # State -----------------------------------------------------------------------------------------------------------

    def spoil(self, why: str) -> None:
        """Mark the store unusable: it may hold half of a step."""
        self._spoiled = why

    def check_usable(self) -> None:
        """Raise UnusableCacheError if a call was interrupted while it wrote."""
        if self._spoiled:
            raise UnusableCacheError(self._spoiled)

    @property
    def evicted(self) -> int:
        """Tokens per (batch row, KV head) that were dropped."""
        return self.length - sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: codes, scales, zeros, positions, scores, balancer, spare capacity."""
        return sum(b.untyped_storage().nbytes() for b in self.buffers)

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

    def typed(self) -> StoreBuffers:
        """The buffers, named."""
        return StoreBuffers.from_list(self.buffers)

    # Handles ---------------------------------------------------------------------------------------------------------

    def register(self, handle: KVTensor) -> None:
        """Remember a living handle, to tell branches of a cache from its one continuation."""
        key, handles = id(handle), self._handles

        def forget(_: object) -> None:
            handles.pop(key, None)

        handles[key] = weakref.ref(handle, forget)

    def continued_from(self, handles: tuple[KVTensor, ...]) -> LayerStore:
        """The store that a call may append to, given the handles that it was called with.

        This store itself, cropped to the handles' length, unless a living handle sees tokens beyond that length: those
        belong to another branch of the cache, and the call gets a cropped copy.
        """
        self.check_usable()
        length = handles[0].shape[2]
        mine = {id(h) for h in handles}
        for key, reference in list(self._handles.items()):
            other = reference()
            if key not in mine and other is not None and other.shape[2] > length:
                return self.copy().crop(length)
        return self.crop(length)

    # Reading ---------------------------------------------------------------------------------------------------------

    def dequantize(self, role: Role, length: int | None = None) -> torch.Tensor:
        """The dense keys or values, [B, H_kv, length, D] in the model's dtype, in token order.

        Raises:
            EvictedTokensError: if tokens were evicted.
        """
        self.check_usable()
        length = self.length if length is None else length
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
            k, v, positions = self._read_tier(i)
            part = (k if role == "key" else v).to(s.dtype)
            dense.scatter_(2, positions[..., None].expand_as(part), part)
        return dense[:, :, :length]

    def _read_tier(self, i: int, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
            return self._like([function(b) for b in self.buffers], site, device)

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
        if (self.plan, self.site, self.counts, self.length) != (values.plan, values.site, values.counts, values.length):
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
        """Drop tokens at positions >= ``length`` from the end, in place; returns self."""
        if length >= self.length:
            return self
        self.untouched = False
        if length >= self._exact_from and length >= self.length - self.counts[0]:
            self._crop_tier0(length)
        else:
            self._rebuild(length)
        self._derived = None
        return self

    def _crop_tier0(self, length: int) -> None:
        """All tokens to drop are in tier 0 of every (row, head), so the counts stay rectangular."""
        kept = self.counts[0] - (self.length - length)
        order = (self.typed().tiers[0].positions[:, :, : self.counts[0]] >= length).to(torch.uint8)
        index = order.argsort(dim=2, stable=True)[:, :, :kept]
        for i in (*range(BUFFERS_PER_TIER), len(self.buffers) - 2):
            buffer = self.buffers[i]
            if buffer.numel():
                wide = index if buffer.dim() == 3 else index[..., None].expand(-1, -1, -1, buffer.shape[3])
                self.buffers[i][:, :, :kept] = buffer.gather(2, wide)
        self.counts = (kept, *self.counts[1:])
        self.length = length

    def _rebuild(self, length: int) -> None:
        """Crop into tokens that tiers hold unevenly: read what is left and compress it again.

        Where tokens were evicted, heads may be left with different numbers of tokens; each keeps as many as the head
        that has fewest, dropping the lowest tier's oldest.
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
        # Order by (alive, tier, position), best last: the first `total - kept` are dropped or the surplus.
        worth = (alive.long() * (len(self.counts) + 1) + rank * alive.long()) * (self.length + 1) + position
        order = worth.argsort(dim=2)[:, :, worth.shape[2] - kept :]
        order = order.gather(2, position.gather(2, order).argsort(dim=2))
        k = k.gather(2, order[..., None].expand(-1, -1, -1, s.key_dim))
        v = v.gather(2, order[..., None].expand(-1, -1, -1, s.value_dim))
        position, rank = position.gather(2, order), rank.gather(2, order)
        kept_scores = torch.cat(scores, 2).gather(2, order)

        orders = self.plan.fill(length, kept)
        balancer = self.typed().balancer.clone() if self.plan.format.is_balanced else None
        self.capacities = self.plan.capacities(orders.counts)
        self.buffers = self._allocate(self.capacities)
        stored = self.typed()
        if balancer is not None:
            stored.balancer.copy_(balancer)
        held = (position < self.plan.sinks) | (position >= self.plan.recent_from(length))
        score = rank.float().masked_fill(held, float("inf"))
        by_score = score.argsort(dim=2, stable=True)
        stop = kept
        for i, count in enumerate(orders.counts):
            index = by_score[:, :, stop - count : stop].sort(dim=2).values
            run(
                "write_tokens", self.device, stored.tiers[i], self.plan.format.tiers[i], 0,
                k, v, index, 0, position.to(torch.int32), balancer,
            )  # fmt: skip
            if i == 0 and self.plan.format.has_scores:
                stored.scores[:, :, :count] = kept_scores.gather(2, index)
            stop -= count
        self.recompressed += 1
        self.counts, self.length = orders.counts, length
        # A head that had lost some of the newest tokens has older ones in their place.
        self._exact_from = length if self.plan.evicts else self.plan.recent_from(length)
