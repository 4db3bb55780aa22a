"""``attend`` on the CPU: hands the addresses of all tiers to ``attention.cpp``, which unpacks codes in the L1 cache."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch

from mikv_compile.kernels.attention import pack_rows
from mikv_compile.kernels.cpp_common import FLOAT_KINDS, build, side_fields
from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.formats import LayerFormat, StoreBuffers

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2


@lru_cache(maxsize=1)
def _kernel() -> Callable[[int, float, float], int]:
    """The compiled entry point; built on first use."""
    function = build("attention").mikv_attend
    function.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_float]
    function.restype = ctypes.c_int
    return function


def _own_fields(x: torch.Tensor) -> tuple[int, ...]:
    """``struct Side`` of the call's own tokens, float32 [B, H_kv, S, D]."""
    return 32, 1, 1, x.data_ptr(), *x.stride()[:3], 0, 0, 0, 0, 0


def _as_float(x: torch.Tensor) -> torch.Tensor:
    """Float32 with contiguous channels; a copy only where needed."""
    x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


def _mask_fields(
    mask: torch.Tensor | None, batch: int, heads: int, rows: int, columns: int
) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """The mask as the kernel reads it, to keep alive, and its fields: kind, address, strides (0: broadcast)."""
    if mask is None:
        return None, (_NO_MASK, 0, 0, 0, 0, 0)
    if mask.dtype is torch.bool:
        kind = _BOOL_MASK
    elif mask.dtype in FLOAT_KINDS:
        kind, mask = _FLOAT_MASK, mask.float()
    else:
        raise NotCovered(f"mask of {mask.dtype}")
    if mask.dim() != 4 or mask.shape[3] < columns:
        raise NotCovered(f"mask of shape {tuple(mask.shape)}")
    strides = []
    for size, stride, full in zip(mask.shape[:3], mask.stride(), (batch, heads, rows), strict=False):
        if size not in (1, full):
            raise NotCovered(f"mask of shape {tuple(mask.shape)}")
        strides.append(0 if size == 1 else stride)
    return mask, (kind, mask.data_ptr(), *strides, mask.stride(3))


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
    """Attention of a call's queries over all tiers and the call's own tokens; see :func:`attention.attend`.

    Args:
        q: [B, H_q, R, D_k]; k, v: [B, H_kv, S, D_k] and [B, H_kv, S, D_v]; float32, float16 or bfloat16 on the CPU.
        mask: None, or broadcastable to [B, H_q, R, length + S], bool or floating.
        scale, softcap, buffers, fmt, counts, length: as in the reference.

    Returns:
        output [B, H_q, R, D_v] in q's dtype and log-sum-exp [B, H_q, R] float32. The same bits for any number of
        threads.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        BuildError: the kernel cannot be compiled here.
    """
    if not q.is_cpu or q.dtype not in FLOAT_KINDS:
        raise NotCovered(f"queries of {q.dtype} on {q.device}")
    kernel = _kernel()
    batch, heads, rows, key_dim = q.shape
    kv_heads, own, value_dim = k.shape[1], k.shape[2], v.shape[3]

    tiers: list[int] = []
    used = 1
    balanced = False
    for tier, tier_fmt, count in zip(buffers.tiers, fmt.tiers, counts, strict=True):
        if not count:
            continue
        used += 1
        balanced |= tier_fmt.key.balanced
        positions = tier.positions
        batch_stride, head_stride, slot_stride = positions.stride()
        if slot_stride != 1:
            raise NotCovered("positions of a tier are not contiguous")
        tiers += side_fields(tier.key, tier_fmt.key)
        tiers += side_fields(tier.value, tier_fmt.value)
        tiers += (positions.data_ptr(), batch_stride, head_stride, 0, count, tier_fmt.key.balanced)
    # Tensors whose addresses the kernel gets stay referenced by locals until it returns.
    own_k, own_v = _as_float(k), _as_float(v)
    tiers += _own_fields(own_k)
    tiers += _own_fields(own_v)
    tiers += (0, 0, 0, length, own, 0)

    rows_q = pack_rows(q, kv_heads).contiguous()
    balancer = buffers.balancer.contiguous() if balanced else None
    mask, mask_fields = _mask_fields(mask, batch, heads, rows, length + own)
    out = torch.empty((batch, heads, rows, value_dim), dtype=torch.float32, device="cpu")
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device="cpu")
    call = array(
        "q",
        [
            rows_q.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            0 if balancer is None else balancer.data_ptr(),
            batch,
            kv_heads,
            heads // kv_heads,
            rows,
            key_dim,
            value_dim,
            torch.get_num_threads(),
            *mask_fields,
            used,
            *tiers,
        ],
    )
    if kernel(call.buffer_info()[0], scale, softcap):
        raise MemoryError("the attention kernel could not allocate its scratch space")
    return out.to(q.dtype), lse
