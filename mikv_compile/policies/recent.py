"""Recency alone (with sinks and eviction this is StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import torch


def scorer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, is_causal: bool
) -> torch.Tensor:
    """All zero: among equal scores the older token ranks lower."""
    return torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
