"""What a site becomes: the ops of :mod:`mikv_compile.kernels.ops` on the buffers of the layer's store."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

import mikv_compile.kernels.ops  # noqa: F401  (declares torch.ops.mikv)
from mikv_compile import _compat
from mikv_compile.kernels import dispatch
from mikv_compile.kernels.formats import BUFFERS_PER_TIER, CannotPackError, Orders, buffer_names, buffer_shapes
from mikv_compile.passes import CacheUpdate, Declined, NewTokens, Operands, Site
from mikv_compile.passes.node_utils import fake, known_equal
from mikv_compile.plan import CacheShape, LayerPlan, check_counts_no_layers
from mikv_compile.planner import Planner
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


@dataclass(frozen=True)
class Region:
    """A repeated layer that is compiled by itself, once for all layers like it."""

    numbers: tuple[int, ...]
    """Which layers of the model; the options give all of them the same tiers."""
    of: int
    """How many layers share a budget in bytes."""


@dataclass(frozen=True)
class Extent:
    """The maybe symbolic sizes of a call's new keys or values."""

    batch: Any
    heads: Any
    tokens: Any
    dim: Any

    @classmethod
    def of(cls, update: CacheUpdate) -> Extent:
        """Sizes of `update.new` by what its dimensions are."""
        value = fake(update.new)
        assert value is not None
        sizes = dict(zip(update.layout, value.shape, strict=True))
        return cls(sizes["B"], sizes.get("H", 1), 0 if update.kind == "read" else sizes["T"], sizes["D"])


def plan_sites(
    sites: Sequence[Site],
    planner: Planner,
    sizes: SizeReader,
    handles: Mapping[Node, Any],
    region: Region | None = None,
) -> tuple[list[PlannedSite], list[Declined]]:
    """Give each site its plan; sites that storage or kernels cannot serve are declined with the reason.

    Args:
        sites: of one graph.
        planner: makes the plan of a layer.
        sizes: what the graph's arguments tell.
        handles: the handle behind each placeholder that has one.
        region: the layers that the graph serves, where it is not the whole model.

    Raises:
        OptionError: for a budget that no plan meets, or options that count layers where a layer has several caches.
    """
    if region is not None and len(sites) > 1:
        check_counts_no_layers(planner.options, "a layer of this model keeps several caches")
    first, layers = (0, len(sites)) if region is None else (region.numbers[0], region.of)
    planned: list[PlannedSite] = []
    declined: list[Declined] = []
    for layer, site in enumerate(sites, first):
        try:
            planned.append(PlannedSite(site, _plan(site, layer, layers, planner, sizes, handles), layer))
        except _CannotServeError as reason:
            declined.append(Declined(site.name, "rewrite", str(reason)))
    return planned, declined


class _CannotServeError(Exception):
    pass


def _plan(
    site: Site, layer: int, layers: int, planner: Planner, sizes: SizeReader, handles: Mapping[Node, Any]
) -> LayerPlan:
    plan = _plan_of_handles(site, handles)
    if plan is None and isinstance(planner.options.budget, str):
        int(Extent.of(site.key).batch)  # a budget in bytes means another plan for another batch size: guard on it
    shape = _check_storage(site, layers, sizes)
    if plan is None:
        try:
            plan = planner.layer(layer, shape, sliding=site.key.keep is not None)
        except CannotPackError as error:
            raise _CannotServeError(f"{error}; give this layer other tiers with the option 'layers'") from error
        if plan.evicts and not site.born and site.key.capacity is None:
            raise _CannotServeError(
                "the cache was filled before this call without scores, and the plan evicts; let the compiled model "
                "read the prompt as well, or choose a plan that keeps all tokens"
            )
    if plan.evicts and site.born and _crosses(site):
        raise _CannotServeError("the plan evicts, and the few queries of this call are no guide to an encoder's tokens")
    if plan.evicts and not site.reads:
        raise _CannotServeError(f"the plan evicts, and evicted tokens cannot be read densely: {site.dense}")
    return plan


def _crosses(site: Site) -> bool:
    """Whether a new cache holds other tokens than the queries', as in cross attention."""
    for read in site.reads:
        query = fake(read.attention.query)
        rows = dict(zip(read.attention.query_dims, () if query is None else query.shape, strict=False)).get("r")
        if rows is None or not known_equal(rows, Extent.of(site.key).tokens):
            return True
    return False


def _check_storage(site: Site, layers: int, sizes: SizeReader) -> CacheShape:
    """The shape of the cache, once it is sure that stores and kernels take it."""
    key, value = fake(site.key.new), fake(site.value.new)
    assert key is not None and value is not None
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        raise _CannotServeError(f"keys are {key.dtype} and values {value.dtype}; both must be one of {DTYPES}")
    if key.device != value.device:
        raise _CannotServeError(f"keys are on {key.device} and values on {value.device}")
    if key.device.type == "cuda" and not dispatch.has_triton():
        raise _CannotServeError("kernels for CUDA need the package triton; install it, or run on the CPU")
    for update in (site.key, site.value):
        if any(sizes.reader(size) is None for size in fake(update.new).shape):  # type: ignore[union-attr]
            raise _CannotServeError(f"the arguments of the graph do not tell the size of {update.new}")
    k, v = Extent.of(site.key), Extent.of(site.value)
    if any(_compat.symbol_of(size) is not None for size in (k.heads, k.dim, v.dim)):
        raise _CannotServeError("the number of heads or the head dimension is symbolic; mark it static")
    if sizes.reader(site.key.capacity or 0) is None or _compat.symbol_of(site.key.keep) is not None:
        raise _CannotServeError("the arguments of the graph do not tell the size of the preallocated cache")
    batch = k.batch if _compat.symbol_of(k.batch) is None else 1
    return CacheShape(int(batch), int(k.heads), int(k.dim), int(v.dim), key.dtype, layers)


def _plan_of_handles(site: Site, handles: Mapping[Node, Any]) -> LayerPlan | None:
    """The plan that the site's caches have already; None if they are dense."""
    found = [handles[u.past] for u in (site.key, site.value) if u.past is not None and u.past in handles]
    if not found:
        return None
    if len(found) == 1:
        raise _CannotServeError("only one of keys and values is compressed")
    if found[0].plan != found[1].plan or (found[0].role, found[1].role) != ("key", "value"):
        raise _CannotServeError("keys and values come from caches of different plans")
    if any(handle.kv_layout != site.key.layout for handle in found):
        layouts = f"{found[0].kv_layout}, and this graph reads {site.key.layout}"
        raise _CannotServeError(f"the cache has the layout {layouts}")
    return found[0].plan


class Lowering:
    """Implements :class:`mikv_compile.passes.SiteLowering` for planned sites."""

    def __init__(self, planned: Sequence[PlannedSite]) -> None:
        self._plans = {p.site.name: p.plan for p in planned}

    def buffers(self, site: Site) -> list[tuple[str, torch.Tensor]]:
        """The store's buffers with symbolic capacities, and the orders of the call."""
        plan = self._plans[site.name]
        key = fake(site.key.new)
        assert key is not None
        k, v = Extent.of(site.key), Extent.of(site.value)
        mode = _compat.fake_mode_of(key)
        symbolic_batch = _compat.symbol_of(k.batch) is not None
        batch = 2 if symbolic_batch else int(k.batch)
        tiers = len(plan.format.tiers)
        shapes = buffer_shapes(
            plan.format, batch, int(k.heads), int(k.dim), int(v.dim),
            [max(_EXAMPLE_SLOTS, 2 * t.block) for t in plan.format.tiers], key.dtype,
        )  # fmt: skip
        made: list[tuple[str, torch.Tensor]] = []
        sizes: dict[tuple[int, int], Any] = {}
        for number, (name, (shape, dtype)) in enumerate(zip(buffer_names(tiers), shapes, strict=True)):
            # Buffers of a tier have one capacity, and the scores that of tier 0. With a symbol for each buffer,
            # compiling would take twice as long.
            tier = number // BUFFERS_PER_TIER if number < BUFFERS_PER_TIER * tiers else 0
            grows = {2} if name != "balancer" and 0 not in shape else set()
            dynamic = grows | ({0} if symbolic_batch else set())
            source = self.source(site, name)
            known = {dim: sizes.get((tier if dim else -1, shape[dim])) for dim in dynamic}
            if dynamic and all(size is not None for size in known.values()):
                size = tuple(known.get(dim, n) for dim, n in enumerate(shape))
                made.append((name, _compat.fake_of_size(mode, size, dtype, key.device)))
                continue
            fresh = _compat.growing_fake(mode, shape, dtype, key.device, dynamic, source)
            sizes |= {(tier if dim else -1, shape[dim]): fresh.shape[dim] for dim in dynamic}
            made.append((name, fresh))
        told = torch.zeros(Orders.encoded_size(tiers), dtype=torch.int64)
        source = self.source(site, "orders")
        orders = _compat.growing_fake(mode, tuple(told.shape), told.dtype, told.device, set(), source)
        return [*made, ("orders", orders)]

    def source(self, site: Site, name: str) -> object:
        """A source of its own for each buffer."""
        return _compat.buffer_source(f"mikv_{site.name}_{name}")

    def emit_born(
        self, graph: Graph, site: Site, first: Operands | None, new: NewTokens, buffers: Mapping[str, Node]
    ) -> None:
        """Score and compress the prompt's tokens right behind the attention, which stays exact."""
        plan = self._plans[site.name]
        *stored, orders = buffers.values()
        keep, k, v = site.key.keep, new.key, new.value
        if keep is not None:  # a sliding window starts with the newest tokens of a prompt
            index = (slice(None), slice(None), slice(-int(keep), None))
            k, v = (graph.call_function(operator.getitem, (x, index)) for x in (k, v))
        # Without queries the keys stand in for them: the balancer becomes 1.
        q = k if first is None else first.query
        if not plan.format.has_scores:
            # Not the scores buffer itself: one op must not read and write one storage through two arguments.
            scores = graph.call_method("new_empty", (k, (0,)), {"dtype": torch.float32})
        elif first is None or keep is not None:
            policy = (plan.format.rank and plan.format.rank.anew) or "recent"
            args: tuple[Any, ...] = (k, k, v, None, 1.0, False, 0.0, None, policy)
            scores = graph.call_function(ops.importance_v2.default, args)
        else:
            args = (
                q, k, v, first.mask, first.scale, first.is_causal, first.softcap or 0.0, first.sinks, plan.policy,
            )  # fmt: skip
            scores = graph.call_function(ops.importance_v2.default, args)
        graph.call_function(ops.compress_v1.default, (q, k, v, scores, stored, orders, str(plan.format)))

    def emit_attend(
        self, graph: Graph, site: Site, operands: Operands, new: NewTokens, buffers: Mapping[str, Node]
    ) -> tuple[Node, Node]:
        """Attend over the tiers and the call's own tokens."""
        *stored, orders = buffers.values()
        args = (
            operands.query, new.key, new.value, operands.mask, operands.scale, operands.softcap or 0.0, stored, orders,
            str(self._plans[site.name].format),
        )  # fmt: skip
        return _pair(graph, graph.call_function(ops.attend_v2.default, args))

    def emit_update(
        self, graph: Graph, site: Site, operands: Operands, lse: Node, new: NewTokens, buffers: Mapping[str, Node]
    ) -> None:
        """Append the new tokens and demote old ones."""
        plan = self._plans[site.name]
        *stored, orders = buffers.values()
        args = (
            operands.query, new.key, new.value, lse, operands.mask, operands.scale, operands.softcap or 0.0, stored,
            orders, str(plan.format), plan.policy,
        )  # fmt: skip
        graph.call_function(ops.update_v2.default, args)

    def emit_step(
        self, graph: Graph, site: Site, operands: Operands, new: NewTokens, buffers: Mapping[str, Node]
    ) -> tuple[Node, Node]:
        """Attend, append and demote in one op."""
        plan = self._plans[site.name]
        *stored, orders = buffers.values()
        args = (
            operands.query, new.key, new.value, operands.mask, operands.scale, operands.softcap or 0.0, stored, orders,
            str(plan.format), plan.policy,
        )  # fmt: skip
        return _pair(graph, graph.call_function(ops.step_v1.default, args))

    def emit_read(self, graph: Graph, site: Site, columns: Any, buffers: Mapping[str, Node]) -> tuple[Node, Node]:
        """Dequantize the layer's past."""
        *stored, orders = buffers.values()
        value = fake(site.key.new)
        assert value is not None
        k, v = Extent.of(site.key), Extent.of(site.value)
        fmt = str(self._plans[site.name].format)
        args = (stored, orders, fmt, columns, int(k.dim), int(v.dim), value.dtype)
        return _pair(graph, graph.call_function(ops.read_v1.default, args))

    def emit_append(self, graph: Graph, site: Site, new: NewTokens, buffers: Mapping[str, Node]) -> None:
        """Append new tokens without scores."""
        *stored, orders = buffers.values()
        args = (new.key, new.value, stored, orders, str(self._plans[site.name].format))
        graph.call_function(ops.append_v1.default, args)


def _pair(graph: Graph, op: Node) -> tuple[Node, Node]:
    """The two results of an op."""
    return graph.call_function(operator.getitem, (op, 0)), graph.call_function(operator.getitem, (op, 1))
