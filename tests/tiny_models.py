"""Tiny random models of transformers, built inline: nothing is downloaded."""

from __future__ import annotations

import functools

import torch
import transformers

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Another prompt changes the next logits by 150 % of their norm and 4 bits change them by 3 to 8 %, so that errors
    # show. At 0.02, the default, attention hardly matters; at 0.3, 4 bits change the logits by 20 to 40 %.
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128, "init_std": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS = {
    "llama": ("Llama", SIZES),
    "assistant": ("Llama", {**SIZES, "num_hidden_layers": 1}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 24}),
    "gemma2": ("Gemma2", {**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": False}),
    "gpt_oss": ("GptOss", {**SIZES, **EXPERTS, "sliding_window": 24}),
    "jamba": ("Jamba", {
        **SIZES, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_dt_rank": 8,
    }),
    "bamba": ("Bamba", {
        **SIZES, **MAMBA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    }),
    "qwen3_next": ("Qwen3Next", {
        **SIZES, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "lfm2": ("Lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "t5": ("T5", {
        "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "initializer_factor": 1.0, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }),
    "bart": ("Bart", {**SEQ2SEQ, "max_position_embeddings": 128, "forced_eos_token_id": None}),
    "whisper": ("Whisper", {
        **SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }),
}  # fmt: skip
"""Name -> first part of the class names, and the arguments of its config."""


def build(name: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A random model of a kind that `CONFIGS` lists."""
    prefix, arguments = CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**arguments, **changes})
    made = getattr(transformers, prefix + ("ForConditionalGeneration" if config.is_encoder_decoder else "ForCausalLM"))
    if name == "whisper":  # its own `generate` is about cutting audio; here the common one is enough
        made = type("PlainWhisper", (made,), {"generate": transformers.GenerationMixin.generate})
    torch.manual_seed(0)
    return made(config).to(dtype).eval()


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The one instance of a kind that tests share; they leave it as it was."""
    return build(name, dtype)


@functools.cache
def compiled(name: str, options: tuple, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The shared instance, compiled with the backend; for options see `dict.items`."""
    return torch.compile(model(name, dtype), backend="mikv", options=dict(options))


def prompt(batch: int = 1, tokens: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))
