"""Stage "rewrite": replace sites in a copy of the graph; the dense caches leave its inputs and outputs.

What a site becomes is decided by a `SiteLowering`; this file only moves nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from mikv_compile.passes.node_utils import output_values
from mikv_compile.passes.records import CacheUpdate, Site
from mikv_compile.passes.report import Declined
from mikv_compile.passes.sizes import NotExpressible, SizeMaker, metadata_value, replace_by_value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operands:
    """A site's nodes in the copied graph. Shapes: `B` rows, `Hq = H * groups` query heads, `S` new tokens.

    The mask covers past and new tokens together, in the order of the dense cache.
    """

    query: Node
    """`[B, Hq, R, D]`"""
    key_new: Node
    """`[B, H, S, D]`"""
    value_new: Node
    """`[B, H, S, Dv]`"""
    mask: Node | None
    """Bool (True = attend) or additive float, broadcastable to `[B, Hq, R, T + S]`; None: all tokens are seen."""
    scale: float
    is_causal: bool
    """Only True where the cache is born."""
    groups: int
    output: Node
    """The attention output `[B, Hq, R, Dv]`; `emit_step` replaces it and must not use it."""


class SiteLowering(Protocol):
    """What sites become. Buffers are extra graph inputs, such as the tensors of a compressed store."""

    def buffers(self, site: Site) -> Sequence[tuple[str, torch.Tensor]]:
        """Names and fake values of the site's buffers; names are unique within the site."""
        ...

    def source(self, site: Site, name: str) -> object:
        """Dynamo's source for a buffer, different for every buffer of the graph, or None."""
        ...

    def emit_born(self, graph: Graph, site: Site, operands: Operands, buffers: Mapping[str, Node]) -> None:
        """Create the nodes that take over a new cache; called right behind the attention, which stays as it is."""
        ...

    def emit_step(self, graph: Graph, site: Site, operands: Operands, buffers: Mapping[str, Node]) -> Node:
        """Create the nodes that attend and append; return the attention output `[B, Hq, R, Dv]`."""
        ...


@dataclass(frozen=True)
class RewrittenSite:
    """Where one site's tensors enter and leave the rewritten graph."""

    site: Site
    buffers: tuple[str, ...]
    """Names of the buffers in the order of their graph inputs."""
    buffer_inputs: tuple[int, ...]
    """Their positions among the rewritten graph's inputs."""
    key_input: int | None
    """Position of the key cache among the original graph's inputs; None where the cache is born."""
    value_input: int | None
    key_outputs: tuple[int, ...]
    """Positions in the output tuple that held the key cache and are None now."""
    value_outputs: tuple[int, ...]


@dataclass(frozen=True)
class RewrittenGraph:
    """A rewritten copy of a Dynamo graph. Its inputs: the kept original inputs, then the buffers, site by site."""

    gm: GraphModule
    kept_inputs: list[int]
    """Positions of the original inputs that are still inputs, in order."""
    sites: tuple[RewrittenSite, ...]
    declined: tuple[Declined, ...]
    """Sites that were left as they were."""


def rewrite(gm: GraphModule, sites: Sequence[Site], lowering: SiteLowering) -> RewrittenGraph:
    """Rewrite `sites` of `gm` in a copy; `gm` itself is not changed."""
    possible, declined = _check_sizes(gm.graph, sites)
    graph, copies = _copy_graph(gm.graph)
    sizes = SizeMaker(graph)
    originals = gm.graph.find_nodes(op="placeholder")
    buffers = {site.name: _add_buffers(graph, site, lowering) for site in possible}
    for site in possible:
        operands = _operands(site, copies)
        _replace_metadata(site, copies, sizes)
        if site.born:
            _rewrite_born(graph, site, operands, copies, lowering, buffers[site.name])
        else:
            _rewrite_step(graph, site, operands, copies, lowering, buffers[site.name])
    graph.lint()
    new_gm = _make_module(gm, graph)
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    done = tuple(
        RewrittenSite(
            site=site,
            buffers=tuple(buffers[site.name]),
            buffer_inputs=tuple(inputs[node] for node in buffers[site.name].values()),
            key_input=None if site.key.past is None else originals.index(site.key.past),
            value_input=None if site.value.past is None else originals.index(site.value.past),
            key_outputs=site.key.outputs,
            value_outputs=site.value.outputs,
        )
        for site in possible
    )
    gone = {update.past for site in possible for update in (site.key, site.value)}
    kept = [i for i, node in enumerate(originals) if node not in gone]
    log.debug("rewrote %d of %d sites", len(done), len(sites))
    return RewrittenGraph(new_gm, kept, done, tuple(declined))


def _check_sizes(graph: Graph, sites: Sequence[Site]) -> tuple[list[Site], list[Declined]]:
    """Leave out the sites whose sizes are used and cannot be made again without the dense tensor."""
    sizes = SizeMaker(graph)
    possible: list[Site] = []
    declined: list[Declined] = []
    for site in sites:
        try:
            for node in _lost_metadata(site):
                sizes.check(metadata_value(node))
            possible.append(site)
        except NotExpressible as problem:
            declined.append(Declined(site.name, "rewrite", str(problem)))
            log.debug("declined %s", declined[-1])
    return possible, declined


def _lost_metadata(site: Site) -> list[Node]:
    """Metadata nodes that lose their tensor; where a cache is born, the new tokens have the same shape."""
    if site.born:
        return []
    return sorted({*site.key.metadata_users, *site.value.metadata_users})


def _copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy of a graph, and for each node its copy."""
    copies: dict[Node, Node] = {}
    copy = Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    returned = copy.graph_copy(graph, copies)
    original_output = graph.output_node()
    output = copy.output(returned)
    output.meta = dict(original_output.meta)
    copies[original_output] = output
    for original, new in copies.items():
        _copy_attributes(original, new)  # such as _dynamo_source, which Dynamo keeps outside of meta
    return copy, copies


def _make_module(gm: GraphModule, graph: Graph) -> GraphModule:
    """A module for `graph` with everything that Dynamo and AOTAutograd expect to find on `gm`."""
    new = GraphModule(gm, graph)
    new.meta.update(gm.meta)
    _copy_attributes(gm, new)
    new.recompile()
    return new


def _copy_attributes(original: object, copy: object) -> None:
    """Copy the instance attributes that `copy` lacks, by reference."""
    for name, value in vars(original).items():
        if name not in vars(copy):
            object.__setattr__(copy, name, value)


def _add_buffers(graph: Graph, site: Site, lowering: SiteLowering) -> dict[str, Node]:
    """Add a placeholder for each buffer of a site behind the existing ones."""
    added: dict[str, Node] = {}
    for name, value in lowering.buffers(site):
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            node = graph.placeholder(f"{site.name}_{name}")
        node.meta["example_value"] = value
        node._dynamo_source = lowering.source(site, name)  # type: ignore[attr-defined]
        added[name] = node
    return added


def _operands(site: Site, copies: Mapping[Node, Node]) -> Operands:
    attention = site.attention
    return Operands(
        query=copies[attention.query],
        key_new=copies[site.key.new],
        value_new=copies[site.value.new],
        mask=None if attention.mask is None else copies[attention.mask],
        scale=attention.scale,
        is_causal=attention.is_causal,
        groups=site.groups,
        output=copies[attention.output],
    )


def _replace_metadata(site: Site, copies: Mapping[Node, Node], sizes: SizeMaker) -> None:
    """Make the sizes that the graph asks of the dense cache from constants and symbolic inputs."""
    for node in _lost_metadata(site):
        copy = copies[node]
        if not copy.users:
            copy.graph.erase_node(copy)
            continue
        with copy.graph.inserting_before(copy):
            replace_by_value(copy, sizes.make(metadata_value(node)))


def _rewrite_born(
    graph: Graph,
    site: Site,
    operands: Operands,
    copies: dict[Node, Node],
    lowering: SiteLowering,
    buffers: Mapping[str, Node],
) -> None:
    """Let the attention read the new tokens without the concatenation, and hand them to the lowering behind it."""
    for update in (site.key, site.value):
        _drop_outputs(graph, update)
        result = copies[update.result]
        empty = [node for node in result.all_input_nodes if node is not copies[update.new]]
        result.replace_all_uses_with(copies[update.new])
        copies[update.result] = copies[update.new]  # a later site may read it
        graph.erase_node(result)
        _erase_unused(empty)
    with graph.inserting_before(operands.output.next):
        lowering.emit_born(graph, site, operands, buffers)


def _rewrite_step(
    graph: Graph,
    site: Site,
    operands: Operands,
    copies: dict[Node, Node],
    lowering: SiteLowering,
    buffers: Mapping[str, Node],
) -> None:
    """Put the lowering's nodes in the place of the attention, its head repeats, the concatenations and the caches."""
    for update in (site.key, site.value):
        _drop_outputs(graph, update)
    with graph.inserting_before(operands.output):
        output = lowering.emit_step(graph, site, operands, buffers)
    output.meta.setdefault("example_value", operands.output.meta.get("example_value"))
    operands.output.replace_all_uses_with(output)
    replaced = {*site.attention.nodes, *site.key_views, *site.value_views, site.key.result, site.value.result}
    _erase_unused([copies[node] for node in sorted(replaced, reverse=True)])
    copies[site.attention.output] = output  # a later site may read it
    for update in (site.key, site.value):
        if update.past is not None:
            graph.erase_node(copies[update.past])


def _erase_unused(nodes: Sequence[Node]) -> None:
    """Erase computations without users, one by one: dead code elimination would take in-place cache writes along."""
    for node in nodes:
        if node.op != "placeholder" and not node.users:
            node.graph.erase_node(node)


def _drop_outputs(graph: Graph, update: CacheUpdate) -> None:
    """Return None where the dense cache was returned."""
    values = list(output_values(graph))
    for position in update.outputs:
        values[position] = None
    graph.output_node().args = (tuple(values),)
