"""What was rewritten, what was not and why, and what a live cache weighs."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from mikv_compile.graph_text import GraphText
from mikv_compile.handle import KVTensor
from mikv_compile.passes import Declined
from mikv_compile.plan import LayerPlan
from mikv_compile.preallocated import PreallocatedKV
from mikv_compile.store import LayerStore


@dataclass(frozen=True)
class SiteReport:
    """A rewritten site."""

    name: str
    layer: int
    phase: str
    """``"prefill"`` where the cache is born, ``"decode"`` where it grows, ``"read"`` where it is only read."""
    form: str
    groups: int | None
    """Query heads per KV head; None where no attention call was recognized."""
    plan: LayerPlan
    reads: str = "fused"
    """``"fused"`` where attention runs on the compressed cache, ``"dense"`` where this layer's cache is dequantized."""
    reason: str | None = None
    """Why it has to be read densely."""

    def __str__(self) -> str:
        heads = "" if self.groups is None else f", {self.groups} query heads per KV head"
        dense = "" if self.reason is None else f", read densely: {self.reason}"
        return f"layer {self.layer} {self.name} ({self.phase}, {self.form}{heads}{dense})"


@dataclass(frozen=True)
class GraphReport:
    """What happened to one traced graph."""

    attentions: int
    """Attention calls in a supported form."""
    rewritten: tuple[SiteReport, ...]
    declined: tuple[Declined, ...]
    lower: str
    shared_by: tuple[int, ...] = ()
    """The layers that it was compiled for, where it is one layer of a model compiled with ``regional=True``."""
    notes: tuple[str, ...] = ()
    """What looks wrong, but may be meant."""
    text: GraphText | None = field(default=None, repr=False)
    """The graph before and after, if it was asked for: ``explain(..., keep_graphs=True)``."""

    def __str__(self) -> str:
        phases = collections.Counter(s.phase for s in self.rewritten)
        kinds = ", ".join(f"{n} {phase}" for phase, n in phases.items()) or "none"
        lines = [f"{self.attentions} attention calls; sites rewritten: {kinds}; lowered with {self.lower}"]
        if self.shared_by:
            lines[0] += f"; one layer, compiled for layers {ranges(list(self.shared_by))}"
        shared = list(self.shared_by)
        for (plan, phase), layers in _by_plan(self.rewritten).items():
            lines.append(f"  layers {ranges(shared or layers)} ({phase}): tiers {describe(plan)}")
        dense: dict[str, list[int]] = {}
        for site in self.rewritten:
            if site.reason is not None:
                dense.setdefault(site.reason, []).append(site.layer)
        lines += [f"  layers {ranges(shared or layers)} are read densely: {reason}" for reason, layers in dense.items()]
        lines += [f"  declined {d}" for d in self.declined]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def describe(plan: LayerPlan) -> str:
    """A plan in a line: each tier's format and share, and what goes beyond."""
    parts = []
    for tier, fmt in zip(plan.tiers, plan.format.tiers, strict=True):
        share = "the rest" if tier.share is None else f"{tier.share:g}"
        parts.append(f"{fmt.key} / {fmt.value} [{share}]")
    text = " > ".join(parts) + (" > evicted" if plan.evicts else "")
    if len(plan.tiers) == 1 and not plan.evicts:
        return text
    weighed = " by value norm" if plan.format.rank is not None and plan.format.rank.by_value else ""
    return f"{text}, window {plan.window}, sinks {plan.sinks}, policy {plan.policy}{weighed}"


def _by_plan(sites: tuple[SiteReport, ...]) -> dict[tuple[LayerPlan, str], list[int]]:
    grouped: dict[tuple[LayerPlan, str], list[int]] = {}
    for site in sites:
        grouped.setdefault((site.plan, site.phase), []).append(site.layer)
    return grouped


def ranges(numbers: list[int]) -> str:
    """Numbers in short: ``0-2, 5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


_graphs: collections.deque[GraphReport] = collections.deque(maxlen=256)
_listeners: list[Callable[[GraphReport], None]] = []
_keepers = 0
"""Callers of :func:`explain` under way that want the graphs as text."""


def keeps_graphs() -> bool:
    """Whether reports are to hold the graphs as text, which nobody else pays for."""
    return _keepers > 0


def record(report: GraphReport) -> None:
    """Keep a graph's report and tell whoever listens."""
    _graphs.append(report)
    for listener in list(_listeners):
        listener(report)


def graph_reports() -> tuple[GraphReport, ...]:
    """Reports of the graphs that this process has compiled with the backend, oldest first (the last 256)."""
    return tuple(_graphs)


@dataclass
class Explanation:
    """What the backend does to a model; ``print`` it."""

    graphs: list[GraphReport] = field(default_factory=list)
    cache: CacheReport | None = None

    @property
    def sites(self) -> int:
        """Rewritten sites of all graphs."""
        return sum(len(g.rewritten) for g in self.graphs)

    @property
    def declined(self) -> list[Declined]:
        """Everything that was left as it was."""
        return [d for g in self.graphs for d in g.declined]

    def __str__(self) -> str:
        lines = [f"graph {i}: {g}" for i, g in enumerate(self.graphs)] or ["no graph was compiled"]
        if self.cache is not None:
            lines.append(str(self.cache))
            if not self.sites and not any(layer.plan for layer in self.cache.layers):
                lines.append(
                    "This call left a dense cache. A call that goes on from it may take it over: explain one with this "
                    "cache in its arguments, too"
                )
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    keep_graphs: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Run a model once through the passes and say what they did.

    Args:
        model: a module or function.
        args, kwargs: what to call it with. Given ``past_key_values``, or with a model that returns one, the report
            includes the cache that the call left.
        options: as for ``torch.compile(..., backend="mikv")``; ``lower`` is ``"eager"``, as nothing has to be fast.
        keep_graphs: keep each graph before and after as readable lines (``GraphReport.text``).

    The call really runs: a cache in the arguments grows by it.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile() has returned, the module
    global _keepers
    graphs: list[GraphReport] = []
    _listeners.append(graphs.append)
    _keepers += keep_graphs
    try:
        compiled = torch.compile(_fresh(model), backend="mikv", options={**(options or {}), "lower": "eager"})
        with torch.no_grad():
            result = compiled(*args, **kwargs)
    finally:
        _listeners.remove(graphs.append)
        _keepers -= keep_graphs
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = result
    found = cache_report(cache)
    return Explanation(graphs, found if found.layers else None)


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """A call of ``model`` with a code object of its own: what was compiled before does not answer instead of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"explained_{next(_explained)}")
    return call


_explained = itertools.count()


@dataclass(frozen=True)
class LayerReport:
    """One layer of a live cache."""

    length: int
    tokens: tuple[int, ...]
    """Per tier."""
    plan: LayerPlan | None
    """None for a layer that is dense."""
    nbytes: int
    """Of every buffer, spare capacity included."""
    coded_nbytes: int
    """Of the used slots' codes, scales and zeros alone, as papers count."""
    dense_nbytes: int
    dense_nbytes_16bit: int
    fallbacks: dict[str, int]
    recompressed: int


@dataclass(frozen=True)
class CacheReport:
    """Bytes of a live cache against its dense size."""

    layers: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a dense cache of the same length in the model's dtype."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """``nbytes / dense_nbytes``."""
        return self.nbytes / max(self.dense_nbytes, 1)

    @property
    def ratio_16bit(self) -> float:
        """The same against a dense cache with 16 bits per element, which papers compare with."""
        return self.nbytes / max(sum(layer.dense_nbytes_16bit for layer in self.layers), 1)

    @property
    def coded_ratio_16bit(self) -> float:
        """Codes, scales and zeros of the used slots against a 16-bit cache: the figure that papers print."""
        coded = sum(layer.coded_nbytes for layer in self.layers)
        return coded / max(sum(layer.dense_nbytes_16bit for layer in self.layers), 1)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reads of the dense cache, by operation."""
        total: collections.Counter[str] = collections.Counter()
        for layer in self.layers:
            total.update(layer.fallbacks)
        return dict(total)

    def __str__(self) -> str:
        compressed = [layer for layer in self.layers if layer.plan is not None]
        lines = [
            f"cache of {len(self.layers)} layers, {len(compressed)} compressed: {self.nbytes:,} bytes, "
            f"{self.ratio:.1%} of dense; {self.ratio_16bit:.1%} of a 16-bit cache, of which codes, scales and zeros "
            f"{self.coded_ratio_16bit:.1%}"
        ]
        same: dict[tuple, list[int]] = {}
        for i, layer in enumerate(self.layers):
            same.setdefault((layer.plan, layer.length, layer.tokens, layer.nbytes), []).append(i)
        for (plan, length, tokens, nbytes), members in same.items():
            if plan is None:
                lines.append(f"  layers {ranges(members)}: dense, {length} tokens, {nbytes:,} bytes each")
                continue
            gone = length - sum(tokens)
            split = " + ".join(map(str, tokens)) + (f" + {gone} evicted" if gone else "")
            size = f"{split} of {length} tokens, {nbytes:,} bytes each"
            lines.append(f"  layers {ranges(members)}: {size}; {describe(plan)}")
        if self.fallbacks:
            lines.append("  dequantized: " + ", ".join(f"{op} x{n}" for op, n in self.fallbacks.items()))
        recompressed = sum(layer.recompressed for layer in self.layers)
        if recompressed:
            lines.append(f"  compressed again after cropping: {recompressed} layers")
        return "\n".join(lines)


def cache_report(cache: Any) -> CacheReport:
    """Report on a cache: a transformers ``Cache``, or any nest of objects, lists, tuples and dicts of handles."""
    layers = []
    seen: set[int] = set()
    for item in _walk(cache, set()):
        if isinstance(item, KVTensor | PreallocatedKV):
            assert item.store is not None
            if id(item.store) not in seen:
                seen.add(id(item.store))
                layers.append(_store_report(item.store))
        else:
            key, value = item
            size = key.nbytes + value.nbytes
            sixteen = 2 * (key.numel() + value.numel())
            layers.append(LayerReport(key.shape[2], (), None, size, size, size, sixteen, {}, 0))
    return CacheReport(tuple(layers))


def stores(cache: Any) -> list[LayerStore | None]:
    """What lies behind each layer of a live cache, in the order of :func:`cache_report`; None for a dense layer."""
    found: dict[int, LayerStore | None] = {}
    for item in _walk(cache, set()):
        store = item.store if isinstance(item, KVTensor | PreallocatedKV) else None
        found.setdefault(id(item if store is None else store), store)
    return list(found.values())


def _store_report(store: LayerStore) -> LayerReport:
    sixteen = store.dense_nbytes * 2 // store.site.dtype.itemsize
    return LayerReport(
        store.length, store.counts, store.plan, store.nbytes, store.coded_nbytes, store.dense_nbytes, sixteen,
        dict(store.fallbacks), store.recompressed,
    )  # fmt: skip


def _walk(item: Any, seen: set[int]) -> Iterator[KVTensor | PreallocatedKV | tuple[torch.Tensor, torch.Tensor]]:
    """Handles, and pairs of dense 4-D tensors, in order."""
    if isinstance(item, KVTensor | PreallocatedKV):
        yield item
        return
    if item is None or isinstance(item, torch.Tensor | str | int | float | bool | torch.dtype) or id(item) in seen:
        return
    seen.add(id(item))
    values = list(item.values()) if isinstance(item, dict) else None
    if values is None:
        values = list(item) if isinstance(item, list | tuple) else list(getattr(item, "__dict__", {}).values())
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    dense = [t for t in tensors if t.dim() == 4 and t.numel() and not isinstance(t, KVTensor | PreallocatedKV)]
    if len(dense) == 2 and dense[0].shape[:3] == dense[1].shape[:3]:
        yield dense[0], dense[1]
    for value in values:
        yield from _walk(value, seen)
