"""Registry of the functions that score a prompt's tokens; policies register theirs by name.

The ops carry a policy as text: its name, with ``+max`` behind it where the maximum over the query heads of a KV head
counts instead of their sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from mikv_compile.kernels.masks import HIDDEN


@dataclass(frozen=True)
class AttentionArgs:
    """How a model attends: all that its attention takes besides queries, keys and values."""

    mask: torch.Tensor | None
    """None, or broadcastable to [B, H_q, R, T]: bool (True attends) or additive."""
    scale: float
    """Factor of the scores."""
    is_causal: bool
    """In torch's meaning: aligned to the top left corner."""
    softcap: float = 0.0
    """If not 0, scores s become ``softcap * tanh(s / softcap)`` before the mask."""
    sinks: torch.Tensor | None = None
    """Logits that take part in the softmax and have no key, broadcastable to [B, H_q, R, n]."""
    heads: str = "sum"
    """What counts of the query heads of a KV head, ``"sum"`` or ``"max"``: not the model's, but the user's choice."""


class Scorer(Protocol):
    """Importance of each token of a prompt."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """Score tokens: q [B, H_q, R, D], k and v [B, H_kv, T, D] to [B, H_kv, T] float32, higher is kept longer."""
        ...


_SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make ``scorer`` available to the ops under ``name``."""
    _SCORERS[name] = scorer


def score(policy: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Run a registered scorer; it need not know of prompts without tokens or rows.

    Args:
        policy: its name, or ``NAME+max``.
        q, k, v, args: as for :class:`Scorer`.
    """
    if not k.numel():
        return torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    name, _, heads = policy.partition("+")
    return _SCORERS[name](q, k, v, replace(args, heads=heads) if heads else args)


def last_row_bias(q: torch.Tensor, k: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """What the mask adds to the scores of a prompt's last row: [B, H_q, T] float32, -inf where it hides the token."""
    batch, heads, rows, _ = q.shape
    bias = torch.zeros(batch, heads, k.shape[2], device=k.device)
    if args.mask is not None and args.mask.shape[2]:
        row = args.mask[:, :, -1]
        hidden = ~row if row.dtype == torch.bool else row <= HIDDEN
        bias = (bias if row.dtype == torch.bool else bias + row.float()).masked_fill(hidden, float("-inf"))
    if args.is_causal:
        bias[:, :, rows:] = float("-inf")
    return bias


def visible(q: torch.Tensor, k: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Whether a prompt's last row may attend to a token, with any head: [B, H_kv, T] bool. False for padding."""
    batch, kv_heads, tokens, _ = k.shape
    return (last_row_bias(q, k, args) > float("-inf")).reshape(batch, kv_heads, -1, tokens).any(dim=2)
