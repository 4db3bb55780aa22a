import pytest
import torch
from test_rewrite import check, rewritten

from mikv_compile.passes import analyze

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_decode_with_dynamic_cache(attention):
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=128,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    seen = []

    def backend(gm, example_inputs):
        analysis = analyze(gm)
        result = rewritten(gm)
        seen.append((analysis, result))

        def call(*args):
            check(gm, result, args)
            return gm.forward(*args)

        return call

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        for tokens in (12, 1, 1, 1):
            compiled(input_ids=torch.randint(0, 128, (1, tokens)), past_key_values=cache)
    assert len(seen) == 3  # prefill, decode, decode with a symbolic length
    for i, (analysis, result) in enumerate(seen):
        assert analysis.declined == () and result.declined == ()
        assert [site.reads[0].groups for site in analysis.sites] == [2] * config.num_hidden_layers
        assert [site.born for site in analysis.sites] == [i == 0] * config.num_hidden_layers
        assert {site.reads[0].attention.form for site in analysis.sites} == {attention}
        assert {site.reads[0].attention.scale for site in analysis.sites} == {0.25}
        assert len(result.sites) == config.num_hidden_layers
