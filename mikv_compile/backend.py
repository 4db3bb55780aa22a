"""The backend ``"mikv"`` of ``torch.compile``: analyse a traced graph, rewrite its sites, lower the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile import _compat, generate
from mikv_compile.config import Options
from mikv_compile.errors import MikvError
from mikv_compile.handle import KVTensor
from mikv_compile.lowering import Extent, Lowering, PlannedSite, plan_sites
from mikv_compile.passes import Analysis, Declined, RewrittenGraph, RewrittenSite, Site, analyze, rewrite
from mikv_compile.passes.columns import NotSeparable, cut_out
from mikv_compile.passes.node_utils import fake, is_metadata, writes_in_place
from mikv_compile.passes.views import aliases
from mikv_compile.plan import Planner
from mikv_compile.preallocated import PreallocatedKV
from mikv_compile.report import GraphReport, SiteReport, record
from mikv_compile.runtime import CompressedGraph, SiteCall
from mikv_compile.sizes import SizeReader, columns_reader

log = logging.getLogger(__name__)

# torch.compile(model, backend="mikv") looks this module up before anything else happens, so this is early enough for
# torch.compile(model, backend="mikv").generate(...) to be caught.
generate.install()


def mikv(
    gm: GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that its KV caches stay compressed.

    Args:
        gm, example_inputs: from Dynamo.
        options: fields of :class:`~mikv_compile.config.Options`; ``inductor.NAME`` keys go to Inductor.
        mode: a mode of ``torch.compile``, translated to Inductor options.

    Raises:
        OptionError: for options that are unknown, malformed or impossible.
    """
    chosen = Options.parse(options)
    planner = Planner(chosen)
    handles = _handles(gm, example_inputs)
    analysis = analyze(gm, {node: handle.kv_layout for node, handle in handles.items()})
    sizes = SizeReader(gm.graph)
    planned, declined = _select(analysis, gm, planner, sizes, handles)
    rewritten = rewrite(gm, [p.site for p in planned], Lowering(planned))
    done = {s.site.name for s in rewritten.sites}
    planned = [p for p in planned if p.site.name in done]
    declined = [*analysis.declined, *declined, *rewritten.declined]
    _report(analysis, planned, declined, chosen)

    written = _written_inputs(gm, handles)
    asked = [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if all(map(is_metadata, node.users))]
    inputs = _make_dense(rewritten, example_inputs)
    if chosen.lower == "eager":
        function: Callable[..., Any] = rewritten.gm.forward
    else:
        settings = {**(_compat.mode_options(mode) if mode else {}), **chosen.inductor}
        function = _compat.compile_with_inductor(rewritten.gm, inputs, settings)
    calls = [_site_call(p, s, sizes, len(planned)) for p, s in zip(planned, rewritten.sites, strict=True)]
    return CompressedGraph(function, gm.forward, rewritten.kept_inputs, written, asked, calls)


def _handles(gm: GraphModule, example_inputs: list[Any]) -> dict[Node, Any]:
    """The placeholders that stand for compressed caches, with what tells their plan, role and layout."""
    found: dict[Node, Any] = {}
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        value = node.meta.get("example_value")
        if isinstance(value, KVTensor):
            found[node] = value
        elif isinstance(given, PreallocatedKV):
            found[node] = given
    return found


def _select(
    analysis: Analysis, gm: GraphModule, planner: Planner, sizes: SizeReader, handles: Mapping[Node, Any]
) -> tuple[list[PlannedSite], list[Declined]]:
    """Sites to rewrite with their plans."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    records_grad = torch.is_grad_enabled() and any(
        getattr(node.meta.get("example_value"), "requires_grad", False) for node in placeholders
    )
    if records_grad:
        reason = "the call records gradients, which a compressed cache has none of; wrap it in torch.no_grad()"
        return [], [Declined(site.name, "rewrite", reason) for site in analysis.sites]
    possible, declined = [], []
    for site in analysis.sites:
        try:
            if isinstance(site.key.position, Node):
                cut_out(site.key.position)
            possible.append(site)
        except NotSeparable as reason:
            declined.append(Declined(site.name, "rewrite", str(reason)))
    planned, refused = plan_sites(possible, planner, sizes, handles)
    return planned, declined + refused


def _written_inputs(gm: GraphModule, handles: Mapping[Node, Any]) -> list[int]:
    """Positions of the compressed caches that the graph as it was writes in place.

    Raises:
        MikvError: for a cache that cannot take such a write.
    """
    written: list[int] = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node not in handles:
            continue
        family = aliases(node)
        writers = [u for member in family for u in member.users if writes_in_place(u) and u.args[0] is member]
        if not writers:
            continue
        if not isinstance(handles[node], PreallocatedKV) and not handles[node].is_preallocated:
            raise MikvError(
                f"`{writers[0].name}` writes into a compressed KV cache ({node.name}) in a way that cannot be "
                "rewritten; replace the layer's tensors by handle.dequantize() first"
            )
        written.append(i)
    return written


def _make_dense(rewritten: RewrittenGraph, example_inputs: list[Any]) -> list[Any]:
    """Example inputs of the rewritten graph. A handle that stayed is passed as the dense tensor it stands for."""
    inputs: list[Any] = []
    placeholders = rewritten.gm.graph.find_nodes(op="placeholder")
    for node, given in zip(placeholders, [example_inputs[i] for i in rewritten.kept_inputs], strict=False):
        value = node.meta.get("example_value")
        if isinstance(value, KVTensor):
            node.meta["example_value"] = given = _compat.fake_dense(value)
        elif isinstance(given, PreallocatedKV):
            given = value
        inputs.append(given)
    return inputs + [node.meta["example_value"] for node in placeholders[len(inputs) :]]


def _site_call(planned: PlannedSite, rewritten: RewrittenSite, sizes: SizeReader, layers: int) -> SiteCall:
    key, value, dtype = Extent.of(planned.site.key), Extent.of(planned.site.value), fake(planned.site.key.new)
    assert dtype is not None
    batch, new_tokens = sizes.reader(key.batch), sizes.reader(key.tokens)
    first = sizes.reader(planned.site.key.first)
    assert batch is not None and new_tokens is not None and first is not None
    capacity = None if planned.site.key.capacity is None else sizes.reader(planned.site.key.capacity)
    return SiteCall(
        rewritten, planned.plan, batch, new_tokens, first, _position(planned.site, sizes), capacity, int(key.heads),
        int(key.dim), int(value.dim), dtype.dtype, dtype.device, layers,
    )  # fmt: skip


def _position(site: Site, sizes: SizeReader) -> Callable[[Sequence[Any], int], int] | None:
    """Reads from the arguments of a call where its new tokens are written."""
    position = site.key.position
    if position is None:
        return None
    if isinstance(position, Node):
        return columns_reader(*cut_out(position))
    read = sizes.reader(position)
    assert read is not None
    return lambda args, _: read(args)


def _report(analysis: Analysis, planned: list[PlannedSite], declined: list[Declined], options: Options) -> None:
    sites = tuple(
        SiteReport(
            p.site.name,
            p.layer,
            "prefill" if p.site.born else "read" if p.site.key.kind == "read" else "decode",
            _form(p.site),
            _groups(p.site),
            p.plan,
            "fused" if p.site.dense is None else "dense",
            p.site.dense,
        )
        for p in planned
    )
    report = GraphReport(len(analysis.attentions), sites, tuple(declined), options.lower)
    record(report)
    log.info("%s", report)
    if declined and (analysis.updates or not sites):
        log.warning("left %d places as they were: %s", len(declined), "; ".join(map(str, declined[:3])))


def _form(site: Site) -> str:
    return "+".join(dict.fromkeys(read.attention.form for read in site.reads)) or "unknown attention"


def _groups(site: Site) -> int | None:
    return site.reads[0].groups if site.reads else None
