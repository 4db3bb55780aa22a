"""Stage "pair": join the keys and the values of a layer with the attention calls that read them to one site.

A site is read by attention calls alone (`reads`), or, if anything else needs the cached numbers, as a dense tensor:
then the cache still leaves the graph compressed, and this layer's part of it is dequantized where the model reads it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from mikv_compile.passes.attention_sdpa import SDPA_TARGETS
from mikv_compile.passes.node_utils import (
    is_metadata,
    is_op,
    known_different,
    known_equal,
    names,
    operation,
    shape_of,
    source_name,
    writes_in_place,
)
from mikv_compile.passes.records import Attention, CacheUpdate, Read, Site
from mikv_compile.passes.report import Declined
from mikv_compile.passes.scores_walk import SOFTMAX
from mikv_compile.passes.views import NotAView, ViewPath, aliases, match_dims, trace_to_source, view_input

__all__ = ["Site", "pair"]

_LEAST_CHANNELS = 4
_SOME_ROWS = "only some rows of the cache's batch are written, and attention alone could read those compressed"
_OPAQUE_TARGETS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)


class _Refused(Exception):
    """Why an attention does not read a cache in a way that its site could serve."""


class _NotACache(_Refused):
    """Why an update is not the cache of a decoder at all."""


def pair(
    attentions: Sequence[Attention | Declined],
    updates: Sequence[CacheUpdate],
    compressed: Mapping[Node, str] = MappingProxyType({}),
) -> tuple[list[Site], list[Declined]]:
    """Join attentions and cache updates to sites; everything left over gets a reason.

    Args:
        attentions: what the stage "canonicalize" found.
        updates: what the stage "find cache updates" found.
        compressed: the placeholders that stand for caches that are compressed already, with their layouts.
    """
    return _Pairing(attentions, updates, compressed).run()


class _Pairing:
    def __init__(
        self, attentions: Sequence[Attention | Declined], updates: Sequence[CacheUpdate], compressed: Mapping[Node, str]
    ) -> None:
        self._attentions = [item for item in attentions if isinstance(item, Attention)]
        self._reasons = {item.site: item.reason for item in attentions if isinstance(item, Declined)}
        self._updates = sorted(updates, key=_place)
        self._compressed = compressed
        self._of_source = {source: update for update in updates for source in update.all_sources}
        self._layouts = {source: update.layout for source, update in self._of_source.items()}
        self._declined: list[Declined] = []
        self._touched: dict[Node, list[Node]] = {}
        """Results of the updates that an attention reads at least in part, by its output."""
        self._not_caches: dict[Node, str] = {}
        """Results of updates that are not to be taken over, with the reason."""

    def run(self) -> tuple[list[Site], list[Declined]]:
        grouped, refused = self._grouped()
        sites: list[Site] = []
        for (key_result, value_result), reads in grouped.items():
            key, value = self._of_source[key_result], self._of_source[value_result]
            shared = [r for (k, v), r in grouped.items() if (k == key_result) != (v == value_result)]
            reason = refused.get((key_result, value_result)) or (
                "its keys and values are read in different combinations" if shared else None
            )
            site = self._fused(key, value, reads) if reason is None else reason
            if isinstance(site, Site):
                sites.append(site)
        taken = {update.result for site in sites for update in (site.key, site.value)}
        sites += self._dense([update for update in self._updates if update.result not in taken], refused)
        sites.sort(key=lambda site: _place(site.key))
        self._explain(sites)
        return sites, self._declined

    def _grouped(self) -> tuple[dict[tuple[Node, Node], list[Read]], dict[tuple[Node, Node], str]]:
        """The attentions that read each pair of updates, and why some pairs cannot be served by attention alone."""
        grouped: dict[tuple[Node, Node], list[Read]] = {}
        refused: dict[tuple[Node, Node], str] = {}
        for attention in self._attentions:
            try:
                key_path, value_path = self._trace(attention)
            except _Refused as reason:
                self._reasons[attention.output.name] = str(reason)
                continue
            key, value = self._of_source[key_path.source], self._of_source[value_path.source]
            place = (key.result, value.result)
            grouped.setdefault(place, [])
            try:
                grouped[place].append(_join(attention, key_path, value_path, key, value))
            except _NotACache as reason:
                self._not_caches.update(dict.fromkeys(place, str(reason)))
                refused[place] = self._reasons[attention.output.name] = str(reason)
            except _Refused as reason:
                refused[place] = self._reasons[attention.output.name] = str(reason)
        return grouped, refused

    def _trace(self, attention: Attention) -> tuple[ViewPath, ViewPath]:
        """Where the key and the value operand come from."""
        paths: list[ViewPath] = []
        refusal: str | None = None
        for what, operand in (("key", attention.key), ("value", attention.value)):
            try:
                paths.append(trace_to_source(operand, self._layouts))
                self._touched.setdefault(attention.output, []).append(self._of_source[paths[-1].source].result)
            except NotAView as problem:
                refusal = refusal or f"the {what} is not read from a cache: {problem}"
        if refusal is not None:
            raise _Refused(refusal)
        return paths[0], paths[1]

    def _fused(self, key: CacheUpdate, value: CacheUpdate, reads: list[Read]) -> Site | str:
        """The site whose cache only attention calls read, or why it is none."""
        try:
            for update, views in ((key, "key_views"), (value, "value_views")):
                _check_users(update, reads, [node for read in reads for node in getattr(read, views)])
                _check_not_overwritten(update, max(read.attention.output for read in reads))
            return Site(
                reads[0].attention.output.name, key, value, tuple(reads), starts_empty=_starts_empty(key, value)
            )
        except _Refused as reason:
            for read in reads:
                self._reasons[read.attention.output.name] = str(reason)
            return str(reason)

    def _dense(self, updates: list[CacheUpdate], refused: Mapping[tuple[Node, Node], str]) -> list[Site]:
        """Pairs of what is left: keys and values of one layer are written one after the other."""
        sites: list[Site] = []
        for update in updates:
            softmax = None if update.rows is None else self._softmax_behind(update)
            if softmax is not None:
                why = next((r for place, r in refused.items() if update.result in place), self._reason_near(softmax))
                self._not_caches.setdefault(update.result, f"{_SOME_ROWS}: {why}")
        left = [u for u in updates if u.rows is None and u.result not in self._not_caches and u.kind != "read"]
        while len(left) > 1:
            first, second, *rest = left
            found = self._softmax_behind(first) or self._softmax_behind(second)
            known = all(u.past in self._compressed for u in (first, second))
            if not _belong_together(first, second) or not (found or known):
                left = left[1:]
                continue
            left = rest
            key, value = (second, first) if (second.result, first.result) in refused else (first, second)
            reason = refused.get((key.result, value.result)) or self._reason_near(found)
            sites.append(Site(key.result.name, key, value, (), reason))
        return sites

    def _softmax_behind(self, update: CacheUpdate) -> Node | None:
        """The first softmax or SDPA that the cached numbers flow into, if there is one: the sign of attention."""
        todo, seen = list(update.all_sources), set(update.all_sources)
        while todo:
            node = todo.pop(0)
            if is_op(node, *SDPA_TARGETS) or operation(node) in SOFTMAX:
                return node
            following = list(node.users)
            if writes_in_place(node) and node.all_input_nodes:
                # What is written into a buffer is read from the buffer.
                following += [user for alias in aliases(node.all_input_nodes[0]) for user in alias.users if user > node]
            for user in following:
                if user not in seen and not is_metadata(user) and not is_op(user, *_OPAQUE_TARGETS):
                    seen.add(user)
                    todo.append(user)
        return None

    def _reason_near(self, softmax: Node | None) -> str:
        """What was said about the attention around a softmax."""
        todo = [] if softmax is None else [softmax]
        for _ in range(20):
            if not todo:
                break
            node = todo.pop(0)
            if node.name in self._reasons:
                return self._reasons[node.name]
            todo += node.users
        return "the cached numbers are read by something else than a supported attention call"

    def _explain(self, sites: list[Site]) -> None:
        """Reasons for attentions and updates that no site holds."""
        in_sites = {update.result for site in sites for update in (site.key, site.value)}
        said = {site.dense for site in sites}
        for attention in self._attentions:
            reason = self._reasons.get(attention.output.name)
            served = any(result in in_sites for result in self._touched.get(attention.output, ()))
            if reason is not None and reason not in said and not served:
                self._declined.append(Declined(attention.output.name, "pair", reason))
        for update in self._updates:
            if update.result not in in_sites and update.kind != "read":
                reason = self._not_caches.get(update.result)
                if reason is None and self._softmax_behind(update) is None:
                    reason = "no attention in this graph reads it; a graph break lies between, or it is no KV cache"
                elif reason is None:
                    reason = "keys and values cannot be told apart: no second cache is written in the same way"
                self._declined.append(Declined(update.result.name, "pair", reason))


def only_read(compressed: Mapping[Node, str], updates: Sequence[CacheUpdate]) -> list[CacheUpdate]:
    """Records of the compressed caches that this graph does not write, as those of cross attention."""
    written = {update.past for update in updates}
    return [
        CacheUpdate(
            result=node,
            past=node,
            new=node,
            layout=layout,
            kind="read",
            metadata_users=tuple(sorted(user for user in node.users if is_metadata(user))),
        )
        for node, layout in compressed.items()
        if node not in written
    ]


def _place(update: CacheUpdate) -> Any:
    return _Order(update.written or update.result)


class _Order:
    """Nodes compare by their place in the graph, but only with `<`."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __lt__(self, other: _Order) -> bool:
        return self.node < other.node


def _join(attention: Attention, key_path: ViewPath, value_path: ViewPath, key: CacheUpdate, value: CacheUpdate) -> Read:
    """Check that an attention reads two updates in a way that can be served from the compressed cache."""
    if key is value:
        raise _Refused("key and value are read from the same cached tensor")
    _check_match(attention, key, value)
    groups, whole = [], []
    for what, path, update in (("key", key_path, key), ("value", value_path, value)):
        _check_reads_after_write(path, update, attention)
        _check_rows(path, update)
        try:
            repeats, tokens = match_dims(path.layout, getattr(attention, f"{what}_dims"))
        except NotAView as problem:
            raise _Refused(f"the {what} is not read from a cache: {problem}") from None
        operand = attention.key if what == "key" else attention.value
        groups.append(_groups(attention, operand, getattr(attention, f"{what}_dims"), repeats, update, what))
        whole.append(_reads_all(update, None if tokens is None else tokens.stop))
    if groups[0] != groups[1]:
        raise _Refused("key and value heads are repeated a different number of times")
    if whole[0] != whole[1]:
        raise _Refused("keys and values are sliced differently")
    if whole[0] and key.tail and not attention.terms:
        raise _Refused("without a mask, attention sees columns of the preallocated cache that were not written yet")
    if key.tail and not key.born and len(attention.terms) > 1 and any(t.kind == "fill" for t in attention.terms):
        # Where all columns of a row are masked by finite numbers, dense attention spreads over the unwritten ones too.
        raise _Refused("two masks hide columns of the preallocated cache, one of them by a finite number")
    if attention.is_causal and not (key.born or (_starts_empty(key, value) and not (key.tail and whole[0]))):
        raise _Refused(
            "is_causal=True with a cache: torch aligns it to the top left corner, so new tokens would see only the "
            "oldest ones; pass an explicit mask, or is_causal=False for one token"
        )
    return Read(attention, groups[0], key_path.views, value_path.views, whole[0])


def _reads_all(update: CacheUpdate, stop: Any) -> bool:
    """Whether the unwritten columns are read too: the slice `[:stop]` may end with the new tokens instead."""
    if stop is None or not update.tail:
        if stop is not None:
            raise _Refused("attention reads only a slice of the cache")
        return True
    new = shape_of(update.new)
    if update.born and new is not None and known_equal(stop, new[update.token_dim]):
        return False  # a new cache is filled from its start; the callable checks that it is
    if isinstance(update.position, Node) or update.position is None:
        raise _Refused("attention reads a slice of the cache, and the graph does not tell where the new tokens end")
    if new is None or not known_equal(stop, update.position + new[update.token_dim]):
        raise _Refused("attention reads a slice of the cache that does not end with the new tokens")
    return False


def _starts_empty(key: CacheUpdate, value: CacheUpdate) -> bool:
    """Whether the new tokens are the first ones for sure, although the cache is a graph input."""
    return not key.born and all(
        isinstance(u.position, int | torch.SymInt) and known_equal(u.position, 0) for u in (key, value)
    )


def _check_match(attention: Attention, key: CacheUpdate, value: CacheUpdate) -> None:
    """Refuse keys and values that do not belong to one layer."""
    if key.born != value.born:
        raise _NotACache("key and value caches are crossed: one is empty and the other is not")
    ways = [(u.kind == "read", u.layout, u.tail, u.keep, u.rows is None) for u in (key, value)]
    if ways[0] != ways[1]:
        raise _Refused("keys and values are cached in different ways")
    _check_names(key, value)
    for update in (key, value):
        if shape_of(update.result) is None or shape_of(update.new) is None:
            raise _Refused("a shape is unknown")
    new_key, new_value, query = shape_of(key.new), shape_of(value.new), shape_of(attention.query)
    assert new_key is not None and new_value is not None
    if query is None:
        raise _Refused("a shape is unknown")
    for letter, what in (("B", "the same batch size"), ("H", "the same number of heads"), ("T", "as many new tokens")):
        if letter in key.layout and not (letter == "T" and key.kind == "read"):
            at = key.layout.index(letter)
            if not known_equal(new_key[at], new_value[at]):
                raise _Refused(f"key and value caches do not surely have {what}")
    # The attention itself fails on keys and values of different lengths, so unknown is good enough here: Dynamo gives
    # each its own symbol until some operation compares them, and SDPA's fake does not.
    key_shape, value_shape = shape_of(key.result), shape_of(value.result)
    assert key_shape is not None and value_shape is not None
    if known_different(key_shape[key.token_dim], value_shape[value.token_dim]):
        raise _NotACache("key and value caches are crossed: they hold different numbers of tokens")


def _check_names(key: CacheUpdate, value: CacheUpdate) -> None:
    """Refuse keys and values whose places in the user's objects show different layers."""
    if not _same_owner(key, value):
        places = f"keys from {source_name(key.past)}, values from {source_name(value.past)}"
        raise _NotACache(f"key and value caches are crossed: {places}")


def _same_owner(key: CacheUpdate, value: CacheUpdate) -> bool:
    """Whether the names of two cached tensors do not speak against one layer."""
    key_name, value_name = source_name(key.past), source_name(value.past)
    if key_name is None or value_name is None or _parent(key_name) == _parent(value_name):
        return True
    return _indices(key_name) == _indices(value_name)


def _parent(name: str) -> str:
    """`x.layers[0]` for `x.layers[0].keys`: the name without its last attribute or item."""
    return re.sub(r"(\.\w+|\[[^\[\]]*\])$", "", name)


def _indices(name: str) -> list[str]:
    """The integer items in a name, also those in quotes (`_modules['0']`)."""
    return re.findall(r"\[['\"]?(\d+)['\"]?\]", name)


def _belong_together(first: CacheUpdate, second: CacheUpdate) -> bool:
    """Whether two updates can be the keys and values of one layer: they grow in step."""
    one, other = shape_of(first.new), shape_of(second.new)
    if one is None or other is None or first.layout != second.layout or len(first.layout) != 4:
        return False
    channels = [shape[first.layout.index("D")] for shape in (one, other)]
    if any(isinstance(size, int) and size < _LEAST_CHANNELS for size in channels):
        return False  # scales of a cache that the model quantizes itself, or gates
    lengths = [shape_of(u.result if u.past is None else u.past) for u in (first, second)]
    if any(shape is None for shape in lengths) or known_different(*(s[first.token_dim] for s in lengths)):  # type: ignore[index]
        return False
    kinds = [(u.born, u.kind, u.tail, u.keep, u.written is None) for u in (first, second)]
    same = all(known_equal(one[i], other[i]) for i, letter in enumerate(first.layout) if letter != "D")
    return (
        same and kinds[0] == kinds[1] and (first.born or first.past is not second.past) and _same_owner(first, second)
    )


def _groups(
    attention: Attention, operand: Node, dims: Sequence[str], repeats: int, update: CacheUpdate, what: str
) -> int:
    """Query heads per cached head: what the views repeat times what the attention itself does.

    Both are interleaved, so their product is: `(h // own) // repeats == h // (own * repeats)`.
    """
    query, cached = shape_of(attention.query), shape_of(update.new)
    if query is None or cached is None:
        raise _Refused("a shape is unknown")
    kv_heads = cached[update.layout.index("H")] if "H" in update.layout else 1
    query_heads = 1
    batch = cached[update.layout.index("B")]
    for letters, size in zip(attention.query_dims, query, strict=True):
        if set(letters) <= {"k", "g"}:
            query_heads = query_heads * size
        elif letters == "bkg":
            query_heads = size // batch if not known_equal(batch, 1) else size
        elif letters == "b" and not known_equal(size, batch):
            raise _Refused("query, key and value do not surely have the same batch size")
    if known_equal(query_heads, kv_heads * repeats) and known_equal(repeats, 1):
        return 1
    if not isinstance(query_heads, int) or not isinstance(kv_heads, int):
        raise _Refused("the number of heads is symbolic")
    if query_heads % kv_heads:
        raise _Refused(f"{query_heads} query heads are not a multiple of {kv_heads} {what} heads")
    groups = query_heads // kv_heads
    grouped_outside = any("g" in letters and "k" not in letters for letters in attention.query_dims)
    if groups != repeats and not attention.enable_gqa and not grouped_outside and kv_heads * repeats != 1:
        raise _Refused(f"{query_heads} query heads cannot share {kv_heads} {what} heads without enable_gqa")
    if groups % repeats:
        raise _Refused(f"{query_heads} query heads are not a multiple of {kv_heads * repeats} repeated {what} heads")
    return groups


def _check_reads_after_write(path: ViewPath, update: CacheUpdate, attention: Attention) -> None:
    """Refuse what reads a cache before the in-place write of the new tokens."""
    if update.written is None or path.source is update.written or update.kind == "cat":
        return
    readers = path.views[:1] or [node for node in attention.nodes if path.source in node.all_input_nodes]
    if not all(update.written < node for node in readers):
        raise _Refused("attention reads the cache before the new tokens are written")


def _check_rows(path: ViewPath, update: CacheUpdate) -> None:
    """Refuse what reads other rows of the batch than the write fills: a store has these alone."""
    shape = shape_of(path.source)
    rows = shape[update.layout.index("B")] if update.rows is None and shape is not None else update.rows
    if not known_equal(path.rows, rows):
        raise _Refused("attention does not surely read the same rows of the cache's batch as the new tokens fill")


def _check_users(update: CacheUpdate, reads: Sequence[Read], views: Collection[Node]) -> None:
    """Refuse if the cached numbers have a reader besides attention, the outputs and questions about their size."""
    own = {node for read in reads for node in read.attention.nodes} | set(views) | set(update.nodes)
    output = update.result.graph.output_node()
    harmless = {*own, *update.all_sources, *update.metadata_users, output}
    seen = {*update.all_sources} - ({update.new} if update.kind == "replace" else set())
    if update.past is not None:
        seen.add(update.past)
    if update.kind == "read":
        harmless.discard(output)
    extra = {user for node in seen for user in node.users if user not in harmless}
    harmless -= {output}  # what is returned must be the whole cache
    extra |= {user for view in views for user in view.users if user not in harmless}
    if extra:
        raise _Refused(f"the values of the cache update `{update.result.name}` are also read by {names(sorted(extra))}")
    for read in reads:
        others = (read.attention.query, read.attention.sinks, *(term.node for term in read.attention.terms))
        if any(source in others for source in update.all_sources):
            raise _Refused(f"the values of the cache update `{update.result.name}` are also read as query or mask")


def _check_not_overwritten(update: CacheUpdate, last: Node) -> None:
    """Refuse if the new tokens change in place after the update copied them: the rewrite reads them later."""
    root = update.new
    while (source := view_input(root)) is not None:
        root = source
    begin = update.written or update.result
    for user in (user for member in aliases(root) for user in member.users):
        if writes_in_place(user) and user.args[0] in aliases(root) and begin < user < last:
            raise _Refused(f"`{user.name}` overwrites the new tokens in place after the cache update")
