"""TOVA (arXiv 2401.06104): the attention that the last query pays, averaged over all heads of the layer.

All KV heads keep the same tokens. Nothing is added up: each call replaces the scores by what its last row attends to.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.ranking import joined, received
from mikv_compile.kernels.scoring import AttentionArgs

WATCH = Watch(rows=1, memory=1, joint=True)
"""The last row of every call, which alone counts."""


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """The last row's attention: the mean over the query heads of the layer, or their maximum."""
    sums = received(q, k, args, 1)
    return joined(sums if args.heads == "max" else sums / (q.shape[1] // k.shape[1]), args.heads)
