"""Decode attention: few query rows over all tiers and the call's own tokens in one launch, and a second that merges.

The slots of all parts (tiers, own tokens) are cut into splits, numbered over all parts. A program finds its split's
part and attends to its slots, a tile at a time; how each part is stored is known when the kernel is compiled. All query
heads of a KV head and all rows of the call are the columns of one dot: scores are [slots, rows], outputs
[channels, rows], so that no more than 8 columns are padded.

Codes enter dots as they are (``triton_planes.py``). ``x = code * scale + zero`` is taken apart:

* keys, a scale per channel and block of slots: the scale joins the queries, and ``q . zero`` is a product of its own;
* keys, a scale per token and group of channels: it joins the group's scores, ``sum(q)`` times the zero is added;
* values, likewise: the scale joins the weights of a group, and weights times zeros are added up beside.

Queries are brought to below 1 by a power of two, and the pivot of the softmax takes the logarithm of the values' scales
along, so that both fit into float16. Float32 queries and weights are multiplied as two float16 numbers. What is stored
otherwise is dequantized or converted, and multiplied in the type that ``dot_type`` tells.
"""

# Triton's tuples grow, which mypy does not know of.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mikv_compile.kernels.formats import SideBuffers, SideFormat
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
    padded,
    processors,
    strides,
    tile_channels,
)
from mikv_compile.kernels.triton_planes import code_tile, column_channels, load_words

PLAIN, PER_CHANNEL, PER_TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How a side enters a dot: converted or dequantized numbers; codes with a scale per channel; per token and group."""

MOST_ROWS = 16
"""Packed rows of a call that this kernel serves."""
MOST_TIERS = 3
"""Tiers, not counting empty ones."""
MOST_GROUPS = 4
"""Groups of channels that have dots of their own."""
PROGRAMS_PER_PROCESSOR = 3
SHORT_SPLITS = 16
"""So many splits the merge reads at a time; more are made only of at least two tiles each."""
INSTRUCTION_BYTES = 0.4
"""Bytes that a large GPU reads while it issues the instructions for one number; see docs/gpu.md."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HEADROOM = tl.constexpr(16384.0)
"""What queries below 1 are multiplied by where no scale joins them, so that fewer of them are subnormal."""
LO_UNIT = tl.constexpr(2048.0)
"""The second float16 of a float32 number holds what the first leaves over, this many times."""


@triton.jit
def _load_queries(q, q_sh, q_sr, row, row_ok, rows, channel, channel_ok, balancer, BALANCED: tl.constexpr):
    """Packed query rows as columns: [K, R] float32; row m is row ``m % rows`` of the group's head ``m // rows``."""
    where = (row // rows).to(tl.int64) * q_sh + (row % rows).to(tl.int64) * q_sr
    query = tl.load(q + where[None, :] + channel[:, None], mask=row_ok[None, :] & channel_ok[:, None], other=0.0)
    query = query.to(tl.float32)
    if BALANCED:
        query = query / tl.load(balancer + channel, mask=channel_ok, other=1.0)[:, None]
    return query


@triton.jit
def _below_one(query):
    """Powers of two that bring the columns of [K, R] to below 1, and their inverses: [R] float32 each."""
    exponent = tl.max(tl.abs(query), axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 2), 251)
    return ((253 - exponent) << 23).to(tl.float32, bitcast=True), ((1 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _dot_codes(codes, x, PIECES: tl.constexpr):
    """Product of float16 codes with [K, R] numbers below 65504, in one float16 piece or two: float32."""
    first = x.to(tl.float16)
    products = tl.dot(codes, first)
    if PIECES == 2:
        rest = ((x - first.to(tl.float32)) * LO_UNIT).to(tl.float16)
        products += tl.dot(codes, rest) * (1.0 / LO_UNIT)
    return products


@triton.jit
def _plain_tile(
    codes, codes_sn, scales, zeros, slot, slot_ok,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Numbers of N consecutive slots: [N, BLOCK] of type DOT, in the order of ``tile_channels``."""
    if BITS == 16:
        channel = tl.arange(0, BLOCK)
        ok = slot_ok[:, None] & (channel < DIM)[None, :]
        found = tl.load(codes + slot.to(tl.int64)[:, None] * codes_sn + channel[None, :], mask=ok, other=0.0)
    else:
        found = load_codes(codes, slot, slot_ok, DIM, BITS, BLOCK).to(tl.float32)
        scale = load_params(scales, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
        found = found * scale + load_params(zeros, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, True)
    return found.to(DOT)


@triton.jit
def _masked(scores, ok, mask, mask_sh, mask_sr, mask_sc, row, rows, place, MASK: tl.constexpr):
    """Apply the mask of packed rows [R] at positions ``place`` [N], and -inf where ``ok`` [N, R] is False."""
    if MASK != MASK_NONE:
        where = ((row // rows).to(tl.int64) * mask_sh + (row % rows).to(tl.int64) * mask_sr)[None, :]
        where += (place.to(tl.int64) * mask_sc)[:, None]
        if MASK == MASK_BOOL:
            ok &= tl.load(mask + where, mask=ok, other=0) != 0
        else:
            scores += tl.load(mask + where, mask=ok, other=0.0).to(tl.float32)
    return tl.where(ok, scores, float("-inf"))


@triton.jit
def _exp(x, BASE_2: tl.constexpr):
    return tl.exp2(x) if BASE_2 else tl.exp(x)


@triton.jit
def attend_slots(
    q, q_sh, q_sr, key_codes, key_sn, key_scales, key_zeros, value_codes, value_sn, value_scales, value_zeros,
    positions, balancer, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
    scale, softcap, begin, end, length, rows, packed,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    KEY_MODE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_TOKENS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    VALUE_MODE: tl.constexpr,
    BALANCED: tl.constexpr, MASK: tl.constexpr, POSITIONED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PIECES: tl.constexpr, SUBNORMAL: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend to the slots ``begin .. end`` of one head of a part; all pointers stand at the head's first slot.

    Writes pivots and sums of weights at ``part + row`` and unnormalized outputs [.., VALUE_DIM] float32. The pivot of a
    row is any number near its maximum score; -inf if it has seen nothing. Without ``positions``, slot n has position
    ``length + n``.
    """
    UNIT: tl.constexpr = 16777216.0 if SUBNORMAL else 1.0
    BASE_2: tl.constexpr = MASK != MASK_ADD and not CAPPED
    KEY_PLANES: tl.constexpr = 1 if KEY_BITS >= 8 else (8 if KEY_BITS == 3 else 8 // KEY_BITS)
    KEY_WIDTH: tl.constexpr = KEY_DIM // KEY_PLANES
    KEY_ONE: tl.constexpr = KEY_MODE == PER_CHANNEL or KEY_CHANNELS == KEY_DIM
    KEY_SHARED: tl.constexpr = KEY_PLANES if KEY_ONE else (KEY_CHANNELS // KEY_WIDTH if KEY_CHANNELS > KEY_WIDTH else 1)
    KEY_RANGE: tl.constexpr = KEY_WIDTH if KEY_ONE or KEY_CHANNELS >= KEY_WIDTH else KEY_CHANNELS
    KEY_WORDS: tl.constexpr = KEY_BLOCK // KEY_PLANES // (KEY_WIDTH // KEY_RANGE) // 4
    KEY_COLUMNS: tl.constexpr = 4 * KEY_SHARED * KEY_WORDS
    VALUE_PLANES: tl.constexpr = 1 if VALUE_BITS >= 8 else (8 if VALUE_BITS == 3 else 8 // VALUE_BITS)
    VALUE_WIDTH: tl.constexpr = VALUE_DIM // VALUE_PLANES
    VALUE_ONE: tl.constexpr = VALUE_MODE == PLAIN or VALUE_CHANNELS == VALUE_DIM
    VALUE_SHARED: tl.constexpr = (
        VALUE_PLANES if VALUE_ONE else (VALUE_CHANNELS // VALUE_WIDTH if VALUE_CHANNELS > VALUE_WIDTH else 1)
    )
    VALUE_RANGE: tl.constexpr = VALUE_WIDTH if VALUE_ONE or VALUE_CHANNELS >= VALUE_WIDTH else VALUE_CHANNELS
    VALUE_WORDS: tl.constexpr = VALUE_BLOCK // VALUE_PLANES // (VALUE_WIDTH // VALUE_RANGE) // 4
    VALUE_COLUMNS: tl.constexpr = 4 * VALUE_SHARED * VALUE_WORDS
    KEY_RANGES: tl.constexpr = KEY_WIDTH // KEY_RANGE
    KEY_PARTS: tl.constexpr = KEY_PLANES // KEY_SHARED
    VALUE_RANGES: tl.constexpr = VALUE_WIDTH // VALUE_RANGE
    VALUE_PARTS: tl.constexpr = VALUE_PLANES // VALUE_SHARED

    row = tl.arange(0, R)
    row_ok = row < packed
    factor = scale * LOG2_E if BASE_2 else scale
    channel, channel_ok = tile_channels(KEY_DIM, KEY_BITS, KEY_BLOCK)
    query = _load_queries(q, q_sh, q_sr, row, row_ok, rows, channel, channel_ok, balancer, BALANCED)
    queries = ()
    sums = ()
    if KEY_MODE == PLAIN:
        query = query.to(DOT)
    else:
        down, up = _below_one(query)
        factor = up * factor
        for r in tl.static_range(KEY_RANGES):
            for p in tl.static_range(0, KEY_PLANES, KEY_SHARED):
                channel, channel_ok, column = column_channels(
                    KEY_COLUMNS, KEY_BITS, KEY_WIDTH, KEY_RANGE, KEY_SHARED, p, r * KEY_RANGE
                )
                x = _load_queries(q, q_sh, q_sr, row, row_ok, rows, channel, channel_ok, balancer, BALANCED)
                x = x * down[None, :]
                if KEY_MODE == PER_CHANNEL:
                    # Zeros may be as large as scales, and need no factor.
                    sums += (x if PIECES == 2 else x.to(tl.float16),)
                else:
                    sums += (tl.sum(x, axis=0) * factor,)
                    x = x * HEADROOM
                x = x * column[:, None]
                queries += (x if PIECES == 2 else x.to(tl.float16),)
    top = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([N, R], tl.float32)
    outs = ()
    rests = ()
    if VALUE_MODE == PLAIN:
        outs += (tl.zeros([VALUE_BLOCK, R], tl.float32),)
    else:
        for _ in tl.static_range(VALUE_RANGES * VALUE_PARTS):
            outs += (tl.zeros([VALUE_COLUMNS, R], tl.float32),)
            rests += (tl.zeros([N, R], tl.float32),)

    for start in range(begin, end, N):
        slot = start + tl.arange(0, N)
        slot_ok = slot < end
        if KEY_MODE == PLAIN:
            keys = _plain_tile(
                key_codes, key_sn, key_scales, key_zeros, slot, slot_ok,
                KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, DOT, KEY_BLOCK, N,
            )  # fmt: skip
            scores = tl.dot(keys, query, input_precision=PRECISION) * factor
        elif KEY_MODE == PER_CHANNEL:
            words = load_words(key_codes, slot, slot_ok, KEY_BITS, KEY_WIDTH, KEY_WIDTH, 0, KEY_WORDS)
            where = start // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS) + channel // KEY_CHANNELS
            scales = tl.load(key_scales + where, mask=channel_ok, other=0.0)
            zeros = tl.load(key_zeros + where, mask=channel_ok, other=0.0)
            scaled = queries[0] * scales.to(queries[0].dtype)[:, None]
            scores = _dot_codes(code_tile(words, 0, KEY_PLANES, KEY_BITS, SUBNORMAL), scaled, PIECES)
            scores = scores * (factor * UNIT)[None, :]
            scores += _dot_codes(tl.broadcast_to(zeros[None, :], [N, KEY_COLUMNS]), sums[0], PIECES) * factor[None, :]
        else:
            scores = tl.zeros([N, R], tl.float32)
            for r in tl.static_range(KEY_RANGES):
                words = load_words(key_codes, slot, slot_ok, KEY_BITS, KEY_WIDTH, KEY_RANGE, r * KEY_RANGE, KEY_WORDS)
                for p in tl.static_range(KEY_PARTS):
                    where = slot // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS) + p * KEY_RANGES + r
                    scales = tl.load(key_scales + where, mask=slot_ok, other=0.0).to(tl.float32)
                    zeros = tl.load(key_zeros + where, mask=slot_ok, other=0.0).to(tl.float32)
                    codes = code_tile(words, p * KEY_SHARED, KEY_SHARED, KEY_BITS, SUBNORMAL)
                    products = _dot_codes(codes, queries[r * KEY_PARTS + p], PIECES)
                    scores += products * (factor * (UNIT / HEADROOM))[None, :] * scales[:, None]
                    scores += sums[r * KEY_PARTS + p][None, :] * zeros[:, None]
        place = slot + length
        if POSITIONED and MASK != MASK_NONE:
            place = tl.load(positions + slot, mask=slot_ok, other=0)
        scores = capped(scores, softcap, CAPPED)
        ok = slot_ok[:, None]
        if MASK != MASK_NONE:
            ok = ok & row_ok[None, :]
        scores = _masked(scores, ok, mask, mask_sh, mask_sr, mask_sc, row, rows, place, MASK)

        value_words = ()
        value_scales_here = ()
        bound = tl.full([N], 2.0**-24, tl.float32)
        if VALUE_MODE != PLAIN:
            for r in tl.static_range(VALUE_RANGES):
                value_words += (
                    load_words(
                        value_codes, slot, slot_ok, VALUE_BITS, VALUE_WIDTH, VALUE_RANGE, r * VALUE_RANGE, VALUE_WORDS
                    ),
                )
                for p in tl.static_range(VALUE_PARTS):
                    where = slot // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS) + p * VALUE_RANGES + r
                    scales = tl.load(value_scales + where, mask=slot_ok, other=0.0).to(tl.float32)
                    value_scales_here += (scales,)
                    bound = tl.maximum(bound, scales)
            # The bits of a float32 number count up with its logarithm, nearly in a straight line.
            logarithm = bound.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0
            new_top = tl.maximum(top, tl.max(scores + (logarithm if BASE_2 else logarithm * LN_2)[:, None], axis=0))
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=0))
        # While a row has seen only -inf, any finite pivot gives weights of 0 where -inf would give NaN.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = _exp(top - pivot, BASE_2)[None, :]
        weights = _exp(scores - pivot[None, :], BASE_2)
        top = new_top
        total = total * shrink + weights
        new_outs = ()
        new_rests = ()
        if VALUE_MODE == PLAIN:
            values = _plain_tile(
                value_codes, value_sn, value_scales, value_zeros, slot, slot_ok,
                VALUE_DIM, VALUE_BITS, VALUE_TOKENS, VALUE_CHANNELS, DOT, VALUE_BLOCK, N,
            )  # fmt: skip
            new_outs += (outs[0] * shrink + tl.dot(tl.trans(values), weights.to(DOT), input_precision=PRECISION),)
        else:
            for r in tl.static_range(VALUE_RANGES):
                for p in tl.static_range(VALUE_PARTS):
                    codes = tl.trans(code_tile(value_words[r], p * VALUE_SHARED, VALUE_SHARED, VALUE_BITS, SUBNORMAL))
                    products = _dot_codes(codes, weights * value_scales_here[r * VALUE_PARTS + p][:, None], PIECES)
                    new_outs += (outs[r * VALUE_PARTS + p] * shrink + products,)
                    where = slot // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS) + p * VALUE_RANGES + r
                    zeros = tl.load(value_zeros + where, mask=slot_ok, other=0.0).to(tl.float32)
                    new_rests += (rests[r * VALUE_PARTS + p] * shrink + weights * zeros[:, None],)
        outs = new_outs
        rests = new_rests

    place = part + row
    tl.store(part_max + place, top * LN_2 if BASE_2 else top, mask=row_ok)
    tl.store(part_sum + place, tl.sum(total, axis=0), mask=row_ok)
    to = (part_out + place * VALUE_DIM)[None, :]
    if VALUE_MODE == PLAIN:
        channel, channel_ok = tile_channels(VALUE_DIM, VALUE_BITS, VALUE_BLOCK)
        tl.store(to + channel[:, None], outs[0], mask=row_ok[None, :] & channel_ok[:, None])
    else:
        for r in tl.static_range(VALUE_RANGES):
            for p in tl.static_range(VALUE_PARTS):
                channel, channel_ok, column = column_channels(
                    VALUE_COLUMNS, VALUE_BITS, VALUE_WIDTH, VALUE_RANGE, VALUE_SHARED, p * VALUE_SHARED, r * VALUE_RANGE
                )
                found = outs[r * VALUE_PARTS + p] * (column * UNIT)[:, None]
                found += tl.sum(rests[r * VALUE_PARTS + p], axis=0)[None, :]
                tl.store(to + channel[:, None], found, mask=row_ok[None, :] & channel_ok[:, None])


@triton.jit
def _attend_tier(
    q, q_sh, q_sr, key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros,
    positions, balancer, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
    scale, softcap, split, blocks, count, capacity, head, length, rows, packed,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    KEY_MODE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_TOKENS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    VALUE_MODE: tl.constexpr, BALANCED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PIECES: tl.constexpr, SUBNORMAL: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend to the ``split``-th ``blocks`` tiles of a tier."""
    # Elements of a row: words, bytes or numbers.
    KEY_ROW: tl.constexpr = KEY_DIM if KEY_BITS == 16 else KEY_DIM * KEY_BITS // (8 if KEY_MODE == PLAIN else 32)
    VALUE_ROW: tl.constexpr = (
        VALUE_DIM if VALUE_BITS == 16 else VALUE_DIM * VALUE_BITS // (8 if VALUE_MODE == PLAIN else 32)
    )
    if KEY_BITS != 16:
        key_scales += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
        key_zeros += head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
    if VALUE_BITS != 16:
        value_scales += head * (capacity // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS))
        value_zeros += head * (capacity // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS))
    begin = split * blocks * N
    attend_slots(
        q, q_sh, q_sr, key_codes + head * capacity * KEY_ROW, KEY_ROW, key_scales, key_zeros,
        value_codes + head * capacity * VALUE_ROW, VALUE_ROW, value_scales, value_zeros,
        positions + head * capacity, balancer + head * KEY_DIM if BALANCED else None, mask, mask_sh, mask_sr, mask_sc,
        part_out, part_max, part_sum, part, scale, softcap, begin, tl.minimum(begin + blocks * N, count), length, rows,
        packed, KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, KEY_MODE,
        VALUE_DIM, VALUE_BITS, VALUE_TOKENS, VALUE_CHANNELS, VALUE_MODE,
        BALANCED, MASK, True, CAPPED, DOT, PRECISION, PIECES, SUBNORMAL, KEY_BLOCK, VALUE_BLOCK, R, N,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "count0", "blocks0", "splits0", "count1", "blocks1", "splits1", "count2", "blocks2", "splits2",
        "own", "length", "kv_heads", "group", "rows",
    ]
)  # fmt: skip
def decode_kernel(
    q, q_sb, q_sh, q_sr, k, k_sb, k_sh, k_sn, v, v_sb, v_sh, v_sn,
    key_codes0, key_scales0, key_zeros0, value_codes0, value_scales0, value_zeros0, positions0,
    count0, capacity0, blocks0, splits0,
    key_codes1, key_scales1, key_zeros1, value_codes1, value_scales1, value_zeros1, positions1,
    count1, capacity1, blocks1, splits1,
    key_codes2, key_scales2, key_zeros2, value_codes2, value_scales2, value_zeros2, positions2,
    count2, capacity2, blocks2, splits2,
    balancer, mask, mask_sb, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, scale, softcap,
    own, length, kv_heads, group, rows,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TIERS: tl.constexpr,
    KEY_BITS0: tl.constexpr, KEY_TOKENS0: tl.constexpr, KEY_CHANNELS0: tl.constexpr, KEY_MODE0: tl.constexpr,
    VALUE_BITS0: tl.constexpr, VALUE_TOKENS0: tl.constexpr, VALUE_CHANNELS0: tl.constexpr,
    VALUE_MODE0: tl.constexpr, BALANCED0: tl.constexpr, DOT0: tl.constexpr,
    KEY_BITS1: tl.constexpr, KEY_TOKENS1: tl.constexpr, KEY_CHANNELS1: tl.constexpr, KEY_MODE1: tl.constexpr,
    VALUE_BITS1: tl.constexpr, VALUE_TOKENS1: tl.constexpr, VALUE_CHANNELS1: tl.constexpr,
    VALUE_MODE1: tl.constexpr, BALANCED1: tl.constexpr, DOT1: tl.constexpr,
    KEY_BITS2: tl.constexpr, KEY_TOKENS2: tl.constexpr, KEY_CHANNELS2: tl.constexpr, KEY_MODE2: tl.constexpr,
    VALUE_BITS2: tl.constexpr, VALUE_TOKENS2: tl.constexpr, VALUE_CHANNELS2: tl.constexpr,
    VALUE_MODE2: tl.constexpr, BALANCED2: tl.constexpr, DOT2: tl.constexpr,
    OWN: tl.constexpr, OWN_DOT: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    PIECES: tl.constexpr, SUBNORMAL: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, OWN_N: tl.constexpr,
):  # fmt: skip
    """Program (s, b * H_kv + h): all packed rows attend to the slots of split s; those of the last are the own tokens.

    Writes pivots and sums [splits, B * H_q * R] and unnormalized outputs [splits, B * H_q * R, VALUE_DIM], float32.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    packed = group * rows
    split = tl.program_id(0)
    part = (split.to(tl.int64) * tl.num_programs(1) + head) * packed
    q += b * q_sb + h * group * q_sh
    if MASK != MASK_NONE:
        mask += b * mask_sb + h * group * mask_sh
    if TIERS > 0:
        if (split >= 0) & (split < splits0):
            _attend_tier(
                q, q_sh, q_sr, key_codes0, key_scales0, key_zeros0, value_codes0, value_scales0, value_zeros0,
                positions0, balancer, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
                scale, softcap, split, blocks0, count0, capacity0, head, length, rows, packed,
                KEY_DIM, KEY_BITS0, KEY_TOKENS0, KEY_CHANNELS0, KEY_MODE0,
                VALUE_DIM, VALUE_BITS0, VALUE_TOKENS0, VALUE_CHANNELS0, VALUE_MODE0,
                BALANCED0, MASK, CAPPED, DOT0, PRECISION, PIECES, SUBNORMAL, KEY_BLOCK, VALUE_BLOCK, R, N,
            )  # fmt: skip
        split -= splits0
    if TIERS > 1:
        if (split >= 0) & (split < splits1):
            _attend_tier(
                q, q_sh, q_sr, key_codes1, key_scales1, key_zeros1, value_codes1, value_scales1, value_zeros1,
                positions1, balancer, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
                scale, softcap, split, blocks1, count1, capacity1, head, length, rows, packed,
                KEY_DIM, KEY_BITS1, KEY_TOKENS1, KEY_CHANNELS1, KEY_MODE1,
                VALUE_DIM, VALUE_BITS1, VALUE_TOKENS1, VALUE_CHANNELS1, VALUE_MODE1,
                BALANCED1, MASK, CAPPED, DOT1, PRECISION, PIECES, SUBNORMAL, KEY_BLOCK, VALUE_BLOCK, R, N,
            )  # fmt: skip
        split -= splits1
    if TIERS > 2:
        if (split >= 0) & (split < splits2):
            _attend_tier(
                q, q_sh, q_sr, key_codes2, key_scales2, key_zeros2, value_codes2, value_scales2, value_zeros2,
                positions2, balancer, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
                scale, softcap, split, blocks2, count2, capacity2, head, length, rows, packed,
                KEY_DIM, KEY_BITS2, KEY_TOKENS2, KEY_CHANNELS2, KEY_MODE2,
                VALUE_DIM, VALUE_BITS2, VALUE_TOKENS2, VALUE_CHANNELS2, VALUE_MODE2,
                BALANCED2, MASK, CAPPED, DOT2, PRECISION, PIECES, SUBNORMAL, KEY_BLOCK, VALUE_BLOCK, R, N,
            )  # fmt: skip
        split -= splits2
    if OWN and split == 0:
        attend_slots(
            q, q_sh, q_sr, k + b * k_sb + h * k_sh, k_sn, None, None, v + b * v_sb + h * v_sh, v_sn, None, None,
            None, None, mask, mask_sh, mask_sr, mask_sc, part_out, part_max, part_sum, part,
            scale, softcap, 0, own, length, rows, packed,
            KEY_DIM, 16, 1, KEY_DIM, PLAIN, VALUE_DIM, 16, 1, VALUE_DIM, PLAIN,
            False, MASK, False, CAPPED, OWN_DOT, PRECISION, PIECES, SUBNORMAL, KEY_BLOCK, VALUE_BLOCK, R, OWN_N,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Tokens of one format: a tier, or the call's own."""

    key: SideBuffers
    key_fmt: SideFormat
    value: SideBuffers
    value_fmt: SideFormat
    positions: torch.Tensor | None
    count: int


def _mode(fmt: SideFormat, dim: int, slots: int, of_keys: bool) -> tl.constexpr:
    """How a side with tiles of ``slots`` tokens enters its dots."""
    if fmt.is_float:
        return PLAIN
    planes = {8: 1, 4: 2, 2: 4, 3: 8}[fmt.bits]
    width = dim // planes
    if width % 4:
        return PLAIN
    if of_keys and fmt.tokens % slots == 0:
        return PER_CHANNEL
    if fmt.channels != dim:
        if fmt.channels % width and (width % fmt.channels or fmt.channels % 4 or padded(dim) != dim):
            return PLAIN
        # Columns of a group's dot. Tensor cores want at least 16.
        columns = padded(dim) * fmt.channels // dim
        if dim // fmt.channels > MOST_GROUPS or columns < 16:
            return PLAIN
    return PER_TOKEN


def _side_args(name: str, place: int, side: SideBuffers, fmt: SideFormat, dim: int, mode: tl.constexpr) -> dict:
    """Kernel arguments of one side of the tier at a place."""
    coded = not fmt.is_float
    return {
        f"{name}_codes{place}": side.codes if mode is PLAIN else side.codes.view(torch.int32),
        f"{name}_scales{place}": side.scales if coded else None,
        f"{name}_zeros{place}": side.zeros if coded else None,
        f"{name.upper()}_BITS{place}": fmt.bits,
        f"{name.upper()}_TOKENS{place}": fmt.tokens,
        f"{name.upper()}_CHANNELS{place}": fmt.channels if coded else dim,
        f"{name.upper()}_MODE{place}": mode.value,
    }


def plan_splits(tiles: list[int], costs: list[float], wanted: int) -> list[int]:
    """Tiles of a split, for each part: about ``wanted`` splits of equal cost, fewer where there is little to do.

    Args:
        tiles, costs: of the parts; how many tiles they have, and what one costs.
    """
    total = sum(n * cost for n, cost in zip(tiles, costs, strict=True))
    cost = total / wanted
    if sum(tiles) > SHORT_SPLITS:
        cost = max(cost, total / max(sum(tiles) // 2, SHORT_SPLITS))
    return [min(max(round(cost / each), 1), n) for n, each in zip(tiles, costs, strict=True)]


def _cost(part: Part, key_dim: int, value_dim: int) -> float:
    """What a token costs: its bytes, or the instructions to unpack it, in the time of as many bytes."""
    taken = sum(
        dim * side.codes.element_size() if fmt.is_float else dim * fmt.bits / 8 + 4 * dim / fmt.tokens / fmt.channels
        for side, fmt, dim in ((part.key, part.key_fmt, key_dim), (part.value, part.value_fmt, value_dim))
    )
    return max(taken, INSTRUCTION_BYTES * (key_dim + value_dim))


def attend_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiers: list[Part],
    balancer: torch.Tensor,
    mask_args: dict,
    score_args: dict,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of few query rows over all splits, still to be merged.

    Returns:
        outputs [splits, B * H_q * R, D_v], pivots and sums [splits, B * H_q * R] of :func:`decode_kernel`.
    """
    batch, heads, rows, key_dim = q.shape
    kv_heads, own, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, dims = heads // kv_heads, max(padded(key_dim), padded(value_dim))
    exact = q.dtype == torch.float32
    row_block = 16 if is_amd() or group * rows > 8 else 8
    slot_block = 64 if dims <= (64 if exact else 128) else 32
    # Two warps suffice for narrow heads, unless rows fill their registers. Such tiles are small: three are under way.
    warps, stages = (4, 2) if dims > 64 or exact or row_block > 8 else (2, 3)
    args: dict = {}
    for i in range(MOST_TIERS):
        if i < len(tiers):
            part = tiers[i]
            assert part.positions is not None
            floats = [s.codes for s, f in ((part.key, part.key_fmt), (part.value, part.value_fmt)) if f.is_float]
            key_mode = _mode(part.key_fmt, key_dim, slot_block, True)
            value_mode = _mode(part.value_fmt, value_dim, slot_block, False)
            args |= _side_args("key", i, part.key, part.key_fmt, key_dim, key_mode)
            args |= _side_args("value", i, part.value, part.value_fmt, value_dim, value_mode)
            args |= {
                f"positions{i}": part.positions, f"count{i}": part.count, f"capacity{i}": part.positions.shape[2],
                f"BALANCED{i}": part.key_fmt.balanced, f"DOT{i}": dot_type(q, *floats),
            }  # fmt: skip
        else:
            names = [name for name in decode_kernel.arg_names if name.endswith(str(i))]
            args |= dict.fromkeys(names)
            args |= {f"{name}{i}": 0 for name in ("count", "capacity", "blocks", "splits")}
    tiles = [triton.cdiv(part.count, slot_block) for part in tiers]
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(q.device), batch * kv_heads)
    splits = int(own > 0)
    for i, blocks in enumerate(plan_splits(tiles, [_cost(part, key_dim, value_dim) for part in tiers], wanted)):
        args |= {f"blocks{i}": blocks, f"splits{i}": triton.cdiv(tiles[i], blocks)}
        splits += args[f"splits{i}"]

    all_rows = batch * heads * rows
    part_out = torch.empty(splits, all_rows, value_dim, dtype=torch.float32, device=q.device)
    part_max = torch.empty(splits, all_rows, dtype=torch.float32, device=q.device)
    part_sum = torch.empty_like(part_max)
    if splits:
        launch(
            decode_kernel,
            (splits, batch * kv_heads),
            q.device,
            {"num_warps": warps, "num_stages": 1 if is_amd() else stages, "enable_fp_fusion": True},
            q=q, **strides("q", q, "bhr"), k=k, **strides("k", k, "bhn"), v=v, **strides("v", v, "bhn"), **args,
            balancer=balancer.contiguous() if any(part.key_fmt.balanced for part in tiers) else None,
            **mask_args, part_out=part_out, part_max=part_max, part_sum=part_sum, **score_args,
            own=own, length=length, kv_heads=kv_heads, group=group, rows=rows,
            KEY_DIM=key_dim, VALUE_DIM=value_dim, TIERS=len(tiers), OWN=own > 0, OWN_DOT=dot_type(q, k, v),
            PRECISION=dot_precision(), PIECES=2 if exact else 1, SUBNORMAL=not is_amd(),
            KEY_BLOCK=padded(key_dim), VALUE_BLOCK=padded(value_dim), R=row_block, N=slot_block, OWN_N=16,
        )  # fmt: skip
    return part_out, part_max, part_sum
