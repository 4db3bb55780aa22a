"""Stage "find cache updates": every place where new tokens join a cached tensor.

A new write idiom is one new file with a `recognize(node)` function and one line in `CACHE_UPDATE_RECOGNIZERS`.
"""

from __future__ import annotations

from torch.fx import Graph

from mikv_compile.passes import update_cat, update_shift, update_write
from mikv_compile.passes.records import CacheUpdate
from mikv_compile.passes.registry import run_recognizers
from mikv_compile.passes.report import Declined

__all__ = ["CACHE_UPDATE_RECOGNIZERS", "CacheUpdate", "find_cache_updates"]

CACHE_UPDATE_RECOGNIZERS = (update_cat.recognize, update_shift.recognize, update_write.recognize)
"""Functions `node -> CacheUpdate | Declined | None`; None means: not this idiom."""


def find_cache_updates(graph: Graph) -> list[CacheUpdate | Declined]:
    """Every cache update of the graph, in graph order; those that cannot be taken over as `Declined`."""
    return run_recognizers(graph, CACHE_UPDATE_RECOGNIZERS, "find cache updates")
