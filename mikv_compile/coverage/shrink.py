"""Makes any transformers config tiny, from the names and defaults of its fields alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, WINDOW = 128, 64, 2, 4, 2, 16, 128, 8

SIZES: dict[str, Any] = {
    # The decoder, in the words of different authors.
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "n_words"], VOCABULARY),
    **dict.fromkeys(
        [
            "hidden_size", "d_model", "n_embd", "embedding_size", "embed_dim", "projection_dim", "lru_width",
            "out_hidden_size",
        ],
        HIDDEN,
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers",
            "num_decoder_layers", "num_encoder_layers", "depth", "layers",
            "decoder_num_hidden_layers", "encoder_num_hidden_layers",
        ],
        LAYERS,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads",
            "encoder_attention_heads", "attention_heads", "swa_num_attention_heads",
            "decoder_num_attention_heads", "encoder_num_attention_heads",
        ],
        HEADS,
    ),
    **dict.fromkeys(["num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "d_kv", "dim_head", "global_head_dim", "swa_head_dim", "v_head_dim"], HEAD_DIM),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"],
        FEED_FORWARD,
    ),
    **dict.fromkeys(
        [
            "sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size",
            "local_attention", "window_size",
        ],
        WINDOW,
    ),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 128),
    "max_target_positions": 64, "max_source_positions": 32, "type_vocab_size": 2, "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    # Latent attention and sparse indexers.
    "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8,
    # Experts.
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(
        [
            "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace",
            "num_dense_layers",
        ],
        1,
    ),
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 64,
    # State spaces and linear attention.
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 8, "state_size": 8,
    "ssm_state_size": 8, "chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    # Encoders of images and sounds.
    "patch_size": 4, "image_size": 16, "num_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "num_mel_bins": 16, "num_filters": 2, "base_channels": 32,
}  # fmt: skip
"""Field name -> tiny value. A field that a config does not have is left out."""

_ABSENT_STAYS_ABSENT = {
    "sliding_window", "attention_chunk_size", "shared_intermediate_size", "q_lora_rank", "lru_width",
    "num_shared_experts", "n_shared_experts", "num_global_key_value_heads", "global_head_dim",
}  # fmt: skip
"""Fields whose default None or 0 means that the model has no such part."""

_ONE_STAYS_ONE = {
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
    "num_key_value_heads", "qk_rope_head_dim",
}  # fmt: skip
"""Fields whose default 0 or 1 chooses another form of the model: no experts, multi-query attention."""

DROP = object()
"""As an override: leave the field at the config's default."""


def tiny_config(cls: type, overrides: Mapping[str, Any] | None = None) -> Any:
    """A tiny instance of a config class; ``overrides`` win, and a mapping in them is for the sub-config of its name."""
    return cls(**_arguments(cls, dict(overrides or {})))


def _arguments(cls: type, overrides: dict[str, Any]) -> dict[str, Any]:
    fields = {f.name: _default(f) for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    try:
        sample = cls()
    except Exception:  # a config without usable defaults; its class still names its parts
        sample = None
    arguments: dict[str, Any] = {}
    for name, default in fields.items():
        if name in SIZES:
            if default in (None, 0) and name in _ABSENT_STAYS_ABSENT:
                continue
            keep = name in _ONE_STAYS_ONE and default in (0, 1) and default is not False
            arguments[name] = default if keep else SIZES[name]
            if isinstance(default, list | tuple) and not isinstance(SIZES[name], list | tuple):
                arguments[name] = type(default)([SIZES[name]] * len(default))
    if fields.get("kv_lora_rank") and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS  # latent attention expands to as many key heads as query heads
    arguments.update(_small_token_ids(fields))
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        made = getattr(sample, name, None)
        part = type(made) if made is not None else part
        if dataclasses.is_dataclass(part) and part.__name__ not in ("AutoConfig", "PreTrainedConfig"):
            given = overrides.get(name)
            if given is None or isinstance(given, Mapping):
                arguments[name] = tiny_config(part, given)
                overrides.pop(name, None)
    arguments.update(_one_layer_of_each_kind(fields, sample))
    arguments.update(_short_sections(sample))
    arguments.update(overrides)
    return {name: value for name, value in arguments.items() if value is not DROP}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _small_token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens beyond the tiny vocabulary move to its end, each to an id of its own."""
    moved: dict[str, Any] = {}
    free = VOCABULARY - 1
    for name, default in fields.items():
        if name == "pad_token_id":
            moved[name] = None if default is None else 0
        elif name == "eos_token_id" and isinstance(default, list):
            moved[name] = [2]
        elif type(default) is int and default >= VOCABULARY and name.endswith(("_id", "_index")):
            moved[name] = free
            free -= 1
    return moved


def _one_layer_of_each_kind(fields: Mapping[str, Any], sample: Any) -> dict[str, Any]:
    """A hybrid keeps one layer of every kind, four kinds at most."""
    chosen: dict[str, Any] = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(sample, name, None) or ())) if name in fields else []
        if len(kinds) > 1:
            chosen[name] = kinds[:4]
    if not chosen:
        return {}
    count = max(LAYERS, *(len(kinds) for kinds in chosen.values()))
    filled = {name: (kinds + kinds[-1:] * count)[:count] for name, kinds in chosen.items()}
    return {"num_hidden_layers": count, **filled} if "layer_types" in chosen or count > LAYERS else filled


def _short_sections(sample: Any) -> dict[str, Any]:
    """Rotary sections (time, height, width) that fill the tiny head's half."""
    rope = getattr(sample, "rope_parameters", None)
    if not isinstance(rope, Mapping) or not rope.get("mrope_section"):
        return {}
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    side = half * 3 // 8
    return {"rope_parameters": {**rope, "mrope_section": [half - 2 * side, side, side]}}
