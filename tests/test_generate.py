"""Ways to call ``generate``: all of them run compiled code and leave a compressed cache."""

import threading

import pytest
import torch

import mikv_compile
from mikv_compile import KVTensor, cache_report

transformers = pytest.importorskip("transformers")

OPTIONS = {"lower": "eager", "budget": 1.0}


def llama(attention="sdpa", **config):
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=64,
        vocab_size=128, max_position_embeddings=1024, attn_implementation=attention, initializer_range=0.3, **config,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(made).eval()


def prompt(batch=1, tokens=20):
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generate(model, ids, tokens=12, **kwargs):
    out = model.generate(
        ids,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=0,
        **kwargs,
    )
    return out.sequences, out.past_key_values


def ways():
    def wrapper(model):
        return torch.compile(model, backend="mikv", options=OPTIONS)

    def in_place(model):
        model.compile(backend="mikv", options=OPTIONS)
        return model

    def forward(model):
        model.forward = torch.compile(model.forward, backend="mikv", options=OPTIONS)
        return model

    return [wrapper, in_place, forward]


@pytest.mark.parametrize("way", ways(), ids=lambda w: w.__name__)
def test_every_way_to_compile_compresses_and_gives_the_same_tokens(way):
    want, dense = generate(llama(), prompt())
    model = way(llama())
    torch._dynamo.utils.counters.clear()
    got, cache = generate(model, prompt())
    assert torch.equal(got, want)
    assert type(dense.layers[0].keys) is torch.Tensor
    assert all(isinstance(layer.keys, KVTensor) for layer in cache.layers)
    assert cache_report(cache).fallbacks == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_original_model_stays_dense_and_is_restored():
    model = llama()
    fast = torch.compile(model, backend="mikv", options=OPTIONS)
    seen = []

    def other_thread():
        seen.append(generate(model, prompt(), tokens=4)[1])
        seen.append(generate(fast, prompt(), tokens=4)[1])

    class Interrupt(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            if not seen:
                thread = threading.Thread(target=other_thread)
                thread.start()
                thread.join()
            return scores

    processors = transformers.LogitsProcessorList([Interrupt()])
    _, cache = generate(fast, prompt(), tokens=4, logits_processor=processors)
    assert type(seen[0].layers[0].keys) is torch.Tensor
    for compressed in (cache, seen[1]):  # the other thread's end did not end this one's compiled calls
        assert isinstance(compressed.layers[0].keys, KVTensor) and cache_report(compressed).fallbacks == {}
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError):
        fast.generate(prompt(), max_new_tokens=-1)
    assert model._compiled_call_impl is None


def test_other_backends_are_left_alone():
    model = llama()
    _, cache = generate(torch.compile(model, backend="eager"), prompt(), tokens=3)
    assert type(cache.layers[0].keys) is torch.Tensor


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch(attention):
    ids = prompt(batch=3)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[2, :3] = 0
    want, _ = generate(llama(attention), ids, attention_mask=mask)
    got, cache = generate(torch.compile(llama(attention), backend="mikv", options=OPTIONS), ids, attention_mask=mask)
    assert torch.equal(got, want)
    assert isinstance(cache.layers[1].values, KVTensor)


def test_beam_search_reorders_without_reading():
    want, _ = generate(llama(), prompt(batch=2), num_beams=3)
    got, cache = generate(torch.compile(llama(), backend="mikv", options=OPTIONS), prompt(batch=2), num_beams=3)
    assert torch.equal(got, want)
    assert isinstance(cache.layers[0].keys, KVTensor) and cache_report(cache).fallbacks == {}


def test_default_options_generate_close_to_dense_and_smaller():
    model = llama(head_dim=64)
    ids = prompt(tokens=600)
    _, cache = generate(torch.compile(model, backend="mikv", options={"lower": "eager"}), ids, tokens=80)
    report = cache_report(cache)
    assert report.ratio < 0.18 and report.layers[0].length == 679
    with torch.no_grad():
        dense = model(ids, use_cache=True).past_key_values
    for layer, exact in zip(cache.layers, dense.layers, strict=True):
        error = layer.keys.dequantize()[:, :, :600] - exact.keys
        assert error.norm() < 0.1 * exact.keys.norm()


def test_explain_and_reports():
    model = llama()
    told = mikv_compile.explain(model, prompt(tokens=200), options={"preset": "mikv"})
    assert told.sites == 2 and told.declined == [] and len(told.graphs) == 1
    text = str(told)
    assert "layers 0-1 (prefill)" in text and "2 compressed" in text and "policy snapkv" in text
    assert told.cache.layers[0].length == 200

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    told = mikv_compile.explain(Odd(), torch.randn(1, 2, 5, 8))
    assert told.sites == 0 and told.cache is None and told.declined


def test_cache_report_of_a_dense_cache():
    model = llama()
    with torch.no_grad():
        cache = model(prompt()).past_key_values
    report = cache_report(cache)
    assert len(report.layers) == 2 and report.ratio == 1.0 and "dense, 20 tokens" in str(report)
    assert cache_report(None).layers == ()


def test_explain_answers_any_number_of_times():
    model = llama()
    for _ in range(10):
        assert mikv_compile.explain(model, prompt()).sites == 2


def test_two_models_in_one_process():
    """Dynamo shares code between models of one class; their attention scales differ."""
    for head_dim in (16, 32, 64):
        model = llama(head_dim=head_dim)
        want, _ = generate(model, prompt())
        got, cache = generate(torch.compile(model, backend="mikv", options=OPTIONS), prompt())
        assert torch.equal(got, want)
        assert isinstance(cache.layers[0].keys, KVTensor), head_dim


def test_explain_of_a_compiled_model():
    fast = torch.compile(llama(), backend="mikv", options=OPTIONS)
    assert mikv_compile.explain(fast, prompt()).sites == 2


class FirstCallWithoutPast(torch.nn.Module):
    """Many a hand-written decoder: the first call returns its keys as they are, later ones join them to the past."""

    def forward(self, q, k, v, past=None):
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), (k, v)


def test_explain_says_that_a_later_call_may_take_over_a_dense_cache():
    model, given = FirstCallWithoutPast(), [torch.randn(1, 2, 200, 16) for _ in "qkv"]
    with torch.no_grad():
        _, past = model(*given)
    hint = "A call that goes on from it may take it over"
    first = mikv_compile.explain(model, *given)
    assert not first.sites and hint in str(first)
    later = mikv_compile.explain(model, *(torch.randn(1, 2, 1, 16) for _ in "qkv"), past)
    assert later.sites == 1 and hint not in str(later)
