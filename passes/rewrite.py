"""Stage "rewrite": replace sites in a copy of the graph; the dense caches leave its inputs and outputs.

What a site becomes is decided by a `SiteLowering`; this file only moves nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from mikv_compile.passes import canonical
from mikv_compile.passes.node_utils import fake, output_values, shape_of, writes_in_place
from mikv_compile.passes.records import CacheUpdate, Read, Site
from mikv_compile.passes.report import Declined
from mikv_compile.passes.sizes import NotExpressible, SizeMaker, metadata_value, replace_by_value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operands:
    """One attention call's nodes in the copied graph. Shapes: `B` rows, `Hq = H * groups` query heads, `S` new tokens.

    The mask covers past and new tokens together, in the order of the dense cache.
    """

    query: Node
    """`[B, Hq, R, D]`"""
    mask: Node | None
    """Bool (True = attend) or additive float, broadcastable to `[B, Hq, R, T + S]`; None: all tokens are seen."""
    scale: float
    softcap: float | None
    sinks: Node | None
    """Logits without values, broadcastable to `[B, Hq, R, n]`; the rewrite takes care of them in later steps."""
    is_causal: bool
    """Only True where the cache is born."""
    groups: int


@dataclass(frozen=True)
class NewTokens:
    """A call's own keys `[B, H, S, D]` and values `[B, H, S, Dv]` in the copied graph."""

    key: Node
    value: Node


class SiteLowering(Protocol):
    """What sites become. Buffers are extra graph inputs, such as the tensors of a compressed store."""

    def buffers(self, site: Site) -> Sequence[tuple[str, torch.Tensor]]:
        """Names and fake values of the site's buffers; names are unique within the site."""
        ...

    def source(self, site: Site, name: str) -> object:
        """Dynamo's source for a buffer, different for every buffer of the graph, or None."""
        ...

    def emit_born(
        self, graph: Graph, site: Site, first: Operands | None, new: NewTokens, buffers: Mapping[str, Node]
    ) -> None:
        """Create the nodes that take over a new cache, behind its first attention call, if that is known."""
        ...

    def emit_attend(
        self, graph: Graph, site: Site, operands: Operands, new: NewTokens, buffers: Mapping[str, Node]
    ) -> tuple[Node, Node]:
        """Create the nodes of one attention call; return its output `[B, Hq, R, Dv]` and log-sum-exp `[B, Hq, R]`."""
        ...

    def emit_update(
        self, graph: Graph, site: Site, operands: Operands, lse: Node, new: NewTokens, buffers: Mapping[str, Node]
    ) -> None:
        """Create the nodes that append the new tokens, behind the site's last attention call."""
        ...

    def emit_step(
        self, graph: Graph, site: Site, operands: Operands, new: NewTokens, buffers: Mapping[str, Node]
    ) -> tuple[Node, Node]:
        """Create the nodes of a site's only attention call and of the append behind it; return as `emit_attend`."""
        ...

    def emit_read(self, graph: Graph, site: Site, columns: Any, buffers: Mapping[str, Node]) -> tuple[Node, Node]:
        """Create the nodes of the dense past: keys `[B, H, columns, D]` and values `[B, H, columns, Dv]`."""
        ...

    def emit_append(self, graph: Graph, site: Site, new: NewTokens, buffers: Mapping[str, Node]) -> None:
        """Create the nodes that append new tokens that no known attention call reads."""
        ...


@dataclass(frozen=True)
class RewrittenSite:
    """Where one site's tensors enter and leave the rewritten graph."""

    site: Site
    fills: bool
    """The graph fills an empty store; otherwise it reads it and appends."""
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
        _Rewriting(graph, site, copies, sizes, lowering, buffers[site.name]).run()
    graph.lint()
    new_gm = _make_module(gm, graph)
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    done = tuple(
        RewrittenSite(
            site=site,
            fills=fills(site),
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


def fills(site: Site) -> bool:
    """Whether a site's tokens are the first ones, and its attention can go on reading them as they are."""
    if site.born:
        return True
    whole = any(read.whole for read in site.reads) or not site.reads
    return site.starts_empty and (not (site.key.tail and whole) or site.key.kind == "replace")


def _check_sizes(graph: Graph, sites: Sequence[Site]) -> tuple[list[Site], list[Declined]]:
    """Leave out the sites whose sizes are used and cannot be made again without the dense tensor."""
    sizes = SizeMaker(graph)
    possible: list[Site] = []
    declined: list[Declined] = []
    for site in sites:
        try:
            for node in _lost_metadata(site):
                sizes.check(metadata_value(node))
            if not site.born and not site.reads:
                sizes.check(_columns(site))
            if site.key.kind == "read":
                sizes.check(shape_of(site.key.past)[site.key.layout.index("B")])  # type: ignore[index]
            possible.append(site)
        except NotExpressible as problem:
            declined.append(Declined(site.name, "rewrite", str(problem)))
            log.debug("declined %s", declined[-1])
    return possible, declined


def _columns(site: Site) -> Any:
    """The columns of the cached tensor."""
    shape = shape_of(site.key.past)
    if shape is None:
        raise NotExpressible("the shape of the cache is unknown")
    return shape[site.key.token_dim]


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


class _Rewriting:
    """The rewrite of one site in the copied graph."""

    def __init__(
        self,
        graph: Graph,
        site: Site,
        copies: dict[Node, Node],
        sizes: SizeMaker,
        lowering: SiteLowering,
        buffers: Mapping[str, Node],
    ) -> None:
        self._graph, self._site, self._sizes = graph, site, sizes
        self._values = copies
        """What stands for each original node now; shared by all sites."""
        self._own = {id(update): [copies[n] for n in (update.result, *update.nodes)] for update in _updates(site)}
        self._lowering, self._buffers = lowering, buffers

    def run(self) -> None:
        site = self._site
        pasts = {self._values[update.past]: None for update in _updates(site) if update.past is not None}
        self._replace_metadata()
        self._drop_outputs()
        if fills(site):
            self._fill()
        elif site.reads:
            self._step()
        else:
            self._read_dense()
        for past in pasts:
            self._graph.erase_node(past)

    def _fill(self) -> None:
        """Let the attention read the new tokens as they are, and hand them to the lowering behind it."""
        site = self._site
        for update in _updates(site):
            if update.kind == "replace":
                self._erase_own(update)
            elif not (update.born and update.tail):  # what is allocated in this graph serves this call alone
                self._read_new_instead(update)
        last = [read.attention.output for read in site.reads[:1]] or [update.new for update in _updates(site)]
        with self._graph.inserting_before(max(self._values[node] for node in last).next):
            new = self._new_tokens()
            first = self._operands(site.reads[0]) if site.reads else None
            self._lowering.emit_born(self._graph, site, first, new, self._buffers)

    def _read_new_instead(self, update: CacheUpdate) -> None:
        """Drop the concatenation or the write: past and new tokens together are the new ones."""
        new = self._values[update.new]
        own = self._own[id(update)]
        for source in update.all_sources:
            copy = self._values[source]
            for user in [user for user in copy.users if user not in own]:
                user.replace_input_with(copy, new)
            if source.op != "placeholder":
                self._values[source] = new  # a later site may read it
        inputs = [node for copy in own for node in copy.all_input_nodes if node is not new]
        self._erase_own(update)
        _erase_unused(list(dict.fromkeys(inputs)))

    def _step(self) -> None:
        """Put the lowering's nodes in the place of the attention, its head repeats, the writes and the caches."""
        site = self._site
        attended: list[tuple[Operands, Node]] = []
        for read in site.reads:
            output = self._values[read.attention.output]
            with self._graph.inserting_before(output):
                operands = self._operands(read)
                new = self._no_tokens(operands.query) if site.key.kind == "read" else self._new_tokens()
                alone = len(site.reads) == 1 and site.key.kind != "read"
                emit = self._lowering.emit_step if alone else self._lowering.emit_attend
                out, lse = emit(self._graph, site, operands, new, self._buffers)
                if operands.sinks is not None:
                    out, lse = canonical.with_sinks(self._graph, out, lse, operands.sinks)
                heads = self._kv_heads * read.groups
                out = canonical.output(self._graph, out, read.attention.output_dims, heads, read.groups)
                attended.append((operands, lse))
                if not alone and read is site.reads[-1] and site.key.kind != "read":
                    self._lowering.emit_update(self._graph, site, *attended[0], new, self._buffers)
            out.meta.setdefault("example_value", output.meta.get("example_value", output.meta.get("val")))
            output.replace_all_uses_with(out)
            replaced = {*read.attention.nodes, *read.key_views, *read.value_views}
            _erase_unused([self._values[node] for node in sorted(replaced, reverse=True)])
            self._values[read.attention.output] = out  # a later site may read it
        for update in _updates(site):
            self._erase_own(update)
            aliases = {self._values[node] for node in update.sources if node is not update.past}
            _erase_unused(sorted((node for node in aliases if not node._erased), reverse=True))

    def _read_dense(self) -> None:
        """Give the model this layer's dense cache where it first needs it, and append the new tokens."""
        site = self._site
        pasts = [self._values[update.past] for update in _updates(site) if update.past is not None]
        first = min(user for past in pasts for user in past.users)
        with self._graph.inserting_before(first):
            columns = self._sizes.make(_columns(site))
            read = self._lowering.emit_read(self._graph, site, columns, self._buffers)
            for past, update, dense in zip(pasts, _updates(site), read, strict=True):
                past.replace_all_uses_with(canonical.in_layout(self._graph, dense, update.layout))
        last = max(_last(update) for update in _updates(site))
        with self._graph.inserting_before(self._values[last].next):
            self._lowering.emit_append(self._graph, site, self._new_tokens(), self._buffers)
        for update in _updates(site):
            _erase_unused([copy for copy in reversed(self._own[id(update)]) if not writes_in_place(copy)])

    @property
    def _kv_heads(self) -> int:
        update = self._site.key
        shape = shape_of(update.new)
        assert shape is not None
        return int(shape[update.layout.index("H")]) if "H" in update.layout else 1

    def _new_tokens(self) -> NewTokens:
        key, value = (
            canonical.new_tokens(self._graph, self._values[update.new], update.layout)
            for update in _updates(self._site)
        )
        return NewTokens(key, value)

    def _no_tokens(self, query: Node) -> NewTokens:
        """The new tokens of a call that only reads the cache."""
        made = []
        for update in _updates(self._site):
            value = fake(update.past)
            assert value is not None
            sizes = dict(zip(update.layout, value.shape, strict=True))
            shape = self._sizes.make((sizes["B"], sizes.get("H", 1), 0, sizes["D"]))
            made.append(self._graph.call_method("new_empty", (query, shape), {"dtype": value.dtype}))
        return NewTokens(*made)

    def _operands(self, read: Read) -> Operands:
        attention, heads = read.attention, self._kv_heads * read.groups
        query = self._values[attention.query]
        return Operands(
            query=canonical.query(self._graph, query, attention.query_dims, heads, read.groups),
            mask=canonical.mask(self._graph, attention, self._values, heads, read.groups),
            scale=attention.scale,
            softcap=attention.softcap,
            sinks=None if attention.sinks is None else self._values[attention.sinks],
            is_causal=attention.is_causal,
            groups=read.groups,
        )

    def _replace_metadata(self) -> None:
        """Make the sizes that the graph asks of the dense cache from constants and symbolic inputs."""
        for node in _lost_metadata(self._site):
            copy = self._values[node]
            if not copy.users:
                copy.graph.erase_node(copy)
                continue
            with copy.graph.inserting_before(copy):
                replace_by_value(copy, self._sizes.make(metadata_value(node)))

    def _drop_outputs(self) -> None:
        """Return None where the dense cache was returned."""
        values = list(output_values(self._graph))
        for update in _updates(self._site):
            for position in update.outputs:
                values[position] = None
        self._graph.output_node().args = (tuple(values),)

    def _erase_own(self, update: CacheUpdate) -> None:
        """Erase the write idiom, latest node first."""
        nodes = [n for n in dict.fromkeys(self._own[id(update)]) if n.op != "placeholder" and not n._erased]
        _erase_unused([node for node in sorted(nodes, reverse=True) if node is not self._values[update.new]])


def _updates(site: Site) -> tuple[CacheUpdate, CacheUpdate]:
    return site.key, site.value


def _last(update: CacheUpdate) -> Node:
    """The node after which a cache is up to date."""
    return max(node for node in (update.result, update.new, *update.nodes) if node.op != "placeholder")


def _erase_unused(nodes: Sequence[Node]) -> None:
    """Erase computations without users, one by one: dead code elimination would take in-place cache writes along."""
    for node in nodes:
        if node.op != "placeholder" and not node._erased and not node.users:
            node.graph.erase_node(node)
