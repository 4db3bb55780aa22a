"""Key norms (arXiv 2406.11430): keys with a low L2 norm tend to receive much attention, so their tokens are kept."""

from __future__ import annotations

import torch

from mikv_compile.kernels.scoring import AttentionArgs, visible


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """One over the norm, which orders tokens as its negative does and can be weighed by values. Padding gets -inf.

    Keys of zeros, which is what the unwritten part of a preallocated cache holds, get 0.
    """
    norms = k.float().norm(dim=-1)
    scores = norms.reciprocal().masked_fill(norms == 0, 0.0)
    return scores.masked_fill(~visible(q, k, args), float("-inf"))
