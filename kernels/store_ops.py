"""What a call does to a store: fill its tiers from a prompt, append new tokens, demote old ones, read all back.

These compose the primitives of :mod:`dispatch`, so they run on every device alike.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels import ranking, rotation
from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.fit import Guide, key_guide
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers
from mikv_compile.kernels.quantize import channel_balancer

WORTH_STEP = 64
"""Tokens of one worth where a plan evicts and no block is prescribed."""

ROTATED_CHUNK = 512
"""Tokens of a prompt that are rotated at a time."""

READ_CHUNK = 2048
"""Slots of a tier that :func:`read` dequantizes at a time."""


def _protect(scores: torch.Tensor, positions: torch.Tensor, orders: Orders) -> torch.Tensor:
    """Scores with sinks and recent tokens lifted above all others. NaN counts as most important: never dropped."""
    held = (positions < orders.sinks) | (positions >= orders.recent_from)
    return scores.nan_to_num(nan=float("inf")).masked_fill(held, float("inf"))


def select_tokens(scores: torch.Tensor, orders: Orders) -> list[torch.Tensor]:
    """Which of a prompt's tokens go to each tier: the highest scores to tier 0, the next to tier 1, and so on.

    Args:
        scores: [B, H_kv, T] float32; among equals the older token ranks lower.
        orders: ``counts`` tokens go to each tier, what is left over to none; ``sinks``, ``recent_from``.

    Returns:
        for each tier [B, H_kv, count] int64, ascending.
    """
    tokens = scores.shape[2]
    positions = torch.arange(tokens, device=scores.device).expand_as(scores)
    order = _protect(scores, positions, orders).argsort(dim=2, stable=True)
    chosen, stop = [], tokens
    for count in orders.counts:
        chosen.append(order[:, :, stop - count : stop].sort(dim=2).values)
        stop -= count
    return chosen


def compress(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
) -> None:
    """Fill an empty store from a prompt.

    Args:
        q: [B, H_q, R, D_k], read only for the balancer and for which errors of keys matter; ``k`` itself where there
            are no queries. k, v: [B, H_kv, T, D].
        scores: [B, H_kv, T] float32; the highest go to tier 0. May have no elements when all tokens go to tier 0.
        orders: ``counts`` tokens go to each tier; tokens beyond their sum are evicted. The first has position 0.
    """
    tokens = k.shape[2]
    # Moments do not change by a rotation of keys that are rounded with a guide: those are never rotated.
    guide = key_guide(q, k) if q is not k and any(tier.key.fit == "gptq" for tier in fmt.tiers) else None
    balancer = None
    if fmt.is_balanced:
        balancer = channel_balancer(q, k)
        buffers.balancer.copy_(balancer)
    if orders.counts[0] == tokens:
        _write_prompt(buffers, fmt, 0, k, v, None, balancer, guide)
        if fmt.has_scores:
            buffers.scores[:, :, :tokens] = scores
        return
    ranks = ranking.prompt_ranks(scores, v, fmt)
    chosen = list(run("select_tokens", k.device, ranks, orders))
    if len(chosen) > 1 and sum(orders.counts) < tokens:
        chosen[-1] = _by_worth(chosen[-1], ranks, fmt.tiers[-1].block)
    for i, index in enumerate(chosen):
        _write_prompt(buffers, fmt, i, k, v, index, balancer, guide)
        if i == 0 and fmt.has_scores:
            buffers.scores[:, :, : index.shape[2]] = scores.gather(2, index)


def _write_prompt(
    buffers: StoreBuffers,
    fmt: LayerFormat,
    number: int,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor | None,
    balancer: torch.Tensor | None,
    guide: Guide | None,
) -> None:
    """Write a prompt's tokens ``index`` [B, H_kv, N] (None: all) into an empty tier."""
    tier, tier_fmt = buffers.tiers[number], fmt.tiers[number]
    if not fmt.rotated:
        run("write_tokens", k.device, tier, tier_fmt, 0, k, v, index, 0, None, balancer, guide)
        return
    # Piece by piece: a rotated copy of the whole prompt would weigh as much as a layer's values.
    count, step = (
        k.shape[2] if index is None else index.shape[2],
        max(ROTATED_CHUNK // tier_fmt.block, 1) * tier_fmt.block,
    )
    for begin in range(0, count, step):
        if index is None:
            parts = (x[:, :, begin : begin + step] for x in (k, v))
            places = None
        else:
            part = index[:, :, begin : begin + step]
            parts = (x.gather(2, part[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
            places = part.to(torch.int32)
        k_part, v_part = parts
        stored = rotation.as_stored(fmt, k_part, v=v_part)
        run("write_tokens", k.device, tier, tier_fmt, begin, *stored, None, begin, places, balancer, guide)


def _by_worth(index: torch.Tensor, ranks: torch.Tensor, block: int) -> torch.Tensor:
    """The tokens ``index`` [B, H_kv, N] in blocks from the highest ranks to the lowest, ascending in each block.

    When generated tokens need the room, the blocks at the end go first (:meth:`LayerPlan.step`).
    """
    step = max(block, WORTH_STEP)
    order = ranks.gather(2, index).argsort(dim=2, descending=True, stable=True)
    return torch.cat([part.sort(dim=2).values for part in index.gather(2, order).split(step, dim=2)], 2)


def demote(
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
    used: int,
    key_dim: int,
    value_dim: int,
    ranks: torch.Tensor | None = None,
) -> None:
    """Take ``orders.victims`` tokens out of tier 0's ``used`` slots, into lower tiers or away, and close the holes.

    Victims have the lowest ranks; among equals, the oldest. What stays moves from the end of tier 0 into the holes, in
    the order of slots; what moves down is stored in the order of positions.

    Args:
        buffers: of a store that has scores; tier 0 has its scales per token.
        fmt: the store's format.
        orders: ``victims``, ``sinks``, ``recent_from`` and ``destinations`` (whole blocks of the lower tiers).
        used: slots in use of tier 0 now.
        key_dim, value_dim: D_k and D_v.
        ranks: [B, H_kv, used] float32; None: the scores.
    """
    tier, tier_fmt = buffers.tiers[0], fmt.tiers[0]
    device = tier.positions.device
    balancer = buffers.balancer if fmt.is_balanced else None
    positions = tier.positions[:, :, :used]
    scores = _protect(buffers.scores[:, :, :used] if ranks is None else ranks, positions, orders)
    # Lexicographic by (score, position), ascending: slots are in no order once holes have been refilled.
    by_age = positions.argsort(dim=2)
    order = by_age.gather(2, scores.gather(2, by_age).argsort(dim=2, stable=True))
    victims = order[:, :, : orders.victims]

    stop = orders.victims
    for number, start, count in orders.destinations:
        index = victims[:, :, stop - count : stop]
        index = index.gather(2, positions.gather(2, index).argsort(dim=2))
        k, v = run("read_tokens", device, tier, tier_fmt, index, key_dim, value_dim, balancer)
        place = positions.gather(2, index)
        run("write_tokens", device, buffers.tiers[number], fmt.tiers[number], start, k, v, None, 0, place, balancer)
        stop -= count

    # As many victims lie below `kept` as survivors above it; pair them up. Padding pairs slot used - 1 with itself:
    # it is above `kept`, so it is never a hole.
    kept = used - orders.victims
    is_victim = torch.zeros_like(positions, dtype=torch.bool).scatter_(2, victims, True)
    slots = torch.arange(used, device=device).expand_as(positions)
    pairs = min(orders.victims, kept)
    if not pairs:
        return
    holes = slots[:, :, :kept].masked_fill(~is_victim[:, :, :kept], used).sort(dim=2).values[:, :, :pairs]
    movers = slots[:, :, kept:].masked_fill(is_victim[:, :, kept:], used).sort(dim=2).values[:, :, :pairs]
    run("copy_slots", device, tier, tier_fmt, buffers.scores, movers.clamp(max=used - 1), holes.clamp(max=used - 1))


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    own_scores: torch.Tensor | None,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
) -> None:
    """Append a call's own tokens to tier 0, and demote what no longer fits.

    Args:
        k, v: [B, H_kv, S, D_k] and [B, H_kv, S, D_v].
        own_scores: [B, H_kv, S] float32; None stands for zeros.
        orders: see :class:`Orders`.
    """
    _append(*rotation.as_stored(fmt, k, v=v), own_scores, buffers, fmt, orders)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    own_scores: torch.Tensor | None,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
) -> None:
    used, own = orders.counts[0], k.shape[2]
    balancer = buffers.balancer if fmt.is_balanced else None
    run("write_tokens", k.device, buffers.tiers[0], fmt.tiers[0], used, k, v, None, orders.length, None, balancer)
    if fmt.has_scores:
        buffers.scores[:, :, used : used + own] = 0.0 if own_scores is None else own_scores
    if orders.victims:
        take_out(buffers, fmt, orders, used + own, k.shape[3], v.shape[3])


def take_out(buffers: StoreBuffers, fmt: LayerFormat, orders: Orders, used: int, key_dim: int, value_dim: int) -> None:
    """Rank tier 0's tokens and demote; arguments as for :func:`demote`."""
    ranks = ranking.slot_ranks(buffers, fmt, orders, used, key_dim, value_dim)
    run("demote", buffers.scores.device, buffers, fmt, orders, used, key_dim, value_dim, ranks)


def update(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
) -> None:
    """After attention: update scores, append the call's own tokens to tier 0, and demote what no longer fits.

    Args:
        q, k, v, mask, scale, softcap: as given to attention. lse: [B, H_q, R] float32, what it returned.
        orders: see :class:`Orders`.
    """
    q, k, v = rotation.as_stored(fmt, q, k, v=v)
    own = ranking.observe(q, k, lse, mask, scale, softcap, buffers, fmt, orders.counts[0], orders.length)
    _append(k, v, own, buffers, fmt, orders)


def read(
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
    tokens: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All stored tokens from position ``orders.first`` on, in the order of their positions; none may be missing.

    Args:
        tokens: columns of the result; those beyond the stored tokens are 0.

    Returns:
        keys [B, H_kv, tokens, key_dim] and values [B, H_kv, tokens, value_dim] of ``dtype``.
    """
    if orders.length - orders.first > tokens:
        raise ValueError(f"{orders.length - orders.first} tokens do not fit into {tokens}")
    positions = buffers.tiers[0].positions
    lead, device = (*positions.shape[:2], tokens), positions.device
    dense = [torch.zeros(*lead, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim)]
    balancer = buffers.balancer if fmt.is_balanced else None
    counts = (0,) * len(fmt.tiers) if orders.fresh else orders.counts
    for tier, tier_fmt, count in zip(buffers.tiers, fmt.tiers, counts, strict=True):
        for begin in range(0, count, READ_CHUNK):
            end = min(begin + READ_CHUNK, count)
            index = torch.arange(begin, end, device=device).expand(*lead[:2], -1)
            found = run("read_tokens", device, tier, tier_fmt, index, key_dim, value_dim, balancer)
            column = tier.positions[:, :, begin:end].long() - orders.first
            for out, part in zip(dense, rotation.as_given(fmt, *found), strict=True):
                part = part.to(dtype)
                where = column.clamp(min=0)[..., None].expand_as(part)
                if orders.first:
                    # Tokens that are left out add 0 to the first column; each other column is added to once.
                    out.scatter_add_(2, where, part.masked_fill(column[..., None] < 0, 0.0))
                else:
                    out.scatter_(2, where, part)
    return dense[0], dense[1]
