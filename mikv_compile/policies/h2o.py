"""H2O (arXiv 2306.14048): a token's score is all the attention it has received, summed over queries and the group.

Sums favour early tokens, which more queries can attend to. ``h2o-age`` ranks by the mean instead, as ZipCache does
(arXiv 2405.14256): the sum divided by the number of queries that could have attended to the token.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.masks import HIDDEN
from mikv_compile.kernels.ranking import received
from mikv_compile.kernels.scoring import AttentionArgs

WATCH = Watch()
"""Every row of every call counts."""


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Column sums of the prompt's whole attention; costs as much time as the attention, and no T x T memory."""
    return received(q, k, args, 0)


def scorer_by_age(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """The same sums, which become means when tokens are ranked: they are divided by ``T - position`` then.

    Where another number of rows could attend to a token than in a square causal prompt, as with encoders and padding,
    sums are scaled in advance so that the quotient is right. Rows of padding do not count.
    """
    rows, tokens = q.shape[2], k.shape[2]
    if args.mask is None and args.is_causal and rows == tokens:
        return received(q, k, args, 0)
    column = torch.arange(tokens, device=k.device)
    shown = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=k.device)
    if args.mask is not None:
        shown = args.mask if args.mask.dtype == torch.bool else args.mask > HIDDEN
        if shown is not args.mask:
            # Behind a finite mask, a row that should see nothing attends to all tokens alike.
            args = replace(args, mask=args.mask.masked_fill(~shown.any(dim=3, keepdim=True), float("-inf")))
    if args.is_causal:
        shown = shown & (column <= torch.arange(rows, device=k.device)[:, None])
    count = shown.sum(dim=2).float() * (rows if shown.shape[2] == 1 else 1)
    if count.shape[1] > 1:
        count = count.unflatten(1, (k.shape[1], -1)).mean(dim=2)
    return received(q, k, args, 0) * (tokens - column) / count.clamp(min=1)
