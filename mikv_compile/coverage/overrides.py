"""What the generic way of shrinking does not know about single models. Data only; the key is the architecture's name.

A name without a prefix holds for every kind of that name, unless an entry with the prefix exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mikv_compile.coverage.shrink import DROP, FEED_FORWARD, HEAD_DIM, HEADS, HIDDEN, VOCABULARY


@dataclass(frozen=True)
class Override:
    """Everything that one model needs beyond the generic way."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Config fields; a mapping is for the sub-config of its name."""
    features: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Random float inputs of the prefill by shape; for an encoder-decoder they replace the encoder's token ids."""
    cache_argument: str = "past_key_values"
    """Argument and output attribute that hold the cache."""
    own_cache: bool = False
    """The model makes its own kind of cache; none is passed to the first call."""
    use_cache: str = "use_cache"
    """Argument that turns the cache on."""
    codebooks: bool = False
    """Token ids have one row per codebook."""
    whole_history: bool = False
    """Every call takes all token ids so far."""
    language: str | None = None
    """Argument of `set_default_language`."""
    keep_roles: bool = False
    """Leave `is_decoder` and `is_encoder_decoder` of the config alone."""
    repeat_features: bool = False
    """Later calls get the features as well."""
    columns: int | None = None
    """Token ids have one column per codebook: `[1, T, columns]`."""
    skip: str | None = None
    """Why there is nothing to run."""


_GEMMA3N = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": FEED_FORWARD, "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip

_QWEN4 = {
    "hc_lowrank": 16, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip

_DOTS3 = {
    "head_dim": 24, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    "swa_qk_rope_head_dim": 8,
}  # fmt: skip

_ZAMBA = {
    "num_hidden_layers": 3, "num_key_value_heads": HEADS,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
}  # fmt: skip

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE_HALF = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}

_SMALL_ENCODER = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": FEED_FORWARD,
}  # fmt: skip

_BERT_DECODER = {
    "model_type": "bert", **_SMALL_ENCODER, "vocab_size": VOCABULARY, "is_decoder": True, "add_cross_attention": True,
}  # fmt: skip

_INNER = "needs an image in every call; its generate() calls an inner language model"
_DRAFTER = "a drafter: reads the keys and values of the model it drafts for, has no cache of its own"

OVERRIDES: dict[str, Override] = {
    # Latent attention.
    "bailing_hybrid": Override({"layer_group_size": 2}),
    "longcat_flash": Override(
        {
            "ffn_hidden_size": FEED_FORWARD, "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
            "head_dim": 8, "num_layers": 2,
        }
    ),
    "dots3_note_text": Override(_DOTS3),
    # State spaces, linear attention and hybrids.
    "bamba": Override({"attn_layer_indices": [1]}),
    "falcon_h1": Override({"mamba_d_ssm": 128, "mamba_d_head": 32}),
    "granitemoehybrid": Override({"layer_types": ["linear_attention", "full_attention"]}),
    "jamba": Override(
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    ),
    "lfm2_moe": Override({"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": Override(cache_argument="cache_params"),
    "mamba2": Override({"num_heads": 8, "head_dim": 16, "n_groups": 1}, cache_argument="cache_params"),
    "falcon_mamba": Override(cache_argument="cache_params"),
    "minimax": Override({"block_size": 4}, own_cache=True),
    "recurrent_gemma": Override({"block_types": ("recurrent", "attention")}),
    "blt": Override(skip="a composite whose config describes no cache: DynamicCache(config=...) fails on it"),
    "rwkv": Override(cache_argument="state", own_cache=True),
    "xlstm": Override(skip="recurrent: has no attention"),
    "zamba": Override(_ZAMBA),
    "zamba2": Override({**_ZAMBA, "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 8}),
    # Older decoders.
    "cpmant": Override(
        {"dim_ff": FEED_FORWARD, "prompt_length": 2, "segment_types": 4, "dim_head": HEAD_DIM}, whole_history=True
    ),
    "ctrl": Override({"dff": FEED_FORWARD}),
    "gpt_neo": Override({"attention_types": [[["global", "local"], 1]]}),
    "reformer": Override(
        {
            "num_hidden_layers": 2, "attention_head_size": 16, "attn_layers": ["local", "local"],
            "feed_forward_size": FEED_FORWARD, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
            "num_buckets": 4, "axial_pos_embds": False,
        },
        cache_argument="past_buckets_states",
        own_cache=True,
    ),
    "xlm": Override({"emb_dim": HIDDEN, "n_words": VOCABULARY}),
    "xlnet": Override(
        {"d_inner": FEED_FORWARD, "mem_len": 64}, cache_argument="mems", own_cache=True, use_cache="use_mems"
    ),
    "xmod": Override({"default_language": "en_XX"}, language="en_XX"),
    # Experts.
    "dbrx": Override(
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "dots1": Override({"n_routed_experts": 4, "n_shared_experts": 1}),
    "hunyuan_v1_moe": Override({"num_experts": 4, "moe_topk": 2, "num_experts_per_tok": 2}),
    "qwen4_exp_text": Override(_QWEN4),
    "vlm:qwen4_exp": Override({"text_config": _QWEN4}),
    # Shared keys and values, special rotary settings.
    "cohere_compass_text": Override(
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    ),
    "gemma3n_text": Override(_GEMMA3N),
    "vlm:gemma3n": Override({"text_config": _GEMMA3N}),
    "gemma4_assistant": Override(skip=_DRAFTER),
    "gemma4_unified_assistant": Override(skip=_DRAFTER),
    # Sound and music.
    "musicgen": Override(codebooks=True, keep_roles=True),
    "musicgen_melody": Override(codebooks=True, keep_roles=True),
    "moshi": Override(keep_roles=True),
    "seq2seq:whisper": Override(features={"input_features": (1, 16, 64)}),
    "seq2seq:moonshine": Override(features={"input_values": (1, 4000)}),
    "seq2seq:speech_to_text": Override(features={"input_features": (1, 32, 80)}),
    # Images and text.
    **dict.fromkeys(
        [
            "vlm:qwen2_vl", "vlm:qwen2_5_vl", "vlm:hunyuan_vl", "vlm:glm_ocr", "vlm:paddleocr_vl",
            "vlm:qwen2_5_omni_thinker",
        ],
        Override({"text_config": {"rope_parameters": _MROPE}}),
    ),
    **dict.fromkeys(
        ["vlm:glm4v", "vlm:glm4v_moe", "vlm:glm46v"], Override({"text_config": {"rope_parameters": _MROPE_HALF}})
    ),
    "vlm:chameleon": Override({"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}}),
    "vlm:emu3": Override(
        {"vocabulary_map": {"<|extra_200|>": 100, "<image>": 101, "<|visual token 000000|>": 102}}
    ),
    "vlm:step3p7": Override({"text_config": {"sliding_window": 8}}),
    "vlm:cohere_compass": Override(
        {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}}
    ),
    "vlm:deepseek_ocr2": Override(
        {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1}}
    ),
    "vlm:diffusion_gemma": Override(
        {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}}
    ),
    "vlm:dots3_note": Override(
        {
            "text_config": _DOTS3,
            "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
            "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        }
    ),
    "vlm:ernie4_5_vl_moe": Override(
        {
            "text_config": {
                "moe_intermediate_size": [32, 32], "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
            }
        }
    ),
    "vlm:fun_asr_nano": Override({"adaptor_config": {"intermediate_size": HIDDEN // 4}}),
    "vlm:glm5_next": Override({"text_config": {"index_kpool": 2, "linear_head_dim": 16, "linear_num_heads": 4}}),
    "vlm:granite4_vision": Override({"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"}),
    "vlm:granite_docling": Override({"vision_config": {"out_hidden_size": HIDDEN}}),
    "vlm:inkling2": Override({"vision_config": {"text_hidden_size": HIDDEN}}),
    "vlm:kosmos-2.5": Override({"text_config": {"embed_dim": HIDDEN, "layers": 2}}),
    "vlm:kyutai_speech_to_text": Override({"codec_config": DROP}, columns=33),
    "vlm:molmo2": Override(
        {"vision_config": {"image_size": [16, 16]}, "adapter_config": {"vision_feature_layer": [1, 0]}}
    ),
    "vlm:muse_spark": Override({"audio_config": {"num_hidden_layers": 4, "out_hidden_size": HIDDEN}}),
    "vlm:nemo_speechlm": Override({"word_timestamp_config": {"audio_hidden_size": HIDDEN}}),
    "vlm:nemotron_h_omni": Override({"vision_config": {"video_temporal_patch_size": 2}}),
    "vlm:blip": Override(skip="its forward takes no cache; generate() calls an inner text decoder"),
    **dict.fromkeys(["vlm:blip-2", "vlm:instructblip", "vlm:instructblipvideo", "vlm:kosmos-2"], Override(skip=_INNER)),
    "vlm:idefics": Override(features={"pixel_values": (1, 1, 3, 16, 16)}, repeat_features=True),
    "vlm:pix2struct": Override(features={"flattened_patches": (1, 8, 770)}),
    "vlm:pp_formulanet": Override(
        {
            "vision_config": {
                "post_conv_out_channels": HIDDEN, "post_conv_in_channels": HIDDEN, "output_channels": HIDDEN,
                "decoder_hidden_size": HIDDEN,
            }
        },
        features={"pixel_values": (1, 3, 16, 16)},
    ),
    "vlm:vision-encoder-decoder": Override(
        {
            "encoder": {"model_type": "vit", **_SMALL_ENCODER, "image_size": 16, "patch_size": 4},
            "decoder": _BERT_DECODER,
        },
        features={"pixel_values": (1, 3, 16, 16)},
    ),
    "seq2seq:encoder-decoder": Override(
        {"encoder": {"model_type": "bert", **_SMALL_ENCODER, "vocab_size": VOCABULARY}, "decoder": _BERT_DECODER}
    ),
    "seq2seq:speech-encoder-decoder": Override(
        {"encoder": {"model_type": "wav2vec2", **_SMALL_ENCODER}, "decoder": _BERT_DECODER},
        features={"input_values": (1, 4000)},
    ),
    "seq2seq:dia": Override(
        {
            "decoder_config": {
                "num_channels": 9, "cross_hidden_size": HIDDEN, "cross_head_dim": HEAD_DIM,
                "cross_num_attention_heads": HEADS, "cross_num_key_value_heads": HEADS,
            }
        }, columns=9),
    "seq2seq:canary": Override(features={"input_features": (1, 64, 16)}),
    "seq2seq:cohere_asr": Override(features={"input_features": (1, 64, 16)}),
    "seq2seq:moonshine_streaming": Override(
        {"num_key_value_heads": HEADS}, features={"input_values": (1, 4000)}
    ),
    "seq2seq:speecht5": Override(features={"input_values": (1, 4000)}),
    "vlm:pi0": Override(skip="predicts robot actions by flow matching: no tokens, no decoding"),
    "vlm:qwen2_5_omni": Override(skip="has no forward of its own; its thinker is in the list"),
    "vlm:qwen3_omni_moe": Override(skip="has no forward of its own; its thinker is in the list"),
}  # fmt: skip
