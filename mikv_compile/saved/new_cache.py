"""New, empty caches of transformers for a model, to be filled from a file."""

from __future__ import annotations

from typing import Any

import torch

from mikv_compile.saved.tree import ABSENT, Node


def new_cache(node: Node, model: torch.nn.Module) -> Any:
    """The empty cache of which a saved one is, as far as transformers makes it from the model's config; else ABSENT."""
    kind, what = node
    config = getattr(model, "config", None)
    if kind != "object" or config is None:
        return ABSENT
    try:
        import transformers
    except ImportError:
        return ABSENT
    attributes = what["attributes"]
    if what["class"] == "DynamicCache":
        saved, cache = _layers(attributes), transformers.DynamicCache(config=config)
        by_config = [type(layer).__qualname__ for layer in cache.layers]
        # Without a config, transformers makes a DynamicCache of full layers for any model.
        return cache if saved == by_config else transformers.DynamicCache()
    if what["class"] == "StaticCache":
        lengths = [layer["max_cache_len"][1] for layer in _attributes_of_layers(attributes) if "max_cache_len" in layer]
        return transformers.StaticCache(config=config, max_cache_len=max(lengths, default=1))
    if what["class"] == "EncoderDecoderCache":
        parts = [new_cache(attributes[name], model) for name in ("self_attention_cache", "cross_attention_cache")]
        return ABSENT if ABSENT in parts else transformers.EncoderDecoderCache(*parts)
    return ABSENT


def _layers(attributes: dict[str, Node]) -> list[str]:
    """The classes of a saved cache's layers."""
    return [layer[1]["class"] for layer in attributes["layers"][1]]


def _attributes_of_layers(attributes: dict[str, Node]) -> list[dict[str, Node]]:
    return [layer[1]["attributes"] for layer in attributes["layers"][1]]
