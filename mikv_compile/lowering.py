"""What a site becomes: the ops of :mod:`mikv_compile.kernels.ops` on the buffers of the layer's store."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

import mikv_compile.kernels.ops  # noqa: F401  (declares torch.ops.mikv)
from mikv_compile import _compat
from mikv_compile.handle import KVTensor
from mikv_compile.kernels import dispatch
from mikv_compile.kernels.formats import Orders, buffer_names, buffer_shapes
from mikv_compile.passes import Declined, Operands, Site
from mikv_compile.passes.node_utils import fake
from mikv_compile.plan import CacheShape, LayerPlan, Planner
from mikv_compile.sizes import SizeReader

ops = torch.ops.mikv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_EXAMPLE_SLOTS = 128
"""Capacity of the example buffers that a graph is compiled with; any other works as well."""


@dataclass(frozen=True)
class PlannedSite:
    """A site that can be rewritten, with the plan of its layer."""

    site: Site
    plan: LayerPlan
    layer: int


def plan_sites(sites: Sequence[Site], planner: Planner, sizes: SizeReader) -> tuple[list[PlannedSite], list[Declined]]:
    """Give each site its plan; sites that storage or kernels cannot serve are declined with the reason.

    Raises:
        OptionError: for a budget that no plan meets.
    """
    planned: list[PlannedSite] = []
    declined: list[Declined] = []
    for layer, site in enumerate(sites):
        try:
            planned.append(PlannedSite(site, _plan(site, layer, len(sites), planner, sizes), layer))
        except _CannotServeError as reason:
            declined.append(Declined(site.name, "rewrite", str(reason)))
    return planned, declined


class _CannotServeError(Exception):
    pass


def _plan(site: Site, layer: int, layers: int, planner: Planner, sizes: SizeReader) -> LayerPlan:
    key, value = fake(site.key.new), fake(site.value.new)
    assert key is not None and value is not None
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        raise _CannotServeError(f"keys are {key.dtype} and values {value.dtype}; both must be one of {DTYPES}")
    if key.device != value.device:
        raise _CannotServeError(f"keys are on {key.device} and values on {value.device}")
    if key.device.type == "cuda" and not dispatch.has_triton():
        raise _CannotServeError("kernels for CUDA need the package triton; install it, or run on the CPU")
    for update in (site.key, site.value):
        shape = fake(update.new).shape
        if any(sizes.reader(size) is None for size in shape):
            raise _CannotServeError(f"the arguments of the graph do not tell the size of {update.new}")
    if any(_compat.symbol_of(size) is not None for size in (key.shape[1], key.shape[3], value.shape[3])):
        raise _CannotServeError("the number of heads or the head dimension is symbolic; mark it static")
    pasts = [None if u.past is None else u.past.meta.get("example_value") for u in (site.key, site.value)]
    handles = [p for p in pasts if isinstance(p, KVTensor)]
    if len(handles) == 1:
        raise _CannotServeError("only one of keys and values is compressed")
    if handles:
        if handles[0].plan != handles[1].plan or (handles[0].role, handles[1].role) != ("key", "value"):
            raise _CannotServeError("keys and values come from caches of different plans")
        return handles[0].plan
    if isinstance(planner.options.budget, str):
        int(key.shape[0])  # a budget in bytes means another plan for another batch size: guard on it
    batch = key.shape[0] if _compat.symbol_of(key.shape[0]) is None else 1
    shape = CacheShape(int(batch), int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), key.dtype, layers)
    try:
        plan = planner.layer(layer, shape)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise _CannotServeError(f"{error}; give this layer other tiers with the option 'layers'") from error
    if plan.evicts and not site.born:
        raise _CannotServeError(
            "the cache was filled before this call without scores, and the plan evicts; let the compiled model read "
            "the prompt as well, or choose a plan that keeps all tokens"
        )
    return plan


class Lowering:
    """Implements :class:`mikv_compile.passes.SiteLowering` for planned sites."""

    def __init__(self, planned: Sequence[PlannedSite]) -> None:
        self._plans = {p.site.name: p.plan for p in planned}

    def buffers(self, site: Site) -> list[tuple[str, torch.Tensor]]:
        """The store's buffers with symbolic capacities, and the orders of the call."""
        plan = self._plans[site.name]
        key, value = fake(site.key.new), fake(site.value.new)
        assert key is not None and value is not None
        mode = _compat.fake_mode_of(key)
        symbolic_batch = _compat.symbol_of(key.shape[0]) is not None
        batch = 2 if symbolic_batch else int(key.shape[0])
        tiers = len(plan.format.tiers)
        shapes = buffer_shapes(
            plan.format, batch, int(key.shape[1]), int(key.shape[3]), int(value.shape[3]),
            [max(_EXAMPLE_SLOTS, 2 * t.block) for t in plan.format.tiers], key.dtype,
        )  # fmt: skip
        made = []
        for name, (shape, dtype) in zip(buffer_names(tiers), shapes, strict=True):
            grows = {2} if name != "balancer" and 0 not in shape else set()
            dynamic = grows | ({0} if symbolic_batch else set())
            source = self.source(site, name)
            made.append((name, _compat.growing_fake(mode, shape, dtype, key.device, dynamic, source)))
        told = torch.zeros(Orders.encoded_size(tiers), dtype=torch.int64)
        source = self.source(site, "orders")
        orders = _compat.growing_fake(mode, tuple(told.shape), told.dtype, told.device, set(), source)
        return [*made, ("orders", orders)]

    def source(self, site: Site, name: str) -> object:
        """A source of its own for each buffer."""
        return _compat.buffer_source(f"mikv_{site.name}_{name}")

    def emit_born(self, graph: Graph, site: Site, operands: Operands, buffers: Mapping[str, Node]) -> None:
        """Score and compress the prompt's tokens right behind the attention, which stays exact."""
        plan = self._plans[site.name]
        *stored, orders = buffers.values()
        q, k, v = operands.query, operands.key_new, operands.value_new
        if plan.format.has_scores:
            args = (q, k, v, operands.mask, operands.scale, operands.is_causal, 0.0, None, plan.policy)
            scores = graph.call_function(ops.importance_v2.default, args)
        else:
            # Not the scores buffer itself: one op must not read and write one storage through two arguments.
            scores = graph.call_method("new_empty", (k, (0,)), {"dtype": torch.float32})
        graph.call_function(ops.compress_v1.default, (q, k, v, scores, stored, orders, str(plan.format)))

    def emit_step(self, graph: Graph, site: Site, operands: Operands, buffers: Mapping[str, Node]) -> Node:
        """Attend over the tiers and the call's own tokens, then append and demote."""
        plan = self._plans[site.name]
        fmt = str(plan.format)
        *stored, orders = buffers.values()
        q, k, v = operands.query, operands.key_new, operands.value_new
        attended = graph.call_function(
            ops.attend_v2.default, (q, k, v, operands.mask, operands.scale, 0.0, stored, orders, fmt)
        )
        output = graph.call_function(operator.getitem, (attended, 0))
        lse = graph.call_function(operator.getitem, (attended, 1))
        update = (q, k, v, lse, operands.mask, operands.scale, 0.0, stored, orders, fmt, plan.policy)
        graph.call_function(ops.update_v2.default, update)
        return output
