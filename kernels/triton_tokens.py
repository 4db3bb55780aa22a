"""Write, read and move the tokens of one tier: Triton kernels for the references in :mod:`tokens`.

What is written equals the reference bit by bit: the same float32 operations in the same order, divisions rounded as
IEEE 754 says, no fused multiply-add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.fit import Guide
from mikv_compile.kernels.formats import SideFormat, TierBuffers, TierFormat
from mikv_compile.kernels.triton_common import (
    launch,
    load_codes,
    load_params,
    need_contiguous,
    need_even_levels,
    need_floats,
    neighbours,
    padded,
    side_args,
    tile_channels,
)

FP16_MAX = tl.constexpr(65504.0)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a float32 below 2**22 leaves no bits for a fraction, so the sum is rounded half to even."""

TILE = 16
"""Tokens per tile."""
EXACT = {"enable_fp_fusion": False}
"""Compile options that keep products and sums apart."""
PARAM_ELEMENTS = 2048
"""Numbers that are reduced to scales at a time."""


@triton.jit
def _source(index, index_row, slot, slot_ok, INDEXED: tl.constexpr):
    """Which token of the input goes to the slots: [N] int64."""
    return tl.load(index + index_row + slot, mask=slot_ok, other=0) if INDEXED else slot


@triton.jit
def _load_input(x, x_sn, token, channel, ok, balancer, BALANCED: tl.constexpr):
    """Numbers to quantize, times the balancer: float32 in the shape of ``ok``, to which token and channel broadcast."""
    loaded = tl.load(x + token * x_sn + channel, mask=ok, other=0.0).to(tl.float32)
    if BALANCED:
        loaded = loaded * tl.load(balancer + channel, mask=ok, other=1.0)
    return loaded


@triton.jit
def _write_params(
    x, x_sn, index, index_row, scales, zeros, first, count, balancer,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BALANCED: tl.constexpr,
    INDEXED: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of the tokens ``first .. first + SPAN``: minimum and range of each group.

    A tile is [P, E]: P groups with E of their ``TOKENS * CHANNELS`` numbers at a time. ``scales`` and ``zeros`` point
    at the parameters of token 0, ``x`` and ``balancer`` at the head's first number.
    """
    GROUPS: tl.constexpr = DIM // CHANNELS
    PARAMS: tl.constexpr = SPAN // TOKENS * GROUPS
    SIZE: tl.constexpr = TOKENS * CHANNELS
    for p_start in range(0, PARAMS, P):
        p = p_start + tl.arange(0, P)
        token = first + p // GROUPS * TOKENS
        p_ok = (p < PARAMS) & (token < count)
        low = tl.full([P], float("inf"), tl.float32)
        high = tl.full([P], float("-inf"), tl.float32)
        spoiled = tl.zeros([P], tl.int32)
        for e_start in range(0, SIZE, E):
            e = e_start + tl.arange(0, E)
            ok = p_ok[:, None] & (e < SIZE)[None, :]
            slot = token[:, None] + (e // CHANNELS)[None, :]
            channel = (p % GROUPS * CHANNELS)[:, None] + (e % CHANNELS)[None, :]
            source = _source(index, index_row, slot, ok, INDEXED)
            found = _load_input(x, x_sn, source, channel, ok, balancer, BALANCED)
            low = tl.minimum(low, tl.min(tl.where(ok, found, float("inf")), axis=1))
            high = tl.maximum(high, tl.max(tl.where(ok, found, float("-inf")), axis=1))
            spoiled = tl.maximum(spoiled, tl.max((ok & (found != found)).to(tl.int32), axis=1))
        # A NaN in a group must be seen when it is read back, as in the reference: hardware min and max skip it.
        low = tl.where(spoiled > 0, float("nan"), low)
        LEVELS: tl.constexpr = (1 << BITS) - 1
        scale = tl.div_rn(high - low, tl.full([P], LEVELS, tl.float32))
        scale = tl.where(scale > FP16_MAX, FP16_MAX, scale)
        zero = tl.where(low > FP16_MAX, FP16_MAX, tl.where(low < -FP16_MAX, -FP16_MAX, low))
        where = token // TOKENS * GROUPS + p % GROUPS
        tl.store(scales + where, scale.to(tl.float16), mask=p_ok)
        tl.store(zeros + where, zero.to(tl.float16), mask=p_ok)


@triton.jit
def _write_planes(
    x, x_sn, source, slot, slot_ok, codes, scales, zeros, balancer,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BALANCED: tl.constexpr,
    PLANES: tl.constexpr, PLANE_BITS: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Quantize tokens and write ``DIM / PLANES`` bytes of each row, from byte ``OFFSET`` on, as a tile [N, BYTES].

    A byte holds the bits ``SHIFT .. SHIFT + PLANE_BITS`` of the codes of PLANES channels, ``DIM / PLANES`` apart.
    """
    WIDTH: tl.constexpr = DIM // PLANES
    ROW_BYTES: tl.constexpr = DIM * BITS // 8
    LEVELS: tl.constexpr = (1 << BITS) - 1
    byte = tl.arange(0, BYTES)
    ok = slot_ok[:, None] & (byte < WIDTH)[None, :]
    packed = tl.zeros([slot.shape[0], BYTES], tl.int32)
    for plane in tl.static_range(PLANES):
        channel = byte + plane * WIDTH
        found = _load_input(x, x_sn, source[:, None], channel[None, :], ok, balancer, BALANCED)
        where = (slot // TOKENS * (DIM // CHANNELS))[:, None] + (channel // CHANNELS)[None, :]
        scale = tl.load(scales + where, mask=ok, other=0.0).to(tl.float32)
        zero = tl.load(zeros + where, mask=ok, other=0.0).to(tl.float32)
        # A constant group has scale 0: its codes are 0.
        code = tl.where(scale > 0, tl.div_rn(found - zero, tl.where(scale > 0, scale, 1.0)), 0.0)
        code = tl.where(code < 0, 0.0, tl.where(code > LEVELS, LEVELS * 1.0, code))
        code = ((code + ROUNDER) - ROUNDER).to(tl.int32)
        packed |= ((code >> SHIFT) & ((1 << PLANE_BITS) - 1)) << (plane * PLANE_BITS)
    tl.store(codes + slot[:, None] * ROW_BYTES + (OFFSET + byte)[None, :], packed.to(tl.uint8), mask=ok)


@triton.jit
def _write_side(
    x, x_sn, index, index_row, codes, scales, zeros, first, count, balancer,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BALANCED: tl.constexpr,
    INDEXED: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the tokens ``first .. first + SPAN`` of one side of one head. All pointers stand at token 0."""
    if BITS != 16:
        _write_params(
            x, x_sn, index, index_row, scales, zeros, first, count, balancer,
            DIM, BITS, TOKENS, CHANNELS, BALANCED, INDEXED, SPAN, P, E,
        )  # fmt: skip
        # Codes are fitted to the rounded parameters, which other threads of this program have just stored.
        tl.debug_barrier()
    for start in range(0, SPAN, TILE):
        slot = first + start + tl.arange(0, TILE)
        slot_ok = (slot < count) & (slot < first + SPAN)
        source = _source(index, index_row, slot, slot_ok, INDEXED)
        if BITS == 16:
            channel = tl.arange(0, BLOCK)
            ok = slot_ok[:, None] & (channel < DIM)[None, :]
            found = tl.load(x + source[:, None] * x_sn + channel[None, :], mask=ok)
            tl.store(codes + slot[:, None] * DIM + channel[None, :], found.to(codes.dtype.element_ty), mask=ok)
        elif BITS == 3:
            _write_planes(
                x, x_sn, source, slot, slot_ok, codes, scales, zeros, balancer,
                DIM, BITS, TOKENS, CHANNELS, BALANCED, 4, 2, 0, 0, BLOCK // 4,
            )  # fmt: skip
            _write_planes(
                x, x_sn, source, slot, slot_ok, codes, scales, zeros, balancer,
                DIM, BITS, TOKENS, CHANNELS, BALANCED, 8, 1, 2, DIM // 4, BLOCK // 8,
            )  # fmt: skip
        else:
            PLANES: tl.constexpr = 8 // BITS
            _write_planes(
                x, x_sn, source, slot, slot_ok, codes, scales, zeros, balancer,
                DIM, BITS, TOKENS, CHANNELS, BALANCED, PLANES, BITS, 0, 0, BLOCK // PLANES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["start", "count", "first_position", "kv_heads"])
def write_kernel(
    k, k_sb, k_sh, k_sn, v, v_sb, v_sh, v_sn, index, tokens, first_position, in_positions, balancer,
    key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros, positions,
    start, count, capacity, kv_heads,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_TOKENS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    BALANCED: tl.constexpr, INDEXED: tl.constexpr, POSITIONED: tl.constexpr,
    KEY_SPAN: tl.constexpr, KEY_P: tl.constexpr, KEY_E: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_SPAN: tl.constexpr, VALUE_P: tl.constexpr, VALUE_E: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H_kv + h, 0): the i-th KEY_SPAN tokens' keys and positions; (i, b * H_kv + h, 1): values."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    slot_0 = head * capacity + start
    if tl.program_id(2) == 0:
        first = tl.program_id(0).to(tl.int64) * KEY_SPAN
        params_0 = slot_0 // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS)
        _write_side(
            k + b * k_sb + h * k_sh, k_sn, index, head * count,
            key_codes + slot_0 * (KEY_DIM if KEY_BITS == 16 else KEY_DIM * KEY_BITS // 8),
            key_scales + params_0 if KEY_BITS != 16 else None, key_zeros + params_0 if KEY_BITS != 16 else None,
            first, count, balancer + head * KEY_DIM if BALANCED else None,
            KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, BALANCED, INDEXED,
            KEY_SPAN, KEY_P, KEY_E, KEY_BLOCK, TILE,
        )  # fmt: skip
        for tile in range(0, KEY_SPAN, TILE):
            slot = first + tile + tl.arange(0, TILE)
            slot_ok = (slot < count) & (slot < first + KEY_SPAN)
            source = _source(index, head * count, slot, slot_ok, INDEXED)
            if POSITIONED:
                place = tl.load(in_positions + head * tokens + source, mask=slot_ok)
            else:
                place = (source + first_position).to(tl.int32)
            tl.store(positions + slot_0 + slot, place, mask=slot_ok)
    else:
        first = tl.program_id(0).to(tl.int64) * VALUE_SPAN
        params_0 = slot_0 // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS)
        _write_side(
            v + b * v_sb + h * v_sh, v_sn, index, head * count,
            value_codes + slot_0 * (VALUE_DIM if VALUE_BITS == 16 else VALUE_DIM * VALUE_BITS // 8),
            value_scales + params_0 if VALUE_BITS != 16 else None,
            value_zeros + params_0 if VALUE_BITS != 16 else None,
            first, count, None,
            VALUE_DIM, VALUE_BITS, VALUE_TOKENS, VALUE_CHANNELS, False, INDEXED,
            VALUE_SPAN, VALUE_P, VALUE_E, VALUE_BLOCK, TILE,
        )  # fmt: skip


def _tiling(name: str, fmt: SideFormat, dim: int) -> dict[str, int]:
    """Tile shapes of one side: tokens per program (whole groups), groups and numbers reduced at a time, channels."""
    tokens, channels = (1, dim) if fmt.is_float else (fmt.tokens, fmt.channels)
    span = TILE // tokens * tokens if tokens <= TILE else tokens
    elements = min(triton.next_power_of_2(tokens * channels), PARAM_ELEMENTS)
    params = triton.next_power_of_2(span // tokens * (dim // channels))
    sizes = {"SPAN": span, "P": min(params, PARAM_ELEMENTS // elements), "E": elements, "BLOCK": padded(dim)}
    return {f"{name.upper()}_{key}": value for key, value in sizes.items()}


def write_tokens(
    tier: TierBuffers,
    fmt: TierFormat,
    start: int,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor | None,
    first_position: int,
    positions: torch.Tensor | None,
    balancer: torch.Tensor | None,
    guide: Guide | None = None,
) -> None:
    """Quantize tokens into the slots ``start, start + 1, ...`` of a tier; see :func:`tokens.write_tokens`."""
    if fmt.key.fit or fmt.value.fit:
        raise NotCovered(f"rounding as {fmt}")
    batch, kv_heads, tokens, key_dim = k.shape
    value_dim = v.shape[3]
    count = tokens if index is None else index.shape[2]
    if not count:
        return
    need_floats(k, v)
    need_contiguous(*tier.key, *tier.value, tier.positions)
    k, v = neighbours(k), neighbours(v)
    tiling = {**_tiling("key", fmt.key, key_dim), **_tiling("value", fmt.value, value_dim)}
    programs = max(triton.cdiv(count, tiling["KEY_SPAN"]), triton.cdiv(count, tiling["VALUE_SPAN"]))
    if not fmt.key.balanced or fmt.key.is_float:
        balancer = None
    launch(
        write_kernel,
        (programs, batch * kv_heads, 2),
        k.device,
        EXACT,
        k=k, k_sb=k.stride(0), k_sh=k.stride(1), k_sn=k.stride(2),
        v=v, v_sb=v.stride(0), v_sh=v.stride(1), v_sn=v.stride(2),
        index=None if index is None else index.contiguous(),
        tokens=tokens,
        first_position=first_position,
        in_positions=None if positions is None else positions.contiguous(),
        balancer=None if balancer is None else balancer.contiguous(),
        **side_args("key", tier.key, fmt.key, key_dim),
        **side_args("value", tier.value, fmt.value, value_dim),
        positions=tier.positions,
        start=start, count=count, capacity=tier.capacity, kv_heads=kv_heads,
        BALANCED=balancer is not None, INDEXED=index is not None, POSITIONED=positions is not None,
        **tiling, TILE=TILE,
    )  # fmt: skip


@triton.jit
def _read_side(
    codes, scales, zeros, slot, slot_ok, row, out, row_0, balancer,
    DIM: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BALANCED: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Dequantize slots of one side of one head into rows of ``out``: a tile [N, BLOCK] float32."""
    channel, channel_ok = tile_channels(DIM, BITS, BLOCK)
    ok = slot_ok[:, None] & channel_ok[None, :]
    if BITS == 16:
        found = tl.load(codes + slot[:, None] * DIM + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        found = load_codes(codes, slot, slot_ok, DIM, BITS, BLOCK).to(tl.float32)
        found *= load_params(scales, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, False)
        found += load_params(zeros, slot, slot_ok, DIM, BITS, TOKENS, CHANNELS, BLOCK, N, False)
    if BALANCED:
        found = tl.div_rn(found, tl.load(balancer + channel, mask=channel_ok, other=1.0)[None, :])
    tl.store(out + (row_0 + row)[:, None] * DIM + channel[None, :], found, mask=ok)


@triton.jit(do_not_specialize=["count"])
def read_kernel(
    index, key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros, balancer, key_out, value_out,
    count, capacity,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_TOKENS: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_TOKENS: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    BALANCED: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H_kv + h, 0): keys of the i-th TILE slots of ``index`` [B, H_kv, count]; (.., 1): values."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    ok = row < count
    slot = tl.load(index + head * count + row, mask=ok, other=0)
    if tl.program_id(2) == 0:
        params_0 = head * (capacity // KEY_TOKENS * (KEY_DIM // KEY_CHANNELS))
        _read_side(
            key_codes + head * capacity * (KEY_DIM if KEY_BITS == 16 else KEY_DIM * KEY_BITS // 8),
            key_scales + params_0 if KEY_BITS != 16 else None, key_zeros + params_0 if KEY_BITS != 16 else None,
            slot, ok, row, key_out, head * count, balancer + head * KEY_DIM if BALANCED else None,
            KEY_DIM, KEY_BITS, KEY_TOKENS, KEY_CHANNELS, BALANCED, KEY_BLOCK, TILE,
        )  # fmt: skip
    else:
        params_0 = head * (capacity // VALUE_TOKENS * (VALUE_DIM // VALUE_CHANNELS))
        _read_side(
            value_codes + head * capacity * (VALUE_DIM if VALUE_BITS == 16 else VALUE_DIM * VALUE_BITS // 8),
            value_scales + params_0 if VALUE_BITS != 16 else None,
            value_zeros + params_0 if VALUE_BITS != 16 else None,
            slot, ok, row, value_out, head * count, None,
            VALUE_DIM, VALUE_BITS, VALUE_TOKENS, VALUE_CHANNELS, False, VALUE_BLOCK, TILE,
        )  # fmt: skip


def read_tokens(
    tier: TierBuffers, fmt: TierFormat, index: torch.Tensor, key_dim: int, value_dim: int, balancer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize the slots ``index`` [B, H_kv, N] int64 of a tier; see :func:`tokens.read_tokens`."""
    batch, kv_heads, count = index.shape
    keys = torch.empty(batch, kv_heads, count, key_dim, device=index.device)
    values = torch.empty(batch, kv_heads, count, value_dim, device=index.device)
    if not count:
        return keys, values
    need_contiguous(*tier.key, *tier.value)
    need_even_levels(fmt.key, fmt.value)
    if not fmt.key.balanced:
        balancer = None
    launch(
        read_kernel,
        (triton.cdiv(count, TILE), batch * kv_heads, 2),
        index.device,
        EXACT,
        index=index.contiguous(),
        **side_args("key", tier.key, fmt.key, key_dim),
        **side_args("value", tier.value, fmt.value, value_dim),
        balancer=None if balancer is None else balancer.contiguous(),
        key_out=keys, value_out=values, count=count, capacity=tier.capacity, BALANCED=balancer is not None,
        KEY_BLOCK=padded(key_dim), VALUE_BLOCK=padded(value_dim), TILE=TILE,
    )  # fmt: skip
    return keys, values


@triton.jit
def _copy_rows(buffer, source, target, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy rows of WIDTH elements within a buffer: a tile [N, BLOCK]. ``source`` and ``target`` count rows."""
    column = tl.arange(0, BLOCK)
    mask = ok[:, None] & (column < WIDTH)[None, :]
    row = tl.load(buffer + source[:, None] * WIDTH + column[None, :], mask=mask)
    tl.store(buffer + target[:, None] * WIDTH + column[None, :], row, mask=mask)


@triton.jit(do_not_specialize=["count"])
def copy_kernel(
    source, target, key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros, positions, scores,
    count, capacity,
    KEY_WIDTH: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    SCORED: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, KEY_PARAMS_BLOCK: tl.constexpr,
    VALUE_PARAMS_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H_kv + h): the i-th TILE pairs of ``source`` and ``target`` [B, H_kv, count], all buffers.

    No slot is read by one pair and written by another, so programs need no order among them.
    """
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ok = pair < count
    old = head * capacity + tl.load(source + head * count + pair, mask=ok, other=0)
    new = head * capacity + tl.load(target + head * count + pair, mask=ok, other=0)
    ok &= old != new
    _copy_rows(key_codes, old, new, ok, KEY_WIDTH, KEY_BLOCK)
    _copy_rows(value_codes, old, new, ok, VALUE_WIDTH, VALUE_BLOCK)
    if KEY_PARAMS:
        _copy_rows(key_scales, old, new, ok, KEY_PARAMS, KEY_PARAMS_BLOCK)
        _copy_rows(key_zeros, old, new, ok, KEY_PARAMS, KEY_PARAMS_BLOCK)
    if VALUE_PARAMS:
        _copy_rows(value_scales, old, new, ok, VALUE_PARAMS, VALUE_PARAMS_BLOCK)
        _copy_rows(value_zeros, old, new, ok, VALUE_PARAMS, VALUE_PARAMS_BLOCK)
    tl.store(positions + new, tl.load(positions + old, mask=ok), mask=ok)
    if SCORED:
        tl.store(scores + new, tl.load(scores + old, mask=ok), mask=ok)


def copy_slots(
    tier: TierBuffers, fmt: TierFormat, scores: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Copy slots of one tier onto others, codes and all; see :func:`tokens.copy_slots`."""
    batch, kv_heads, count = source.shape
    if not count:
        return
    if fmt.block != 1:
        raise NotCovered("slots that share their scale with others cannot be moved")
    need_contiguous(*tier.key, *tier.value, tier.positions, scores)
    widths: dict[str, int] = {}
    for name, side in (("KEY", tier.key), ("VALUE", tier.value)):
        params = side.scales.shape[3]
        widths |= {f"{name}_WIDTH": side.codes.shape[3], f"{name}_PARAMS": params}
        widths |= {f"{name}_BLOCK": padded(side.codes.shape[3]), f"{name}_PARAMS_BLOCK": triton.next_power_of_2(params)}
    launch(
        copy_kernel,
        (triton.cdiv(count, TILE), batch * kv_heads),
        source.device,
        EXACT,
        source=source.contiguous(), target=target.contiguous(),
        key_codes=tier.key.codes, key_scales=tier.key.scales, key_zeros=tier.key.zeros,
        value_codes=tier.value.codes, value_scales=tier.value.scales, value_zeros=tier.value.zeros,
        positions=tier.positions, scores=scores, count=count, capacity=tier.capacity,
        SCORED=scores.numel() > 0, **widths, TILE=TILE,
    )  # fmt: skip
