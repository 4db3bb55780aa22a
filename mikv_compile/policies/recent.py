"""Recency alone (with sinks and eviction this is StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import torch

from mikv_compile.kernels.scoring import AttentionArgs


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """All zero: among equal scores the older token ranks lower."""
    return torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
