"""What every entry shares: analyse a graph, rewrite its sites, lower the result, wrap it for calls with handles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from mikv_compile import _compat
from mikv_compile.config import Options
from mikv_compile.errors import MikvError, OptionError
from mikv_compile.graph_text import GraphText, graph_text
from mikv_compile.handle import KVTensor
from mikv_compile.lowering import Extent, Lowering, PlannedSite, Region, plan_sites
from mikv_compile.passes import Analysis, Declined, RewrittenGraph, RewrittenSite, Site, analyze, rewrite
from mikv_compile.passes.columns import NotSeparable, cut_out
from mikv_compile.passes.node_utils import fake, is_metadata, writes_in_place
from mikv_compile.passes.views import aliases
from mikv_compile.plan import check_named_layers
from mikv_compile.planner import Planner
from mikv_compile.preallocated import PreallocatedKV
from mikv_compile.report import GraphReport, SiteReport, keeps_graphs, record
from mikv_compile.runtime import CompressedGraph, SiteCall
from mikv_compile.sizes import SizeReader, columns_reader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewrittenDecoder:
    """A graph whose caches have become stores, not yet compiled."""

    graph: RewrittenGraph
    calls: list[SiteCall]
    """Of the rewritten sites."""
    asked: list[int]
    """Positions of the original inputs of which only sizes are read."""
    declined: list[Declined]
    """What stayed as it was, and why."""


def rewrite_graph(
    gm: GraphModule,
    handles: Mapping[Node, Any],
    options: Options,
    *,
    records_grad: bool,
    region: Region | None = None,
    whole: bool = False,
) -> RewrittenDecoder:
    """Plan and rewrite the sites of a graph in a copy; for the arguments see :func:`compile_graph`."""
    planner = Planner(options)
    analysis = analyze(gm, {node: handle.kv_layout for node, handle in handles.items()})
    sizes = SizeReader(gm.graph)
    planned, declined = _select(analysis, planner, sizes, handles, records_grad, region)
    rewritten = rewrite(gm, [p.site for p in planned], Lowering(planned))
    done = {s.site.name for s in rewritten.sites}
    planned = [p for p in planned if p.site.name in done]
    declined = [*analysis.declined, *declined, *rewritten.declined]
    notes = _check_layers(options, len(analysis.sites), whole and not declined) if region is None else ()
    text = graph_text(gm, rewritten) if keeps_graphs() else None
    _report(analysis, planned, declined, options, region, notes, text)

    _check_writes(gm, handles)
    asked = [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if all(map(is_metadata, node.users))]
    layers = len(planned) if region is None else region.of
    calls = [_site_call(p, s, sizes, layers) for p, s in zip(planned, rewritten.sites, strict=True)]
    return RewrittenDecoder(rewritten, calls, asked, declined)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    handles: Mapping[Node, Any],
    options: Options,
    settings: Mapping[str, Any],
    *,
    records_grad: bool,
    region: Region | None = None,
    whole: bool = False,
) -> CompressedGraph:
    """Compile a graph so that its KV caches stay compressed. The graph itself is not changed.

    Args:
        gm: takes flat inputs and returns a flat tuple; ``meta["example_value"]`` of its nodes are fakes of one mode.
        example_inputs: the values of its placeholders, real or fake.
        handles: the handle behind each placeholder that has one.
        options: what is compressed and how.
        settings: Inductor options, for ``lower="inductor"``.
        records_grad: whether the call records gradients; then nothing is compressed.
        region: the layers that the graph serves, where it is not the whole model.
        whole: whether the graph surely holds all layers of the model.

    Raises:
        OptionError: for options that are impossible for this graph.
    """
    made = rewrite_graph(gm, handles, options, records_grad=records_grad, region=region, whole=whole)
    rewritten = made.graph
    inputs = _make_dense(rewritten, example_inputs)
    if options.lower == "eager":
        function: Callable[..., Any] = rewritten.gm.forward
    else:
        function = _compat.compile_with_inductor(rewritten.gm, inputs, dict(settings))
    return CompressedGraph(function, gm.forward, rewritten.kept_inputs, written_inputs(gm), made.asked, made.calls)


def _select(
    analysis: Analysis,
    planner: Planner,
    sizes: SizeReader,
    handles: Mapping[Node, Any],
    records_grad: bool,
    region: Region | None,
) -> tuple[list[PlannedSite], list[Declined]]:
    """Sites to rewrite with their plans."""
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
    planned, refused = plan_sites(possible, planner, sizes, handles, region)
    return planned, declined + refused


def _check_layers(options: Options, layers: int, whole: bool) -> tuple[str, ...]:
    """What the report has to say of an option ``layers`` that names more layers than the graph has.

    Raises:
        OptionError: if these are all that the model has.
    """
    if not layers:
        return ()
    try:
        check_named_layers(options, layers, "this model" if whole else "this graph")
    except OptionError as error:
        if whole:
            raise
        return (f"{error}; if the model has more, it was split, and each of its graphs counts from 0",)
    return ()


def written_inputs(gm: GraphModule) -> list[int]:
    """Positions of the inputs that a graph writes in place."""
    return [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if _writers(node)]


def _writers(node: Node) -> list[Node]:
    return [u for member in aliases(node) for u in member.users if writes_in_place(u) and u.args[0] is member]


def _check_writes(gm: GraphModule, handles: Mapping[Node, Any]) -> None:
    """Make sure that the compressed caches that the graph as it was writes in place can take such a write.

    Raises:
        MikvError: for a cache that cannot.
    """
    for node, handle in handles.items():
        writers = _writers(node)
        if writers and not isinstance(handle, PreallocatedKV) and not handle.is_preallocated:
            raise MikvError(
                f"`{writers[0].name}` writes into a compressed KV cache ({node.name}) in a way that cannot be "
                "rewritten; replace the layer's tensors by handle.dequantize() first"
            )


def _make_dense(rewritten: RewrittenGraph, example_inputs: Sequence[Any]) -> list[Any]:
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


def _report(
    analysis: Analysis,
    planned: list[PlannedSite],
    declined: list[Declined],
    options: Options,
    region: Region | None,
    notes: tuple[str, ...],
    text: GraphText | None,
) -> None:
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
    report = GraphReport(
        len(analysis.attentions),
        sites,
        tuple(declined),
        options.lower,
        region.numbers if region is not None else (),
        notes,
        text,
    )
    record(report)
    log.info("%s", report)
    for note in notes:
        log.warning("%s", note)
    if declined and (analysis.updates or not sites):
        log.warning("left %d places as they were: %s", len(declined), "; ".join(map(str, declined[:3])))


def _form(site: Site) -> str:
    return "+".join(dict.fromkeys(read.attention.form for read in site.reads)) or "unknown attention"


def _groups(site: Site) -> int | None:
    return site.reads[0].groups if site.reads else None
