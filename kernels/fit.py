"""Rounding that looks at what is lost: scales and zeros by the error they leave, in plain PyTorch (the reference).

At 2 and 3 bits the range of a group is a bad guide to its scale: few numbers lie near the ends. Here the range is
narrowed by each factor of ``NARROWED`` in turn, codes are rounded on that grid, and the line through (code, number)
that fits best replaces the grid's own scale and zero. Which line is best depends on the side:

``clip``      least squares, for keys: the error of a score has the least variance.
``unbiased``  the line whose numbers have the group's own spread, for values: attention averages values over many
              tokens, which removes noise but not the shrinkage that least squares brings.
``gptq``      ``clip``, channel by channel, where the channels that are still to be rounded make up for the error in
              the direction of the queries (GPTQ, arXiv 2210.17323, with queries in the place of a layer's inputs).
``hqq``       the range's scale with a zero by half-quadratic splitting (HQQ, mobiusml.github.io/hqq_blog): robust
              against single outliers.

Sums are in float64, so that another order of adding (the C++ kernel's) gives the same codes but for freak ties.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mikv_compile.kernels.formats import SideFormat

NARROWED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Parts of a group's range that are tried."""

FP16_MAX = 65504.0

GUIDE_ROWS = 512
"""Last query rows of a prompt that tell which errors of keys matter."""

DAMPING = 0.01
"""Added to the diagonal of the queries' second moments, as a part of its mean: other queries will come."""

HQQ_STEPS, HQQ_POWER, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01


class Guide(NamedTuple):
    """Which errors of keys the queries notice, per (row, KV head)."""

    order: torch.Tensor
    """[B, H_kv, D] int64: channels in the order of rounding, those that matter most first."""
    factor: torch.Tensor
    """[B, H_kv, D, D] float32, upper triangular in that order: the Cholesky factor of the inverse second moments."""


def key_guide(q: torch.Tensor, k: torch.Tensor) -> Guide | None:
    """The guide for a prompt's keys.

    Args:
        q: [B, H_q, R, D], of which the last rows are looked at. k: [B, H_kv, T, D].

    Returns:
        None without queries or keys. A head whose second moments are not finite, or 0, has the identity for a factor:
        its channels are rounded one by one.
    """
    batch, kv_heads, tokens, dim = k.shape
    if not (q.shape[2] and tokens and batch):
        return None
    rows = q[:, :, -GUIDE_ROWS:].double()
    rows = rows.reshape(batch, kv_heads, -1, dim)
    moments = rows.transpose(2, 3) @ rows / rows.shape[2]
    weight = moments.diagonal(dim1=2, dim2=3)
    # A head without a guide rounds channel by channel; the others need not know.
    good = moments.isfinite().all(dim=3).all(dim=2) & (weight.mean(dim=2) > 0)
    unit = torch.eye(dim, dtype=moments.dtype, device=k.device)
    moments = torch.where(good[..., None, None], moments, unit)
    weight = moments.diagonal(dim1=2, dim2=3)
    moments = moments + torch.diag_embed((DAMPING * weight.mean(dim=2, keepdim=True)).expand_as(weight))
    order = (weight * k.float().var(dim=2, correction=0)).argsort(dim=2, descending=True)
    ordered = moments.gather(2, order[..., None].expand_as(moments)).gather(3, order[:, :, None].expand_as(moments))
    factor, failed = torch.linalg.cholesky_ex(torch.linalg.inv(ordered), upper=True)
    factor = torch.where((failed == 0)[..., None, None] & good[..., None, None], factor, unit)
    return Guide(order, factor.float())


def fit(x: torch.Tensor, bits: int, how: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups of numbers.

    Args:
        x: [..., N] float32, a group in the last dimension. ``how``: ``clip``, ``unbiased`` or ``hqq``.

    Returns:
        codes [..., N] float32, scale and zero [...] float16. A constant group, or one with a NaN, has codes 0.
    """
    levels = (1 << bits) - 1
    low, high = x.amin(dim=-1), x.amax(dim=-1)
    if how == "hqq":
        return _half_quadratic(x, low, high, levels)
    wide = x.double()
    mean = wide.mean(dim=-1)
    variance = ((wide - mean[..., None]) ** 2).mean(dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best = codes = None
    for part in NARROWED:
        step = (half * part * 2 / levels)[..., None]
        grid = torch.where(step > 0, (x - (middle - half * part)[..., None]) / step, 0.0).round().clamp(0, levels)
        grid = grid.nan_to_num(nan=0.0)
        centre = grid.double().mean(dim=-1)
        spread = (grid.double() ** 2).mean(dim=-1) - centre**2
        shared = (wide * grid.double()).mean(dim=-1) - mean * centre
        explained = torch.where(spread > 0, shared**2 / spread, 0.0)
        if best is None:
            best, codes, line = explained, grid, (centre, spread, shared)
            continue
        better = explained > best
        best = torch.where(better, explained, best)
        codes = torch.where(better[..., None], grid, codes)
        line = tuple(torch.where(better, new, old) for new, old in zip((centre, spread, shared), line, strict=True))
    assert codes is not None
    centre, spread, shared = line
    slope = variance / shared if how == "unbiased" else shared / spread
    slope = torch.where((spread > 0) & (shared > 0), slope, 0.0)
    scale = slope.clamp(max=FP16_MAX).half()
    zero = (mean - scale.double() * centre).clamp(-FP16_MAX, FP16_MAX).half()
    return torch.where(scale[..., None] > 0, codes, 0.0), scale, zero


def _half_quadratic(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HQQ: the scale stays; the zero follows the mean of what rounding leaves, outliers left aside."""
    scale = ((high - low) / levels).clamp(max=FP16_MAX).half()
    step = scale.float()[..., None]
    zero, beta = low[..., None], HQQ_BETA
    least = best = None
    for _ in range(HQQ_STEPS):
        codes = torch.where(step > 0, (x - zero) / step, 0.0).round().clamp(0, levels).nan_to_num(nan=0.0)
        left = x - (codes * step + zero)
        error = left.abs().pow(HQQ_POWER).mean(dim=-1, keepdim=True)
        if least is None:
            least, best = error, zero
        else:
            best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        shrunk = left.sign() * (left.abs() - left.abs().clamp(min=1e-8).pow(HQQ_POWER - 1) / beta).clamp(min=0)
        zero = (x - shrunk - codes * step).mean(dim=-1, keepdim=True)
        beta *= HQQ_GROWTH
    rounded = best.clamp(-FP16_MAX, FP16_MAX).half()
    codes = torch.where(step > 0, (x - rounded.float()) / step, 0.0).round().clamp(0, levels).nan_to_num(nan=0.0)
    return codes, scale, rounded[..., 0]


def fit_groups(x: torch.Tensor, fmt: SideFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round tokens by groups of ``fmt.tokens x fmt.channels``.

    Args:
        x: [B, H, T, D] float32; T is a multiple of ``fmt.tokens``.

    Returns:
        codes [B, H, T, D] uint8, not packed; scales and zeros [B, H, T / tokens, D / channels] float16.
    """
    b, h, t, d = x.shape
    groups = x.reshape(b, h, t // fmt.tokens, fmt.tokens, d // fmt.channels, fmt.channels).transpose(3, 4)
    lined = groups.reshape(*groups.shape[:4], -1)
    codes, scales, zeros = fit(lined, fmt.bits, "clip" if fmt.fit == "gptq" else fmt.fit)
    codes = codes.reshape(groups.shape).transpose(3, 4).reshape(b, h, t, d)
    return codes.to(torch.uint8), scales, zeros


def fit_guided(x: torch.Tensor, fmt: SideFormat, guide: Guide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round keys per channel in blocks of tokens; channels to come make up for the error of those before.

    Args:
        x: [B, H, T, D] float32; T is a multiple of ``fmt.tokens``, and ``fmt.channels`` is 1.

    Returns:
        as :func:`fit_groups`.
    """
    b, h, t, d = x.shape
    blocks = x.reshape(b, h, t // fmt.tokens, fmt.tokens, d)
    index = guide.order[:, :, None, None].expand_as(blocks)
    rest = blocks.gather(4, index).permute(4, 0, 1, 2, 3).contiguous()  # [D, B, H, blocks, tokens]
    codes, scales, zeros = torch.empty_like(rest), rest.new_empty(rest.shape[:4]), rest.new_empty(rest.shape[:4])
    for c in range(d):
        codes[c], scale, zero = fit(rest[c], fmt.bits, "clip")
        scales[c], zeros[c] = scale.float(), zero.float()
        read = codes[c] * scales[c][..., None] + zeros[c][..., None]
        missing = (rest[c] - read) / guide.factor[:, :, c, c, None, None]
        ahead = guide.factor[:, :, c, c + 1 :].permute(2, 0, 1)[..., None, None]
        rest[c + 1 :] -= ahead * missing
    back = guide.order.argsort(dim=2)
    codes = codes.permute(1, 2, 3, 4, 0).gather(4, back[:, :, None, None].expand_as(blocks))
    params = [
        p.permute(1, 2, 3, 0).gather(3, back[:, :, None].expand(b, h, t // fmt.tokens, d)) for p in (scales, zeros)
    ]
    return codes.reshape(b, h, t, d).to(torch.uint8), params[0].half(), params[1].half()
