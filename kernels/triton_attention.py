"""Attention over tiers and the scores that follow from it: Triton kernels for the references in :mod:`attention`.

Attention is split along the slots: for each split, a kernel writes a pivot, the sum of weights and the weighted sum of
values of every row; a last kernel merges them. Calls of few rows are one launch over all parts
(``triton_decode.py``); others are one launch per tier and one for the call's own tokens. The query heads of a KV head
and the rows of a call are packed into the rows of one dot, as in the reference.

In the kernels of this file, codes enter dots as they are when one scale serves all channels of a token: the scale then
leaves the dot of the keys and joins the weights of the values. Other codes are dequantized in registers. Dots add up in
float32; see ``dot_type`` for what they multiply in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.formats import LayerFormat, SideBuffers, SideFormat, StoreBuffers
from mikv_compile.kernels.scoring import AttentionArgs
from mikv_compile.kernels.triton_common import (
    MASK_ADD,
    MASK_BOOL,
    MASK_NONE,
    capped,
    dot_precision,
    dot_type,
    is_amd,
    launch,
    load_codes,
    load_params,
    need_contiguous,
    need_even_levels,
    need_floats,
    need_small,
    neighbours,
    padded,
    processors,
    side_args,
    strides,
    tile_channels,
)
from mikv_compile.kernels.triton_decode import MOST_ROWS, MOST_TIERS, Part, attend_parts

PROGRAMS_PER_PROCESSOR = 4
TILE_ELEMENTS = 4096
"""Numbers in a tile of keys or values."""
MERGED_SPLITS = 16
"""Splits that the merge reads at a time."""


@triton.jit
def _load_rows(q, q_sh, q_sr, row, row_ok, rows, channel, channel_ok):
    """Packed query rows: row m is row ``m % rows`` of the group's head ``m // rows``. [M, D] in q's dtype."""
    where = (row // rows).to(tl.int64) * q_sh + (row % rows).to(tl.int64) * q_sr
    return tl.load(q + where[:, None] + channel[None, :], mask=row_ok[:, None] & channel_ok[None, :], other=0.0)


@triton.jit
def _masked(scores, ok, mask, mask_sh, mask_sr, mask_sc, row, rows, place, MASK: tl.constexpr):
    """Apply the mask of packed rows [M] at positions ``place`` [N], and -inf where ``ok`` [M, N] is False."""
    if MASK != MASK_NONE:
        where = ((row // rows).to(tl.int64) * mask_sh + (row % rows).to(tl.int64) * mask_sr)[:, None]
        where += (place.to(tl.int64) * mask_sc)[None, :]
        if MASK == MASK_BOOL:
            ok &= tl.load(mask + where, mask=ok, other=0) != 0
        else:
            scores += tl.load(mask + where, mask=ok, other=0.0).to(tl.float32)
    return tl.where(ok, scores, float("-inf"))


@triton.jit
def _dot_keys(
    q, codes, codes_sn, scales, zeros, slot, slot_ok,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Products of query rows [M, D] (of type DOT) with the keys of N consecutive slots: [M, N] float32."""
    if BITS == 16:
        channel = tl.arange(0, BLOCK)
        ok = slot_ok[:, None] & (channel < DIM)[None, :]
        k = tl.load(codes + slot.to(tl.int64)[:, None] * codes_sn + channel[None, :], mask=ok, other=0.0).to(DOT)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        found = load_codes(codes, slot, slot_ok, DIM, BITS, BLOCK).to(tl.float32)
        scale = load_params(scales, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
        zero = load_params(zeros, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
        if CHANNELS == DIM:
            # q . (code * scale + zero) = (q . code) * scale + sum(q) * zero; codes are exact in every DOT type.
            total = tl.sum(q.to(tl.float32), axis=1)[:, None]
            products = tl.dot(q, tl.trans(found.to(DOT)), input_precision=PRECISION)
            products = products * tl.trans(scale) + total * tl.trans(zero)
        else:
            products = tl.dot(q, tl.trans((found * scale + zero).to(DOT)), input_precision=PRECISION)
    return products


@triton.jit
def _dot_values(
    p, codes, codes_sn, scales, zeros, slot, slot_ok,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Weights [M, N] float32 times the values of N consecutive slots: [M, D] float32."""
    if BITS == 16:
        channel = tl.arange(0, BLOCK)
        ok = slot_ok[:, None] & (channel < DIM)[None, :]
        v = tl.load(codes + slot.to(tl.int64)[:, None] * codes_sn + channel[None, :], mask=ok, other=0.0).to(DOT)
        products = tl.dot(p.to(DOT), v, input_precision=PRECISION)
    else:
        found = load_codes(codes, slot, slot_ok, DIM, BITS, BLOCK).to(tl.float32)
        scale = load_params(scales, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
        zero = load_params(zeros, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
        # A weight times a scale may be too small for float16, which has the fewest exponents.
        if DOT != tl.float16 and CHANNELS == DIM:  # noqa: SIM300
            products = tl.dot((p * tl.trans(scale)).to(DOT), found.to(DOT), input_precision=PRECISION)
            products += tl.sum(p * tl.trans(zero), axis=1)[:, None]
        else:
            products = tl.dot(p.to(DOT), (found * scale + zero).to(DOT), input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["blocks", "first_split", "count", "length", "kv_heads", "group", "rows"])
def attend_kernel(
    q, q_sb, q_sh, q_sr,
    key_codes, key_sb, key_sh, key_sn, key_scales, key_zeros,
    value_codes, value_sb, value_sh, value_sn, value_scales, value_zeros,
    positions, balancer, mask, mask_sb, mask_sh, mask_sr, mask_sc,
    part_out, part_max, part_sum,
    scale, softcap, blocks, first_split, count, length, capacity, kv_heads, group, rows,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_TOKENS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    BALANCED: tl.constexpr, MASK: tl.constexpr, POSITIONED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (s, i, b * H_kv + h): the i-th M packed rows attend to the s-th ``blocks`` blocks of N slots.

    Writes maxima and sums [splits, B * H_q * R] and unnormalized outputs [splits, B * H_q * R, VALUE_DIM], float32.
    Without ``positions``, slot n has position ``length + n``: the call's own tokens.
    """
    head = tl.program_id(2).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    row = tl.program_id(1) * M + tl.arange(0, M)
    row_ok = row < group * rows
    key_channel, key_ok = tile_channels(KEY_DIM, KEY_BITS, KEY_BLOCK)
    value_channel, value_ok = tile_channels(VALUE_DIM, VALUE_BITS, VALUE_BLOCK)

    query = _load_rows(q + b * q_sb + h * group * q_sh, q_sh, q_sr, row, row_ok, rows, key_channel, key_ok)
    if BALANCED:
        query = query.to(tl.float32) / tl.load(balancer + head * KEY_DIM + key_channel, mask=key_ok, other=1.0)[None, :]
    query = query.to(DOT)
    key_codes += b * key_sb + h * key_sh
    value_codes += b * value_sb + h * value_sh
    if KEY_BITS != 16:
        key_scales += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
        key_zeros += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
    if VALUE_BITS != 16:
        value_scales += head * (capacity // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS))
        value_zeros += head * (capacity // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS))
    if MASK != MASK_NONE:
        mask += b * mask_sb + h * group * mask_sh

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, VALUE_BLOCK], tl.float32)
    begin = tl.program_id(0) * blocks * N
    for start in range(begin, tl.minimum(begin + blocks * N, count), N):
        slot = start + tl.arange(0, N)
        slot_ok = slot < count
        scores = scale * _dot_keys(
            query, key_codes, key_sn, key_scales, key_zeros, slot, slot_ok,
            KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, DOT, PRECISION, KEY_BLOCK, N,
        )  # fmt: skip
        place = slot + length
        if POSITIONED and MASK != MASK_NONE:
            place = tl.load(positions + head * capacity + slot, mask=slot_ok, other=0)
        ok = row_ok[:, None] & slot_ok[None, :]
        scores = capped(scores, softcap, CAPPED)
        scores = _masked(scores, ok, mask, mask_sh, mask_sr, mask_sc, row, rows, place, MASK)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # While a row has seen only -inf, any finite pivot gives weights of 0 where -inf would give NaN.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - pivot)
        weights = tl.exp(scores - pivot[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + _dot_values(
            weights, value_codes, value_sn, value_scales, value_zeros, slot, slot_ok,
            VALUE_DIM, VALUE_BITS, VALUE_TOKENS, VALUE_CHANNELS, DOT, PRECISION, VALUE_BLOCK, N,
        )  # fmt: skip
        top = new_top

    all_rows = tl.num_programs(2).to(tl.int64) * group * rows
    part = (first_split + tl.program_id(0)) * all_rows + head * group * rows + row
    tl.store(part_max + part, top, mask=row_ok)
    tl.store(part_sum + part, total, mask=row_ok)
    where = part[:, None] * VALUE_DIM + value_channel[None, :]
    tl.store(part_out + where, out, mask=row_ok[:, None] & value_ok[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    part_out, part_max, part_sum, out, lse, splits,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program r: combine all splits of row r of B * H_q * R, SPLITS at a time, into ``out`` and ``lse``."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channel = tl.arange(0, VALUE_BLOCK)
    channel_ok = channel < VALUE_DIM
    top = tl.max(tl.full([SPLITS], float("-inf"), tl.float32), axis=0)
    total = tl.sum(tl.zeros([SPLITS], tl.float32), axis=0)
    merged = tl.zeros([VALUE_BLOCK], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        ok = split < splits
        part = split.to(tl.int64) * rows + row
        tops = tl.load(part_max + part, mask=ok, other=float("-inf"))
        sums = tl.load(part_sum + part, mask=ok, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weights = tl.exp(top - pivot), tl.exp(tops - pivot)
        where = part[:, None] * VALUE_DIM + channel[None, :]
        outs = tl.load(part_out + where, mask=ok[:, None] & channel_ok[None, :], other=0.0)
        total = total * shrink + tl.sum(sums * weights, axis=0)
        merged = merged * shrink + tl.sum(outs * weights[:, None], axis=0)
        top = new_top
    # A row that may attend to nothing has total 0 and merged 0.
    merged = merged / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * VALUE_DIM + channel, merged.to(out.dtype.element_ty), mask=channel_ok)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


def _own_part(k: torch.Tensor, v: torch.Tensor) -> Part:
    exact = SideFormat(bits=16)
    return Part(SideBuffers(k, k, k), exact, SideBuffers(v, v, v), exact, None, k.shape[2])


def _mask_args(mask: torch.Tensor | None, shape: tuple[int, int, int]) -> dict:
    """Kernel arguments of a mask that broadcasts to [B, H_q, R, columns]."""
    if mask is None:
        return {"mask": None, "mask_sb": 0, "mask_sh": 0, "mask_sr": 0, "mask_sc": 0, "MASK": MASK_NONE.value}
    full = mask.expand(*shape, mask.shape[-1])
    kind = MASK_BOOL if mask.dtype == torch.bool else MASK_ADD
    if kind is MASK_BOOL:
        full = full.view(torch.uint8)
    else:
        need_floats(full)
    return {"mask": full, **strides("mask", full, "bhrc"), "MASK": kind.value}


def _score_args(scale: float, softcap: float) -> dict:
    """Kernel arguments for ``scale * qk``, or for ``softcap * tanh(scale * qk / softcap)`` if the softcap is not 0.

    The scale takes the factors within the tanh of ``capped`` along.
    """
    factor = 2.0 * scale / softcap if softcap else scale
    return {"scale": float(factor), "softcap": float(softcap), "CAPPED": softcap != 0}


def _tiling(rows: int, slots: int, dims: int, dot: tl.dtype, bits: tuple[int, ...]) -> tuple[int, int, dict]:
    """Rows and slots per tile of ``dims`` channels, and compile options, with the aim that nothing spills.

    ``bits``: of the sides that are read, keys and values or keys alone.
    """
    exact = dot == tl.float32
    row_block = min(padded(rows), 16 if exact else 32)
    slot_block = min(padded(slots), max(TILE_ELEMENTS // dims, 16), 64)
    # Tiles in flight lie in shared memory on NVIDIA, which spares wide rows registers, but in registers on AMD.
    stages = 1 if is_amd() else 3 if exact and dims > 128 else 2
    # Exact keys alone are light. 3-bit rows are two rows of bytes, and often too crooked for wide loads.
    warps = 8 if exact or 3 in bits or (row_block * dims > 2048 and bits != (16,)) else 4
    return row_block, slot_block, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _attend_each(
    q: torch.Tensor,
    kv_heads: int,
    value_dim: int,
    parts: list[Part],
    balancer: torch.Tensor,
    mask_args: dict,
    score_args: dict,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over all splits of each part, still to be merged: a launch per part, for any number of rows."""
    batch, heads, rows, key_dim = q.shape
    group = heads // kv_heads
    dims = max(padded(key_dim), padded(value_dim))
    plan, splits = [], 0
    for part in parts:
        floats = [side.codes for side, f in ((part.key, part.key_fmt), (part.value, part.value_fmt)) if f.is_float]
        dot, bits = dot_type(q, *floats), (part.key_fmt.bits, part.value_fmt.bits)
        row_block, slot_block, options = _tiling(group * rows, part.count, dims, dot, bits)
        row_blocks = triton.cdiv(group * rows, row_block)
        # Splits until all processors are busy, but never less than one block of slots each.
        wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(q.device), batch * kv_heads * row_blocks)
        blocks = triton.cdiv(triton.cdiv(part.count, slot_block), wanted)
        grid = (triton.cdiv(part.count, blocks * slot_block), row_blocks, batch * kv_heads)
        sizes = {"blocks": blocks, "first_split": splits, "DOT": dot, "M": row_block, "N": slot_block}
        plan.append((part, grid, options, sizes))
        splits += grid[0]

    all_rows = batch * heads * rows
    part_out = torch.empty(splits, all_rows, value_dim, dtype=torch.float32, device=q.device)
    part_max = torch.empty(splits, all_rows, dtype=torch.float32, device=q.device)
    part_sum = torch.empty_like(part_max)
    for part, grid, options, sizes in plan:
        balanced = part.key_fmt.balanced
        launch(
            attend_kernel,
            grid,
            q.device,
            options,
            q=q, **strides("q", q, "bhr"),
            **side_args("key", part.key, part.key_fmt, key_dim), **strides("key", part.key.codes, "bhn"),
            **side_args("value", part.value, part.value_fmt, value_dim), **strides("value", part.value.codes, "bhn"),
            positions=part.positions, balancer=balancer.contiguous() if balanced else None, **mask_args,
            part_out=part_out, part_max=part_max, part_sum=part_sum,
            **score_args, count=part.count, length=length,
            capacity=0 if part.positions is None else part.positions.shape[2],
            kv_heads=kv_heads, group=group, rows=rows,
            BALANCED=balanced, POSITIONED=part.positions is not None, PRECISION=dot_precision(),
            KEY_BLOCK=padded(key_dim), VALUE_BLOCK=padded(value_dim), **sizes,
        )  # fmt: skip
    return part_out, part_max, part_sum


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
    """Attention of a call's queries over all tiers and its own tokens; see :func:`attention.attend`."""
    need_floats(q, k, v)
    batch, heads, rows, key_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    q, k, v = neighbours(q), neighbours(k), neighbours(v)
    tiers = []
    for tier, tier_fmt, count in zip(buffers.tiers, fmt.tiers, counts, strict=True):
        if count:
            need_contiguous(*tier.key, *tier.value, tier.positions)
            need_small(tier)
            need_even_levels(tier_fmt.key, tier_fmt.value)
            tiers.append(Part(tier.key, tier_fmt.key, tier.value, tier_fmt.value, tier.positions, count))
    seen = (_mask_args(mask, (batch, heads, rows)), _score_args(scale, softcap), length)
    if heads // kv_heads * rows <= MOST_ROWS and len(tiers) <= MOST_TIERS:
        part_out, part_max, part_sum = attend_parts(q, k, v, tiers, buffers.balancer, *seen)
    else:
        own = [_own_part(k, v)] if k.shape[2] else []
        part_out, part_max, part_sum = _attend_each(q, kv_heads, value_dim, own + tiers, buffers.balancer, *seen)
    out = torch.empty(batch, heads, rows, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    launch(
        merge_kernel,
        (batch * heads * rows,),
        q.device,
        {"enable_fp_fusion": True},
        part_out=part_out, part_max=part_max, part_sum=part_sum, out=out, lse=lse, splits=part_out.shape[0],
        VALUE_DIM=value_dim, VALUE_BLOCK=padded(value_dim), SPLITS=MERGED_SPLITS,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["count", "length", "kv_heads", "group", "rows"])
def add_scores_kernel(
    q, q_sb, q_sh, q_sr, key_codes, key_sb, key_sh, key_sn, key_scales, key_zeros,
    positions, balancer, mask, mask_sb, mask_sh, mask_sr, mask_sc,
    lse, sums, sums_stride, scale, softcap, count, length, capacity, kv_heads, group, rows,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    BALANCED: tl.constexpr, MASK: tl.constexpr, POSITIONED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, KEY_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H_kv + h): the attention that the i-th N slots receive, M packed rows at a time.

    With ``positions`` (a tier) it is added to ``sums`` [B * H_kv, sums_stride]; without (own tokens) it is stored.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    slot = tl.program_id(0) * N + tl.arange(0, N)
    slot_ok = slot < count
    channel, channel_ok = tile_channels(KEY_DIM, KEY_BITS, KEY_BLOCK)
    q += b * q_sb + h * group * q_sh
    key_codes += b * key_sb + h * key_sh
    if KEY_BITS != 16:
        key_scales += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
        key_zeros += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
    if MASK != MASK_NONE:
        mask += b * mask_sb + h * group * mask_sh
    place = slot + length
    if POSITIONED and MASK != MASK_NONE:
        place = tl.load(positions + head * capacity + slot, mask=slot_ok, other=0)

    received = tl.zeros([N], tl.float32)
    for start in range(0, group * rows, M):
        row = start + tl.arange(0, M)
        row_ok = row < group * rows
        query = _load_rows(q, q_sh, q_sr, row, row_ok, rows, channel, channel_ok)
        if BALANCED:
            factor = tl.load(balancer + head * KEY_DIM + channel, mask=channel_ok, other=1.0)
            query = query.to(tl.float32) / factor[None, :]
        scores = scale * _dot_keys(
            query.to(DOT), key_codes, key_sn, key_scales, key_zeros, slot, slot_ok,
            KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, DOT, PRECISION, KEY_BLOCK, N,
        )  # fmt: skip
        ok = row_ok[:, None] & slot_ok[None, :]
        scores = capped(scores, softcap, CAPPED)
        scores = _masked(scores, ok, mask, mask_sh, mask_sr, mask_sc, row, rows, place, MASK)
        norm = tl.load(lse + head * group * rows + row, mask=row_ok, other=0.0)
        norm = tl.where(norm == float("-inf"), 0.0, norm)
        received += tl.sum(tl.exp(scores - norm[:, None]), axis=0)
    where = sums + head * sums_stride + slot
    if POSITIONED:
        received += tl.load(where, mask=slot_ok, other=0.0)
    tl.store(where, received, mask=slot_ok)


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
    """Add this call's attention to tier 0's scores and return the own tokens'; see :func:`attention.add_scores`."""
    need_floats(q, k)
    batch, heads, rows, key_dim = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    tier, key_fmt = buffers.tiers[0], fmt.tiers[0].key
    need_contiguous(*tier.key, tier.positions, buffers.scores)
    need_small(tier)
    need_even_levels(key_fmt)
    q, k = neighbours(q), neighbours(k)
    own = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=q.device)
    # The own tokens first: should their kernel fail to build, the reference still finds the tier's scores untouched.
    parts: list[tuple[SideBuffers, SideFormat, torch.Tensor | None, int, torch.Tensor]] = []
    if tokens:
        parts.append((SideBuffers(k, k, k), SideFormat(bits=16), None, tokens, own))
    if count:
        parts.append((tier.key, key_fmt, tier.positions, count, buffers.scores))
    group = heads // kv_heads
    for side, side_fmt, positions, part_count, sums in parts:
        dot = dot_type(q, *([side.codes] if side_fmt.is_float else []))
        row_block, slot_block, options = _tiling(group * rows, part_count, padded(key_dim), dot, (side_fmt.bits,))
        launch(
            add_scores_kernel,
            (triton.cdiv(part_count, slot_block), batch * kv_heads),
            q.device,
            options,
            q=q, **strides("q", q, "bhr"),
            **side_args("key", side, side_fmt, key_dim), **strides("key", side.codes, "bhn"),
            positions=positions, balancer=buffers.balancer.contiguous() if side_fmt.balanced else None,
            **_mask_args(mask, (batch, heads, rows)),
            lse=lse.contiguous(), sums=sums, sums_stride=sums.shape[2],
            **_score_args(scale, softcap), count=part_count, length=length,
            capacity=0 if positions is None else positions.shape[2], kv_heads=kv_heads, group=group, rows=rows,
            BALANCED=side_fmt.balanced, POSITIONED=positions is not None, DOT=dot, PRECISION=dot_precision(),
            KEY_BLOCK=padded(key_dim), M=row_block, N=slot_block,
        )  # fmt: skip
    return own


@triton.jit
def _prefill_scores(
    query, k, k_sn, mask, mask_sr, mask_sc, row, row_ok, column, column_ok, channel, channel_ok, scale,
    softcap, CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scaled, capped and masked scores of query rows [M, D] and keys [N] of one head: [M, N] float32."""
    where = column.to(tl.int64)[:, None] * k_sn + channel[None, :]
    keys = tl.load(k + where, mask=column_ok[:, None] & channel_ok[None, :], other=0.0).to(DOT)
    scores = capped(tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale, softcap, CAPPED)
    ok = row_ok[:, None] & column_ok[None, :]
    if CAUSAL:
        ok &= column[None, :] <= row[:, None]
    # Rows are those of one head, so there is no packing: a head stride of 0 and more rows than any row number.
    return _masked(scores, ok, mask, 0, mask_sr, mask_sc, row, 1 << 30, column, MASK)


@triton.jit(do_not_specialize=["first_row", "rows", "tokens", "heads", "group"])
def row_norms_kernel(
    q, q_sb, q_sh, q_sr, k, k_sb, k_sh, k_sn, mask, mask_sb, mask_sh, mask_sr, mask_sc,
    norms, scale, softcap, first_row, rows, tokens, heads, group,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H_q + h): maximum and sum of weights of the i-th M rows from ``first_row`` on, N keys at a time.

    ``norms`` [B * H_q, rows - first_row, 2] float32; 0 and 1 for a row that may attend to nothing. They are not one
    log-sum-exp because that loses the sum of a row whose scores are all the lowest number.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    row = first_row + tl.program_id(0) * M + tl.arange(0, M)
    row_ok = row < rows
    channel = tl.arange(0, BLOCK)
    channel_ok = channel < DIM
    query = _load_rows(q + b * q_sb + h * q_sh, 0, q_sr, row, row_ok, 1 << 30, channel, channel_ok).to(DOT)
    k += b * k_sb + h // group * k_sh
    if MASK != MASK_NONE:
        mask += b * mask_sb + h * mask_sh
    stop = tokens
    if CAUSAL:
        stop = tl.minimum(tokens, first_row + (tl.program_id(0) + 1) * M)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, stop, N):
        column = start + tl.arange(0, N)
        scores = _prefill_scores(
            query, k, k_sn, mask, mask_sr, mask_sc, row, row_ok, column, column < tokens, channel, channel_ok, scale,
            softcap, CAUSAL, MASK, CAPPED, DOT, PRECISION,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - pivot) + tl.sum(tl.exp(scores - pivot[:, None]), axis=1)
        top = new_top
    where = norms + 2 * (head * (rows - first_row) + row - first_row)
    tl.store(where, tl.where(total == 0.0, 0.0, top), mask=row_ok)
    tl.store(where + 1, tl.where(total == 0.0, 1.0, total), mask=row_ok)


@triton.jit(do_not_specialize=["first_row", "rows", "tokens", "kv_heads", "group"])
def column_sums_kernel(
    q, q_sb, q_sh, q_sr, k, k_sb, k_sh, k_sn, mask, mask_sb, mask_sh, mask_sr, mask_sc,
    norms, sums, scale, softcap, first_row, rows, tokens, kv_heads, group,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (j, b * H_kv + h): attention received by the j-th N keys from all heads of the group, M rows at a time.

    ``norms`` from :func:`row_norms_kernel`; ``sums`` [B * H_kv, tokens] float32.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    column = tl.program_id(0) * N + tl.arange(0, N)
    column_ok = column < tokens
    channel = tl.arange(0, BLOCK)
    channel_ok = channel < DIM
    k += b * k_sb + h * k_sh
    begin = first_row
    if CAUSAL:
        begin = tl.maximum(first_row, tl.program_id(0) * N)
    received = tl.zeros([N], tl.float32)
    for member in range(0, group):
        q_head = h * group + member
        q_rows = q + b * q_sb + q_head * q_sh
        head_norms = norms + 2 * ((head * group + member) * (rows - first_row) - first_row)
        head_mask = mask
        if MASK != MASK_NONE:
            head_mask += b * mask_sb + q_head * mask_sh
        for start in range(begin, rows, M):
            row = start + tl.arange(0, M)
            row_ok = row < rows
            query = _load_rows(q_rows, 0, q_sr, row, row_ok, 1 << 30, channel, channel_ok).to(DOT)
            scores = _prefill_scores(
                query, k, k_sn, head_mask, mask_sr, mask_sc, row, row_ok, column, column_ok, channel, channel_ok,
                scale, softcap, CAUSAL, MASK, CAPPED, DOT, PRECISION,
            )  # fmt: skip
            top = tl.load(head_norms + 2 * row, mask=row_ok, other=0.0)
            total = tl.load(head_norms + 2 * row + 1, mask=row_ok, other=1.0)
            received += tl.sum(tl.exp(scores - top[:, None]) * (1.0 / total)[:, None], axis=0)
    tl.store(sums + head * tokens + column, received, mask=column_ok)


def _norms_with(sinks: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """What :func:`row_norms_kernel` wrote, with the weights of logits that broadcast to [B, H_q, rows, n]."""
    extra = sinks.float().logsumexp(dim=-1)
    top, total = norms.unbind(dim=-1)
    new_top = torch.maximum(top, extra)
    # A row that may attend to nothing has weights of 0 whatever its norms are.
    return torch.stack([new_top, total * (top - new_top).exp() + (extra - new_top).exp()], dim=-1)


def column_sums(q: torch.Tensor, k: torch.Tensor, args: AttentionArgs, last_rows: int) -> torch.Tensor:
    """Attention that each key receives from the last query rows; see :func:`attention.column_sums`.

    Two passes, the rows' maxima and totals and then the columns' sums, so that no T x T matrix exists.
    """
    mask = args.mask
    need_floats(q, k)
    batch, heads, rows, dim = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    if rows >= 1 << 30:
        raise NotCovered("row numbers of this size are taken to mean that rows are not packed")
    first_row = max(rows - last_rows, 0) if last_rows else 0
    q, k = neighbours(q), neighbours(k)
    dot = dot_type(q, k)
    mask_args = _mask_args(mask, (batch, heads, rows))
    if mask is not None and mask.shape[-1] == 1:
        mask_args["mask_sc"] = 0
    row_block, slot_block, options = _tiling(rows - first_row, tokens, padded(dim), dot, (16,))
    norms = torch.empty(batch, heads, rows - first_row, 2, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=q.device)
    shared = {
        "q": q, **strides("q", q, "bhr"), "k": k, **strides("k", k, "bhn"), **mask_args,
        "norms": norms, **_score_args(args.scale, args.softcap),
        "first_row": first_row, "rows": rows, "tokens": tokens, "group": heads // kv_heads,
        "DIM": dim, "CAUSAL": args.is_causal, "DOT": dot,
        "PRECISION": dot_precision(), "BLOCK": padded(dim),
        "M": row_block, "N": slot_block,
    }  # fmt: skip
    row_blocks = triton.cdiv(rows - first_row, row_block)
    launch(row_norms_kernel, (row_blocks, batch * heads), q.device, options, **shared, heads=heads)
    if args.sinks is not None:
        shared["norms"] = _norms_with(args.sinks if args.sinks.shape[2] == 1 else args.sinks[:, :, first_row:], norms)
    launch(
        column_sums_kernel,
        (triton.cdiv(tokens, slot_block), batch * kv_heads),
        q.device,
        options,
        **shared, sums=sums, kv_heads=kv_heads,
    )  # fmt: skip
    return sums
