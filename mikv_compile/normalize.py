"""Graphs of other tracers than Dynamo, brought to what Dynamo gives.

That is: flat inputs, a flat tuple of outputs, fakes of one mode in ``meta["example_value"]``, and an integer input for
every symbolic size. Fakes are made again by running the graph once more on fake inputs; what the tracer left in
``meta["val"]`` only tells the inputs' shapes. So every assumption that the graph makes about its sizes is in the one
:class:`ShapeEnv`, and is checked before each call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from mikv_compile import _compat
from mikv_compile.passes.node_utils import argument, operation, output_values
from mikv_compile.passes.sizes import NotExpressible, SizeMaker, replace_by_value
from mikv_compile.passes.views import in_place_writers
from mikv_compile.sizes import SizeReader

_FROM_EXPORT = "range_constraints"
_MAX_KNOWN = 4096
_WRITES = ("index_copy", "index_put", "slice_scatter", "scatter", "copy")


class CannotNormalize(Exception):
    """A graph that cannot be brought to Dynamo's form; the message says why."""


@dataclass(frozen=True)
class Convention:
    """How the graph module is called, and what it returns."""

    module: GraphModule
    flat_inputs: int

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values of the placeholders.

        Raises:
            TypeError: if the arguments are not structured as those that the graph was traced with.
        """
        spec = _compat.input_spec(self.module.graph)
        if spec is None:
            flat = self._bound(args, kwargs)
        elif _compat.takes_keywords(spec):
            names = spec.child(1).context
            if set(names) == set(kwargs):
                kwargs = {name: kwargs[name] for name in names}
            flat, given = _compat.tree_flatten((args, kwargs))
        else:
            if kwargs:
                raise TypeError("this graph takes positional arguments only")
            flat, given = _compat.tree_flatten(args)
        if spec is not None and given != spec and not _compat.same_structure(given, spec):
            raise TypeError(f"the arguments are structured as {given}, and the graph was traced with {spec}")
        if len(flat) != self.flat_inputs:
            raise TypeError(f"the graph takes {self.flat_inputs} inputs, and got {len(flat)}")
        return flat

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        parameters = [
            inspect.Parameter(
                str(node.target), inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=node.args[0] if node.args else inspect.Parameter.empty,
            )
            for node in self.module.graph.find_nodes(op="placeholder")
        ]  # fmt: skip
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.values())

    def call_flat(self, flat: Sequence[Any]) -> Any:
        """What the module as it was returns."""
        spec = _compat.input_spec(self.module.graph)
        if spec is None:
            return self.module(*flat)
        given = _compat.tree_unflatten(list(flat), spec)
        return self.module(*given[0], **given[1]) if _compat.takes_keywords(spec) else self.module(*given)

    def structured(self, outputs: Sequence[Any]) -> Any:
        """The module's result from the values of its output node's flat arguments."""
        _, spec = _compat.tree_flatten(_as_plain(self.module.graph.output_node().args[0]))
        return self.module.graph.process_outputs(_compat.tree_unflatten(list(outputs), spec))


@dataclass(frozen=True)
class NormalGraph:
    """A graph as the passes want it. Inputs: those of the original, then written buffers, then symbolic sizes."""

    gm: GraphModule
    fakes: list[Any]
    """Values of the placeholders."""
    flat_inputs: int
    buffers: tuple[str, ...]
    """Names of the module's buffers that the graph writes and that are inputs here."""
    sizes: tuple[Callable[[Sequence[Any]], int], ...]
    """Read the symbolic sizes from the other inputs."""
    guards: Guards


def normalize(gm: GraphModule, example_inputs: Sequence[Any] | None) -> NormalGraph:
    """Bring a graph to Dynamo's form, in a copy.

    Args:
        gm: from export, ``make_fx`` or another tracer.
        example_inputs: values of its placeholders, for tracers that leave no ``meta["val"]``.

    Raises:
        CannotNormalize: if it does not run on fake tensors.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [_example(node, i, example_inputs) for i, node in enumerate(placeholders)]
    static = not any(isinstance(s, torch.SymInt) for x in examples for s in _sizes(x))
    chosen = not hasattr(gm, _FROM_EXPORT)  # with export, users say which sizes are symbols
    grown = _grown(gm.graph, examples) if chosen and static else set()
    fixed = _fixed(gm.graph, examples) if chosen else set()
    for dynamic in (grown, set()):
        try:
            return _normalized(gm, examples, dynamic, fixed)
        except CannotNormalize:
            raise
        except Exception as problem:
            if not dynamic:
                raise CannotNormalize(f"the graph does not run on fake tensors: {problem!r}") from problem
    raise AssertionError


def _normalized(
    gm: GraphModule, examples: Sequence[Any], grown: set[tuple[int, int]], fixed: set[tuple[int, int]]
) -> NormalGraph:
    new = _flat_copy(gm)
    _write_in_place_again(new.graph)
    graph = new.graph
    mode = _compat.new_fake_mode()
    inputs = _Inputs(mode, grown, fixed)
    fakes = [inputs.make(i, example) for i, example in enumerate(examples)]
    with torch.no_grad():
        _Run(new, mode).run(*fakes)
    buffers = _lift_written_buffers(new)
    placeholders = graph.find_nodes(op="placeholder")
    fakes = [node.meta["example_value"] for node in placeholders]
    symbols = _compat.tree_unique_symbols(fakes)
    reader = SizeReader(graph)
    sizes = []
    for symbol in symbols:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            node = graph.placeholder(f"size_{symbol.node.expr}")
        node.meta["example_value"] = symbol
        read = reader.reader(symbol)
        assert read is not None
        sizes.append(read)
        fakes.append(symbol)
    _replace_sizes(graph)
    graph.lint()
    new.recompile()
    guards = Guards(fakes[: len(placeholders)], mode.shape_env, inputs.limits)
    return NormalGraph(new, fakes, len(examples), buffers, tuple(sizes), guards)


def _example(node: Node, index: int, example_inputs: Sequence[Any] | None) -> Any:
    """What tells a placeholder's shape."""
    if "val" in node.meta or "example_value" in node.meta:
        return node.meta.get("val", node.meta.get("example_value"))
    if example_inputs is None or index >= len(example_inputs):
        raise CannotNormalize(f"nothing tells the shape of the input `{node.name}`; give example_inputs")
    return example_inputs[index]


def _sizes(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)


def _grown(graph: Graph, examples: Sequence[Any]) -> set[tuple[int, int]]:
    """Dimensions of a graph without symbols that are worth trying as symbols: tokens of caches that grow, and masks.

    Whether the graph works for other sizes shows when it runs: a size that it has as a constant becomes one again.
    """
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: set[tuple[int, int]] = set()
    totals: set[int] = set()
    for node in graph.nodes:
        if operation(node) != "cat" or not isinstance(node.args[0], list | tuple) or len(node.args[0]) != 2:
            continue
        past, dim = node.args[0][0], argument(node, 1, "dim", 0)
        result = node.meta.get("val", node.meta.get("example_value"))
        if past not in inputs or not isinstance(dim, int) or not isinstance(examples[inputs[past]], torch.Tensor):
            continue
        shape = examples[inputs[past]].shape
        if len(shape) in (3, 4) and shape[dim] > 1:
            found.add((inputs[past], dim % len(shape)))
            totals |= {result.shape[dim]} if isinstance(result, torch.Tensor) else set()
    caches = {i for i, _ in found}
    for i, value in enumerate(examples):
        if isinstance(value, torch.Tensor) and i not in caches and value.dim() > 1 and value.shape[-1] in totals:
            found.add((i, value.dim() - 1))
    return found


def _fixed(graph: Graph, examples: Sequence[Any]) -> set[tuple[int, int]]:
    """Dimensions of caches that must be constants: heads, channels, and the size of a preallocated cache.

    ``make_fx(tracing_mode="symbolic")`` makes symbols of all sizes; other values of these run the graph as it was.
    """
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: set[tuple[int, int]] = set()
    for node in graph.nodes:
        name = operation(node)
        if name not in ("cat", *_WRITES) or not node.args:
            continue
        target = node.args[0]
        if name == "cat":
            target = target[0] if isinstance(target, list | tuple) and target else None
        while isinstance(target, Node) and target not in inputs and target.op == "call_function" and target.args:
            target = target.args[0]  # a slice of the cache
        if not isinstance(target, Node) or target not in inputs:
            continue
        value = examples[inputs[target]]
        if not isinstance(value, torch.Tensor) or value.dim() not in (3, 4):
            continue
        tokens = argument(node, 1, "dim", 0) if name == "cat" else None
        kept = {0} | ({tokens % value.dim()} if isinstance(tokens, int) else set())
        found |= {(inputs[target], dim) for dim in range(value.dim()) if dim not in kept}
    constants = {_compat.symbol_of(examples[i].shape[dim]) for i, dim in found} - {None}
    found |= {
        (i, dim)
        for i, value in enumerate(examples)
        for dim, size in enumerate(_sizes(value))
        if isinstance(value, torch.Tensor) and _compat.symbol_of(size) in constants
    }
    return found


class _Inputs:
    """Makes fake inputs whose symbolic sizes are related as those of the original ones."""

    def __init__(self, mode: Any, grown: set[tuple[int, int]], fixed: set[tuple[int, int]]) -> None:
        self._mode, self._grown, self._fixed = mode, grown, fixed
        self._symbols: dict[Any, Any] = {}
        self.limits: list[tuple[int, int | None, int, int | None]] = []
        """(input, dimension, least, most) of sizes that the tracer was told limits of."""

    def make(self, index: int, example: Any) -> Any:
        """The fake of one input."""
        if isinstance(example, torch.SymInt):
            size = self._hint(example)
            fake = _compat.sized_fake(self._mode, torch.empty(size, device="meta"), {0}, f"mikv_input_{index}")
            self._relate(example, fake.shape[0], index, None)
            return fake.shape[0]
        if not isinstance(example, torch.Tensor):
            if isinstance(example, torch.SymFloat | torch.SymBool):
                raise CannotNormalize(f"input {index} is a symbolic {type(example).__name__}")
            return example
        shape = [self._hint(size) for size in example.shape]
        strides = [self._hint(stride) for stride in example.stride()]
        plain = torch.empty_strided(shape, strides, dtype=example.dtype, device="meta")
        dynamic = {i for i, s in enumerate(example.shape) if isinstance(s, torch.SymInt) or (index, i) in self._grown}
        dynamic = {i for i in dynamic if (index, i) not in self._fixed}
        fake = _compat.sized_fake(self._mode, plain, dynamic, f"mikv_input_{index}", example.device)
        for dim, size in enumerate(example.shape):
            if isinstance(size, torch.SymInt):
                self._relate(size, fake.shape[dim], index, dim)
        return fake

    def _hint(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        hint = _compat.hint_of(size)
        if hint is None:
            raise CannotNormalize(f"the size {size} of an input depends on data")
        return hint

    def _relate(self, original: torch.SymInt, made: Any, index: int, dim: int | None) -> None:
        """Make a new symbol equal to what the original size says, if its symbols are known already."""
        expression = original.node.expr
        if expression.is_Symbol:
            least, most = _compat.limits_of(original)
            self.limits.append((index, dim, least, most))
        if expression.is_Symbol and expression not in self._symbols:
            self._symbols[expression] = made
            return
        known = expression.free_symbols <= self._symbols.keys()
        if known and not bool(made == _compat.substituted(expression, self._symbols)):
            raise CannotNormalize(f"the sizes of input {index} contradict each other")


class _Run(Interpreter):
    """Runs the graph on fakes and notes them; parameters and buffers become fakes of the same mode."""

    def __init__(self, gm: GraphModule, mode: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        with _compat.on_fakes(self._mode):
            value = super().run_node(n)
        for name in ("val", "tensor_meta", "example_value"):
            n.meta.pop(name, None)
        if n.op != "output":
            n.meta["example_value"] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def _flat_copy(gm: GraphModule) -> GraphModule:
    """A copy with placeholders first, the output as a flat tuple, and without export's check of its inputs."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    nodes = sorted(gm.graph.nodes, key=lambda node: node.op != "placeholder")  # stable: export has get_attr first
    for node in nodes:
        if node.op == "output":
            flat, _ = _compat.tree_flatten(_as_plain(node.args[0]))
            graph.output(tuple(copies[x] if isinstance(x, Node) else x for x in flat))
        elif node.op == "call_module" and node.target == "_guards_fn":
            continue
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    new = GraphModule(gm, graph)
    return new


def _write_in_place_again(graph: Graph) -> None:
    """Undo functionalization: a write that makes a copy and is copied back to its input is that write in place."""
    for copy in graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        place, source = (_compat.layout_of(node) for node in copy.args[:2])
        if place is not None and place == source:
            unused = copy.args[0]
            copy.replace_all_uses_with(copy.args[1])
            graph.erase_node(copy)
            if isinstance(unused, Node) and operation(unused) == "slice" and not unused.users:
                graph.erase_node(unused)
    for back in list(graph.nodes):
        if operation(back) != "copy" or len(back.args) < 2 or not str(back.target).startswith("aten.copy_."):
            continue
        cache, write = back.args[:2]
        if operation(write) not in ("index_copy", "index_put", "slice_scatter") or write.args[0] is not cache:
            continue
        later = [user for user in cache.users if user > write and user is not back]
        if cache.op not in ("placeholder", "get_attr") or later or write in output_values(graph):
            continue
        if operation(write) == "slice_scatter":
            with graph.inserting_before(write):
                part = graph.call_function(torch.ops.aten.slice.Tensor, (cache, *write.args[2:]))
                graph.call_function(torch.ops.aten.copy_.default, (part, write.args[1]))
            write.replace_all_uses_with(cache)
            back.replace_all_uses_with(cache)
            graph.erase_node(back)
            graph.erase_node(write)
            continue
        in_place = getattr(torch.ops.aten, f"{operation(write)}_").default
        write.target = in_place
        back.replace_all_uses_with(write)
        graph.erase_node(back)


def _as_plain(value: Any) -> Any:
    """Lists and dicts of FX as those of Python."""
    if isinstance(value, dict):
        return {k: _as_plain(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_as_plain, value))
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_as_plain, value))
    return value


def _lift_written_buffers(gm: GraphModule) -> tuple[str, ...]:
    """Make inputs of the buffers that the graph writes in place, as Dynamo does."""
    lifted: list[str] = []
    by_name: dict[str, Node] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        if str(node.target) not in by_name:
            if not in_place_writers(node):
                continue
            with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
                by_name[str(node.target)] = gm.graph.placeholder(f"buffer_{node.name}")
            by_name[str(node.target)].meta.update(node.meta)
            lifted.append(str(node.target))
        node.replace_all_uses_with(by_name[str(node.target)])
        gm.graph.erase_node(node)
    return tuple(lifted)


def _replace_sizes(graph: Graph) -> None:
    """Compute sizes from the integer inputs instead of asking tensors for them: those may leave the graph."""
    maker = SizeMaker(graph)
    returned = set(output_values(graph))
    for node in list(graph.nodes):
        if operation(node) not in ("sym_size", "sym_numel") or node in returned:
            continue
        value = node.meta["example_value"]
        try:
            maker.check(value)
        except NotExpressible:
            continue
        with graph.inserting_before(node):
            replace_by_value(node, maker.make(value))


class Guards:
    """What a normalized graph assumes of its inputs."""

    def __init__(self, fakes: Sequence[Any], shape_env: Any, limits: Sequence[tuple[int, int | None, int, int | None]]):
        """Take over the assumptions.

        Args:
            fakes: values of the inputs, buffers included.
            shape_env: where the fakes' symbols live.
            limits: (input, dimension, least, most).

        Raises:
            CannotNormalize: if they depend on more than the inputs' sizes.
        """
        self._fakes = list(fakes)
        self._limits = list(limits)
        self._expressions = _compat.guard_expressions(shape_env)
        self._least = _compat.least_sizes(shape_env)
        self._known: dict[tuple[Any, ...], str | None] = {}
        sizes = [_compat.symbol_of(size) for fake in fakes for size in _sizes(fake)]
        told = {symbol for symbol in sizes if symbol is not None and symbol.is_Symbol}
        for expression in (*sizes, *self._expressions):
            if expression is not None and not expression.free_symbols <= told:
                raise CannotNormalize(f"the sizes of the inputs do not tell {expression}, which the graph depends on")

    def broken(self, args: Sequence[Any]) -> str | None:
        """Why the graph does not serve these inputs; None if it does."""
        key: list[Any] = []
        for i, (fake, given) in enumerate(zip(self._fakes, args, strict=True)):
            if isinstance(fake, torch.Tensor):
                if not isinstance(given, torch.Tensor) or given.dim() != fake.dim():
                    return f"input {i} is no tensor of {fake.dim()} dimensions"
                if (given.dtype, given.device) != (fake.dtype, fake.device):
                    return f"input {i} is {given.dtype} on {given.device}, not {fake.dtype} on {fake.device}"
                key += given.shape
            elif isinstance(fake, torch.SymInt):
                if not isinstance(given, int):
                    return f"input {i} is no integer"
                key.append(given)
            elif type(given) is not type(fake) or given != fake:
                return f"input {i} is {given!r}, and the graph was traced for {fake!r}"
        found = self._known.get(tuple(key), key)
        if found is key:
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            found = self._known[tuple(key)] = self._check_sizes(args)
        return found  # type: ignore[return-value]

    def _check_sizes(self, args: Sequence[Any]) -> str | None:
        values: dict[Any, int] = {}
        pairs = [
            (i, size, given)
            for i, (fake, arg) in enumerate(zip(self._fakes, args, strict=True))
            for size, given in zip(_sizes(fake), _sizes(arg), strict=True)
            if isinstance(fake, torch.Tensor | torch.SymInt)
        ]
        for i, size, given in pairs:
            symbol = _compat.symbol_of(size)
            if symbol is not None and symbol.is_Symbol and symbol not in values:
                values[symbol] = int(given)
                if given < self._least.get(symbol, 0):
                    return f"a size of input {i} is {given}, and the graph was traced for more"
        for i, size, given in pairs:
            symbol = _compat.symbol_of(size)
            expected = int(size) if symbol is None else int(symbol.subs(values))
            if expected != given:
                return f"a size of input {i} is {given}, and the graph was traced for {expected}"
        for i, dim, least, most in self._limits:
            given = args[i] if dim is None else args[i].shape[dim]
            if given < least or (most is not None and given > most):
                return f"a size of input {i} is {given}, outside the limits that the graph was traced with"
        for expression in self._expressions:
            if not bool(expression.subs(values)):
                return f"the sizes of the inputs do not meet {expression}"
        return None
