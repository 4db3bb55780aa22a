"""The ops that rewritten graphs call, declared once with ``torch.library``.

=======================  ==============================================================================================
``mikv::importance_v1``  scores of a prompt's tokens by a policy
``mikv::compress_v1``    fill a new store's buffers from a prompt
``mikv::attend_v1``      attention over a store's tiers and the call's own tokens; reads only
``mikv::update_v1``      scores, append, demote; after ``attend_v1`` in the same step
=======================  ==============================================================================================

Meaning, fixed: a call's own tokens are attended exactly; a token demoted because of this call is still read at its old
precision in this call; scores are the attention that was really computed. ``format`` is the text of a
:class:`~mikv_compile.kernels.formats.LayerFormat`, ``buffers`` the flat list of a
:class:`~mikv_compile.kernels.formats.StoreBuffers`, ``orders`` an encoded
:class:`~mikv_compile.kernels.formats.Orders`. A schema that changes gets a new version in its name: compiled artefacts
are cached by name.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels import scoring, store_ops
from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers

_library = torch.library.Library("mikv", "DEF")

_library.define(
    "importance_v1(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, str policy) -> Tensor"
)
_library.define(
    "compress_v1(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor(a!)[] buffers, Tensor orders, str format) -> ()"
)
_library.define(
    "attend_v1(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, Tensor[] buffers, Tensor orders, str format)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "update_v1(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? mask, float scale, Tensor(a!)[] buffers,"
    " Tensor orders, str format) -> ()"
)


def _full_mask(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """A mask with four dimensions and a column for each of ``tokens`` positions."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask[None]
    return mask.expand(-1, -1, -1, tokens)


def _importance(q, k, v, mask, scale, is_causal, policy):
    return scoring.score(policy, q, k, v, _full_mask(mask, k.shape[2]), scale, is_causal)


def _compress(q, k, v, scores, buffers, orders, format):
    fmt = LayerFormat.parse(format)
    store_ops.compress(q, k, v, scores, StoreBuffers.from_list(buffers), fmt, Orders.decode(orders, len(fmt.tiers)))


def _attend(q, k, v, mask, scale, buffers, orders, format):
    fmt = LayerFormat.parse(format)
    told = Orders.decode(orders, len(fmt.tiers))
    stored = StoreBuffers.from_list(buffers)
    full = _full_mask(mask, told.length + k.shape[2])
    return run("attend", q.device, q, k, v, full, scale, stored, fmt, told.counts, told.length)


def _update(q, k, v, lse, mask, scale, buffers, orders, format):
    fmt = LayerFormat.parse(format)
    told = Orders.decode(orders, len(fmt.tiers))
    full = _full_mask(mask, told.length + k.shape[2])
    store_ops.update(q, k, v, lse, full, scale, StoreBuffers.from_list(buffers), fmt, told)


for _name, _impl in (
    ("importance_v1", _importance),
    ("compress_v1", _compress),
    ("attend_v1", _attend),
    ("update_v1", _update),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("mikv::importance_v1", lib=_library)
def _(q, k, v, mask, scale, is_causal, policy):
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@torch.library.register_fake("mikv::compress_v1", lib=_library)
def _(q, k, v, scores, buffers, orders, format):
    return None


@torch.library.register_fake("mikv::attend_v1", lib=_library)
def _(q, k, v, mask, scale, buffers, orders, format):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("mikv::update_v1", lib=_library)
def _(q, k, v, lse, mask, scale, buffers, orders, format):
    return None
