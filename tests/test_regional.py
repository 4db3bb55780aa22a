"""`mikv_compile.compile(model, regional=True)`: one graph for all layers, and nothing else different."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import mikv_compile
from mikv_compile import MikvError, OptionError, cache_report, graph_reports

transformers = pytest.importorskip("transformers")

from tiny_models import SIZES, build, prompt  # noqa: E402  (needs transformers)
from transformers import DynamicCache  # noqa: E402

FULL = {"budget": 1.0, "lower": "eager"}
INT4 = {"tiers": "int4", "window": 0, "sinks": 0, "flush_every": 1, "quantizer": "mikv", "lower": "eager"}

LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
HYBRID = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
OTHERS = {
    "gemma3": ("Gemma3", "Gemma3TextConfig", {"sliding_window": 24, "layer_types": KINDS * 2, "num_hidden_layers": 4}),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", LATENT),
    "gpt_neox": ("GPTNeoX", "GPTNeoXConfig", {"num_key_value_heads": 4}),
    "gemma3n": ("Gemma3n", "Gemma3nTextConfig", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": KINDS * 2, "sliding_window": 24,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }),
}  # fmt: skip


def made(name: str, **changes) -> torch.nn.Module:
    """A new model, as all models here are changed in place."""
    if name not in OTHERS:
        return build(name, **changes)
    prefix, config, arguments = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**SIZES, **arguments, **changes})
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


def generate(runner, inputs, tokens=6, **kwargs):
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **kwargs}
    return runner.generate(inputs, return_dict_in_generate=True, output_logits=True, **arguments)


def counted(call) -> int:
    """Graphs that Dynamo makes in a call; a graph break counts as an error."""
    torch._dynamo.utils.counters.clear()
    call()
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same(got, want) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for g, w in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


# The same tokens and the same bytes as the whole model


@pytest.mark.parametrize(
    "name, graphs",
    [
        ("llama", 2),
        ("mistral", 2),
        ("gemma3", 4),  # two kinds of layers
        pytest.param("deepseek_v3", 4, marks=pytest.mark.slow),  # the first layer is dense, the others have experts
        ("gpt_neox", 2),
    ],
)
def test_same_tokens_and_bytes_as_the_whole_model(name, graphs):
    inputs = prompt(2, 40)
    model = made(name)
    want = generate(model, inputs)
    whole = generate(mikv_compile.compile(model, **FULL), inputs)
    torch._dynamo.reset()
    results = []
    assert (
        counted(lambda: results.append(generate(mikv_compile.compile(model, regional=True, **FULL), inputs))) == graphs
    )
    if name == "gemma3":
        assert {report.shared_by for report in graph_reports()[-graphs:]} == {(0, 2), (1, 3)}
    same(results[0], want)
    same(results[0], whole)
    assert cache_report(results[0].past_key_values) == cache_report(whole.past_key_values)
    assert all(layer.plan for layer in cache_report(whole.past_key_values).layers)
    if name != "deepseek_v3":
        assert not cache_report(whole.past_key_values).fallbacks


def test_encoder_decoder():
    model = made("bart")
    want = generate(model, prompt(2))
    got = generate(mikv_compile.compile(model, regional=True, **FULL), prompt(2))
    same(got, want)
    for part in ("self_attention_cache", "cross_attention_cache"):
        assert all(layer.plan for layer in cache_report(getattr(got.past_key_values, part)).layers)
    assert got.past_key_values.is_updated == {0: True, 1: True}


@pytest.mark.slow
def test_layers_that_hand_keys_to_other_layers():
    """Keys that leave a layer other than through the cache leave its graph, and stay dense."""
    model = made("gemma3n")
    want = generate(model, prompt(2, 40))
    same(generate(mikv_compile.compile(model, regional=True, **FULL), prompt(2, 40)), want)
    assert any(report.declined for report in graph_reports()[-9:])


def test_hybrid():
    """States of other layers than attention are as in the dense model."""
    model = made("lfm2", **HYBRID)
    want = generate(model, prompt(2))
    got = generate(mikv_compile.compile(model, regional=True, **FULL), prompt(2))
    same(got, want)
    assert [layer.plan is not None for layer in cache_report(got.past_key_values).layers] == [True, True]


def test_compressed():
    """Four bits: not the dense model's numbers, but those of the whole model's graph."""
    model = made("llama")
    whole = generate(mikv_compile.compile(model, **INT4), prompt(2, 40))
    got = generate(mikv_compile.compile(model, regional=True, **INT4), prompt(2, 40))
    same(got, whole)
    assert cache_report(got.past_key_values) == cache_report(whole.past_key_values)


def test_static_cache():
    model = made("llama")
    want = generate(model, prompt(2), cache_implementation="static")
    got = generate(mikv_compile.compile(model, regional=True, **FULL), prompt(2), cache_implementation="static")
    same(got, want)
    assert all(layer.plan for layer in cache_report(got.past_key_values).layers)


@pytest.mark.slow
def test_inductor():
    model = made("llama", num_hidden_layers=3)
    want = generate(model, prompt())
    got = []
    assert counted(lambda: got.append(generate(mikv_compile.compile(model, regional=True, budget=1.0), prompt()))) == 2
    same(got[0], want)


# One graph for all layers


@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=pytest.mark.slow), 30])
def test_the_number_of_graphs_does_not_depend_on_the_number_of_layers(layers):
    model = mikv_compile.compile(made("llama", num_hidden_layers=layers), regional=True, **FULL)
    assert counted(lambda: generate(model, prompt())) == 2
    assert counted(lambda: generate(model, prompt())) == 0
    assert [report.shared_by for report in graph_reports()[-2:]] == [tuple(range(layers))] * 2
    assert f"one layer, compiled for layers 0-{layers - 1}\n  layers 0-{layers - 1} (decode)" in str(
        graph_reports()[-1]
    )


def test_other_prompts_and_batches():
    model = made("llama", num_hidden_layers=10)
    plain = copy.deepcopy(model)
    mikv_compile.compile(model, regional=True, **FULL)
    graphs = []
    for batch, tokens in ((1, 20), (1, 33), (1, 50), (3, 20), (2, 41)):
        got = []
        graphs.append(counted(lambda: got.append(generate(model, prompt(batch, tokens)))))  # noqa: B023
        same(got[0], generate(plain, prompt(batch, tokens)))
    assert graphs[0] == 2 and graphs[1] == 1 and graphs[2] == 0 and graphs[4] == 0 and sum(graphs) <= 5


@pytest.mark.slow
def test_two_models_do_not_share_a_limit():
    """Dynamo counts graphs per code object: the tenth model is compiled as the first was."""
    for _ in range(10):
        model = mikv_compile.compile(made("llama", num_hidden_layers=1 + 1), regional=True, **FULL)
        assert counted(lambda: model(prompt())) == 1  # noqa: B023


# Ways to use the cache


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"assistant": True},
        pytest.param({"prompt_lookup_num_tokens": 2}, marks=pytest.mark.slow),
        pytest.param({"prefill_chunk_size": 7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ways_to_generate(kwargs):
    model = made("llama")
    batch = 2 if "num_beams" in kwargs or "prefill_chunk_size" in kwargs else 1
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = made("assistant")
    want = generate(model, prompt(batch), tokens=8, **kwargs)
    got = generate(mikv_compile.compile(model, regional=True, **FULL), prompt(batch), tokens=8, **kwargs)
    assert torch.equal(got.sequences, want.sequences)
    assert not cache_report(got.past_key_values).fallbacks


@torch.no_grad()
def test_a_cache_without_config_grows_by_layers():
    """`DynamicCache()` appends its entries in the first call, and is a list of handles afterwards."""
    model, plain = made("llama", num_hidden_layers=3), made("llama", num_hidden_layers=3)
    mikv_compile.compile(model, regional=True, **FULL)
    cache, dense = DynamicCache(), DynamicCache()
    for step in (prompt(2), prompt(2, 1), prompt(2, 3)):
        got = []
        assert counted(lambda: got.append(model(step, past_key_values=cache))) == 1  # noqa: B023
        want = plain(step, past_key_values=dense)
        torch.testing.assert_close(got[0].logits, want.logits, atol=1e-4, rtol=1e-4)
        assert got[0].past_key_values is cache
    assert len(cache.layers) == 3 and cache.get_seq_length() == 24
    cache.crop(-4)
    dense.crop(-4)
    got, want = (m(prompt(2, 1, 5), past_key_values=c).logits for m, c in ((model, cache), (plain, dense)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(prompt(2), use_cache=False).logits, plain(prompt(2), use_cache=False).logits)


# Indices


class Layer(torch.nn.Module):
    """Attention that may read another layer's entry, or compute with its number."""

    def __init__(self, layer_idx: int, reads: int | None = None, scaled: bool = False, first: bool = False) -> None:
        super().__init__()
        self.layer_idx, self.reads, self.scaled, self.first = layer_idx, reads, scaled, first
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x, past_key_values):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        k, v = past_key_values.update(k, v, self.layer_idx)
        if self.reads is not None:
            k, v = past_key_values.layers[self.reads].keys, past_key_values.layers[self.reads].values
        if self.first:
            x = x + past_key_values.get_seq_length()
        out = F.scaled_dot_product_attention(q, k, v)
        if self.scaled:
            out = out / (self.layer_idx + 1)
        return x + out.transpose(1, 2).reshape(x.shape)


class Stack(torch.nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, past_key_values):
        for layer in self.layers:
            x = layer(x, past_key_values=past_key_values)
        return x


@pytest.mark.parametrize(
    "layer",
    [
        lambda i: Layer(i),
        lambda i: Layer(i, reads=i - i % 2),  # both layers of a pair read the first one's keys
        lambda i: Layer(i, reads=i - 1 if i else 3),  # numbers that are all different, and not the layer's own
        lambda i: Layer(i, reads=0),
        lambda i: Layer(i, scaled=True),
        lambda i: Layer(i, first=True),  # the length of the first layer, which was written before
    ],
    ids=["own", "pairs", "others", "first", "computes", "length"],
)
@torch.no_grad()
def test_only_the_own_index_is_shared(request, layer):
    """Layers that ask for something else, or compute with their number, get graphs of their own."""
    model = Stack([layer(i) for i in range(4)])
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    xs = [torch.randn(2, n, 32) for n in (7, 1, 1)]
    config = made("assistant", num_hidden_layers=4).config
    cache, dense, got = DynamicCache(config=config), DynamicCache(config=config), []
    if model.layers[0].reads == 3:  # the last layer's entry, which the first call would find empty
        start = torch.randn(2, 2, 2, 3, 16)
        for made_cache in (cache, dense):
            made_cache.update(*start, 3)
    want = [model(x, dense) for x in xs]
    mikv_compile.compile(model, regional=True, **FULL)
    graphs = counted(lambda: got.extend(model(x, cache) for x in xs))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (graphs == 2) == ("[own]" in request.node.name)
    assert [entry.keys.shape for entry in cache.layers] == [entry.keys.shape for entry in dense.layers]


class Buffered(torch.nn.Module):
    """A layer that keeps its own preallocated cache, or takes and returns its past."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        if buffers:
            self.register_buffer("keys", torch.zeros(2, 2, 16, 16))
            self.register_buffer("values", torch.zeros(2, 2, 16, 16))

    def forward(self, x, at, past):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        if hasattr(self, "keys"):
            self.keys.index_copy_(2, at, k)
            self.values.index_copy_(2, at, v)
            mask = torch.arange(16) <= at[:, None]
            out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        else:
            past = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            out = F.scaled_dot_product_attention(q, *past, is_causal=x.shape[1] > 1)
        return x + out.transpose(1, 2).reshape(x.shape), past


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "returned"])
@torch.no_grad()
def test_caches_without_transformers(buffers):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([Buffered(buffers) for _ in range(10)])

    def run(module):
        pasts, outs, start = [(torch.zeros(2, 2, 0, 16),) * 2] * 10, [], 0
        for n in (6, 1, 1):
            torch.manual_seed(n)
            x, at = torch.randn(2, n, 32), torch.arange(start, start + n)
            for i, layer in enumerate(module):
                x, pasts[i] = layer(x, at, pasts[i])
            outs.append(x)
            start += n
        return outs, module if buffers else pasts

    want, _ = run(copy.deepcopy(layers))
    holder = torch.nn.Module()
    holder.layers = layers
    mikv_compile.compile(holder, regional=True, **FULL)
    results = []
    assert counted(lambda: results.append(run(layers))) <= 4
    got, caches = results[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    report = cache_report([list(layer.buffers()) for layer in caches] if buffers else caches)
    assert len(report.layers) == 10 and all(layer.plan for layer in report.layers)


# Options that count layers


@pytest.mark.parametrize("options", [{"layers": "0-1=fp; 3=int8"}, {"budget": "90kB"}], ids=str)
def test_plans_are_those_of_the_whole_model(options):
    options = {"window": 4, "sinks": 1, **options, "lower": "eager"}
    model = made("llama", num_hidden_layers=4)
    whole, got = (
        cache_report(
            generate(mikv_compile.compile(model, regional=r, **options), prompt(1, 300), tokens=3).past_key_values
        )
        for r in (False, True)
    )
    assert [layer.plan for layer in got.layers] == [layer.plan for layer in whole.layers]
    assert [layer.nbytes for layer in got.layers] == [layer.nbytes for layer in whole.layers]
    if options.get("budget") == "90kB":
        assert got.nbytes <= 90_000 and any(sum(layer.tokens) < layer.length for layer in got.layers)


@pytest.mark.parametrize("options", [{"layers": "0=fp"}, {"budget": "1MB"}], ids=str)
@pytest.mark.parametrize("name", ["t5", "lfm2"])
def test_options_that_count_layers_need_one_cache_per_layer(name, options):
    model = made(name, **(HYBRID if name == "lfm2" else {}))
    with pytest.raises(OptionError, match=r"counts the layers of the whole model.*regional=False"):
        generate(mikv_compile.compile(model, regional=True, lower="eager", **options), prompt())


def test_wrong_options():
    for regional in (False, True):
        with pytest.raises(OptionError, match="did you mean 'budget'"):
            mikv_compile.compile(made("llama"), regional=regional, budgets=1.0)
        with pytest.raises(OptionError, match="shares add up"):
            mikv_compile.compile(made("llama"), regional=regional, tiers="int8:0.7,int4:0.7")


def test_mode_goes_with_options():
    model = mikv_compile.compile(made("llama"), mode="max-autotune-no-cudagraphs", **FULL)
    assert torch.isfinite(generate(model, prompt()).logits[-1]).all()


# The module afterwards


def test_undo():
    model = made("llama")
    before = [dict(vars(module)) for module in model.modules()]
    assert mikv_compile.compile(model, regional=True, **FULL) is model
    generate(model, prompt())
    assert mikv_compile.uncompile(model) is model
    assert counted(lambda: generate(model, prompt())) == 0
    assert [vars(module).keys() for module in model.modules()] == [attributes.keys() for attributes in before]
    assert mikv_compile.uncompile(mikv_compile.compile(model, **FULL)) is model


def test_compiling_again_takes_the_new_options():
    model = mikv_compile.compile(made("llama"), regional=True, **FULL)
    full = generate(model, prompt(1, 64))
    other = generate(mikv_compile.compile(model, regional=True, **INT4), prompt(1, 64))
    assert cache_report(other.past_key_values).nbytes < cache_report(full.past_key_values).nbytes / 2


def test_copies_are_not_compiled():
    model = mikv_compile.compile(made("llama"), regional=True, **FULL)
    want = model(prompt()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = []
        assert counted(lambda: got.append(other(prompt()).logits)) == 0  # noqa: B023
        torch.testing.assert_close(got[0], want)
        assert other.model.layers[0].forward.__self__ is other.model.layers[0]
        assert counted(lambda: mikv_compile.compile(other, regional=True, **FULL)(prompt())) == 1  # noqa: B023


def test_what_cannot_be_compiled_by_layers():
    with pytest.raises(MikvError, match=r"no torch.nn.ModuleList.*regional=False"):
        mikv_compile.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), regional=True)
    model = made("llama")
    with pytest.raises(MikvError, match="compiled as a whole"):
        mikv_compile.compile(mikv_compile.compile(model), regional=True)
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(MikvError, match="a forward of its own"):
        mikv_compile.compile(model, regional=True)
    model = made("llama")
    model.model.layers[0].forward = lambda x, **kwargs: x
    with pytest.raises(MikvError, match="a forward of its own"):
        mikv_compile.compile(model, regional=True)
    assert "forward" not in vars(model.model.layers[1])
    pairs = Stack([Layer(0), Layer(2)])
    for layer in pairs.layers:
        layer.second = Layer(layer.layer_idx + 1)
    with pytest.raises(MikvError, match=r"several entries of the cache \(\[0, 1\]\)"):
        mikv_compile.compile(pairs, regional=True)


def test_offloaded_cache():
    model = mikv_compile.compile(made("llama"), regional=True, **FULL)
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(MikvError, match="offloaded"):
        model(prompt(), past_key_values=cache)


# Hooks, gradients, other tracers


@torch.no_grad()
def test_hooks(capfd):
    model, seen = made("llama"), []
    want = copy.deepcopy(model)(prompt(), output_hidden_states=True)
    mikv_compile.compile(model, regional=True, **FULL)
    model(prompt())
    hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append("layer"))
    model(prompt())
    assert seen == ["layer"] and "hooks" not in capfd.readouterr().err
    hook.remove()
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    cache = model(prompt()).past_key_values
    assert seen == ["layer", "mlp"] and "have hooks" in capfd.readouterr().err
    assert [layer.plan is not None for layer in cache_report(cache).layers] == [True, False]
    hook.remove()
    torch.testing.assert_close(model(prompt(), output_hidden_states=True).hidden_states, want.hidden_states)


def test_attentions_are_collected():
    model = made("llama", attn_implementation="eager")
    want = model(prompt(), output_attentions=True).attentions
    mikv_compile.compile(model, regional=True, **FULL)
    torch.testing.assert_close(model(prompt(), output_attentions=True).attentions, want)


def test_gradients():
    """A call that records gradients is left dense; checkpointed layers run as they are."""
    model = made("llama")
    model(prompt(), labels=prompt()).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    mikv_compile.compile(model, regional=True, **FULL)
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        outputs = []
        graphs = counted(lambda: outputs.append(model(prompt(), labels=prompt())))  # noqa: B023
        assert graphs == (0 if checkpointed else 1)
        output = outputs[0]
        assert not any(layer.plan for layer in cache_report(output.past_key_values).layers)
        output.loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_other_tracers_see_the_layers_as_they_are():
    model = made("llama")
    want = model(prompt()).logits
    mikv_compile.compile(model, regional=True, **FULL)
    got = []
    assert counted(lambda: got.append(torch.compile(model, backend="eager")(prompt(), use_cache=False).logits)) == 1
    torch.testing.assert_close(got[0], want)
    explained = mikv_compile.explain(model, prompt())
    assert len(explained.graphs) == 1 and explained.sites == 2
