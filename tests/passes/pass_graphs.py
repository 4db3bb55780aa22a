"""Helpers of the pass tests: capture the Dynamo graph of a small function, and some cache shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

B, H, GROUPS, D, PAST = 2, 2, 2, 4, 5
HQ = H * GROUPS


def capture_calls(fn: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool | None = None) -> list[GraphModule]:
    """The Dynamo graphs that `fn` gives when it is called with each of `calls`, in the order of compilation."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return graphs


def capture(fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> GraphModule:
    """The one Dynamo graph of `fn(*inputs)`."""
    (graph,) = capture_calls(fn, inputs, dynamic=dynamic)
    return graph


def query(tokens: int = 1, heads: int = HQ) -> torch.Tensor:
    """Queries `[B, heads, tokens, D]`."""
    return torch.randn(B, heads, tokens, D)


def new(tokens: int = 1) -> torch.Tensor:
    """New keys or values `[B, H, tokens, D]`."""
    return torch.randn(B, H, tokens, D)


def past(tokens: int = PAST) -> torch.Tensor:
    """Cached keys or values `[B, H, tokens, D]`."""
    return torch.randn(B, H, tokens, D)


def step_inputs(tokens: int = 1) -> tuple[torch.Tensor, ...]:
    """Inputs `(q, k, v, past_k, past_v)` of one decode step."""
    return query(tokens), new(tokens), new(tokens), past(), past()
