"""What is compared: a method makes a model keep its cache in some way. Does not import the backend.

To add one, subclass :class:`Session` where the cache is made or weighed in another way, and write a class with the
attributes of :class:`Method`. A suite names it by ``factory = "package.module:Class"``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch


class UnavailableError(Exception):
    """A method cannot run in this environment (a package is missing, say); that is no failure of the method."""


@dataclass(frozen=True)
class CacheSize:
    """What a cache weighs. Bytes of all layers and rows."""

    tokens: int
    nbytes: int
    """Bytes of every buffer, as it lies in memory in this run."""
    nbytes_16bit: int
    """Bytes of the same cache in a 16-bit model: what the model's dtype fills is counted with 2 bytes an element."""
    dense_nbytes_16bit: int
    """Bytes of a dense cache of as many tokens with 2 bytes an element."""

    @property
    def ratio_16bit(self) -> float:
        """``nbytes_16bit / dense_nbytes_16bit``."""
        return self.nbytes_16bit / max(self.dense_nbytes_16bit, 1)

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        return {**vars(self), "ratio_16bit": self.ratio_16bit}


class Session:
    """A model whose calls keep their cache in the method's way. This one is dense.

    Args:
        model: a causal language model of transformers.
        call: what to call instead of the model itself, a compiled one for example.
    """

    def __init__(self, model: Any, call: Any = None) -> None:
        self.model = model
        self._call = model if call is None else call
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def new_cache(self) -> Any:
        """An empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Read a prompt [1, tokens]; returns its compressed cache, and the last token's logits [vocabulary]."""
        cache = self.new_cache()
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        logits = self._call(input_ids=self._put(input_ids), past_key_values=cache, use_cache=True, **keep).logits
        return cache, logits[0, -1]

    def forward(self, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Read on [1, tokens] over a cache, which grows; returns the logits behind each token [tokens, vocabulary]."""
        return self._call(input_ids=self._put(input_ids), past_key_values=cache, use_cache=True).logits[0]

    def fork(self, cache: Any) -> Any:
        """A copy that can be read on without changing the original."""
        return copy.deepcopy(cache)

    def size(self, cache: Any) -> CacheSize:
        """What a cache weighs."""
        length = cache.get_seq_length()
        tensors = distinct_storages(cache)
        floats = (torch.float32, torch.float64)
        at_16bit = sum(n * 2 // t.dtype.itemsize if t.dtype in floats else n for t, n in tensors)
        return CacheSize(length, sum(n for _, n in tensors), at_16bit, dense_nbytes(self.model, length))

    def facts(self) -> dict[str, Any]:
        """Anything else worth recording with a result."""
        return {}

    def _put(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.to(self.model.device)


@runtime_checkable
class Method(Protocol):
    """A way to keep the cache."""

    @property
    def name(self) -> str:
        """Unique among the methods that are compared."""

    @property
    def family(self) -> str:
        """Methods of one family share a colour in plots: ``dense``, ``mikv``, ``eviction``, ``quantized``, ..."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that changes its numbers, as JSON."""

    def open(self, model: Any) -> AbstractContextManager[Session]:
        """Change the model so that it keeps its cache so, until the context ends."""


@dataclass(frozen=True)
class DenseMethod:
    """The plain model, not compiled: the reference of everything."""

    name: str = "dense"
    family: str = "dense"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self, model: Any) -> Iterator[Session]:
        """The model as it is."""
        yield Session(model)


def dense_nbytes(model: Any, length: int, element: int = 2) -> int:
    """Bytes of a dense cache of one row, where every layer keeps keys and values of all ``length`` tokens."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * length * element


def distinct_storages(item: Any) -> list[tuple[torch.Tensor, int]]:
    """A tensor of every storage that a Python object reaches, and the storage's bytes."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    seen: set[int] = set()
    todo = [item]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, torch.nn.Module | type | str | bytes | int | float | None):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = (value, storage.nbytes())
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        else:  # tensor subclasses, too: what they wrap lies in their attributes
            todo += getattr(value, "__dict__", {}).values()
            todo += [getattr(value, name, None) for c in type(value).__mro__ for name in getattr(c, "__slots__", ())]
    return list(found.values())
