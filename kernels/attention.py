"""Attention over tiers and the scores that follow from it, in plain PyTorch (the reference).

Query heads are grouped by KV head and packed as rows: ``[B, H_q, R, D] -> [B, H_kv, G * R, D]`` with query head h
reading KV head ``h // G``. All arithmetic is float32.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels.formats import LayerFormat, SideBuffers, SideFormat, StoreBuffers, TierBuffers
from mikv_compile.kernels.quantize import dequantize
from mikv_compile.kernels.scoring import AttentionArgs

ROW_CHUNK = 256
"""Query rows scored at a time, so that column sums never hold a T x T matrix."""


def pack_rows(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H_q, R, D] to float32 [B, H_kv, G * R, D]."""
    batch, heads, rows, dim = q.shape
    return q.float().reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def _used(side: SideBuffers, tokens: int, count: int) -> SideBuffers:
    blocks = count // tokens
    return SideBuffers(side.codes[:, :, :count], side.scales[:, :, :blocks], side.zeros[:, :, :blocks])


def _mask_columns(mask: torch.Tensor, positions: torch.Tensor, heads: int, rows: int) -> torch.Tensor:
    """The mask of each packed row at the given positions: [B, H_kv, G * R, N], dtype of ``mask``."""
    batch, kv_heads, count = positions.shape
    full = mask.expand(batch, heads, rows, mask.shape[-1])
    index = positions.long().repeat_interleave(heads // kv_heads, dim=1)[:, :, None].expand(-1, -1, rows, -1)
    return full.gather(3, index).reshape(batch, kv_heads, heads // kv_heads * rows, count)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()


def _capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def softmax_rows(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; 0 for a row that may attend to nothing, NaN where a score is NaN."""
    if not scores.shape[-1]:
        return scores
    nothing = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return scores.softmax(dim=-1).masked_fill(nothing, 0.0)


def tier_scores(
    rows_q: torch.Tensor,
    tier: TierBuffers,
    fmt_key: SideFormat,
    count: int,
    balancer: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    heads: int,
    rows: int,
) -> torch.Tensor:
    """Scaled, capped and masked scores of the first ``count`` slots of a tier: [B, H_kv, G * R, count] float32."""
    if fmt_key.balanced:
        rows_q = rows_q / balancer[:, :, None]
    keys = dequantize(_used(tier.key, fmt_key.tokens, count), fmt_key, rows_q.shape[-1])
    columns = None if mask is None else _mask_columns(mask, tier.positions[:, :, :count], heads, rows)
    return _masked(_capped(rows_q @ keys.transpose(2, 3) * scale, softcap), columns)


def _own_scores(
    rows_q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    heads: int,
    rows: int,
    length: int,
) -> torch.Tensor:
    """The same for the call's own tokens, whose positions begin at ``length``: [B, H_kv, G * R, S] float32."""
    columns = None
    if mask is not None:
        positions = torch.arange(length, length + k.shape[2], device=k.device)
        columns = _mask_columns(mask, positions.expand(*k.shape[:2], -1), heads, rows)
    return _masked(_capped(rows_q @ k.float().transpose(2, 3) * scale, softcap), columns)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    buffers: StoreBuffers,
    fmt: LayerFormat,
    counts: tuple[int, ...],
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a call's queries over all tiers and over the call's own keys and values, which are taken exactly.

    Args:
        q: [B, H_q, R, D_k]; k, v: [B, H_kv, S, D_k] and [B, H_kv, S, D_v], the call's own tokens; S may be 0. Any
            floating dtypes.
        mask: None, or broadcastable to [B, H_q, R, length + S]: bool (True attends) or additive; columns are positions.
        scale: factor of the scores. ``softcap``: if not 0, scores s become ``softcap * tanh(s / softcap)`` before the
            mask.
        counts: slots in use of each tier. ``length``: position of the first of the call's own tokens.

    Returns:
        output [B, H_q, R, D_v] in q's dtype (0 for a row that may attend to nothing), and the log-sum-exp of each row's
        scores [B, H_q, R] float32.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    rows_q = pack_rows(q, kv_heads)
    parts, values = [], []
    for tier, tier_fmt, count in zip(buffers.tiers, fmt.tiers, counts, strict=True):
        if count:
            seen = (mask, scale, softcap, heads, rows)
            parts.append(tier_scores(rows_q, tier, tier_fmt.key, count, buffers.balancer, *seen))
            values.append(dequantize(_used(tier.value, tier_fmt.value.tokens, count), tier_fmt.value, value_dim))
    parts.append(_own_scores(rows_q, k, mask, scale, softcap, heads, rows, length))
    values.append(v.float())
    scores = torch.cat(parts, dim=-1)
    lse = scores.logsumexp(dim=-1)
    out = softmax_rows(scores) @ torch.cat(values, dim=2)
    return out.reshape(batch, heads, rows, value_dim).to(q.dtype), lse.reshape(batch, heads, rows)


def add_scores(
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
) -> torch.Tensor:
    """Add the attention of this call to tier 0's scores (H2O, arXiv 2306.14048) and return the new tokens' own.

    Args:
        q, k, mask, scale, softcap, length: as in :func:`attend`. lse: [B, H_q, R] float32 from it.
        buffers: ``buffers.scores[:, :, :count]`` grows by the attention summed over rows and the group's query heads.

    Returns:
        [B, H_kv, S] float32, the attention that the call's own tokens received.
    """
    batch, heads, rows, _ = q.shape
    kv_heads = k.shape[1]
    rows_q = pack_rows(q, kv_heads)
    norm = lse.reshape(batch, kv_heads, -1, 1).nan_to_num(neginf=0.0)
    if count:
        seen = (mask, scale, softcap, heads, rows)
        old = tier_scores(rows_q, buffers.tiers[0], fmt.tiers[0].key, count, buffers.balancer, *seen)
        buffers.scores[:, :, :count] += (old - norm).exp().sum(dim=2)
    own = _own_scores(rows_q, k, mask, scale, softcap, heads, rows, length)
    return (own - norm).exp().sum(dim=2)


def column_sums(q: torch.Tensor, k: torch.Tensor, args: AttentionArgs, last_rows: int) -> torch.Tensor:
    """Attention that each key receives from the last query rows of a prefill.

    Args:
        q: [B, H_q, R, D]; k: [B, H_kv, T, D]. ``args``: how the model attends.
        last_rows: how many of the last rows to sum over; 0 means all of them (H2O's accumulated attention).

    Returns:
        [B, H_kv, T] float32, summed over rows and over the query heads of a KV head.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    total = torch.zeros(batch, kv_heads, tokens, device=q.device)
    keys = k.float().transpose(2, 3)
    first = max(rows - last_rows, 0) if last_rows else 0

    def of_rows(x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return x if x.shape[-2] == 1 else x[..., begin:end, :]

    for begin in range(first, rows, ROW_CHUNK):
        end = min(begin + ROW_CHUNK, rows)
        scores = _capped((pack_rows(q[:, :, begin:end], kv_heads) @ keys).mul_(args.scale), args.softcap)
        scores = scores.view(batch, heads, end - begin, tokens)
        if args.mask is not None:
            scores = _masked(scores, of_rows(args.mask, begin, end))
        if args.is_causal:
            row = torch.arange(begin, end, device=q.device)[:, None]
            scores = scores.masked_fill(torch.arange(tokens, device=q.device) > row, float("-inf"))
        if args.sinks is not None:
            sinks = of_rows(args.sinks, begin, end).float().expand(*scores.shape[:3], -1)
            scores = torch.cat([scores, sinks], dim=-1)
        total += softmax_rows(scores)[..., :tokens].reshape(batch, kv_heads, -1, tokens).sum(dim=2)
    return total
