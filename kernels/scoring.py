"""Registry of the functions that score a prompt's tokens; policies register theirs by name."""

from __future__ import annotations

from typing import Protocol

import torch


class Scorer(Protocol):
    """Importance of each token of a prompt."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> torch.Tensor:
        """Score tokens: q [B, H_q, R, D], k and v [B, H_kv, T, D] to [B, H_kv, T] float32, higher is kept longer."""
        ...


_SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make ``scorer`` available to the op ``mikv::importance`` under ``name``."""
    _SCORERS[name] = scorer


def score(name: str, *args) -> torch.Tensor:
    """Run a registered scorer."""
    return _SCORERS[name](*args)
