"""The callable around a rewritten graph: handles to buffers before the call, buffers to handles after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mikv_compile.errors import MikvError
from mikv_compile.handle import KVTensor
from mikv_compile.kernels.formats import Orders
from mikv_compile.kernels.store_ops import compress
from mikv_compile.passes import RewrittenSite
from mikv_compile.plan import CacheShape, LayerPlan
from mikv_compile.store import LayerStore

log = logging.getLogger(__name__)

Reader = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class SiteCall:
    """What the callable has to know of a rewritten site."""

    rewritten: RewrittenSite
    plan: LayerPlan
    batch: Reader
    new_tokens: Reader
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    layers: int

    def shape(self, args: Sequence[Any]) -> CacheShape:
        """B, H_kv and head dimensions of this call."""
        return CacheShape(self.batch(args), self.kv_heads, self.key_dim, self.value_dim, self.dtype, self.layers)


class CompressedGraph:
    """Calls a rewritten graph with the buffers of its sites' stores, and returns handles in place of dense caches."""

    def __init__(self, function: Callable[..., Any], kept_inputs: list[int], sites: list[SiteCall]) -> None:
        self._function = function
        self._kept = kept_inputs
        self._sites = sites

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph on Dynamo's arguments; the caller's handles stay as they were until it has succeeded."""
        stores: list[tuple[SiteCall, LayerStore, Orders, int]] = []
        inputs = [_dense(args[i]) for i in self._kept]
        encoded: dict[Orders, torch.Tensor] = {}
        for site in self._sites:
            new = site.new_tokens(args)
            prepare = _new_store if site.rewritten.key_input is None else _old_store
            store, orders = prepare(site, args, new)
            stores.append((site, store, orders, new))
        for _, store, orders, _ in stores:
            if orders not in encoded:
                encoded[orders] = orders.encode()
            inputs += [*store.buffers, encoded[orders]]
        try:
            outputs = list(self._function(*inputs))
            for site, store, orders, new in stores:
                _commit(site, store, orders, new, outputs)
        except BaseException:
            _abandon(stores)
            raise
        return tuple(outputs)


def _commit(site: SiteCall, store: LayerStore, orders: Orders, new: int, outputs: list[Any]) -> None:
    """Take over what the graph did to a store, and put its handles where the dense cache was returned."""
    if site.rewritten.key_input is None:
        store.filled(orders, new)
    else:
        store.commit(orders, new)
    for position in site.rewritten.key_outputs:
        outputs[position] = KVTensor(store, "key")
    for position in site.rewritten.value_outputs:
        outputs[position] = KVTensor(store, "value")


def _dense(value: Any) -> Any:
    """A handle whose site was declined is read as the dense tensor that it stands for."""
    if not isinstance(value, KVTensor) or value.store is None:
        return value
    value.store.count_fallback("declined site")
    return value.dequantize()


def _new_store(site: SiteCall, args: Sequence[Any], new: int) -> tuple[LayerStore, Orders]:
    orders = site.plan.fill(new)
    return LayerStore(site.plan, site.shape(args), site.device, orders.counts), orders


def _old_store(site: SiteCall, args: Sequence[Any], new: int) -> tuple[LayerStore, Orders]:
    assert site.rewritten.key_input is not None and site.rewritten.value_input is not None
    key, value = args[site.rewritten.key_input], args[site.rewritten.value_input]
    if isinstance(key, KVTensor) and isinstance(value, KVTensor):
        if key.range[0] > key._real_store("reading").base:
            # The kernels see all tokens of a store, so one that starts later has to be made.
            dense = [handle.dequantize() for handle in (key, value)]
            store = _filled(key.plan, site.shape(args), dense[0], dense[1])
        else:
            store = _joined(key, value).continued_from((key, value))
    else:
        store = _compressed(site, key, value)
    return store, store.prepare(new)


def _joined(key: KVTensor, value: KVTensor) -> LayerStore:
    """The one store behind two handles."""
    assert key.store is not None and value.store is not None
    if key.shape[2] != value.shape[2]:
        raise MikvError(
            f"a layer's keys have {key.shape[2]} tokens and its values {value.shape[2]}; crop both to the same length"
        )
    if key.store is value.store:
        return key.store
    # Keys and values went different ways, such as a copy of one of them.
    joined = key.store.joined(value.store)
    if joined is None:
        joined = _filled(key.store.plan, key.store.site, key.dequantize(), value.dequantize())
        joined.count_fallback("keys and values of different stores")
    return joined


def _compressed(site: SiteCall, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
    """A store filled from a dense cache that was made elsewhere. Without queries, the newest tokens count most."""
    shape = CacheShape(key.shape[0], site.kv_heads, site.key_dim, site.value_dim, site.dtype, site.layers)
    return _filled(site.plan, shape, key, value)


def _filled(plan: LayerPlan, shape: CacheShape, key: torch.Tensor, value: torch.Tensor) -> LayerStore:
    """A new store of dense keys and values, as if they were a prompt without scores."""
    length = key.shape[2]
    orders = plan.fill(length)
    store = LayerStore(plan, shape, key.device, orders.counts)
    scores = torch.zeros(key.shape[:3], device=key.device)
    # The keys stand in for the queries: the balancer becomes 1.
    compress(key, key, value, scores, store.typed(), plan.format, orders)
    store.filled(orders, length)
    return store


def _abandon(stores: Sequence[tuple[SiteCall, LayerStore, Orders, int]]) -> None:
    """A call failed. Appended tokens lie behind the used slots and do not exist yet, but demotion has moved others."""
    for site, store, orders, _ in stores:
        if site.rewritten.key_input is not None and orders.victims:
            store.spoil(
                "an error interrupted the step that was moving this cache's tokens between tiers, so it may hold half "
                "of a step; start again from the prompt"
            )
