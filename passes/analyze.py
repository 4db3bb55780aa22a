"""Run the stages that only read the graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from torch.fx import GraphModule, Node

from mikv_compile.passes.attention import find_attentions
from mikv_compile.passes.cache_updates import find_cache_updates
from mikv_compile.passes.pair import only_read, pair
from mikv_compile.passes.records import Attention, CacheUpdate, Site
from mikv_compile.passes.report import Declined

log = logging.getLogger(__name__)

Match = TypeVar("Match")


@dataclass(frozen=True)
class Analysis:
    """What the stages found in one graph."""

    sites: tuple[Site, ...]
    declined: tuple[Declined, ...]
    attentions: tuple[Attention, ...]
    """Every attention call in a supported form, in a site or not."""
    updates: tuple[CacheUpdate, ...]
    """Every cache update in a supported form, in a site or not."""


def analyze(gm: GraphModule, compressed: Mapping[Node, str] = MappingProxyType({})) -> Analysis:
    """Find all sites of a Dynamo graph; changes nothing, and never raises because of an odd graph.

    Args:
        gm: the graph.
        compressed: the placeholders that stand for caches that are compressed already, with their layouts.
    """
    found = find_attentions(gm.graph)
    attentions, declined = _split(found)
    updates, declined_updates = _split(find_cache_updates(gm.graph))
    updates += only_read(compressed, updates)
    declined += declined_updates
    sites: list[Site] = []
    try:
        sites, declined_pairs = pair(found, updates, compressed)
        declined += declined_pairs
    except Exception as error:  # an odd graph must not stop the user's compilation
        log.debug("pair failed", exc_info=True)
        declined.append(Declined("graph", "pair", f"internal error: {error!r}"))
    for refused in declined:
        log.debug("declined %s", refused)
    for site in sites:
        log.debug(
            "site %s: keys %s, values %s, %d reads", site.name, site.key.result, site.value.result, len(site.reads)
        )
    read_densely = {site.dense for site in sites}
    declined = [refused for refused in declined if refused.reason not in read_densely]
    return Analysis(tuple(sites), tuple(declined), tuple(attentions), tuple(updates))


def _split(found: Sequence[Match | Declined]) -> tuple[list[Match], list[Declined]]:
    """Matches and refusals, each in order."""
    matches = [item for item in found if not isinstance(item, Declined)]
    return matches, [item for item in found if isinstance(item, Declined)]
