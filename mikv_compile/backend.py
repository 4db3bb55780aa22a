"""The backend ``"mikv"`` of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile import _compat, generate
from mikv_compile.config import Options
from mikv_compile.handle import KVTensor
from mikv_compile.kernels import cpp_step
from mikv_compile.lowering import Region
from mikv_compile.pipeline import compile_graph
from mikv_compile.preallocated import PreallocatedKV

# torch.compile(model, backend="mikv") looks this module up before anything else happens, so this is early enough for
# torch.compile(model, backend="mikv").generate(...) to be caught.
generate.install()


def mikv(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    region: Region | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that its KV caches stay compressed.

    Args:
        gm, example_inputs: from Dynamo.
        options: fields of :class:`~mikv_compile.config.Options`; ``inductor.NAME`` keys go to Inductor.
        mode: a mode of ``torch.compile``, translated to Inductor options.
        region: the layers that the graph serves, where :mod:`mikv_compile.regional` compiles one by itself.

    Raises:
        OptionError: for options that are unknown, malformed or impossible.
    """
    chosen = Options.parse(options)
    settings = {**(_compat.mode_options(mode) if mode else {}), **chosen.inductor}
    records_grad = torch.is_grad_enabled() and any(
        getattr(node.meta.get("example_value"), "requires_grad", False)
        for node in gm.graph.find_nodes(op="placeholder")
    )
    if any(isinstance(value, torch.Tensor) and value.is_cpu for value in example_inputs):
        cpp_step.build_ahead()
    handles = _handles(gm, example_inputs)
    whole = region is None and _compat.is_whole_call(gm)
    return compile_graph(
        gm, example_inputs, handles, chosen, settings, records_grad=records_grad, region=region, whole=whole
    )


def _handles(gm: GraphModule, example_inputs: list[Any]) -> dict[Node, Any]:
    """The placeholders that stand for compressed caches, with what tells their plan, role and layout."""
    found: dict[Node, Any] = {}
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        value = node.meta.get("example_value")
        if isinstance(value, KVTensor):
            found[node] = value
        elif isinstance(given, PreallocatedKV):
            found[node] = given
    return found
