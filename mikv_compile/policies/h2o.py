"""H2O (arXiv 2306.14048): a token's score is all the attention it has received, summed over queries and the group."""

from __future__ import annotations

import torch

from mikv_compile.kernels.dispatch import run
from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.scoring import AttentionArgs

WATCH = Watch()
"""Every row of every call counts."""


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Column sums of the prompt's whole attention; costs as much time as the attention, and no T x T memory."""
    return run("column_sums", q.device, q, k, args, 0)
