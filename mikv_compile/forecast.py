"""What a model's cache will weigh, dense and compressed, from the model's config alone: no weights are loaded.

The model is built on torch's ``meta`` device, which holds shapes and no numbers, and called with two tokens. What its
cache then holds tells each layer's heads, dimensions and window, whatever the names in its config are.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mikv_compile.config import Options
from mikv_compile.errors import MikvError
from mikv_compile.kernels.formats import CannotPackError
from mikv_compile.plan import CacheShape, LayerPlan
from mikv_compile.planner import Planner

_TOKENS = 2
_MOST = 2**31
"""A cache that holds as many tokens within a limit has none."""


class CannotForecastError(MikvError):
    """A config does not tell what the model's cache holds; the message says why, and what does."""


@dataclass(frozen=True)
class CachedLayer:
    """The keys and values of one layer.

    Attributes:
        layer: its number in the model.
        kv_heads, key_dim, value_dim: H_kv and the dimensions of a head.
        window: tokens that a sliding layer keeps, the newest ones; None: all.
    """

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def tokens(self, context: int) -> int:
        """Tokens that it keeps of a prompt."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class ModelShape:
    """What there is to know of a model before it is loaded.

    Attributes:
        architecture: the class in transformers.
        layers: those that keep keys and values, in order.
        parameters: how many numbers its weights are; shared ones count once.
        longest: tokens that the model was made for; None where the config does not say.
        notes: what the cache holds besides, and is not counted.
    """

    architecture: str
    layers: tuple[CachedLayer, ...]
    parameters: int
    longest: int | None
    notes: tuple[str, ...]


def model_shape(config: Any) -> ModelShape:
    """Build a decoder of transformers without weights, and look at the cache that it fills.

    Args:
        config: of transformers.

    Raises:
        CannotForecastError: for a model that is no decoder, cannot be called without weights, or keeps no keys and
            values.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    try:
        with torch.device("meta"), torch.no_grad():
            # In 16 bits: kernels for experts take nothing else.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            cache = DynamicCache(config=model.config)
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model's code raises where tensors have no values
        reason = " ".join(str(error).split())[:200]
        raise CannotForecastError(
            f"the config of a {config.model_type} does not tell what its cache holds ({type(error).__name__}: {reason})"
            "; `mikv explain` loads the model, and shows it"
        ) from error
    layers, notes = _cached_layers(cache.layers)
    if not layers:
        raise CannotForecastError(f"a {type(model).__name__} keeps no keys and values that could be compressed")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        notes.append(
            "attention is latent: what is expanded from the cache is mostly read densely, and stays dense with plans "
            "that evict; `mikv explain` says which"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    longest = getattr(text, "max_position_embeddings", None)
    return ModelShape(type(model).__name__, tuple(layers), parameters, longest, tuple(notes))


def _cached_layers(entries: list[Any]) -> tuple[list[CachedLayer], list[str]]:
    """Keys and values of a cache on the ``meta`` device, and notes on what else it holds."""
    layers: list[CachedLayer] = []
    without: dict[str, list[int]] = collections.defaultdict(list)
    more: dict[str, list[int]] = collections.defaultdict(list)
    for number, entry in enumerate(entries):
        kind = type(entry).__name__
        keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != _TOKENS:
            without[kind].append(number)
            continue
        if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            more[kind].append(number)
        window = None
        if getattr(entry, "is_sliding", False):
            # The layer itself knows how many tokens it keeps of more than its window.
            many = (int(entry.sliding_window) + 1,)
            entry.update(*(x.new_empty((*x.shape[:2], *many, x.shape[3])) for x in (keys, values)))
            window = int(entry.keys.shape[2])
        layers.append(CachedLayer(number, int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]), window))
    notes = [f"layers {_few(n)} ({kind}) keep no keys and values: not counted" for kind, n in without.items()]
    notes += [
        f"layers {_few(n)} ({kind}) keep more than keys and values, which is not counted" for kind, n in more.items()
    ]
    return layers, notes


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


@dataclass(frozen=True)
class LayerForecast:
    """One layer after a prompt. ``plan`` is None for a layer that stays dense, and ``reason`` says why."""

    shape: CachedLayer
    plan: LayerPlan | None
    reason: str | None
    tokens: int
    nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class Forecast:
    """The cache of a model with some options.

    Attributes:
        model: its shape.
        options: of the backend.
        dtype: of the model, and so of the dense cache.
        batch: rows.

    Raises:
        OptionError: by every method, for options that are impossible for this model.
    """

    model: ModelShape
    options: Options
    dtype: torch.dtype
    batch: int = 1

    def layers(self, context: int) -> list[LayerForecast]:
        """Each layer after a prompt of ``context`` tokens."""
        return [
            LayerForecast(layer, plan, reason, layer.tokens(context), *self._sizes(layer, plan, context))
            for layer, (plan, reason) in zip(self.model.layers, self._plans, strict=True)
        ]

    def nbytes(self, context: int) -> int:
        """Bytes of the compressed cache after a prompt of ``context`` tokens."""
        return sum(n * self._sizes(layer, plan, context)[0] for (layer, plan), n in self._alike.items())

    def dense_nbytes(self, context: int) -> int:
        """Bytes of the dense cache of as many tokens."""
        return sum(n * self._sizes(layer, plan, context)[1] for (layer, plan), n in self._alike.items())

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the weights in ``dtype``."""
        return self.model.parameters * self.dtype.itemsize

    def largest_context(self, limit: int, dense: bool = False) -> int | None:
        """The longest prompt whose cache takes at most ``limit`` bytes; None if there is no longest."""
        size = self.dense_nbytes if dense else self.nbytes
        least, beyond = 0, 1
        while size(beyond) <= limit:
            if beyond >= _MOST:
                return None
            least, beyond = beyond, beyond * 2
        while beyond - least > 1:
            middle = (least + beyond) // 2
            least, beyond = (middle, beyond) if size(middle) <= limit else (least, middle)
        return least

    @cached_property
    def _plans(self) -> list[tuple[LayerPlan | None, str | None]]:
        planner = Planner(self.options)
        made: list[tuple[LayerPlan | None, str | None]] = []
        for number, layer in enumerate(self.model.layers):
            shape = self._shape(layer)
            try:
                made.append((planner.layer(number, shape, sliding=layer.window is not None), None))
            except CannotPackError as error:
                made.append((None, str(error)))
        return made

    @cached_property
    def _alike(self) -> dict[tuple[CachedLayer, LayerPlan | None], int]:
        """Layers that weigh the same, whatever their number, and how many there are."""
        plans = [plan for plan, _ in self._plans]
        alike = [CachedLayer(0, s.kv_heads, s.key_dim, s.value_dim, s.window) for s in self.model.layers]
        return dict(collections.Counter(zip(alike, plans, strict=True)))

    def _shape(self, layer: CachedLayer) -> CacheShape:
        sizes = (self.batch, layer.kv_heads, layer.key_dim, layer.value_dim)
        return CacheShape(*sizes, self.dtype, len(self.model.layers))

    def _sizes(self, layer: CachedLayer, plan: LayerPlan | None, context: int) -> tuple[int, int]:
        """Bytes compressed and dense."""
        tokens, shape = layer.tokens(context), self._shape(layer)
        dense = shape.dense_nbytes(tokens)
        if plan is None:
            return dense, dense
        sizes = (shape.batch, shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype)
        return plan.nbytes(tokens, *sizes), dense
