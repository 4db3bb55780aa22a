"""Write, read and move the tokens of one tier, in plain PyTorch (the reference)."""

from __future__ import annotations

import torch

from mikv_compile.kernels.fit import Guide
from mikv_compile.kernels.formats import SideBuffers, SideFormat, TierBuffers, TierFormat
from mikv_compile.kernels.quantize import dequantize, quantize

CHUNK = 512
"""Tokens gathered and quantized at a time: bounds the copies that compressing a long prompt makes."""


def _select(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _write_side(
    side: SideBuffers, fmt: SideFormat, start: int, x: torch.Tensor, balancer: torch.Tensor | None, guide: Guide | None
) -> None:
    stop = start + x.shape[2]
    if fmt.is_float:
        side.codes[:, :, start:stop] = x
        return
    if balancer is not None:
        x = x.float() * balancer[:, :, None]
    codes, scales, zeros = quantize(x, fmt, guide)
    side.codes[:, :, start:stop] = codes
    side.scales[:, :, start // fmt.tokens : stop // fmt.tokens] = scales
    side.zeros[:, :, start // fmt.tokens : stop // fmt.tokens] = zeros


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
    """Quantize tokens into the slots ``start, start + 1, ...`` of a tier.

    Args:
        tier, fmt: the tier's buffers (written) and format. ``start`` and the number of tokens are multiples of
            ``fmt.block``.
        k, v: [B, H_kv, T, D_k] and [B, H_kv, T, D_v], any floating dtype, any strides.
        index: [B, H_kv, N] int64, the tokens to take, in slot order; None takes all T.
        first_position: token t has position ``first_position + t``, unless
        positions: [B, H_kv, T] int32 gives each token's position.
        balancer: [B, H_kv, D_k] float32 when ``fmt.key.balanced``, otherwise None.
        guide: which errors of keys matter, for the rounding ``gptq``; without one it is ``clip``.
    """
    count = k.shape[2] if index is None else index.shape[2]
    if not fmt.key.balanced:
        balancer = None
    step = max(CHUNK // fmt.block, 1) * fmt.block
    for begin in range(0, count, step):
        end = min(begin + step, count)
        if index is None:
            k_part, v_part = k[:, :, begin:end], v[:, :, begin:end]
            where = torch.arange(begin, end, device=k.device).expand(*k.shape[:2], -1)
        else:
            where = index[:, :, begin:end]
            k_part, v_part = _select(k, where), _select(v, where)
        _write_side(tier.key, fmt.key, start + begin, k_part, balancer, guide)
        _write_side(tier.value, fmt.value, start + begin, v_part, None, None)
        place = where + first_position if positions is None else positions.gather(2, where)
        tier.positions[:, :, start + begin : start + end] = place


def _read_side(side: SideBuffers, fmt: SideFormat, index: torch.Tensor, dim: int) -> torch.Tensor:
    codes = _select(side.codes, index)
    if fmt.is_float:
        return codes.float()
    block = index // fmt.tokens
    # Per-token parameters of the chosen slots: the block structure is gone once slots are picked one by one.
    per_token = SideFormat(fmt.bits, tokens=1, channels=fmt.channels, fit=fmt.fit)
    return dequantize(SideBuffers(codes, _select(side.scales, block), _select(side.zeros, block)), per_token, dim)


def read_tokens(
    tier: TierBuffers, fmt: TierFormat, index: torch.Tensor, key_dim: int, value_dim: int, balancer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize the slots ``index`` [B, H_kv, N] int64 of a tier.

    Returns:
        keys [B, H_kv, N, D_k] and values [B, H_kv, N, D_v], float32, the balancer already divided out.
    """
    k = _read_side(tier.key, fmt.key, index, key_dim)
    if fmt.key.balanced:
        assert balancer is not None
        k = k / balancer[:, :, None]
    return k, _read_side(tier.value, fmt.value, index, value_dim)


def copy_slots(
    tier: TierBuffers, fmt: TierFormat, scores: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Copy slots of one tier onto others, codes and all: refills the holes that demoted tokens leave.

    Args:
        tier, fmt: a tier whose scales are per token.
        scores: [B, H_kv, C] float32 of this tier, moved along; may have no elements.
        source, target: [B, H_kv, N] int64. A pair with source == target changes nothing; no slot is a source of one
            pair and the target of another.
    """
    for side, side_fmt in ((tier.key, fmt.key), (tier.value, fmt.value)):
        for buffer in side if not side_fmt.is_float else side[:1]:
            buffer.scatter_(2, target[..., None].expand(-1, -1, -1, buffer.shape[-1]), _select(buffer, source))
    tier.positions.scatter_(2, target, tier.positions.gather(2, source))
    if scores.numel():
        scores.scatter_(2, target, scores.gather(2, source))
