"""KeyDiff (arXiv 2504.15364): keys that point elsewhere than most keys do are kept, so that what is kept is diverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mikv_compile.kernels.scoring import AttentionArgs, visible


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """One minus the cosine similarity to the mean of the normalized keys: from 0 to 2. Padding gets -inf."""
    shown = visible(q, k, args)
    directions = F.normalize(k.float(), dim=-1)
    # A broken key must not spoil the mean for all others.
    counted = directions.nan_to_num(nan=0.0).masked_fill(~shown[..., None], 0.0)
    mean = counted.sum(dim=2, keepdim=True) / shown.sum(dim=2).clamp(min=1)[..., None, None]
    return (1 - F.cosine_similarity(directions, mean, dim=-1)).masked_fill(~shown, float("-inf"))
