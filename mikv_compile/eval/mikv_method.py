"""The backend as a method: real compiled calls, real kernels, real bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mikv_compile.eval.methods import CacheSize, Session


class NotCompressedError(Exception):
    """Some layer's cache stayed dense, so that what would be measured is not what was asked for."""


@dataclass(frozen=True)
class MikvMethod:
    """``torch.compile(..., backend="mikv")`` with options.

    Attributes:
        options: of :class:`mikv_compile.Options`.
        name, family: see :class:`~mikv_compile.eval.methods.Method`.
        regional: compile the repeated layer once (True), the whole model (False), or the whole model only if it has to
            be (None).
        tags: a part of the settings that pictures read.
        partly: go on although some layers' caches stay dense; otherwise that is an error.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    family: str = "mikv"
    regional: bool | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    partly: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", name_of(self.options))

    @property
    def settings(self) -> dict[str, Any]:
        """The options; how the graph is lowered is one of them."""
        return {"options": dict(self.options)} | ({"tags": dict(self.tags)} if self.tags else {})

    @contextmanager
    def open(self, model: Any) -> Iterator[Session]:
        """Compile the model, and undo it in the end.

        Raises:
            mikv_compile.OptionError: for impossible options.
        """
        import mikv_compile

        torch._dynamo.reset()
        try:
            compiled, regional = self._compile(model)
            yield MikvSession(model, compiled, regional, self.partly)
        finally:
            mikv_compile.uncompile(model)
            torch._dynamo.reset()

    def _compile(self, model: Any) -> tuple[Any, bool]:
        import mikv_compile

        if self.regional is not False:
            try:
                return mikv_compile.compile(model, regional=True, **self.options), True
            except mikv_compile.MikvError:  # no repeated layers, or options that count those of the whole model
                if self.regional:
                    raise
        return mikv_compile.compile(model, regional=False, **self.options), False


class MikvSession(Session):
    """A model that was compiled with the backend."""

    def __init__(self, model: Any, compiled: Any, regional: bool, partly: bool = False) -> None:
        import mikv_compile

        super().__init__(model, compiled)
        self.regional, self._partly = regional, partly
        self._earlier = mikv_compile.graph_reports()
        self._fallbacks: dict[str, int] = {}

    def prefill(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """As :meth:`Session.prefill`; raises :class:`NotCompressedError` if a layer's cache stayed dense."""
        cache, logits = super().prefill(input_ids)
        self._check(cache)
        return cache, logits

    def size(self, cache: Any) -> CacheSize:
        """As :meth:`Session.size`, from the stores behind the cache's handles."""
        report = self._check(cache)
        self._fallbacks = report.fallbacks
        saved = 0
        for store in _stores(cache):
            site, plan, length = store.site, store.plan, store.length
            shape = (length, site.batch, site.kv_heads, site.key_dim, site.value_dim)
            # What the model's own dtype fills is smaller in a 16-bit model; everything else stays.
            saved += plan.nbytes(*shape, site.dtype) - plan.nbytes(*shape, torch.float16)
        dense = sum(layer.dense_nbytes_16bit for layer in report.layers)
        length = max(layer.length for layer in report.layers)
        return CacheSize(length, report.nbytes, report.nbytes - saved, dense)

    def facts(self) -> dict[str, Any]:
        """Graphs, sites and how they are read."""
        import mikv_compile

        earlier = {id(report) for report in self._earlier}  # kept, so that no id is used again
        graphs = [report for report in mikv_compile.graph_reports() if id(report) not in earlier]
        sites = [site for graph in graphs for site in graph.rewritten]
        return {
            "compiled": "layer by layer" if self.regional else "as a whole",
            "graphs": len(graphs),
            "sites_rewritten": len(sites),
            "sites_read_densely": sum(site.reads == "dense" for site in sites),
            "declined": sorted({str(declined) for graph in graphs for declined in graph.declined}),
            "dequantized_reads": self._fallbacks,
        }

    def _check(self, cache: Any) -> Any:
        from mikv_compile import cache_report

        report = cache_report(cache)
        dense = [i for i, layer in enumerate(report.layers) if layer.plan is None]
        if (dense or not report.layers) and not self._partly:
            which = f"layers {dense} of {len(report.layers)}" if dense else "all layers"
            reasons = "; ".join(self.facts()["declined"]) or "mikv_compile.explain(model, input_ids) says why"
            raise NotCompressedError(f"the cache of {which} stayed dense: {reasons}")
        return report


def _stores(cache: Any) -> list[Any]:
    """The stores behind a cache's handles, each once."""
    found = [getattr(getattr(layer, "keys", None), "store", None) for layer in cache.layers]
    return list({id(store): store for store in found if store is not None}.values())


def name_of(options: Mapping[str, Any]) -> str:
    """A name that tells the options apart: ``mikv budget=0.25 policy=h2o``."""
    shown = {key: value for key, value in options.items() if key not in ("lower", "preset")}
    first = str(options.get("preset", "mikv"))
    return " ".join([first, *(f"{key}={value}" for key, value in sorted(shown.items()))])
