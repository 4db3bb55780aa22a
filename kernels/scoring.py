"""Registry of the functions that score a prompt's tokens; policies register theirs by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


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


class Scorer(Protocol):
    """Importance of each token of a prompt."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """Score tokens: q [B, H_q, R, D], k and v [B, H_kv, T, D] to [B, H_kv, T] float32, higher is kept longer."""
        ...


_SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make ``scorer`` available to the ops under ``name``."""
    _SCORERS[name] = scorer


def score(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """Run a registered scorer; it need not know of prompts without tokens."""
    if not k.shape[2]:
        return torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    return _SCORERS[name](q, k, v, args)
