"""Stage "canonicalize": bring every form of attention into one record.

A new form is one new file with a `recognize(node)` function and one line in `ATTENTION_RECOGNIZERS`.
"""

from __future__ import annotations

from torch.fx import Graph

from mikv_compile.passes import attention_eager, attention_flex, attention_sdpa
from mikv_compile.passes.records import Attention
from mikv_compile.passes.registry import run_recognizers
from mikv_compile.passes.report import Declined

__all__ = ["ATTENTION_RECOGNIZERS", "Attention", "find_attentions"]

ATTENTION_RECOGNIZERS = (attention_sdpa.recognize, attention_flex.recognize, attention_eager.recognize)
"""Functions `node -> Attention | Declined | None`; None means: not this idiom."""


def find_attentions(graph: Graph) -> list[Attention | Declined]:
    """Every attention call of the graph, in graph order; those of an unsupported form as `Declined`."""
    return run_recognizers(graph, ATTENTION_RECOGNIZERS, "canonicalize")
