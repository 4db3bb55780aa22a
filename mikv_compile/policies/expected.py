"""Expected attention (arXiv 2510.00636): the attention that later queries will pay, if they are like the last ones.

Queries are taken as normally distributed, ``q ~ N(mu, Sigma)``, so that ``E[exp(q k)] = exp(mu k + k Sigma k / 2)``.
The paper estimates mu and Sigma from queries before the rotary embedding and applies the mean rotation of the next 512
positions; a traced graph has only rotated queries. They are taken as they are: the last 512 rows average over as many
rotations themselves, of the past instead of the future.
"""

from __future__ import annotations

import torch

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.scoring import AttentionArgs, last_row_bias

ROWS = 512
"""Last query rows from which mean and covariance are estimated."""

FLOOR = 0.02
"""The paper's epsilon: added to the probability before it is multiplied by the norm of the value."""

CHUNK = 2048
"""Tokens that are scored at a time."""

WATCH = Watch(rows=ROWS, memory=128)
"""Later queries are seen, so nothing has to be expected: a running mean of attention over about 128 of them."""


def scorer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Expected attention, the mean over the group (or its maximum). Padding gets -inf; its rows are left out.

    Softcap bounds the exponent, sink logits take their part of the softmax, and an additive mask's last row counts.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    bias = last_row_bias(q, k, args)
    q = q[:, :, -ROWS:].float()
    weight = q.new_ones(*q.shape[:3], 1)
    if rows == tokens:
        weight = (bias[:, :, -ROWS:, None] > float("-inf")).float()
    q = q.masked_fill(weight == 0, 0.0)
    total = weight.sum(dim=2, keepdim=True).clamp(min=1)
    centre = q.sum(dim=2, keepdim=True) / total
    spread = (q - centre) * weight
    covariance = spread.transpose(2, 3) @ spread / total

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (kv_heads, heads // kv_heads))

    exponents = []
    for part in k.split(CHUNK, dim=2):
        keys = part.float()[:, :, None]
        linear = (keys @ grouped(centre).transpose(3, 4))[..., 0] * args.scale
        square = ((keys @ grouped(covariance)) * keys).sum(dim=-1) * (args.scale**2 / 2)
        exponents.append(linear + square)
    exponent = torch.cat(exponents, dim=3).flatten(1, 2)
    if args.softcap:
        exponent = args.softcap * torch.tanh(exponent / args.softcap)
    exponent = exponent + bias
    if args.sinks is not None:
        exponent = torch.cat([exponent, args.sinks[:, :, -1].float().expand(batch, heads, -1)], dim=2)
    attention = grouped(exponent.softmax(dim=2)[:, :, :tokens])
    found = attention.mean(dim=2) if args.heads == "sum" else attention.amax(dim=2)
    return found.masked_fill(~grouped(bias > float("-inf")).any(dim=2), float("-inf"))
