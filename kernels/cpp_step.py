"""A decode step on the CPU with little Python around its two kernels: attention, and the append of the call's tokens.

With a short context both kernels take a few microseconds, so what a step costs is looking at the sixteen or so buffers
of each layer. What follows from them is kept from step to step.
"""

from __future__ import annotations

import threading

import torch

from mikv_compile._compat import import_toolchain
from mikv_compile.kernels import cpp_attention, cpp_fit, cpp_tokens, dispatch, masks, ranking, store_ops
from mikv_compile.kernels.cpp_attention import PreparedCall
from mikv_compile.kernels.cpp_common import FLOAT_KINDS
from mikv_compile.kernels.cpp_tokens import AppendPlan
from mikv_compile.kernels.dispatch import BuildError, NotCovered
from mikv_compile.kernels.formats import BUFFERS_PER_TIER, LayerFormat, Orders, StoreBuffers

_MOST_KEPT = 4096
"""Stores that are remembered, whether they still exist or not; each takes about 2 KiB."""


class _KnownStore:
    """What the two kernels need to know of one store, for one shape of queries."""

    __slots__ = ("append", "attend", "fmt")

    def __init__(
        self, buffers: list[torch.Tensor], fmt: LayerFormat, shape: tuple[int, int, int, int], kv_heads: int, v_dim: int
    ) -> None:
        if not all(x.is_contiguous() for x in buffers):
            raise NotCovered("a stored buffer is not contiguous")
        stored = StoreBuffers.from_list(buffers)
        self.fmt = fmt
        self.attend = PreparedCall(stored, fmt, shape, kv_heads, v_dim)
        self.append = AppendPlan(stored, fmt, shape[3], v_dim)


_known: dict[tuple[object, ...], _KnownStore | None] = {}


def _look_up(
    buffers: list[torch.Tensor], format: str, q: torch.Tensor, k: torch.Tensor, v_dim: int
) -> _KnownStore | None:
    """What is known of a store.

    The key holds all that follows from the buffers: their addresses, the sizes from which contiguous buffers of one
    format get their shapes, and the dtypes of codes, as "fp" stands for the model's own. So another store in the same
    memory is never taken for this one.
    """
    slots = tuple(x.shape[2] for x in buffers[BUFFERS_PER_TIER - 1 :: BUFFERS_PER_TIER])
    dtypes = tuple(x.dtype for x in buffers[0:-2:BUFFERS_PER_TIER] + buffers[3:-2:BUFFERS_PER_TIER])
    key = (format, *q.shape, k.shape[1], v_dim, slots, dtypes, *(x.data_ptr() for x in buffers))
    found = _known.get(key, _known)
    if found is _known:
        if len(_known) >= _MOST_KEPT:
            _known.clear()
        try:
            found = _KnownStore(buffers, LayerFormat.parse(format), tuple(q.shape), k.shape[1], v_dim)  # type: ignore[arg-type]
        except (NotCovered, BuildError):
            found = None
        _known[key] = found
    return found  # type: ignore[return-value]


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    buffers: list[torch.Tensor],
    told: Orders,
    format: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attend, append and demote, as ``mikv::attend_v2`` and ``mikv::update_v2`` do one after the other.

    Returns:
        output and log-sum-exp; None, with nothing changed, for calls that these two have to serve: the first one of a
        store, those of which only some rows count for the scores, and what the kernels do not take.
    """
    if told.fresh or k.dtype not in FLOAT_KINDS or v.dtype not in FLOAT_KINDS:
        return None
    known = _look_up(buffers, format, q, k, v.shape[3])
    if known is None:
        return None
    fmt, own = known.fmt, k.shape[2]
    watch = fmt.watch if fmt.watch is not None and own >= fmt.watch.least else None
    if watch is not None and 0 < watch.rows < q.shape[2]:
        return None
    seen = None
    if mask is not None or told.first or told.stale:
        masks.check_stale(mask, told, own)
        seen = masks.by_position(mask, told, own, q.device)
    try:
        out, lse = known.attend(q, k, v, seen, scale, softcap, told.counts, told.length)
    except NotCovered:
        return None
    used, own_scores = told.counts[0], None
    if fmt.rank is not None or not (watch is None or watch.is_plain):
        stored = StoreBuffers.from_list(buffers)
        own_scores = ranking.observe(q, k, lse, seen, scale, softcap, stored, fmt, used, told.length)
    elif watch is not None:
        own_scores = known.attend.add_scores(q, k, lse, seen, scale, softcap, buffers[-2], used, told.length)
        own_scores = ranking.pooled(own_scores, watch)
    known.append(k, v, used, told.length, own_scores)
    if told.victims:
        store_ops.take_out(StoreBuffers.from_list(buffers), fmt, told, used + own, q.shape[3], v.shape[3])
    return (out, lse) if mask is None else masks.add_unwritten(out, lse, mask, told, own)


_ahead: threading.Thread | None = None


def build_ahead() -> None:
    """Start to build the kernels in a thread, once: the C++ compiler works while graphs are traced and compiled.

    A build that fails says nothing here; whoever needs the kernel next gets the error.
    """
    global _ahead
    if _ahead is None and dispatch.backend_for(torch.device("cpu")) == "cpp":
        import_toolchain()  # not in the thread: two threads should not import it at once
        _ahead = threading.Thread(target=_build, name="mikv-build", daemon=True)
        _ahead.start()


def _build() -> None:
    for kernels in (cpp_attention.kernels, cpp_tokens.kernels, cpp_fit.kernel):
        try:
            kernels()
        except BuildError as error:
            dispatch.log.debug("built ahead in vain: %s", error)
