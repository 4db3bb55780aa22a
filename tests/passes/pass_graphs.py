"""Helpers of the pass tests: capture the Dynamo graph of a small function, and some cache shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

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


def dynamo(fn: Callable[..., Any], *inputs: Any, symbolic: int | None = None) -> tuple[GraphModule, tuple[Any, ...]]:
    """The one Dynamo graph of `fn(*inputs)`, and copies of its own inputs; every size `symbolic` gets a symbol."""
    graphs: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            graphs.append((gm, tuple(_copy(x) for x in args)))
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    copies = [_copy(x) for x in inputs]
    for copy in copies:
        if isinstance(copy, torch.Tensor):
            torch._dynamo.mark_dynamic(copy, [dim for dim, size in enumerate(copy.shape) if size == symbolic])
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*copies)
    ((gm, args),) = graphs
    return gm, args


def exported(fn: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph of `torch.export`, in its training IR."""

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return fn(*args)

    with torch.no_grad():
        gm = torch.export.export(Module().eval(), inputs).module()
    assert isinstance(gm, GraphModule)
    return gm, inputs


def decomposed(fn: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph of `make_fx` below the dispatcher: matmul is expand, view and bmm there."""
    with torch.no_grad():
        return make_fx(fn, tracing_mode="fake")(*inputs), inputs


def pre_dispatch(fn: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph of `make_fx` above the dispatcher."""
    with torch.no_grad():
        return make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs), inputs


TRACERS = (dynamo, exported, decomposed, pre_dispatch)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


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
