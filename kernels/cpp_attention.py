"""``attend`` on the CPU: hands the addresses of all tiers to ``attention.cpp``, which unpacks codes in the L1 cache."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache
from struct import Struct

import torch

from mikv_compile.kernels.cpp_common import FLOAT_KINDS, build, side_fields, threads
from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.formats import LayerFormat, StoreBuffers

_NO_MASK, _BOOL_MASK, _FLOAT_MASK = 0, 1, 2


@lru_cache(maxsize=1)
def kernels() -> tuple[Callable[..., int], Callable[..., int]]:
    """The compiled entry points of attention and of scores; built on first use."""
    library = build("attention")
    attend, add_scores = library.mikv_attend, library.mikv_add_scores
    attend.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_float]
    add_scores.argtypes = [*attend.argtypes, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    attend.restype = add_scores.restype = ctypes.c_int
    return attend, add_scores


_no_mask = (_NO_MASK, 0, 0, 0, 0, 0)


def _mask_fields(
    mask: torch.Tensor, batch: int, heads: int, rows: int, columns: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The mask as the kernel reads it, to keep alive, and its fields: kind, address, strides (0: broadcast)."""
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


_OUTPUTS = Struct("=3q")
_THREADS = 10
_THREADS_AND_MASK = Struct("=7q")
_HEADER = 18
"""Fields of ``struct Call`` before its tiers."""
_SIDE = 12
_TIER = 30
_FIRST_AND_COUNT = Struct("=2q")
_COUNT = Struct("=q")
_OWN_SIDE = Struct("=7q")


class PreparedCall:
    """Attention calls on one store that have the same shapes: what follows from its buffers is looked up once, here.

    It belongs to exactly the buffers that it was built from, and keeps none of them alive: whoever calls it holds them.
    One thread at a time may call it.

    Args:
        buffers: the store's buffers on the CPU, with their format.
        shape: B, H_q, R, D_k of the queries. kv_heads, value_dim: H_kv and D_v.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        BuildError: the kernel cannot be compiled here.
    """

    __slots__ = ("_address", "_counts", "_fields", "_keep", "_kernel", "_own", "_shape")

    def __init__(
        self, buffers: StoreBuffers, fmt: LayerFormat, shape: tuple[int, int, int, int], kv_heads: int, value_dim: int
    ) -> None:
        kernels()
        batch, heads, rows, key_dim = shape
        self._shape = (batch, heads, rows, value_dim)
        tiers: list[int] = []
        for tier, tier_fmt in zip(buffers.tiers, fmt.tiers, strict=True):
            batch_stride, head_stride, slot_stride = tier.positions.stride()
            if slot_stride != 1:
                raise NotCovered("positions of a tier are not contiguous")
            tiers += side_fields(tier.key, tier_fmt.key)
            tiers += side_fields(tier.value, tier_fmt.value)
            tiers += (tier.positions.data_ptr(), batch_stride, head_stride, 0, 0, tier_fmt.key.balanced)
        self._keep = None
        balancer = buffers.balancer
        if fmt.is_balanced and not balancer.is_contiguous():
            self._keep = balancer = balancer.contiguous()
        sizes = (batch, kv_heads, heads // kv_heads, rows, key_dim, value_dim)
        header = [0, 0, 0, balancer.data_ptr() if fmt.is_balanced else 0, *sizes, 0, *_no_mask, len(fmt.tiers) + 1]
        self._fields = array("q", [*header, *tiers, *(0,) * _TIER])
        self._address = self._fields.buffer_info()[0]
        self._counts = [8 * (_HEADER + _TIER * i + _TIER - 2) for i in range(len(fmt.tiers))]
        self._own = 8 * (_HEADER + _TIER * len(fmt.tiers))

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        counts: tuple[int, ...],
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; arguments, result and errors as for :func:`attend`."""
        batch, heads, rows, value_dim = self._shape
        out = torch.empty((batch, heads, rows, value_dim), dtype=torch.float32, device="cpu")
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device="cpu")
        kept = self._tell(q, k, v, mask, counts, length, out.data_ptr(), lse)
        _check(kernels()[0](self._address, scale, softcap))
        del kept
        return out if q.dtype is torch.float32 else out.to(q.dtype), lse

    def add_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float,
        scores: torch.Tensor,
        count: int,
        length: int,
    ) -> torch.Tensor:
        """Add the call's attention to ``scores`` [B, H_kv, C] float32 of tier 0, of which ``count`` slots are used.

        Other arguments, result and errors as for :func:`add_scores`.
        """
        batch, kv_heads, tokens, _ = k.shape
        own = torch.zeros((batch, kv_heads, tokens), dtype=torch.float32, device="cpu")
        batch_stride, head_stride, slot_stride = scores.stride()
        if slot_stride != 1 and count:
            raise NotCovered("scores are not contiguous")
        lse = lse.contiguous()
        counts = (count, *(0,) * (len(self._counts) - 1))
        kept = self._tell(q, k, k, mask, counts, length, 0, lse)
        status = kernels()[1](
            self._address, scale, softcap, scores.data_ptr(), batch_stride, head_stride, own.data_ptr()
        )  # fmt: skip
        del kept
        _check(status)
        return own

    def _tell(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        counts: tuple[int, ...],
        length: int,
        out: int,
        lse: torch.Tensor,
    ) -> tuple[object, ...]:
        """Write a call's arguments; the tensors whose addresses the kernel gets are returned, to be kept until then."""
        if not q.is_cpu or q.dtype not in FLOAT_KINDS:
            raise NotCovered(f"queries of {q.dtype} on {q.device}")
        batch, heads, rows, _ = self._shape
        k, v = _neighbours(k), _neighbours(v)
        mask_fields: tuple[int, ...] = _no_mask
        if mask is not None:
            mask, mask_fields = _mask_fields(mask, batch, heads, rows, length + k.shape[2])
        rows_q = q.float().contiguous()
        fields = self._fields
        _OUTPUTS.pack_into(fields, 0, rows_q.data_ptr(), out, lse.data_ptr())
        _THREADS_AND_MASK.pack_into(fields, 8 * _THREADS, threads(), *mask_fields)
        for at, count in zip(self._counts, counts, strict=True):
            _COUNT.pack_into(fields, at, count)
        own = self._own
        for side in (k, v):
            strides = side.stride()
            _OWN_SIDE.pack_into(fields, own, FLOAT_KINDS[side.dtype], 1, 1, side.data_ptr(), *strides[:3])
            own += 8 * _SIDE
        _FIRST_AND_COUNT.pack_into(fields, own + 24, length, k.shape[2])
        return rows_q, k, v, mask


def _check(status: int) -> None:
    if status:
        raise MemoryError("the attention kernel could not allocate its scratch space")


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] that the kernel reads; a copy only where needed."""
    if x.dtype not in FLOAT_KINDS:
        x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


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
    call = PreparedCall(buffers, fmt, q.shape, k.shape[1], v.shape[3])  # type: ignore[arg-type]
    return call(q, k, v, mask, scale, softcap, counts, length)


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
    """Add this call's attention to tier 0's scores and return the own tokens'; see :func:`attention.add_scores`.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        BuildError: the kernel cannot be compiled here.
    """
    call = PreparedCall(buffers, fmt, q.shape, k.shape[1], k.shape[3])  # type: ignore[arg-type]
    return call.add_scores(q, k, lse, mask, scale, softcap, buffers.scores, count, length)
