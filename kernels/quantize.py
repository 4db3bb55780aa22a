"""Asymmetric round-to-nearest quantization of keys and values, in plain PyTorch (the reference).

``x ~ code * scale + zero`` with ``zero = min`` and ``scale = (max - min) / (2**bits - 1)`` over a group of
``tokens x channels`` (MiKV arXiv 2402.18096, equation 1; per-channel blocks as in KIVI, arXiv 2402.02750). Scale and
zero are float16, and codes are fitted to the rounded values, so that storing them adds no further error.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.fit import Guide
from mikv_compile.kernels.formats import SideBuffers, SideFormat
from mikv_compile.kernels.packing import pack, unpack

FP16_MAX = 65504.0


LLOYD_LEVELS = {
    2: (-1.5104, -0.4528, 0.4528, 1.5104),
    3: (-2.1520, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1520),
    4: (
        -2.7326, -2.0690, -1.6181, -1.2562, -0.9423, -0.6568, -0.3881, -0.1284,
        0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6181, 2.0690, 2.7326,
    ),
}  # fmt: skip
"""The levels with the least squared error for normal numbers of variance 1 (J. Max, Quantizing for minimum distortion,
1960, table I), used by TurboQuant (arXiv 2504.19874) after a rotation. 8 bits stay evenly spaced."""


def quantize(
    x: torch.Tensor, fmt: SideFormat, guide: Guide | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize tokens.

    Args:
        x: [B, H, T, D], any floating dtype; T is a multiple of ``fmt.tokens``.
        fmt: a coded side format.
        guide: which errors of keys matter, for the rounding ``gptq``; without one it is ``clip``.

    Returns:
        packed codes [B, H, T, D * bits / 8] uint8, scales and zeros [B, H, T / tokens, D / channels] float16.
    """
    b, h, t, d = x.shape
    if fmt.fit == "lloyd" and fmt.bits in LLOYD_LEVELS:
        return _quantize_lloyd(x.float(), fmt)
    if fmt.fit and fmt.fit != "lloyd":
        guided = fmt.fit == "gptq" and fmt.channels == 1 and guide is not None
        name, more = ("fit_guided", (guide,)) if guided else ("fit_groups", ())
        codes, scales, zeros = run(name, x.device, x.float(), fmt, *more)
        return pack(codes, fmt.bits), scales, zeros
    groups = x.float().reshape(b, h, t // fmt.tokens, fmt.tokens, d // fmt.channels, fmt.channels)
    low, high = groups.amin(dim=(3, 5)), groups.amax(dim=(3, 5))
    levels = (1 << fmt.bits) - 1
    zeros = low.clamp(-FP16_MAX, FP16_MAX).half()
    scales = ((high - low) / levels).clamp(max=FP16_MAX).half()
    step = scales.float()[:, :, :, None, :, None]
    offset = zeros.float()[:, :, :, None, :, None]
    # A constant group has scale 0: its codes are 0 and it reads back as the zero point.
    codes = torch.where(step > 0, (groups - offset) / step, 0.0).round_().clamp_(0, levels)
    return pack(codes.to(torch.uint8).reshape(b, h, t, d), fmt.bits), scales, zeros


def _quantize_lloyd(x: torch.Tensor, fmt: SideFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, h, t, d = x.shape
    groups = x.reshape(b, h, t // fmt.tokens, fmt.tokens, d // fmt.channels, fmt.channels)
    mean = groups.mean(dim=(3, 5), keepdim=True)
    zeros = mean.clamp(-FP16_MAX, FP16_MAX).half()
    centred = groups - zeros.float()
    spread = centred.square().mean(dim=(3, 5), keepdim=True).sqrt()
    levels = torch.tensor(LLOYD_LEVELS[fmt.bits], device=x.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(torch.where(spread > 0, centred / spread, 0.0).contiguous(), borders)
    chosen = levels[codes]
    # Levels are means of what they stand for, so numbers shrink; this scale gives the group its own spread back.
    shared = (centred * chosen).mean(dim=(3, 5), keepdim=True)
    scales = torch.where(shared > 0, spread.square() / shared, 0.0).clamp(max=FP16_MAX).half()
    params = (b, h, t // fmt.tokens, d // fmt.channels)
    packed = pack(codes.to(torch.uint8).reshape(b, h, t, d), fmt.bits)
    return packed, scales.reshape(params), zeros.reshape(params)


def dequantize(side: SideBuffers, fmt: SideFormat, dim: int) -> torch.Tensor:
    """Read tokens back as float32 [B, H, T, dim]; ``side`` holds whole blocks."""
    if fmt.is_float:
        return side.codes.float()
    codes = unpack(side.codes, fmt.bits, dim)
    b, h, t, d = codes.shape
    numbers = codes.float()
    if fmt.fit == "lloyd" and fmt.bits in LLOYD_LEVELS:
        numbers = torch.tensor(LLOYD_LEVELS[fmt.bits], device=codes.device)[codes.long()]
    groups = numbers.reshape(b, h, t // fmt.tokens, fmt.tokens, d // fmt.channels, fmt.channels)
    scales = side.scales.float()[:, :, :, None, :, None]
    zeros = side.zeros.float()[:, :, :, None, :, None]
    return (groups * scales + zeros).reshape(b, h, t, d)


def channel_balancer(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """MiKV's outlier-aware channel balancer ``b = sqrt(max|q| / max|k|)`` per (row, KV head, channel).

    Keys are stored as ``k * b`` and queries divided by ``b`` (arXiv 2402.18096, equations 2 to 4).

    Args:
        q: [B, H_q, R, D]; the maximum runs over all query heads of a KV head.
        k: [B, H_kv, T, D].

    Returns:
        [B, H_kv, D] float32, within [1e-4, 1e4]; 1 where either maximum is 0 or not finite, or of no tokens.
    """
    batch, kv_heads, tokens, dim = k.shape
    if not (tokens and q.shape[2]):
        return torch.ones(batch, kv_heads, dim, device=k.device)
    q_max = q.abs().amax(dim=2).float().reshape(batch, kv_heads, q.shape[1] // kv_heads, dim).amax(dim=2)
    k_max = k.abs().amax(dim=2).float()
    ratio = (q_max / k_max).sqrt()
    usable = (q_max > 0) & (k_max > 0) & q_max.isfinite() & k_max.isfinite() & ratio.isfinite()
    return torch.where(usable, ratio.clamp(1e-4, 1e4), 1.0)
