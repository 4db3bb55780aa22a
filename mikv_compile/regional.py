"""Compiles the repeated layer of a decoder once for all layers, instead of the whole model as one long graph.

Dynamo's guards on the number of a layer stand in the way: it is an attribute of the module, and the cache is indexed
with it. Here each call of a layer gets a *view* of the cache in which the layer's own entry has the same name in every
layer (:class:`_Entries`), so that the number is handed on but never looked at. Code that does look at it, or that asks
for another layer's entry, is guarded as always and makes more graphs, not wrong ones.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mikv_compile import _compat, backend
from mikv_compile.config import Options
from mikv_compile.errors import MikvError
from mikv_compile.lowering import Region
from mikv_compile.plan import check_counts_no_layers, check_named_layers, parse_layers
from mikv_compile.planner import Planner
from mikv_compile.sensitivity import layer_tiers

log = logging.getLogger(__name__)


def compile(
    model: torch.nn.Module,
    *,
    regional: bool = False,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    **options: Any,
) -> Any:
    """Compile a decoder so that its KV cache stays compressed.

    Args:
        model: a module. With ``regional=True`` it is changed in place, see Returns.
        regional: compile the repeated layer once for all layers instead of the whole model. What lies outside of the
            layers (embeddings, masks, the head) runs as it is.
        fullgraph, dynamic: as for ``torch.compile``; with ``regional=True`` they hold for one layer.
        mode: a mode of ``torch.compile``. Unlike there, it goes together with options.
        options: fields of :class:`~mikv_compile.config.Options`.

    Returns:
        With ``regional=False`` what ``torch.compile(model, backend="mikv", options=options)`` returns. With
        ``regional=True`` the model itself, whose layers have got compiled ``forward`` methods. Compiling it again
        replaces them. :func:`uncompile` undoes both.

    Raises:
        OptionError: for options that are unknown, malformed or impossible.
        MikvError: if ``regional=True`` and the model has no repeated layers, or layers that something else has compiled
            or given a ``forward`` of their own.
    """
    chosen = Options.parse(options)
    Planner(chosen)
    if not regional:
        if mode is not None:  # torch.compile takes options or a mode
            options["inductor"] = {**_compat.mode_options(mode), **chosen.inductor}
        return torch.compile(model, backend="mikv", options=options, fullgraph=fullgraph, dynamic=dynamic)
    if isinstance(model, _compat.optimized_module_class()):
        raise MikvError("the model is compiled as a whole already; pass the module that was given to torch.compile")
    uncompile(model)
    for members in _layer_lists(model, chosen):
        settings = {"fullgraph": fullgraph, "dynamic": dynamic}
        for call in _layer_calls(members, chosen, functools.partial(_shared_function, options, mode, settings)):
            vars(call.layer)["forward"] = call
    return model


def uncompile(model: torch.nn.Module) -> torch.nn.Module:
    """The module as it was before :func:`compile`. Caches that it has filled stay compressed."""
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _LayerCall):
            del vars(module)["forward"]
    return model


# Which layers


def _layer_lists(model: torch.nn.Module, options: Options) -> list[list[torch.nn.Module]]:
    """The model's lists of repeated layers, those that take a cache if there are such.

    Raises:
        MikvError: if there are none, or their ``forward`` is not that of their class.
    """
    found: list[list[torch.nn.Module]] = []
    inner: set[int] = set()
    for module in model.modules():
        if id(module) in inner or not isinstance(module, torch.nn.ModuleList):
            continue
        classes = collections.Counter(type(m) for m in module if any(m.children()))
        if max(classes.values(), default=0) > 1:
            found.append(list(dict.fromkeys(module)))
            inner.update(id(m) for m in module.modules())
    found = [members for members in found if any(map(_takes_cache, members))] or found
    if not found:
        raise MikvError(
            f"{type(model).__name__} has no torch.nn.ModuleList of two or more layers of one class; compile it as a "
            "whole with regional=False"
        )
    if len(found) > 1:
        check_counts_no_layers(options, f"{type(model).__name__} has {len(found)} lists of layers")
    for layer in itertools.chain(*found):
        forward = vars(layer).get("forward")
        plain = forward is None or getattr(forward, "__func__", None) is type(layer).forward
        if not plain or layer._compiled_call_impl is not None:
            raise MikvError(
                f"a {type(layer).__name__} has a forward of its own (compiled, offloaded or wrapped), which cannot be "
                "shared; undo that, or compile the whole model with regional=False"
            )
    return found


def _takes_cache(layer: torch.nn.Module) -> bool:
    names = inspect.signature(type(layer).forward).parameters
    return any("cache" in name or "past" in name or "kv" in name for name in names)


def _layer_calls(
    layers: list[torch.nn.Module], options: Options, make: Callable[[Region], Callable[..., Any]]
) -> list[_LayerCall]:
    """The new ``forward`` of each layer. Layers that look alike and have the same plan share one function.

    This is only about speed: Dynamo's guards tell layers apart that differ after all.
    """
    check_named_layers(options, len(layers), "this model")
    attributes = [_attributes(layer) for layer in layers]
    numbering = _numbering(attributes)
    overrides: dict[int, Any] = dict(parse_layers(options.layers))
    if options.resolved("layer_budget", "uniform") == "pyramid":
        overrides = {number: overrides.get(number, number) for number in range(len(layers))}
    if options.plan is not None:
        kinds = (p.dtype for p in layers[0].parameters() if p.is_floating_point())
        dtype = next(kinds, torch.get_default_dtype())
        overrides = dict(enumerate(layer_tiers(options, dtype, len(layers))))
    groups: dict[Any, _Group] = {}
    calls = []
    for number, (layer, own) in enumerate(zip(layers, attributes, strict=True)):
        alike = (_structure(layer), frozenset(item for item in own.items() if item[0] not in numbering))
        group = groups.setdefault((alike, overrides.get(number)), _Group(options))
        index = _index(layer, own, numbering)
        group.members.append((number, layer, index))
        calls.append(_LayerCall(layer, index, group))
    for group in groups.values():
        group.function = make(Region(tuple(number for number, _, _ in group.members), len(layers)))
    return calls


def _attributes(layer: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """The plain attributes of all modules of a layer, by path and name."""
    simple = (int, float, bool, str, types.NoneType)
    return {
        (path, name): value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if type(value) in simple and name != "training"
    }


def _numbering(attributes: list[dict[tuple[str, str], Any]]) -> set[tuple[str, str]]:
    """Attributes that number the layers: whole numbers, no two of them equal."""
    values: dict[tuple[str, str], list[Any]] = {}
    for own in attributes:
        for key, value in own.items():
            values.setdefault(key, []).append(value)
    return {key for key, seen in values.items() if {type(v) for v in seen} == {int} and len(set(seen)) == len(seen)}


def _index(layer: torch.nn.Module, own: Mapping[tuple[str, str], Any], numbering: set[tuple[str, str]]) -> int | None:
    """The number by which a layer asks for its entry of the cache, if its attributes tell.

    Raises:
        MikvError: if it asks for several.
    """
    named = {value for (_, name), value in own.items() if name == "layer_idx" and type(value) is int}
    if len(named) > 1:
        raise MikvError(
            f"a {type(layer).__name__} uses several entries of the cache ({sorted(named)}), which cannot be told apart "
            "without their numbers; compile the whole model with regional=False"
        )
    found = named or {value for key, value in own.items() if key in numbering}
    return found.pop() if len(found) == 1 else None


def _structure(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Classes, parameters and buffers of a layer's modules."""
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    return (
        tuple((path, type(module)) for path, module in layer.named_modules()),
        tuple((path, tensor.shape, tensor.dtype, tensor.device) for path, tensor in tensors),
    )


# What runs


@dataclass
class _Group:
    """Layers that share a compiled function."""

    options: Options

    def __post_init__(self) -> None:
        self.members: list[tuple[int, torch.nn.Module, int | None]] = []
        """Number in the list, module, and index in the cache."""
        self.function: Callable[..., Any]
        self.warned = False

    def is_own_index(self, value_for: Callable[[torch.nn.Module], Any]) -> bool:
        """Whether an expression of a layer gives each layer its own index."""
        return all(index is not None and value_for(layer) == index for _, layer, index in self.members)


def _shared_function(
    options: Mapping[str, Any], mode: str | None, settings: Mapping[str, Any], region: Region
) -> Callable[..., Any]:
    """A compiled call of any layer of a region."""

    def mikv(gm: Any, example_inputs: list[Any]) -> Callable[..., Any]:
        return backend.mikv(gm, example_inputs, options=options, mode=mode, region=region)

    def call_layer(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    # Dynamo keeps graphs, and counts them, per code object.
    call_layer.__code__ = call_layer.__code__.replace(co_name=f"call_layer_{next(_functions)}")
    return torch.compile(call_layer, backend=mikv, **settings)


_functions = itertools.count()


class _LayerCall:
    """The ``forward`` of a layer: the shared function, with a view of the cache. Hooks of the layer run around it."""

    def __init__(self, layer: torch.nn.Module, index: int | None, group: _Group) -> None:
        self.layer, self.index, self.group = layer, index, group
        # Also what inspect.signature looks at.
        self.__wrapped__ = _plain_forward(layer)
        inner = [module for module in layer.modules() if module is not layer]
        self._inner_hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def __reduce__(self) -> Any:
        return _plain_forward, (self.layer,)  # a copy of the layer is not compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # In a graph that somebody else traces, a layer is what its class says.
        if _compat.is_traced() or self._must_run_plainly():
            return self.__wrapped__(*args, **kwargs)
        views: list[tuple[Any, Any]] = []
        cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
        args = tuple([self._viewed(value, views) if isinstance(value, cache) else value for value in args])
        for name, value in kwargs.items():
            if isinstance(value, cache):
                kwargs[name] = self._viewed(value, views)
        try:
            output = self.group.function(self.layer, *args, **kwargs)
        finally:
            for view, cache in views:
                _write_back(view, cache)
        return _without_views(output, views)

    def _must_run_plainly(self) -> bool:
        if getattr(self.layer, "gradient_checkpointing", False) and self.layer.training:
            return True
        # Dynamo does not guard on hooks: one that came after the first call would not run.
        if not any(self._inner_hooks):
            return False
        if not self.group.warned:
            log.warning(
                "modules inside of %s have hooks, which a shared graph cannot run: its calls run uncompiled. "
                "output_attentions and output_hidden_states leave such hooks, too; regional=False can trace those",
                type(self.layer).__name__,
            )
            self.group.warned = True
        return True

    def _viewed(self, value: Any, views: list[tuple[Any, Any]]) -> Any:
        """A view of a cache of transformers."""
        options, index = self.group.options, self.index
        parts = [name for name in _PARTS if name in vars(value)]
        if parts:
            check_counts_no_layers(options, "an encoder-decoder model keeps two caches per layer")
            view = _view(value, {name: self._viewed(getattr(value, name), views) for name in parts})
            if index is not None:
                vars(view)["is_updated"] = _Flags(value.is_updated, index, self.group)
            views.append((view, value))
            return view
        if getattr(value, "offloading", False):
            raise MikvError("regional compilation cannot prefetch the layers of an offloaded cache; use regional=False")
        if index is None:
            return value
        if index < len(value.layers):
            own = value.layers[index]
        elif getattr(value, "layer_class_to_replicate", None) is not None:
            own = value.layer_class_to_replicate()  # the cache appends its entries when they are first written
        else:
            return value
        if not hasattr(own, "keys"):
            check_counts_no_layers(options, f"layer {index} keeps no keys and values")
        entries = _Entries(value.layers, own, index, self.group)
        view = _view(value, {"layers": entries, "layer_class_to_replicate": None})
        views.append((view, value))
        return view


def _plain_forward(layer: torch.nn.Module) -> Callable[..., Any]:
    return types.MethodType(type(layer).forward, layer)


def _without_views(output: Any, views: list[tuple[Any, Any]]) -> Any:
    for view, cache in views:
        if output is view:
            return cache
    if type(output) is tuple:
        return tuple([_without_views(item, views) for item in output])
    return output


# The cache as one layer sees it

OWN = -(2**31)
"""The index of a layer's own entry, in every layer."""


class _Named:
    """Knows which of the indices that a layer's code uses is the layer's own."""

    def __init__(self, index: int, group: _Group) -> None:
        self.index, self.group = index, group

    def name(self, index: Any) -> Any:
        """``OWN`` for the layer's own index, without a guard on it while Dynamo traces; other indices as they are."""
        own = _asks_for_own() if _compat.is_traced() else type(index) is int and index in (OWN, self.index)
        return OWN if own else index


def _asks_for_own() -> bool:
    """While Dynamo traces :meth:`_Named.name`: whether the index comes from a place that gives each layer its own."""
    index, source = _compat.traced_local("index")
    named, _ = _compat.traced_local("self")
    if source is None:
        return type(index) is int and index == OWN
    return type(index) is int and (index == OWN or named.group.is_own_index(functools.partial(_read, source)))


# Dynamo runs it while tracing, and takes the answer as a constant.
_asks_for_own._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _read(source: Any, layer: torch.nn.Module) -> Any:
    return _compat.value_at(source, {"layer": layer})


class _Entries(_Named):
    """In place of ``cache.layers``."""

    def __init__(self, entries: list[Any], own: Any, index: int, group: _Group) -> None:
        super().__init__(index, group)
        self.entries, self.own = entries, own

    def __getitem__(self, index: Any) -> Any:
        index = self.name(index)
        return self.own if index == OWN else self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.entries)


class _Flags(_Named):
    """In place of a dict by index, such as ``EncoderDecoderCache.is_updated``."""

    def __init__(self, values: dict[int, Any], index: int, group: _Group) -> None:
        super().__init__(index, group)
        self.values, self.own = values, values.get(index)

    def get(self, index: Any, default: Any = None) -> Any:
        """As that of a dict."""
        index = self.name(index)
        if index != OWN:
            return self.values.get(index, default)
        return default if self.own is None else self.own

    def __getitem__(self, index: Any) -> Any:
        index = self.name(index)
        if index != OWN:
            return self.values[index]
        if self.own is None:
            raise KeyError(index)
        return self.own

    def __setitem__(self, index: Any, value: Any) -> None:
        index = self.name(index)
        if index == OWN:
            self.own = value
        else:
            self.values[index] = value


class _View:
    """Mixed into a cache class: methods that compare an index before they use it get ``OWN``."""

    layers: Any

    def update(self, key_states: Any, value_states: Any, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, self.layers.name(layer_idx), *args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: Any = 0) -> Any:
        return super().get_seq_length(self.layers.name(layer_idx))  # type: ignore[misc]

    def get_max_length(self, layer_idx: Any = None) -> Any:
        return super().get_max_length(self.layers.name(layer_idx))  # type: ignore[misc]

    def get_mask_sizes(self, query_length: Any, layer_idx: Any) -> Any:
        return super().get_mask_sizes(query_length, self.layers.name(layer_idx))  # type: ignore[misc]

    def has_previous_state(self, layer_idx: Any = None, state_idx: Any = None) -> Any:
        return super().has_previous_state(self.layers.name(layer_idx), state_idx)  # type: ignore[misc]


@functools.cache
def _view_class(cls: type) -> type:
    bases = (cls,) if hasattr(cls, "check_dynamic_cache") else (_View, cls)
    return type(f"{cls.__name__}OfOneLayer", bases, {})


def _view(cache: Any, changed: Mapping[str, Any]) -> Any:
    """An object of a subclass of the cache's class, with the same attributes apart from those that are changed."""
    view: Any = object.__new__(_view_class(type(cache)))  # type: ignore[arg-type]
    vars(view).update(vars(cache), **changed)
    return view


def _write_back(view: Any, cache: Any) -> None:
    """Take over what a layer has assigned to the view's attributes."""
    for name, value in vars(view).items():
        if isinstance(value, _Flags):
            if value.own is not None:
                value.values[value.index] = value.own
        elif isinstance(value, _Entries):
            if value.index >= len(value.entries) and value.own.is_initialized:
                missing = range(len(value.entries), value.index)
                value.entries.extend([*(cache.layer_class_to_replicate() for _ in missing), value.own])
        elif name not in _CHANGED and vars(cache).get(name, _CHANGED) is not value:
            setattr(cache, name, value)


_PARTS = ("self_attention_cache", "cross_attention_cache")
_CHANGED = ("layers", "layer_class_to_replicate", *_PARTS)
"""Attributes in which a view differs from its cache."""
