"""Stage "pair": join each attention call to the two cache updates that its keys and values come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from mikv_compile.passes.node_utils import known_different, known_equal, names, shape_of, source_name, writes_in_place
from mikv_compile.passes.records import Attention, CacheUpdate, Site
from mikv_compile.passes.report import Declined
from mikv_compile.passes.views import NotAView, ViewPath, trace_to_source, view_input

__all__ = ["Site", "pair"]


class _Refused(Exception):
    """Why an attention and its updates do not make a site."""


def pair(attentions: Sequence[Attention], updates: Sequence[CacheUpdate]) -> tuple[list[Site], list[Declined]]:
    """Join attentions to cache updates, one to one; everything left over gets a reason."""
    by_result = {update.result: update for update in updates}
    declined: list[Declined] = []
    traced: list[tuple[Attention, ViewPath, ViewPath]] = []
    for attention in attentions:
        try:
            traced.append((attention, *_trace(attention, by_result)))
        except _Refused as refused:
            declined.append(_declined(attention.output, str(refused)))
    readers = Counter(source for _, key, value in traced for source in {key.source, value.source})
    sites: list[Site] = []
    for attention, key, value in traced:
        try:
            sites.append(_join(attention, key, value, by_result, readers))
        except _Refused as refused:
            declined.append(_declined(attention.output, str(refused)))
    explained = {source for _, key, value in traced for source in (key.source, value.source)}
    for update in updates:
        if update.result not in explained:
            reason = "no supported attention call reads this cache update through plain views"
            declined.append(_declined(update.result, reason))
    return sites, declined


def _declined(node: Node, reason: str) -> Declined:
    return Declined(node.name, "pair", reason)


def _trace(attention: Attention, by_result: Mapping[Node, CacheUpdate]) -> tuple[ViewPath, ViewPath]:
    """Where the key and the value operand come from."""
    paths = []
    for what, operand in (("key", attention.key), ("value", attention.value)):
        try:
            paths.append(trace_to_source(operand, by_result))
        except NotAView as problem:
            raise _Refused(f"the {what} is not read from a cache: {problem}") from None
    return paths[0], paths[1]


def _join(
    attention: Attention,
    key_path: ViewPath,
    value_path: ViewPath,
    by_result: Mapping[Node, CacheUpdate],
    readers: Mapping[Node, int],
) -> Site:
    """Check everything that makes an attention and two updates one site."""
    key, value = by_result[key_path.source], by_result[value_path.source]
    for source in (key.result, value.result):
        if readers[source] > 1:
            raise _Refused(f"{readers[source]} attention calls read the cache update `{source.name}`; only one may")
    if key.result is value.result:
        raise _Refused("key and value are read from the same cached tensor")
    if key.born != value.born:
        raise _Refused("key and value caches are crossed: one is empty and the other is not")
    if key.past is not None and attention.is_causal:
        raise _Refused(
            "is_causal=True with a cache: torch aligns it to the top left corner, so new tokens would see only the "
            "oldest ones; pass an explicit mask, or is_causal=False for one token"
        )
    _check_names(key, value)
    _check_extents(attention, key, value)
    groups = _groups(attention, attention.key, key_path, "key")
    if groups != _groups(attention, attention.value, value_path, "value"):
        raise _Refused("key and value heads are repeated a different number of times")
    for update, path in ((key, key_path), (value, value_path)):
        _check_users(attention, update, path)
        _check_not_overwritten(attention, update)
    return Site(attention, key, value, groups, attention.output.name, key_path.views, value_path.views)


def _check_names(key: CacheUpdate, value: CacheUpdate) -> None:
    """Refuse keys and values whose places in the user's objects show different layers."""
    key_name, value_name = source_name(key.past), source_name(value.past)
    if key_name is None or value_name is None or _parent(key_name) == _parent(value_name):
        return
    if _indices(key_name) != _indices(value_name):
        raise _Refused(f"key and value caches are crossed: keys from {key_name}, values from {value_name}")


def _parent(name: str) -> str:
    """`x.layers[0]` for `x.layers[0].keys`: the name without its last attribute or item."""
    return re.sub(r"(\.\w+|\[[^\[\]]*\])$", "", name)


def _indices(name: str) -> list[str]:
    """The integer items in a name, also those in quotes (`_modules['0']`)."""
    return re.findall(r"\[['\"]?(\d+)['\"]?\]", name)


def _check_extents(attention: Attention, key: CacheUpdate, value: CacheUpdate) -> None:
    """Batch and head counts agree for sure, and so do the numbers of new tokens."""
    key_shape, value_shape = shape_of(key.result), shape_of(value.result)
    new_key, new_value, query = shape_of(key.new), shape_of(value.new), shape_of(attention.query)
    if key_shape is None or value_shape is None or new_key is None or new_value is None or query is None:
        raise _Refused("a shape is unknown")
    if not known_equal(key_shape[0], value_shape[0]) or not known_equal(key_shape[0], query[0]):
        raise _Refused("query, key and value do not surely have the same batch size")
    if not known_equal(key_shape[1], value_shape[1]):
        raise _Refused("key and value caches do not surely have the same number of heads")
    if not known_equal(new_key[2], new_value[2]):
        raise _Refused("key and value caches do not surely get the same number of new tokens")
    if key.born and not known_equal(query[2], new_key[2]):
        # Cross attention: later calls only read this cache, and no call after this one would append to it.
        raise _Refused("a new cache is filled with other tokens than the query's, as cross attention does")
    if key.born and attention.mask is None and not attention.is_causal and not known_equal(query[2], 1):
        raise _Refused(
            "every query sees every token of the new cache, as in cross attention; such a cache does not grow"
        )
    # The attention itself fails on keys and values of different lengths, so unknown is good enough here: Dynamo gives
    # each its own symbol until some operation compares them, and SDPA's fake does not.
    if known_different(key_shape[2], value_shape[2]):
        raise _Refused("key and value caches are crossed: they hold different numbers of tokens")


def _groups(attention: Attention, operand: Node, path: ViewPath, what: str) -> int:
    """Query heads per cached head: the repeats of the views times what the attention itself repeats.

    Both are interleaved, so their product is: `(h // own) // repeats == h // (own * repeats)`.
    """
    query, shape = shape_of(attention.query), shape_of(operand)
    if query is None or shape is None:
        raise _Refused("a shape is unknown")
    query_heads, heads = query[1], shape[1]
    if known_equal(query_heads, heads):
        return path.repeats
    if not isinstance(query_heads, int) or not isinstance(heads, int):
        raise _Refused("the number of heads is symbolic")
    if heads != 1 and not attention.enable_gqa:  # one head broadcasts
        raise _Refused(f"{query_heads} query heads cannot share {heads} {what} heads without enable_gqa")
    if query_heads % heads:
        raise _Refused(f"{query_heads} query heads are not a multiple of {heads} {what} heads")
    return path.repeats * (query_heads // heads)


def _check_users(attention: Attention, update: CacheUpdate, path: ViewPath) -> None:
    """Refuse if the dense result has a reader besides this attention, the outputs and questions about its size."""
    own = {*path.views, *attention.nodes}
    harmless = {*own, *update.metadata_users, update.result.graph.output_node()}
    extra = [user for user in update.result.users if user not in harmless]
    extra += [user for view in path.views for user in view.users if user not in own]
    if extra or update.result in (attention.query, attention.mask):
        readers = f"by {names(extra)}" if extra else "as query or mask"
        raise _Refused(f"the values of the cache update `{update.result.name}` are also read {readers}")


def _check_not_overwritten(attention: Attention, update: CacheUpdate) -> None:
    """Refuse if the new tokens change in place after the update copied them: the rewrite reads them later."""
    for user in (user for member in _aliases(update.new) for user in member.users):
        if writes_in_place(user) and update.result < user < attention.output:
            raise _Refused(f"`{user.name}` overwrites the new tokens in place after the cache update")


def _aliases(node: Node) -> Iterable[Node]:
    """All nodes that may share memory with `node`, as far as views tell."""
    root = node
    while (source := view_input(root)) is not None:
        root = source
    found, todo = {root}, [root]
    while todo:
        for user in todo.pop().users:
            if user not in found and view_input(user) in found:
                found.add(user)
                todo.append(user)
    return found
