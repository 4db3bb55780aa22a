"""Run a tuple of recognizers over a graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.fx import Graph, Node

from mikv_compile.passes.report import Declined, Stage

log = logging.getLogger(__name__)

Match = TypeVar("Match")


def run_recognizers(
    graph: Graph, recognizers: Sequence[Callable[[Node], Match | Declined | None]], stage: Stage
) -> list[Match | Declined]:
    """What the recognizers say about each node, in graph order; the first that knows a node decides."""
    found: list[Match | Declined] = []
    for node in graph.nodes:
        for recognize in recognizers:
            try:
                result = recognize(node)
            except Exception as error:  # an odd graph must not stop the user's compilation
                log.debug("%s: recognizer %s failed on %s", stage, recognize.__module__, node.name, exc_info=True)
                result = Declined(node.name, stage, f"internal error in {recognize.__module__}: {error!r}")
            if result is not None:
                log.debug("%s: %s", stage, result)
                found.append(result)
                break
    return found
