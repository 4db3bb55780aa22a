"""Greedy decoding over a session's cache, a token a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mikv_compile.eval.methods import Session


def greedy(
    session: Session, cache: Any, logits: torch.Tensor, count: int, stop: Callable[[int], bool] = lambda token: False
) -> list[int]:
    """Up to ``count`` tokens, the first of them from ``logits`` [vocabulary]; ``stop`` is told each of them."""
    tokens = [int(logits.argmax())]
    while len(tokens) < count and not stop(tokens[-1]):
        tokens.append(int(session.forward(torch.tensor([tokens[-1:]]), cache)[-1].argmax()))
    return tokens
