"""Select, write, read, move and demote tokens on the CPU: hands addresses to ``tokens.cpp``.

What is stored equals the references bit by bit, for any number of threads. (Two things that no number shows may differ:
which NaN it is, and the sign of a zero point where a group's minimum is both 0 and -0.)
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from struct import Struct

import torch

from mikv_compile.kernels.cpp_common import FLOAT_KINDS, build, side_fields, threads
from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.fit import Guide
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, TierBuffers, TierFormat

_APPEND = Struct("=16q")
"""Fields of ``struct Call`` that an append changes: keys, values, start, count, first position, own scores."""
_THREADS = 19
_HEADER = 39
"""Fields of ``struct Call`` before its tiers."""
_TIER = 30
"""Fields of ``struct Tier``; the last two are start and count."""

_NO_ROWS = (0, 0, 0)
_NO_DENSE = (0, 0, 0, 0, 0)

_PARALLEL = 131072
"""Numbers to write below which the kernel takes one thread anyway (``kMinWork``)."""


@lru_cache(maxsize=1)
def kernels() -> dict[str, Callable[[int], int]]:
    """The compiled entry points; built on first use."""
    library = build("tokens", exact=True)
    functions = {}
    for name in ("write_tokens", "read_tokens", "copy_slots", "select_tokens", "demote"):
        function = getattr(library, f"mikv_{name}")
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int
        functions[name] = function
    return functions


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("the kernel could not allocate its scratch space")
    if status == 2:
        raise IndexError("a token or slot is out of range")


def _call(name: str, *parts: Sequence[int]) -> None:
    """Run an entry point. The tensors whose addresses it gets have to stay alive until this returns."""
    fields = array("q", [field for part in parts for field in part])
    _check(kernels()[name](fields.buffer_info()[0]))


def _header(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    balancer: torch.Tensor | None,
    num_tiers: int = 1,
    *,
    k: Sequence[int] = _NO_DENSE,
    v: Sequence[int] = _NO_DENSE,
    start: int = 0,
    count: int = 0,
    first_position: int = 0,
    own_scores: Sequence[int] = _NO_ROWS,
    demotion: Sequence[int] = (0, 0, 0),
    scores: Sequence[int] = _NO_ROWS,
    index: Sequence[int] = _NO_ROWS,
    target: Sequence[int] = _NO_ROWS,
    places: Sequence[int] = _NO_ROWS,
    limit: int = 0,
) -> list[int]:
    """``struct Call`` up to its tiers."""
    fields = [*k, *v, start, count, first_position, *own_scores, *demotion, threads()]
    fields += [batch, heads, key_dim, value_dim, 0 if balancer is None else balancer.data_ptr()]
    return [*fields, *scores, *index, *target, *places, limit, num_tiers]


def _tier_fields(tier: TierBuffers, fmt: TierFormat, start: int = 0, count: int = 0) -> tuple[int, ...]:
    """``struct Tier``."""
    key, value = side_fields(tier.key, fmt.key), side_fields(tier.value, fmt.value)
    return (*key, *value, *_rows(tier.positions, torch.int32), int(fmt.key.balanced), start, count)


def _rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Address and strides of [B, H, N]."""
    batch_stride, head_stride, stride = x.stride()
    if x.dtype is not dtype or stride != 1 or not x.is_cpu:
        raise NotCovered(f"a buffer of {x.dtype} with strides {x.stride()}")
    return x.data_ptr(), batch_stride, head_stride


def _input_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N] as the kernel reads it; a copy only where needed."""
    x = x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] with contiguous channels; a copy only where needed."""
    if x.dtype not in FLOAT_KINDS or not x.is_cpu:
        raise NotCovered(f"tokens of {x.dtype} on {x.device}")
    return x if x.stride(3) == 1 else x.contiguous()


def _dense(x: torch.Tensor) -> tuple[int, ...]:
    """``struct Dense``."""
    return FLOAT_KINDS[x.dtype], x.data_ptr(), *x.stride()[:3]


def _balancer(fmt: TierFormat | LayerFormat, balancer: torch.Tensor | None) -> torch.Tensor | None:
    """[B, H, D_k] as the kernel reads it, None where nothing is balanced."""
    balanced = fmt.key.balanced if isinstance(fmt, TierFormat) else fmt.is_balanced
    return balancer.float().contiguous() if balanced and balancer is not None else None


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
    """Quantize tokens into the slots ``start, start + 1, ...`` of a tier; see :func:`tokens.write_tokens`.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        IndexError: ``index`` names a token that there is not.
        BuildError: the kernel cannot be compiled here.
    """
    _need_range_rounding(fmt)
    batch, heads, tokens, key_dim = k.shape
    count = tokens if index is None else index.shape[2]
    _need_room(tier, fmt, start, count)
    # Tensors whose addresses the kernel gets stay referenced by locals until it returns.
    k, v, balancer = _neighbours(k), _neighbours(v), _balancer(fmt, balancer)
    index = None if index is None else _input_rows(index, torch.int64)
    positions = None if positions is None else _input_rows(positions, torch.int32)
    header = _header(
        batch, heads, key_dim, v.shape[3], balancer,
        k=_dense(k), v=_dense(v), start=start, count=count, first_position=first_position,
        index=_NO_ROWS if index is None else _rows(index, torch.int64),
        places=_NO_ROWS if positions is None else _rows(positions, torch.int32),
        limit=tokens,
    )  # fmt: skip
    _call("write_tokens", header, _tier_fields(tier, fmt))


def _need_range_rounding(fmt: TierFormat) -> None:
    for side in (fmt.key, fmt.value):
        if side.fit:
            raise NotCovered(f"rounding as {side}")


def _need_room(tier: TierBuffers, fmt: TierFormat, start: int, count: int) -> None:
    if start < 0 or start + count > tier.capacity:
        raise NotCovered(f"{count} tokens from slot {start} on in a tier of {tier.capacity}")
    for side in (fmt.key, fmt.value):
        if start % side.tokens or count % side.tokens:
            raise NotCovered(f"{count} tokens from slot {start} on are no whole blocks of {side.tokens}")


def read_tokens(
    tier: TierBuffers, fmt: TierFormat, index: torch.Tensor, key_dim: int, value_dim: int, balancer: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize the slots ``index`` [B, H_kv, N] int64 of a tier; see :func:`tokens.read_tokens`.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        IndexError: ``index`` names a slot that there is not.
        BuildError: the kernel cannot be compiled here.
    """
    batch, heads, count = index.shape
    index, balancer = _input_rows(index, torch.int64), _balancer(fmt, balancer)
    keys = torch.empty((batch, heads, count, key_dim), dtype=torch.float32, device="cpu")
    values = torch.empty((batch, heads, count, value_dim), dtype=torch.float32, device="cpu")
    header = _header(
        batch, heads, key_dim, value_dim, balancer,
        k=_dense(keys), v=_dense(values), count=count, index=_rows(index, torch.int64), limit=tier.capacity,
    )  # fmt: skip
    _call("read_tokens", header, _tier_fields(tier, fmt))
    return keys, values


def copy_slots(
    tier: TierBuffers, fmt: TierFormat, scores: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Copy slots of one tier onto others, codes and all; see :func:`tokens.copy_slots`.

    Raises:
        NotCovered: a device or layout that only the reference takes.
        IndexError: ``source`` or ``target`` names a slot that there is not. Other heads may have been copied.
        BuildError: the kernel cannot be compiled here.
    """
    _need_own_scales(fmt)
    batch, heads, count = source.shape
    source, target = _input_rows(source, torch.int64), _input_rows(target, torch.int64)
    header = _header(
        batch, heads, _channels(tier.key.codes, fmt.key.bits), _channels(tier.value.codes, fmt.value.bits), None,
        count=count, scores=_score_rows(scores),
        index=_rows(source, torch.int64), target=_rows(target, torch.int64), limit=tier.capacity,
    )  # fmt: skip
    _call("copy_slots", header, _tier_fields(tier, fmt))


def _need_own_scales(fmt: TierFormat) -> None:
    if fmt.block != 1:
        raise NotCovered("slots that share their scale with others cannot be moved")


def _channels(codes: torch.Tensor, bits: int) -> int:
    """Head dimension of a side."""
    return codes.shape[3] if bits == 16 else codes.shape[3] * 8 // bits


def _score_rows(scores: torch.Tensor) -> tuple[int, int, int]:
    return _rows(scores, torch.float32) if scores.numel() else _NO_ROWS


def select_tokens(scores: torch.Tensor, orders: Orders) -> Sequence[torch.Tensor]:
    """Which of a prompt's tokens go to each tier; see :func:`store_ops.select_tokens`.

    Raises:
        NotCovered: scores of another dtype or device, or fewer of them than tokens are to be chosen.
        BuildError: the kernel cannot be compiled here.
    """
    batch, heads, tokens = scores.shape
    chosen = sum(orders.counts)
    if chosen > tokens or scores.dtype is not torch.float32 or len(orders.counts) > 255:
        raise NotCovered(f"{chosen} of {tokens} tokens by scores of {scores.dtype}")
    scores = _input_rows(scores, torch.float32)
    found = torch.empty((batch, heads, chosen), dtype=torch.int64, device="cpu")
    fields = (*_rows(scores, torch.float32), *_rows(found, torch.int64), batch, heads, tokens)
    limits = (orders.sinks, orders.recent_from, threads(), len(orders.counts))
    _call("select_tokens", fields, limits, orders.counts)
    return found.split(orders.counts, dim=2)


def demote(
    buffers: StoreBuffers,
    fmt: LayerFormat,
    orders: Orders,
    used: int,
    key_dim: int,
    value_dim: int,
    ranks: torch.Tensor | None = None,
) -> None:
    """Take ``orders.victims`` tokens out of tier 0's ``used`` slots; see :func:`store_ops.demote`.

    Raises:
        NotCovered: a dtype, device or layout that only the reference takes.
        BuildError: the kernel cannot be compiled here.
    """
    balancer = _balancer(fmt, buffers.balancer)
    _need_own_scales(fmt.tiers[0])
    victims = orders.victims
    if not 0 <= victims <= used <= buffers.tiers[0].capacity or sum(orders.moves) > victims:
        raise NotCovered(f"{victims} victims, of which {orders.moves} go to lower tiers, of {used} tokens")
    tiers = list(_tier_fields(buffers.tiers[0], fmt.tiers[0]))
    destinations = orders.destinations
    for number, start, count in destinations:
        _need_range_rounding(fmt.tiers[number])
        _need_room(buffers.tiers[number], fmt.tiers[number], start, count)
        tiers += _tier_fields(buffers.tiers[number], fmt.tiers[number], start, count)
    batch, heads, _ = buffers.tiers[0].positions.shape
    if ranks is not None:
        ranks = _input_rows(ranks.expand(batch, heads, used), torch.float32)
    header = _header(
        batch, heads, key_dim, value_dim, balancer, 1 + len(destinations),
        own_scores=_NO_ROWS if ranks is None else _rows(ranks, torch.float32),
        count=used, demotion=(victims, orders.sinks, orders.recent_from), scores=_rows(buffers.scores, torch.float32),
    )  # fmt: skip
    _call("demote", header, tiers)


class AppendPlan:
    """Appends tokens to tier 0 of one store, again and again: addresses and formats are looked up once, here.

    It belongs to the memory of the tensors that it was built from, and keeps none of them alive: whoever calls it holds
    those tensors. A store that has grown, was copied or moved needs a new plan. One thread at a time may call it.

    Args:
        buffers: the store's buffers, on the CPU.
        fmt: their format.
        key_dim, value_dim: D_k and D_v.

    Raises:
        NotCovered: a dtype, device or layout that the kernel does not take, or slots of tier 0 that share scales.
        BuildError: the kernel cannot be compiled here.
    """

    __slots__ = ("_address", "_capacity", "_fields", "_kernel", "_key_dim", "_lead", "_value_dim")

    def __init__(self, buffers: StoreBuffers, fmt: LayerFormat, key_dim: int, value_dim: int) -> None:
        tier, tier_fmt = buffers.tiers[0], fmt.tiers[0]
        _need_own_scales(tier_fmt)
        _need_range_rounding(tier_fmt)
        balancer = buffers.balancer if tier_fmt.key.balanced else None
        if balancer is not None and not (balancer.is_contiguous() and balancer.dtype is torch.float32):
            raise NotCovered("the balancer is not contiguous")
        self._kernel = kernels()["write_tokens"]
        batch, heads, self._capacity = tier.positions.shape
        self._lead = (batch, heads)
        self._key_dim, self._value_dim = key_dim, value_dim
        header = _header(batch, heads, key_dim, value_dim, balancer, scores=_score_rows(buffers.scores))
        self._fields = array("q", [*header, *_tier_fields(tier, tier_fmt)])
        self._address = self._fields.buffer_info()[0]

    def __call__(
        self, k: torch.Tensor, v: torch.Tensor, start: int, first_position: int, own_scores: torch.Tensor | None = None
    ) -> None:
        """Quantize a call's own tokens into the slots ``start, start + 1, ...`` of tier 0, with their scores.

        The same as ``write_tokens(tiers[0], ..., start, k, v, None, first_position, None, balancer)`` and, where the
        store has scores, ``scores[:, :, start : start + S] = own_scores``.

        Args:
            k, v: [B, H_kv, S, D_k] and [B, H_kv, S, D_v], float32, float16 or bfloat16, any strides.
            start: the first slot; ``start + S`` slots must be there.
            first_position: token t has position ``first_position + t``.
            own_scores: [B, H_kv, S] float32; None stands for zeros.

        Raises:
            NotCovered: tokens of another dtype or device, or more of them than there are slots. Nothing was written.
        """
        batch, heads, count, dim = k.shape
        lead = (batch, heads)
        k_kind, v_kind = FLOAT_KINDS.get(k.dtype), FLOAT_KINDS.get(v.dtype)
        if k_kind is None or v_kind is None or not (k.is_cpu and v.is_cpu):
            raise NotCovered(f"tokens of {k.dtype} and {v.dtype} on {k.device}")
        if lead != self._lead or dim != self._key_dim or v.shape != (batch, heads, count, self._value_dim):
            raise NotCovered(f"tokens of shape {tuple(k.shape)} and {tuple(v.shape)}")
        if start < 0 or start + count > self._capacity:
            raise NotCovered(f"{count} tokens from slot {start} on in a tier of {self._capacity}")
        k_batch, k_head, k_token, channel = k.stride()
        if channel != 1:
            k = k.contiguous()
            k_batch, k_head, k_token, _ = k.stride()
        v_batch, v_head, v_token, channel = v.stride()
        if channel != 1:
            v = v.contiguous()
            v_batch, v_head, v_token, _ = v.stride()
        scores = _NO_ROWS
        if own_scores is not None:
            own_scores = _input_rows(own_scores.expand(batch, heads, count), torch.float32)
            scores = _rows(own_scores, torch.float32)
        fields = self._fields
        if batch * heads * count * (dim + self._value_dim) >= _PARALLEL:
            fields[_THREADS] = threads()
        _APPEND.pack_into(
            fields, 0,
            k_kind, k.data_ptr(), k_batch, k_head, k_token, v_kind, v.data_ptr(), v_batch, v_head, v_token,
            start, count, first_position, *scores,
        )  # fmt: skip
        _check(self._kernel(self._address))
