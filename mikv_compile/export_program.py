"""``export``: a decoder as one AOTInductor package that keeps its KV cache compressed.

torch.export traces the decoder twice, for one token and for several. The passes turn its preallocated caches into
stores, whose buffers become inputs of the program, together with a few integers that say what happens to them. What is
left knows neither the model's code nor the passes: :mod:`mikv_compile.export_runner` runs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mikv_compile import _compat
from mikv_compile.config import Options
from mikv_compile.errors import CannotServe, MikvError, OptionError
from mikv_compile.export_format import DESCRIPTION, PROGRAMS, Layer, Package
from mikv_compile.normalize import CannotNormalize, NormalGraph, normalize
from mikv_compile.passes.node_utils import output_values
from mikv_compile.pipeline import RewrittenDecoder, rewrite_graph
from mikv_compile.runtime import SiteCall

CONVENTION = (
    "export takes a causal language model of transformers, or a module whose forward(tokens [B, S], positions [S]) "
    "returns one tensor of logits and whose preallocated KV caches are buffers that it writes at these positions"
)


def export(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    max_length: int,
    batch: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a decoder with AOTInductor, with a compressed KV cache, into one file.

    :func:`mikv_compile.load_exported` runs it, in a process that needs torch and this package, but neither
    transformers nor the model's code. Compiling takes minutes for models of dozens of layers.

    Args:
        model: a causal language model of transformers whose layers keep keys and values only, or a module with
            ``forward(tokens, positions)``: int64 ``[B, S]`` and int64 ``[S]``, the place of each token in the
            sequence. It returns logits ``[B, S, V]``, or ``[B, 1, V]`` of the last token, and its KV caches are buffers
            of at least ``max_length`` columns, which it writes at ``positions``.
        path: of the package, ending in ``.pt2``.
        max_length: tokens that a sequence may have, prompt included. What a cache really holds grows with the
            sequence.
        batch: rows of each call, B.
        options: as for ``torch.compile(backend="mikv")``; ``lower`` can only be ``"inductor"``.

    Returns:
        The path.

    Raises:
        MikvError: for a model that is not of this form, or a cache that cannot be rewritten, with the reason.
        OptionError: for options that are unknown, malformed or impossible.
    """
    path = Path(path)
    chosen = Options.parse(options)
    if chosen.lower != "inductor":
        raise OptionError("option 'lower' is 'eager', but an exported program is always compiled by Inductor; leave it")
    if path.suffix != ".pt2":
        raise MikvError(f"{path}: AOTInductor packages are files whose name ends in .pt2")
    if not path.parent.is_dir():
        raise MikvError(f"{path}: there is no folder {path.parent}")
    programs, package = exported_programs(model, max_length, batch, chosen)
    compiled = {name: _compat.compile_ahead_of_time(p, dict(chosen.inductor)) for name, p in programs.items()}
    _compat.write_package(os.fspath(path), compiled, {DESCRIPTION: package.to_json()})
    return path


def exported_programs(
    model: torch.nn.Module, max_length: int, batch: int, options: Options
) -> tuple[dict[str, torch.export.ExportedProgram], Package]:
    """The programs of a package, not yet compiled, and what it says of itself; for the arguments see :func:`export`.

    Inputs of a program are tokens, positions, and for each layer the buffers of its store and the encoded orders.
    """
    for name, value, least in (("max_length", max_length, 2), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MikvError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    decoder = _decoder(model, batch, max_length)
    programs: dict[str, torch.export.ExportedProgram] = {}
    layers: dict[str, tuple[Layer, ...]] = {}
    vocabulary = 0
    for name, tokens in PROGRAMS.items():
        made, vocabulary = _rewritten(decoder, batch, min(tokens, max_length), max_length, options)
        programs[name] = _program(made.graph.gm)
        layers[name] = tuple(Layer(call.plan, call.shape(()), str(call.device)) for call in made.calls)
    first, *others = layers.values()
    if any(other != first for other in others):
        raise MikvError("the caches of the decoder are others for one token than for several tokens")
    return programs, Package(batch, max_length, vocabulary, first)


def _decoder(model: torch.nn.Module, batch: int, max_length: int) -> torch.nn.Module:
    """The model in the form that is traced."""
    if not isinstance(model, torch.nn.Module):
        raise MikvError(f"{type(model).__name__} is no module; {CONVENTION}")
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return model
    from mikv_compile.export_models import PositionedDecoder

    return PositionedDecoder(model, batch, max_length)


def _rewritten(
    model: torch.nn.Module, batch: int, tokens: int, max_length: int, options: Options
) -> tuple[RewrittenDecoder, int]:
    """The decoder's graph for one token, or for any larger number, with stores for its caches; its vocabulary."""
    device = next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    example = torch.zeros(batch, tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)
    shapes = None
    if tokens > 1:
        dim = torch.export.Dim("tokens", min=2, max=max_length)
        shapes = ({1: dim}, {0: dim})
    try:
        with torch.no_grad():
            traced = torch.export.export(model, example, dynamic_shapes=shapes)
    except TypeError as error:
        raise MikvError(f"the model does not take tokens and positions: {error}; {CONVENTION}") from error
    except Exception as error:
        raise MikvError(f"torch.export cannot trace the model: {error}") from error
    try:
        normal = normalize(traced.module(), None)
    except CannotNormalize as error:
        raise MikvError(f"the exported graph cannot be rewritten: {error}") from error
    made = rewrite_graph(normal.gm, {}, options, records_grad=False)
    _check(made, normal, tokens, max_length)
    return made, _vocabulary(traced)


def _vocabulary(traced: torch.export.ExportedProgram) -> int:
    """Token ids are below this: the rows of the table that they are looked up in, or else the number of logits."""
    tokens, logits = traced.graph_signature.user_inputs[0], traced.graph_signature.user_outputs[0]
    looked_up = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    tables = [node.args[0] for node in looked_up if str(node.args[1]) == tokens]
    if tables:
        return min(int(table.meta["val"].shape[0]) for table in tables)
    return next(int(node.meta["val"].shape[-1]) for node in traced.graph.nodes if node.name == logits)


def _check(made: RewrittenDecoder, normal: NormalGraph, tokens: int, max_length: int) -> None:
    """Refuse graphs that the runner could not serve, which appends every call's tokens to every store."""
    reasons = "".join(f"\n  {declined}" for declined in made.declined)
    if not made.calls:
        raise MikvError(f"no KV cache was found in the model; {CONVENTION}{reasons}")
    left = [i for i in made.graph.kept_inputs if normal.flat_inputs <= i < normal.flat_inputs + len(normal.buffers)]
    if left:
        names = ", ".join(normal.buffers[i - normal.flat_inputs] for i in left)
        raise MikvError(f"the model writes buffers that could not be compressed: {names}{reasons}")
    outputs = [node for node in output_values(made.graph.gm.graph) if node is not None]
    value = outputs[0].meta.get("example_value") if len(outputs) == 1 and isinstance(outputs[0], Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        raise MikvError(f"the model returns {len(outputs)} values; {CONVENTION}")
    for call in made.calls:
        _check_site(call, tokens, max_length)


def _check_site(call: SiteCall, tokens: int, max_length: int) -> None:
    site = call.rewritten.site
    if call.capacity is None or call.position is None or site.key.kind == "read" or call.keep is not None:
        raise MikvError(f"the cache of {site.name} is not preallocated and written at positions; {CONVENTION}")
    columns = call.capacity(())
    if columns < max_length:
        raise MikvError(f"max_length is {max_length}, but the cache of {site.name} has {columns} columns")
    start = max_length - tokens
    args = torch.zeros(1, tokens, dtype=torch.int64), torch.arange(start, max_length)
    try:
        written = call.position(args, tokens), call.first(args)
    except (CannotServe, IndexError) as error:
        raise MikvError(f"where the cache of {site.name} is written does not follow from the positions") from error
    if written != (start, 0):
        raise MikvError(
            f"the model writes tokens at position {start} to column {written[0]} of the cache of {site.name}; the "
            "column has to be the position"
        )


def _program(gm: GraphModule) -> torch.export.ExportedProgram:
    """The rewritten graph as an exported program."""
    _ask_tensors_for_sizes(gm)
    args: list[torch.Tensor] = []
    shapes: list[dict[int, Any] | None] = []
    dims: dict[Any, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        fake, dynamic = node.meta["example_value"], {}
        sizes = []
        for i, size in enumerate(fake.shape):
            symbol = _compat.symbol_of(size)
            sizes.append(int(size) if symbol is None else _compat.hint_of(size) or 0)
            if symbol is not None:
                dynamic[i] = dims.setdefault(symbol, torch.export.Dim(f"size{len(dims)}", min=0))
        args.append(torch.zeros(sizes, dtype=fake.dtype, device=fake.device))
        shapes.append(dynamic or None)
    with torch.no_grad():
        return torch.export.export(gm, tuple(args), dynamic_shapes=tuple(shapes))


def _ask_tensors_for_sizes(gm: GraphModule) -> None:
    """Symbolic sizes are inputs of a rewritten graph; a program takes tensors alone, and asks those."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    where: dict[Any, tuple[Node, int]] = {}
    for node in placeholders:
        value = node.meta["example_value"]
        for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            where.setdefault(_compat.symbol_of(size), (node, i))
    for node in placeholders:
        if isinstance(node.meta["example_value"], torch.SymInt):
            with gm.graph.inserting_after(placeholders[-1]):
                asked = gm.graph.call_function(
                    torch.ops.aten.sym_size.int, where[_compat.symbol_of(node.meta["example_value"])]
                )
            node.replace_all_uses_with(asked)
            gm.graph.erase_node(node)
    gm.recompile()
