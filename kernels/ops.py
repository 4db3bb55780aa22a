"""The ops that rewritten graphs call, declared once with ``torch.library``.

=======================  ==============================================================================================
``mikv::importance_v2``  scores of a prompt's tokens by a policy
``mikv::compress_v1``    fill a new store's buffers from a prompt
``mikv::attend_v2``      attention over a store's tiers and the call's own tokens; reads only
``mikv::update_v2``      scores, append, demote; after ``attend_v2`` in the same step
``mikv::step_v1``        both in one, where a step attends once
``mikv::append_v1``      the same for tokens that come without queries
``mikv::read_v1``        the stored tokens as dense keys and values
=======================  ==============================================================================================

Meaning, fixed: a call's own tokens are attended exactly; a token demoted because of this call is still read at its old
precision in this call; scores are the attention that was really computed. ``format`` is the text of a
:class:`~mikv_compile.kernels.formats.LayerFormat`, ``buffers`` the flat list of a
:class:`~mikv_compile.kernels.formats.StoreBuffers`, ``orders`` an encoded
:class:`~mikv_compile.kernels.formats.Orders`, ``softcap`` 0 where there is none. What the columns of ``mask`` are is
told in :mod:`~mikv_compile.kernels.masks`. A schema that changes gets a new version in its name: compiled artefacts are
cached by name.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels import cpp_step, masks, ranking, rotation, scoring, store_ops
from mikv_compile.kernels.dispatch import backend_for, run
from mikv_compile.kernels.formats import BUFFERS_PER_TIER, LayerFormat, Orders, StoreBuffers
from mikv_compile.kernels.scoring import AttentionArgs

_library = torch.library.Library("mikv", "DEF")

_library.define(
    "importance_v2(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, float softcap,"
    " Tensor? sinks, str policy) -> Tensor"
)
_library.define(
    "compress_v1(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor(a!)[] buffers, Tensor orders, str format) -> ()"
)
_library.define(
    "attend_v2(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, Tensor[] buffers, Tensor orders,"
    " str format) -> (Tensor, Tensor)"
)
_library.define(
    "update_v2(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? mask, float scale, float softcap,"
    " Tensor(a!)[] buffers, Tensor orders, str format, str policy) -> ()"
)
_library.define(
    "step_v1(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, Tensor(a!)[] buffers,"
    " Tensor orders, str format, str policy) -> (Tensor, Tensor)"
)
_library.define("append_v1(Tensor k, Tensor v, Tensor(a!)[] buffers, Tensor orders, str format) -> ()")
_library.define(
    "read_v1(Tensor[] buffers, Tensor orders, str format, SymInt tokens, SymInt key_dim, SymInt value_dim,"
    " ScalarType dtype) -> (Tensor, Tensor)"
)


def _typed(buffers, orders, format):
    fmt = LayerFormat.parse(format)
    return StoreBuffers.from_list(buffers), fmt, Orders.decode(orders, len(fmt.tiers))


def _importance(q, k, v, mask, scale, is_causal, softcap, sinks, policy):
    seen = masks.seen_columns(mask, k.shape[2])
    return scoring.score(policy, q, k, v, AttentionArgs(seen, scale, is_causal, softcap, masks.four_dims(sinks)))


def _compress(q, k, v, scores, buffers, orders, format):
    store_ops.compress(q, k, v, scores, *_typed(buffers, orders, format))


def _attend(q, k, v, mask, scale, softcap, buffers, orders, format):
    stored, fmt, told = _typed(buffers, orders, format)
    own, counts = k.shape[2], (0,) * len(fmt.tiers) if told.fresh else told.counts
    masks.check_stale(mask, told, own)
    seen = masks.by_position(mask, told, own, q.device)
    stored_like = rotation.as_stored(fmt, q, k, v=v)
    out, lse = run("attend", q.device, *stored_like, seen, scale, softcap, stored, fmt, counts, told.length)
    return masks.add_unwritten(rotation.output_as_given(fmt, out, q.dtype), lse, mask, told, own)


def _update(q, k, v, lse, mask, scale, softcap, buffers, orders, format, policy):
    stored, fmt, told = _typed(buffers, orders, format)
    if not told.fresh:
        seen = masks.by_position(mask, told, k.shape[2], q.device) if fmt.watch or fmt.rank else None
        store_ops.update(q, k, v, lse, seen, scale, softcap, stored, fmt, told)
        return
    scores = lse.new_empty(0)
    if fmt.has_scores:
        args = AttentionArgs(masks.seen_columns(mask, k.shape[2]), scale, False, softcap)
        scores = scoring.score(policy, q, k, v, args)
    store_ops.compress(q, k, v, scores, stored, fmt, told)


def _step(q, k, v, mask, scale, softcap, buffers, orders, format, policy):
    if backend_for(q.device) == "cpp":
        told = Orders.decode(orders, (len(buffers) - 2) // BUFFERS_PER_TIER)
        fmt = LayerFormat.parse(format)
        stored_like = rotation.as_stored(fmt, q, k, v=v)
        done = cpp_step.step(*stored_like, mask, scale, softcap, buffers, told, format)
        if done is not None:
            return (rotation.output_as_given(fmt, done[0], q.dtype), done[1]) if fmt.rotated else done
    out, lse = _attend(q, k, v, mask, scale, softcap, buffers, orders, format)
    _update(q, k, v, lse, mask, scale, softcap, buffers, orders, format, policy)
    return out, lse


def _append(k, v, buffers, orders, format):
    stored, fmt, told = _typed(buffers, orders, format)
    if told.fresh:
        # The keys stand in for the queries: the balancer becomes 1.
        store_ops.compress(k, k, v, ranking.unobserved(k, v, fmt), stored, fmt, told)
    else:
        store_ops.append(k, v, None, stored, fmt, told)


def _read(buffers, orders, format, tokens, key_dim, value_dim, dtype):
    return store_ops.read(*_typed(buffers, orders, format), tokens, key_dim, value_dim, dtype)


for _name, _impl in (
    ("importance_v2", _importance),
    ("compress_v1", _compress),
    ("attend_v2", _attend),
    ("update_v2", _update),
    ("step_v1", _step),
    ("append_v1", _append),
    ("read_v1", _read),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("mikv::importance_v2", lib=_library)
def _(q, k, v, mask, scale, is_causal, softcap, sinks, policy):
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@torch.library.register_fake("mikv::compress_v1", lib=_library)
def _(q, k, v, scores, buffers, orders, format):
    return None


@torch.library.register_fake("mikv::attend_v2", lib=_library)
def _(q, k, v, mask, scale, softcap, buffers, orders, format):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("mikv::update_v2", lib=_library)
def _(q, k, v, lse, mask, scale, softcap, buffers, orders, format, policy):
    return None


@torch.library.register_fake("mikv::step_v1", lib=_library)
def _(q, k, v, mask, scale, softcap, buffers, orders, format, policy):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("mikv::append_v1", lib=_library)
def _(k, v, buffers, orders, format):
    return None


@torch.library.register_fake("mikv::read_v1", lib=_library)
def _(buffers, orders, format, tokens, key_dim, value_dim, dtype):
    positions = buffers[BUFFERS_PER_TIER - 1]
    lead = (*positions.shape[:2], tokens)
    return positions.new_empty((*lead, key_dim), dtype=dtype), positions.new_empty((*lead, value_dim), dtype=dtype)
