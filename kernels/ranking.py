"""From attention to the order in which tokens leave tier 0: what policies and their options make of it.

These compose the primitives of :mod:`dispatch`, so they mean the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.formats import LayerFormat, Orders, Rank, StoreBuffers, Watch
from mikv_compile.kernels.masks import HIDDEN
from mikv_compile.kernels.scoring import AttentionArgs, score

READ_CHUNK = 2048
"""Slots whose values are dequantized at a time for their norms."""

_LOWEST = float("-inf")


def _member(x: torch.Tensor | None, number: int, group: int) -> torch.Tensor | None:
    """Of [B, H_q or 1, ...] the heads with this number in their group: [B, H_kv or 1, ...]."""
    return x if x is None or x.shape[1] == 1 else x[:, number::group]


def _strongest(group: int, of_member: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The largest of what the heads of each group give, element by element; NaN where one is NaN."""
    best = of_member(0)
    for number in range(1, group):
        best = torch.maximum(best, of_member(number))
    return best


def received(q: torch.Tensor, k: torch.Tensor, args: AttentionArgs, last_rows: int) -> torch.Tensor:
    """Attention that a prompt's tokens receive from its last query rows; no T x T matrix is ever held.

    Args:
        q: [B, H_q, R, D]; k: [B, H_kv, T, D]. ``args``: how the model attends.
        last_rows: how many of the last rows count; 0 means all.

    Returns:
        [B, H_kv, T] float32, summed over the rows. Over the query heads of a KV head it is the sum, or with
        ``args.heads == "max"`` the maximum.
    """
    group = q.shape[1] // k.shape[1]

    def of_member(number: int) -> torch.Tensor:
        own = replace(args, mask=_member(args.mask, number, group), sinks=_member(args.sinks, number, group))
        return run("column_sums", q.device, q[:, number::group], k, own, last_rows)

    if args.heads == "sum" or group == 1:
        return run("column_sums", q.device, q, k, args, last_rows)
    return _strongest(group, of_member)


def joined(scores: torch.Tensor, heads: str) -> torch.Tensor:
    """Scores [B, H_kv, N] with the mean over the KV heads in each of them, or with ``heads == "max"`` the maximum."""
    all_heads = scores.mean(dim=1, keepdim=True) if heads == "sum" else scores.amax(dim=1, keepdim=True)
    return all_heads.expand_as(scores)


def pooled(own_scores: torch.Tensor, watch: Watch) -> torch.Tensor:
    """Scores of a call's own tokens [B, H_kv, S], smoothed over neighbours as ``watch`` wants."""
    if watch.pool == 1:
        return own_scores
    return F.max_pool1d(own_scores, watch.pool, stride=1, padding=watch.pool // 2)


def observe(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    count: int,
    length: int,
) -> torch.Tensor | None:
    """Let a later call's attention change tier 0's scores as the format's ``watch`` says.

    Args:
        q, k, mask, scale, softcap: as given to attention. lse: [B, H_q, R] float32, what it returned.
        buffers: ``buffers.scores[:, :, :count]`` changes.
        fmt: the store's format. ``count``: slots in use of tier 0. ``length``: position of the call's first token.

    Returns:
        scores of the call's own tokens [B, H_kv, S] float32; None stands for zeros.
    """
    watch, own = fmt.watch, None
    if watch is not None and k.shape[2] >= watch.least:
        rows = min(watch.rows or q.shape[2], q.shape[2])
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -rows:]
        told = (q[:, :, -rows:], k, lse[:, :, -rows:], seen)
        if watch.is_plain:
            own = run("add_scores", k.device, *told, scale, softcap, buffers, fmt, count, length)
        else:
            own = _observe(*told, scale, softcap, buffers, fmt, watch, count, length)
        own = pooled(own, watch)
    if fmt.rank is not None and fmt.rank.marks_hidden and mask is not None and q.shape[2]:
        own = torch.zeros(k.shape[:3], device=k.device) if own is None else own
        last = mask[:, :, -1, length : length + k.shape[2]]
        shown = last if last.dtype == torch.bool else last > HIDDEN
        shown = shown.expand(k.shape[0], q.shape[1], -1).unflatten(1, (k.shape[1], -1)).any(dim=2)
        own = own.masked_fill(~shown, _LOWEST)
    return own


def _observe(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    watch: Watch,
    count: int,
    length: int,
) -> torch.Tensor:
    """The rest of :func:`observe`, for a watch that is not plain and the rows that it looks at."""
    rows, new = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]

    def attention(number: int, step: int) -> torch.Tensor:
        # The primitive adds to the scores that it finds, so here it finds zeros.
        fresh = buffers._replace(scores=torch.zeros_like(buffers.scores))
        heads = slice(number, None, step)
        told = (q[:, heads], k, lse[:, heads], _member(mask, number, step))
        own = run("add_scores", k.device, *told, scale, softcap, fresh, fmt, count, length)
        return torch.cat([fresh.scores[:, :, :count], own], dim=2)

    got = attention(0, 1) if watch.heads == "sum" else _strongest(group, lambda number: attention(number, group))
    if watch.joint:
        got = joined(got, watch.heads)
    scores = buffers.scores[:, :, :count]
    if not watch.memory:
        scores += got[:, :, :count]
        return got[:, :, count:]
    # Of the watched rows, only those behind an own token could attend to it.
    later = torch.arange(new, 0, -1, device=k.device).clamp(max=rows)
    could = torch.cat([later.new_full((count,), rows), later])
    mean = got / (could * (group if watch.heads == "sum" else 1))
    ages = length + new - buffers.tiers[0].positions[:, :, :count]
    weight = rows / ages.clamp(min=1, max=max(watch.memory, rows))
    old = mean[:, :, :count]
    blend = torch.where(weight >= 1, old, (1 - weight) * scores + weight * old)
    scores.copy_(torch.where(scores == _LOWEST, scores, blend))
    return mean[:, :, count:]


def unobserved(k: torch.Tensor, v: torch.Tensor, fmt: LayerFormat) -> torch.Tensor:
    """Scores [B, H_kv, T] float32 of a prompt's tokens that came without queries: all equal, or by keys and values."""
    if fmt.rank is not None and fmt.rank.anew:
        return score(fmt.rank.anew, k, k, v, AttentionArgs(None, 1.0, False))
    return torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)


def ranks(
    scores: torch.Tensor, rank: Rank, positions: torch.Tensor, length: int, norms: torch.Tensor | None
) -> torch.Tensor:
    """What tokens are ranked by: scores [B, H_kv, N], divided by age, weighed by values and joined as ``rank`` wants.

    Args:
        scores: [B, H_kv, N] float32; -inf, the mark of hidden tokens, stays.
        positions: broadcastable to [B, H_kv, N]. length: tokens seen so far, so a token's age is length - position.
        norms: [B, H_kv, N] float32 norms of the values; needed with ``by_value``.
    """
    found = scores
    if rank.by_age:
        found = found / (length - positions).clamp(min=1)
    if rank.by_value:
        assert norms is not None
        found = (found + rank.floor) * norms
    if rank.by_age or rank.by_value:
        found = found.masked_fill(scores == _LOWEST, _LOWEST)
    return joined(found, "sum") if rank.joint else found


def prompt_ranks(scores: torch.Tensor, v: torch.Tensor, fmt: LayerFormat) -> torch.Tensor:
    """What a prompt's tokens are ranked by: scores [B, H_kv, T] and values [B, H_kv, T, D_v] to [B, H_kv, T]."""
    if fmt.rank is None:
        return scores
    positions = torch.arange(v.shape[2], device=v.device)
    norms = v.float().norm(dim=-1) if fmt.rank.by_value else None
    return ranks(scores, fmt.rank, positions, v.shape[2], norms)


def slot_ranks(
    buffers: StoreBuffers, fmt: LayerFormat, orders: Orders, used: int, key_dim: int, value_dim: int
) -> torch.Tensor | None:
    """What tier 0's tokens are ranked by when some have to leave: [B, H_kv, used] float32; None: by their scores.

    Args:
        buffers, fmt, used, key_dim, value_dim: as for :func:`~mikv_compile.kernels.store_ops.demote`.
        orders: ``length`` and ``counts[0]`` before the call; what ``used`` exceeds the latter are its own tokens.
    """
    rank = fmt.rank
    if rank is None:
        return None
    tier, scores = buffers.tiers[0], buffers.scores[:, :, :used]
    balancer = buffers.balancer if fmt.is_balanced else None

    def read(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(begin, end, device=scores.device).expand(*scores.shape[:2], -1)
        return run("read_tokens", scores.device, tier, fmt.tiers[0], index, key_dim, value_dim, balancer)

    norms = None
    if rank.anew:
        k, v = read(0, used)
        shown = (scores != _LOWEST)[:, :, None]
        scores = score(rank.anew, k, k, v, AttentionArgs(shown, 1.0, False))
        norms = v.norm(dim=-1)
    elif rank.by_value:
        starts = range(0, used, READ_CHUNK)
        norms = torch.cat([read(s, min(s + READ_CHUNK, used))[1].norm(dim=-1) for s in starts], dim=2)
    length = orders.length + used - orders.counts[0]
    return ranks(scores, rank, tier.positions[:, :, :used], length, norms).float()
