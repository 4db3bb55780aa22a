"""``transform``: the passes for graphs that did not come from Dynamo."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile.config import Options
from mikv_compile.normalize import CannotNormalize, Convention, NormalGraph, normalize
from mikv_compile.passes import Declined
from mikv_compile.pipeline import compile_graph, written_inputs
from mikv_compile.report import GraphReport, record
from mikv_compile.runtime import CompressedGraph, Handle

log = logging.getLogger(__name__)


def transform(
    gm: Any, example_inputs: Sequence[Any] | None = None, *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Rewrite a decoder step that ``torch.export`` or ``make_fx`` traced, so that its KV caches stay compressed.

    The result is called like the graph module and returns the same structure, with handles
    (:class:`~mikv_compile.KVTensor`) in the place of the caches. It takes them again at the next call, and so does the
    transformed graph of another phase, such as a decode step after a prefill; dense caches are taken over. Places that
    cannot be rewritten stay as they were, :func:`~mikv_compile.graph_reports` says why. Arguments that the graph was
    not traced for, such as another length where it has the length as a constant, are given to the graph as it was.

    Args:
        gm: an ``ExportedProgram``, its ``.module()``, or a ``GraphModule`` of ATen or torch operations.
        example_inputs: the positional arguments it was traced with; needed where the graph has no ``meta["val"]``.
        options: as for ``torch.compile(backend="mikv")``, but ``lower`` is ``"eager"`` unless given.

    Raises:
        TypeError: if ``gm`` is neither a graph module nor an exported program.
        OptionError: for options that are unknown, malformed or impossible.
    """
    if isinstance(gm, torch.export.ExportedProgram):
        gm = gm.module()
    if not isinstance(gm, GraphModule):
        raise TypeError(
            f"transform takes a torch.fx.GraphModule or an ExportedProgram, not {type(gm).__name__}; trace the model "
            "with torch.export.export or make_fx first, or use torch.compile(model, backend='mikv')"
        )
    return _Transformed(gm, example_inputs, Options.parse({"lower": "eager", **(options or {})}))


class _Transformed:
    """The callable around a graph. Handles of other plans than its own get a rewritten graph of their own."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any] | None, options: Options) -> None:
        self._module, self._options = gm, options
        self._convention = Convention(gm, len(gm.graph.find_nodes(op="placeholder")))
        self._normal: NormalGraph | None = None
        self._written: list[int] = []
        self._variants: dict[Any, CompressedGraph] = {}
        self._warned = False
        flat = None if example_inputs is None else self._convention.flatten(tuple(example_inputs), {})
        try:
            self._normal = normalize(gm, flat)
        except CannotNormalize as reason:
            record(GraphReport(0, (), (Declined("graph", "rewrite", str(reason)),), options.lower))
            log.warning("a graph stays as it was: %s", reason)
            return
        self._base = self._compile({}, records_grad=False)
        self._written = written_inputs(self._normal.gm)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; the arguments are those of the graph module, with handles where caches were."""
        flat = self._convention.flatten(args, kwargs)
        if self._normal is None:
            return self._run_original(flat, "it could not be rewritten")
        full = flat + [_attribute(self._module, name) for name in self._normal.buffers]
        broken = self._normal.guards.broken(full)
        if broken is not None:
            return self._run_original(flat, broken)
        graph = self._variant(full)
        outputs = graph(*full, *(read(full) for read in self._normal.sizes))
        return self._convention.structured(outputs)

    def _variant(self, full: Sequence[Any]) -> CompressedGraph:
        """The rewritten graph for the plans that the arguments' caches have."""
        handles = {i: value for i, value in enumerate(full) if isinstance(value, Handle)}
        records_grad = self._records_grad(full)
        if not records_grad and _serves(self._base, handles):
            return self._base
        known = [(i, handle.plan, handle.role, handle.kv_layout) for i, handle in handles.items()]
        key = (records_grad, *known)
        if key not in self._variants:
            self._variants[key] = self._compile(handles, records_grad=records_grad)
        return self._variants[key]

    def _compile(self, handles: Mapping[int, Any], *, records_grad: bool) -> CompressedGraph:
        assert self._normal is not None
        gm, fakes = self._normal.gm, self._normal.fakes
        placeholders = gm.graph.find_nodes(op="placeholder")
        by_node: dict[Node, Any] = {placeholders[i]: handle for i, handle in handles.items()}
        with torch.no_grad():
            return compile_graph(gm, fakes, by_node, self._options, self._options.inductor, records_grad=records_grad)

    def _records_grad(self, full: Sequence[Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [*(x for x in full if isinstance(x, torch.Tensor)), *self._module.parameters()]
        return any(tensor.requires_grad for tensor in tensors)

    def _run_original(self, flat: list[Any], reason: str) -> Any:
        """Run the graph as it was, on dense tensors."""
        if not self._warned:
            log.warning("a call runs as the model wrote it: %s", reason)
            self._warned = True
        result: list[Any] = []

        def function(*dense: Any) -> tuple[Any, ...]:
            result.append(self._convention.call_flat(dense))
            return ()

        everything = list(range(len(flat)))
        CompressedGraph(function, function, everything, [i for i in self._written if i < len(flat)], [], [])(*flat)
        return result[0]


def _serves(graph: CompressedGraph, handles: Mapping[int, Any]) -> bool:
    """Whether a rewritten graph reads all of these handles with the plans that they have."""
    read: set[int] = set()
    for site in graph.sites:
        rewritten = site.rewritten
        for position, role in ((rewritten.key_input, "key"), (rewritten.value_input, "value")):
            handle = None if position is None else handles.get(position)
            if handle is None:
                continue
            if (handle.plan, handle.role, handle.kv_layout) != (site.plan, role, site.layout):
                return False
            read.add(position)  # type: ignore[arg-type]
    return read == set(handles)


def _attribute(module: torch.nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
