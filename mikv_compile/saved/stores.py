"""Stores and plans as plain data and tensors, and back, with every check that keeps kernels within their buffers.

A store is saved with its slots in use, so what is read has the capacities of a new store of the same counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from mikv_compile.errors import SavedCacheError
from mikv_compile.kernels.cpp_common import FLOAT_KINDS
from mikv_compile.kernels.formats import LayerFormat, TierFormat, buffer_names, buffer_shapes
from mikv_compile.plan import FIRST_STEP, SLOT_STEP, CacheShape, LayerPlan, Tier
from mikv_compile.policies import POLICIES
from mikv_compile.saved.container import damaged
from mikv_compile.store import Bookkeeping, LayerStore

_MOST = 2**31 - 1
"""Greatest number of tokens, rows, heads and channels: positions are int32."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_KINDS}
"""Of what a store stands for."""


def require(holds: bool, what: str) -> None:
    """Raise SavedCacheError unless a condition holds; ``what`` is not as it should be."""
    if not holds:
        raise damaged(f"{what} makes no sense")


def number(value: Any, what: str, least: int = 0, most: int = _MOST) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``."""
    require(type(value) is int and least <= value <= most, f"{what} ({str(value)[:40]})")
    return value


# Plans ---------------------------------------------------------------------------------------------------------------


def plan_to_data(plan: LayerPlan) -> dict[str, Any]:
    """A plan as plain data."""
    return {**dataclasses.asdict(plan), "format": str(plan.format)}


def plan_from_data(data: dict[str, Any]) -> LayerPlan:
    """Inverse of :func:`plan_to_data`.

    Raises:
        SavedCacheError: if no options make such a plan, or its policy is not registered in this process.
        Exception: any other, if ``data`` is of another form.
    """
    plan = LayerPlan(
        tiers=tuple(Tier(**tier) for tier in data["tiers"]),
        format=LayerFormat.parse(data["format"]),
        policy=data["policy"],
        window=number(data["window"], "the window"),
        sinks=number(data["sinks"], "the number of sinks"),
        recent_share=data["recent_share"],
        flush_every=number(data["flush_every"], "flush_every", 1),
        slot_bytes=tuple(data["slot_bytes"]),
    )
    fmt = plan.format
    require(str(fmt) == data["format"] and 0 < len(fmt.tiers) == len(plan.tiers), f"the format {data['format']!r}")
    require(len(plan.slot_bytes) == len(plan.tiers), "the bytes of a slot")
    require(all(_is_real(size, most=1e9) and size > 0 for size in plan.slot_bytes), "the bytes of a slot")
    require(_is_real(plan.recent_share, most=1), "the recent share")
    for tier, tier_fmt in zip(plan.tiers, fmt.tiers, strict=True):
        _check_tier(tier, tier_fmt, plan.flush_every)
    movable = plan.evicts or len(plan.tiers) > 1
    require(fmt.tiers[0].block == 1, "a first tier of blocks")
    require(fmt.scored == movable and (movable or (fmt.watch is None and fmt.rank is None)), "what has scores")
    require(fmt.rotated in ("", "k", "v", "kv"), "the rotation")
    if fmt.watch is not None:
        require(fmt.watch.pool % 2 == 1 and max(dataclasses.astuple(fmt.watch)[:4]) <= _MOST, "the watch")
    if fmt.rank is not None:
        require(_is_real(fmt.rank.floor, most=1e30), "the floor of the scores")
    name, _, heads = plan.policy.partition("+")
    require(heads in ("", "max"), f"the policy {plan.policy!r}")
    for needed in filter(None, (name, fmt.rank.anew if fmt.rank else "")):
        if needed not in POLICIES:
            raise SavedCacheError(
                f"the cache was made with the policy {needed[:60]!r}, which is not registered in this process; import "
                "the module that registers it first"
            )
    return plan


def _is_real(value: Any, most: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most


def _check_tier(tier: Tier, fmt: TierFormat, flush_every: int) -> None:
    bits = (tier.key_bits, tier.value_bits)
    require(bits == (fmt.key.bits, fmt.value.bits), f"a tier of {bits} bits stored as {fmt}")
    names = {side.float_name for side in (fmt.key, fmt.value) if side.is_float}
    require(names <= {tier.float_name}, f"a tier of {tier.float_name!r} stored as {fmt}")
    require(type(tier.float_name) is str and not fmt.value.balanced, f"the format {fmt}")
    require(tier.share is None or _is_real(tier.share, _MOST if type(tier.share) is int else 2), "a tier's share")
    number(tier.less, "what a tier's share is short of")
    block = fmt.block
    require(all(block % side.tokens == 0 for side in (fmt.key, fmt.value)), f"the blocks of {fmt}")
    # Capacities are multiples of these steps, or of the block if that is larger.
    steps = (max(block, FIRST_STEP), max(block, SLOT_STEP), flush_every)
    require(all(step % block == 0 for step in steps), f"blocks of {block} tokens")


# Stores --------------------------------------------------------------------------------------------------------------


def store_to_data(store: LayerStore, plan: int, prefix: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A store as plain data, and its slots in use as tensors on the CPU.

    Args:
        store: nothing of it may wait to be compressed.
        plan: the number of its plan.
        prefix: stands in the tensors' names before those of :func:`~mikv_compile.kernels.formats.buffer_names`.
    """
    site = {**dataclasses.asdict(store.site), "dtype": str(store.site.dtype).removeprefix("torch.")}
    data = {"plan": plan, "site": site, **store.bookkeeping._asdict()}
    tensors = {}
    names, shapes = buffer_names(len(store.counts)), _shapes(store.plan, store.site, store.counts)
    for name, (shape, _), used, buffer in zip(names, shapes, _used_slots(store, shapes), store.buffers, strict=True):
        if not math.prod(shape):
            continue
        # What lies behind the slots in use are tokens that have left them: they do not belong into a file.
        made = torch.zeros(shape, dtype=buffer.dtype)
        made[:, :, :used] = buffer[:, :, :used]
        tensors[prefix + name] = made
    return data, tensors


def store_from_data(
    data: dict[str, Any],
    plans: list[LayerPlan],
    tensor: Callable[[str], torch.Tensor],
    prefix: str,
    device: torch.device,
) -> LayerStore:
    """Inverse of :func:`store_to_data`.

    Args:
        data: what it returned. plans: by their numbers.
        tensor: a tensor by its name, which begins with ``prefix``.
        device: where the store goes.

    Raises:
        SavedCacheError: if the numbers, or the stored positions, contradict each other or the plan.
        Exception: any other, if ``data`` is of another form.
    """
    plan = plans[number(data["plan"], "the number of a plan", most=len(plans) - 1)]
    about = dict(data["site"])
    dtype = DTYPES[about.pop("dtype")]
    site = CacheShape(dtype=dtype, **{key: number(value, key, least=1) for key, value in about.items()})
    for fmt in plan.format.tiers:
        fmt.key.check(site.key_dim)
        fmt.value.check(site.value_dim)
    counts = tuple(number(count, "a number of tokens") for count in data["counts"])
    kept = Bookkeeping(
        base=number(data["base"], "the first position"),
        start=number(data["start"], "the first position that is seen"),
        length=number(data["length"], "the number of tokens"),
        counts=counts,
        exact_from=number(data["exact_from"], "what is surely in the first tier"),
        recycled=tuple(data["recycled"]),  # type: ignore[arg-type]
    )
    _check_bookkeeping(kept, plan)
    shapes = _shapes(plan, site, counts)
    found: list[torch.Tensor | None] = []
    for name, (shape, kind) in zip(buffer_names(len(counts)), shapes, strict=True):
        if not math.prod(shape):
            found.append(None)
            continue
        stored = tensor(prefix + name)
        if (tuple(stored.shape), stored.dtype) != (shape, kind):
            raise damaged(
                f"the buffer {name} is {tuple(stored.shape)} {stored.dtype}, and its plan says {shape} {kind}"
            )
        # A copy first: what is checked must not lie in a file that may change.
        found.append(stored.clone() if name.endswith("_positions") else stored)
    positions = [x for name, x in zip(buffer_names(len(counts)), found, strict=True) if name.endswith("_positions")]
    _check_positions(positions, kept, plan)
    store = LayerStore(plan, site, device, counts)
    for buffer, values in zip(store.buffers, found, strict=True):
        if values is not None:
            buffer.copy_(values)
    store.bookkeeping = kept
    return store


def _shapes(plan: LayerPlan, s: CacheShape, counts: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    slots = plan.capacities(counts)
    return buffer_shapes(plan.format, s.batch, s.kv_heads, s.key_dim, s.value_dim, slots, s.dtype)


def _used_slots(store: LayerStore, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[int]:
    """How much of the third dimension of each buffer is in use."""
    used = []
    for count, fmt in zip(store.counts, store.plan.format.tiers, strict=True):
        used += [count, *[count // fmt.key.tokens] * 2, count, *[count // fmt.value.tokens] * 2, count]
    return [*used, store.counts[0], shapes[-1][0][2]]


def _check_bookkeeping(kept: Bookkeeping, plan: LayerPlan) -> None:
    counts, total = kept.counts, sum(kept.counts)
    require(len(counts) == len(plan.tiers), "the number of tiers")
    blocks = [fmt.block for fmt in plan.format.tiers]
    require(all(count % block == 0 for count, block in zip(counts, blocks, strict=True)), "a tier's number of tokens")
    require(total <= kept.length if plan.evicts else total == kept.length, "the number of tokens")
    require(kept.base <= kept.start <= kept.base + kept.length <= _MOST, "the range of tokens")
    require(plan.is_fifo or not kept.base, "the first position")
    require(kept.exact_from <= kept.length, "what is surely in the first tier")
    fixed, cursor = kept.recycled
    number(fixed, "what is not overwritten", least=-1)
    number(cursor, "what is overwritten next")
    last, block = counts[-1], blocks[-1]
    if plan.evicts and len(counts) > 1:
        require(cursor <= last and cursor % block == 0, "what is overwritten next")
        require(fixed < 0 or (fixed <= cursor and fixed % block == 0), "what is not overwritten")
    else:
        require((fixed, cursor) == (-1, 0), "what is overwritten next")


def _check_positions(tiers: list[torch.Tensor | None], kept: Bookkeeping, plan: LayerPlan) -> None:
    """Each (batch row, KV head) has to hold different tokens of the sequence, where the bookkeeping says so."""
    used = [x[:, :, :count] for x, count in zip(tiers, kept.counts, strict=True) if x is not None]
    if not used:
        return
    everything = torch.cat(used, 2).sort(dim=2).values
    require(int(everything[:, :, 0].min()) >= 0, "a position before the first token")
    require(int(everything[:, :, -1].max()) < kept.length, "a position behind the last token")
    require(not (everything[:, :, 1:] == everything[:, :, :-1]).any(), "a token that is stored twice")
    surely = kept.length - kept.exact_from
    if surely:
        first = tiers[0]
        late = torch.zeros(1) if first is None else (first[:, :, : kept.counts[0]] >= kept.exact_from).sum(dim=2)
        require(bool((late == surely).all()), "the place of a recent token")
    if plan.is_fifo and len(kept.counts) == 2 and tiers[1] is not None:
        in_order = torch.arange(kept.counts[1], dtype=torch.int32)
        require(bool((tiers[1][:, :, : kept.counts[1]] == in_order).all()), "the order of a sliding window")
