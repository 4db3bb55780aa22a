"""The structure of a cache object as plain data, and back.

Lists, tuples, dicts and what can be written in them are rebuilt. Objects of any class, such as transformers' caches and
their layers, are never made from a file: their attributes are set in objects that the caller has made. Nodes are pairs
``[kind, what]``; tensors and handles are named in them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from mikv_compile.errors import MikvError, SavedCacheError
from mikv_compile.handle import KVTensor
from mikv_compile.preallocated import PreallocatedKV, make_preallocated, take_over
from mikv_compile.saved.stores import number, require
from mikv_compile.store import LayerStore

Node = tuple[str, Any]

ABSENT = object()
"""There is nothing to fill."""

_PLAIN = (type(None), bool, int, float, str)
_BEHAVIOUR = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
"""What an attribute of these holds is up to the program, not to the cache."""


class Leaves(Protocol):
    """Where tensors go to, or come from."""

    def number_of(self, store: LayerStore) -> int:
        """The number of a store."""
        ...

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a dense tensor."""
        ...


def to_node(item: Any, leaves: Leaves, place: str = "cache", within: tuple[int, ...] = ()) -> Node:
    """A cache as plain data; its stores and dense tensors are handed to ``leaves``.

    Raises:
        SavedCacheError: for what cannot be saved, with its place.
    """
    if isinstance(item, KVTensor | PreallocatedKV):
        return "handle", _handle_to_data(item, leaves)
    if isinstance(item, torch.Tensor):
        if type(item) not in (torch.Tensor, torch.nn.Parameter) or item.layout is not torch.strided or item.is_meta:
            raise SavedCacheError(f"{place} is a tensor of {type(item).__name__}, which cannot be saved")
        return "tensor", leaves.name_of(item)
    if type(item) in _PLAIN:
        return "value", item
    if isinstance(item, torch.dtype):
        return "dtype", str(item).removeprefix("torch.")
    if isinstance(item, torch.device):
        return "device", None
    if id(item) in within:
        raise SavedCacheError(f"{place} contains itself, which cannot be saved")
    inside = (*within, id(item))
    if type(item) in (list, tuple, torch.Size):
        kind = "list" if type(item) is list else "tuple"
        return kind, [to_node(x, leaves, f"{place}[{i}]", inside) for i, x in enumerate(item)]
    if type(item) is dict:
        for key in item:
            if type(key) not in _PLAIN:
                raise SavedCacheError(f"{place} has a key of {type(key).__name__}, which cannot be saved")
        return "dict", [[key, to_node(x, leaves, f"{place}[{key!r}]", inside)] for key, x in item.items()]
    attributes = _attributes(item, place)
    parts = {name: to_node(x, leaves, f"{place}.{name}", inside) for name, x in attributes.items()}
    return "object", {"class": type(item).__qualname__, "attributes": parts}


def _attributes(item: Any, place: str) -> dict[str, Any]:
    """What an object's state is."""
    if isinstance(item, torch.nn.Module):
        return dict(item.named_buffers())  # weights are no part of a cache
    # Tuples and dicts of other classes, sets and numbers may hold more than their attributes tell.
    if isinstance(item, dict | tuple | list | set | frozenset | bytes | complex) or not hasattr(item, "__dict__"):
        raise SavedCacheError(
            f"{place} is a {type(item).__name__}, which cannot be saved; caches are lists, tuples, dicts and objects "
            "of tensors, numbers and text"
        )
    if vars(item).get("offloading"):
        raise _offloaded(place)
    return {name: value for name, value in vars(item).items() if not isinstance(value, _BEHAVIOUR)}


def _offloaded(place: str) -> SavedCacheError:
    """What such a cache moves to the CPU and back are no handles, and a stream that does it cannot be saved."""
    return SavedCacheError(f"{place} is a cache with offloading=True, which can neither be saved nor loaded")


def _handle_to_data(handle: KVTensor | PreallocatedKV, leaves: Leaves) -> dict[str, Any]:
    if handle.store is None:
        raise SavedCacheError("a cache cannot be saved while a compiler traces it")
    data = {"store": leaves.number_of(handle.store), "role": handle.role, "layout": handle.kv_layout}
    if isinstance(handle, PreallocatedKV):
        return {**data, "capacity": handle.capacity, "rows": handle.rows}
    return {**data, "range": handle._range, "capacity": handle.capacity}


class Filler:
    """Makes a cache of nodes, or fills one. Nothing that was given changes before :meth:`apply`."""

    def __init__(self, stores: list[LayerStore], dense: Callable[[str], torch.Tensor], device: torch.device) -> None:
        """Make one.

        Args:
            stores: by their numbers. dense: a dense tensor on ``device``, by its name; the same for the same name.
            device: what attributes that name a device get.
        """
        self._stores, self._dense, self._device = stores, dense, device
        self._changes: list[Callable[[], Any]] = []

    def apply(self) -> None:
        """Change what was given to :meth:`made`."""
        for change in self._changes:
            change()

    def made(self, node: Node, into: Any = ABSENT, place: str = "cache") -> Any:
        """What a node stands for: ``into``, which is filled later, or something new.

        Raises:
            SavedCacheError: if ``into`` is of another structure.
            Exception: any other, if the node is of another form.
        """
        kind, what = node
        if kind == "handle":
            return self._handle(what, into)
        if kind == "tensor":
            return self._tensor(what, into)
        if kind == "value":
            require(type(what) in _PLAIN, place)
            return what
        if kind == "dtype":
            dtype = getattr(torch, what)
            require(isinstance(dtype, torch.dtype), place)
            return dtype
        if kind == "device":
            return self._device
        if kind in ("list", "tuple"):
            return self._sequence(kind, what, into, place)
        if kind == "dict":
            found = into if type(into) is dict else {}
            made = {key: self.made(part, found.get(key, ABSENT), f"{place}[{key!r}]") for key, part in what}
            if found is not into:
                return made
            self._changes += [into.clear, partial(into.update, made)]
            return into
        require(kind == "object", place)
        return self._object(what, into, place)

    def _sequence(self, kind: str, parts: list[Node], into: Any, place: str) -> Any:
        found = into if isinstance(into, list | tuple) else ()
        if len(found) > len(parts):
            raise self._mismatch(place, f"has {len(found)} entries, and the saved one {len(parts)}")
        given = [*found, *[ABSENT] * (len(parts) - len(found))]
        made = [self.made(part, x, f"{place}[{i}]") for i, (part, x) in enumerate(zip(parts, given, strict=True))]
        if kind == "tuple":
            return tuple(made)
        if type(into) is not list:
            return made
        self._changes.append(partial(into.__setitem__, slice(None), made))
        return into

    def _object(self, what: dict[str, Any], into: Any, place: str) -> Any:
        name = what["class"]
        if into is ABSENT or into is None:
            raise SavedCacheError(
                f"{place} is a {name}, which is not made from a file; give load_cache the model "
                f"(model=...), or a new and empty cache of the same kind to fill (into=...)"
            )
        if type(into).__qualname__ != name:
            raise self._mismatch(place, f"is a {type(into).__qualname__}, and the saved one a {name}")
        for attribute, part in what["attributes"].items():
            owner, last = _owner(into, attribute)
            if owner is None:
                raise self._mismatch(f"{place}.{attribute}", "is missing")
            require(_may_be_set(owner, last), f"{place}.{attribute}")
            if last == "offloading" and tuple(part) != ("value", False):
                raise _offloaded(place)
            given = getattr(owner, last) if _has(owner, last) else ABSENT
            if attribute == "layers" and type(given) is list:
                given = _with_layers(into, given, len(part[1]))
            made = self.made(part, given, f"{place}.{attribute}")
            self._changes.append(partial(setattr, owner, last, made))
        return into

    def _tensor(self, name: str, into: Any) -> torch.Tensor:
        dense = self._dense(name)
        if type(into) is not torch.Tensor or not _alike(into, dense):
            return dense

        def copy() -> None:
            # In place, as graphs and views of the program may know this tensor.
            with torch.no_grad(), torch.inference_mode(into.is_inference()):
                into.copy_(dense)

        self._changes.append(copy)
        return into

    def _handle(self, what: dict[str, Any], into: Any) -> torch.Tensor:
        store = self._stores[number(what["store"], "the number of a store", most=len(self._stores) - 1)]
        role, layout, capacity = what["role"], what["layout"], what["capacity"]
        require(role in ("key", "value") and type(layout) is str, "a handle")
        if capacity is not None:
            number(capacity, "the size of a cache")
        if "rows" not in what:
            shown = what["range"]
            start, stop = (None, None) if shown is None else (number(x, "a range of tokens") for x in shown)
            require((start is None) == (shown is None) and (capacity is not None or shown is not None), "a handle")
            if start is not None and stop is not None:
                inside = store.base <= start <= stop <= store.end
                require(inside and (capacity is None or stop - start <= capacity), "a range of tokens")
            return KVTensor(store, role, layout, start, stop, capacity)
        rows = number(what["rows"], "the number of rows", least=store.site.batch)
        made = make_preallocated(store, role, layout, capacity, rows)
        if not (type(into) is torch.Tensor or isinstance(into, PreallocatedKV)) or not _alike(into, made):
            return made
        self._changes.append(partial(self._take_over, into, store, role, layout))
        return into

    def _take_over(self, tensor: torch.Tensor, store: LayerStore, role: Any, layout: str) -> None:
        try:
            take_over(tensor, store, role, layout)
        except MikvError as error:
            raise SavedCacheError(f"a tensor of the given cache cannot be filled: {error}") from error

    @staticmethod
    def _mismatch(place: str, how: str) -> SavedCacheError:
        return SavedCacheError(f"{place} of the given cache {how}; make the cache as the saved one was made")


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _owner(item: Any, attribute: str) -> tuple[Any, str]:
    """The object that has an attribute, and the attribute's name; of a module, buffers have dots in their names."""
    if not isinstance(item, torch.nn.Module):
        return item, attribute
    path, _, last = attribute.rpartition(".")
    try:
        item = item.get_submodule(path)
    except AttributeError:
        return None, last
    return (item if last in item._buffers else None), last


def _has(owner: Any, name: str) -> bool:
    return name in vars(owner) or (isinstance(owner, torch.nn.Module) and name in owner._buffers)


def _may_be_set(owner: Any, name: str) -> bool:
    """Whether an attribute is one that objects have for themselves: no method, no property, nothing of Python's."""
    if not name.isidentifier() or name.startswith("__"):
        return False
    of_class = inspect.getattr_static(type(owner), name, None)
    return not (callable(of_class) or hasattr(of_class, "__get__"))


def _with_layers(cache: Any, layers: list[Any], count: int) -> list[Any]:
    """A list of ``count`` layers, where transformers' cache would make them one by one when they are first used."""
    make = getattr(cache, "layer_class_to_replicate", None)
    if not isinstance(make, type) or count > 10_000:
        return layers
    return [*layers, *(make() for _ in range(count - len(layers)))]
