"""The backend ``"mikv"`` of ``torch.compile``: analyse a traced graph, rewrite its sites, lower the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile import _compat, generate
from mikv_compile.config import Options
from mikv_compile.errors import MikvError
from mikv_compile.handle import KVTensor
from mikv_compile.lowering import Lowering, PlannedSite, plan_sites
from mikv_compile.passes import Analysis, Declined, RewrittenGraph, analyze, rewrite
from mikv_compile.passes.node_utils import fake, writes_in_place
from mikv_compile.plan import Planner
from mikv_compile.report import GraphReport, SiteReport, record
from mikv_compile.runtime import CompressedGraph, SiteCall
from mikv_compile.sizes import SizeReader

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
    analysis = analyze(gm)
    sizes = SizeReader(gm.graph)
    planned, declined = _select(analysis, gm, planner, sizes)
    rewritten = rewrite(gm, [p.site for p in planned], Lowering(planned))
    done = {s.site.name for s in rewritten.sites}
    planned = [p for p in planned if p.site.name in done]
    declined = [*analysis.declined, *declined, *rewritten.declined]
    _report(analysis, planned, declined, chosen)

    inputs = _make_dense(rewritten, example_inputs)
    if chosen.lower == "eager":
        function: Callable[..., Any] = rewritten.gm.forward
    else:
        settings = {**(_compat.mode_options(mode) if mode else {}), **chosen.inductor}
        function = _compat.compile_with_inductor(rewritten.gm, inputs, settings)
    calls = [_site_call(p, s, sizes, len(planned)) for p, s in zip(planned, rewritten.sites, strict=True)]
    return CompressedGraph(function, rewritten.kept_inputs, calls)


def _select(
    analysis: Analysis, gm: GraphModule, planner: Planner, sizes: SizeReader
) -> tuple[list[PlannedSite], list[Declined]]:
    """Sites to rewrite with their plans."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    records_grad = torch.is_grad_enabled() and any(
        getattr(node.meta.get("example_value"), "requires_grad", False) for node in placeholders
    )
    if records_grad:
        reason = "the call records gradients, which a compressed cache has none of; wrap it in torch.no_grad()"
        return [], [Declined(site.name, "rewrite", reason) for site in analysis.sites]
    return plan_sites(analysis.sites, planner, sizes)


def _make_dense(rewritten: RewrittenGraph, example_inputs: list[Any]) -> list[Any]:
    """Example inputs of the rewritten graph. A handle that stayed is passed as the dense tensor it stands for."""
    inputs: list[Any] = []
    placeholders = rewritten.gm.graph.find_nodes(op="placeholder")
    for node, given in zip(placeholders, [example_inputs[i] for i in rewritten.kept_inputs], strict=False):
        value = node.meta.get("example_value")
        if isinstance(value, KVTensor):
            _refuse_writes(node)
            node.meta["example_value"] = given = _compat.fake_dense(value)
        inputs.append(given)
    return inputs + [node.meta["example_value"] for node in placeholders[len(inputs) :]]


def _refuse_writes(handle: Node) -> None:
    """The graph gets a dense copy of this handle; what it writes into that would be lost."""
    views = [handle]
    for user in (user for view in views for user in view.users):
        value = fake(user)
        if isinstance(value, KVTensor) or (value is not None and value._is_view()):
            views.append(user)
        if writes_in_place(user) and any(argument in views for argument in user.args[:1]):
            raise MikvError(
                f"`{user.name}` writes into a compressed KV cache ({handle.name}) in a way that cannot be rewritten; "
                "replace the layer's tensors by handle.dequantize() first"
            )


def _site_call(planned: PlannedSite, rewritten: Any, sizes: SizeReader, layers: int) -> SiteCall:
    key, value = fake(planned.site.key.new), fake(planned.site.value.new)
    assert key is not None and value is not None
    batch, new_tokens = sizes.reader(key.shape[0]), sizes.reader(key.shape[2])
    assert batch is not None and new_tokens is not None
    return SiteCall(
        rewritten, planned.plan, batch, new_tokens, int(key.shape[1]), int(key.shape[3]), int(value.shape[3]),
        key.dtype, key.device, layers,
    )  # fmt: skip


def _report(analysis: Analysis, planned: list[PlannedSite], declined: list[Declined], options: Options) -> None:
    sites = tuple(
        SiteReport(
            p.site.name, p.layer, "prefill" if p.site.born else "decode", p.site.attention.form, p.site.groups, p.plan
        )
        for p in planned
    )
    report = GraphReport(len(analysis.attentions), sites, tuple(declined), options.lower)
    record(report)
    log.info("%s", report)
    if declined and (analysis.updates or not sites):
        log.warning("left %d places as they were: %s", len(declined), "; ".join(map(str, declined[:3])))
