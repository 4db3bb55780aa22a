"""SnapKV (arXiv 2404.14469): attention that the prompt's last queries pay, smoothed over neighbouring tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.ranking import received
from mikv_compile.kernels.scoring import AttentionArgs

OBSERVED_ROWS = 32
"""Last query rows that are looked at."""

KERNEL = 7
"""Tokens of the max-pool that keeps a token's neighbours with it."""

WATCH = Watch(rows=OBSERVED_ROWS, pool=KERNEL, least=2)
"""A later chunk of the prompt, or a next question, is looked at like the first. Single generated tokens score 0, except
in plans that evict, where every call is watched."""


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Pooled column sums over the last rows."""
    sums = received(q, k, args, OBSERVED_ROWS)
    return F.max_pool1d(sums, KERNEL, stride=1, padding=KERNEL // 2)
