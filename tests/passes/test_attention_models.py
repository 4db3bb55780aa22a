"""Attention of tiny random Hugging Face decoders: every record has the meaning of the model's own computation."""

import dataclasses

import canonical_oracle
import pytest
import torch

from mikv_compile.passes import Attention, find_attentions

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "n_embed": 32, "n_embd": 32, "d_model": 32, "num_hidden_layers": 1,
    "n_layer": 1, "n_layers": 1, "num_layers": 1, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "ffn_dim": 32,
    "rotary_dim": 4, "max_position_embeddings": 32, "n_positions": 32, "n_ctx": 32, "max_seq_len": 32,
    "num_local_experts": 2, "num_experts_per_tok": 1, "attention_types": [[["global"], 1]],
    "layer_types": ["full_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

QUICK = [("llama", "eager"), ("bloom", None), ("xglm", None), ("gpt_neo", None), ("gpt_oss", None), ("gemma2", None)]
_BOTH = (
    "gpt2", "gpt_neox", "gpt_bigcode", "falcon", "opt", "phi", "phi3", "qwen2", "qwen3", "mistral", "mixtral", "gemma",
    "olmo2", "stablelm", "cohere", "granite", "starcoder2", "smollm3", "glm4", "biogpt",
)  # fmt: skip
_EAGER = ("gpt_neox_japanese", "mpt", "codegen", "gptj", "roformer", "rembert", "megatron-bert", "trocr")
SLOW = [
    ("llama", "sdpa"),
    *((name, attention) for name in _BOTH for attention in ("sdpa", "eager")),
    *((name, None) for name in _EAGER),
]


def build(name, attention):
    """A model with random weights; whatever its configuration has of `SIZES` is small."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(SIZES)
    config = kind(**{key: value for key, value in SIZES.items() if key in known})
    config.is_decoder = True
    torch.manual_seed(0)
    extra = {} if attention is None else {"attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **extra).eval()


def check_model(name, attention):
    """Capture prefill and a chunk of a batch of two, and check every attention in every graph."""
    model = build(name, attention)
    seen = []

    def backend(gm, example_inputs):
        def run(*args):
            copies = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
            seen.append((gm, copies, find_attentions(gm.graph)))
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    forward = torch.compile(model.forward, backend=backend)
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        for part in (ids[:, :5], ids[:, 5:]):
            cache = forward(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    assert [len(found) for _, _, found in seen if found] == [1, 1]
    for gm, args, found in seen:
        assert all(isinstance(record, Attention) for record in found), found
        canonical_oracle.check(gm, args, found)


@pytest.mark.parametrize(("name", "attention"), QUICK)
def test_model(name, attention):
    check_model(name, attention)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), SLOW)
def test_more_models(name, attention):
    check_model(name, attention)
