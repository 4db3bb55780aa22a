"""Everything that transformers' `generate` and its caches can do, compressed against dense, on tiny random models."""

from __future__ import annotations

import copy

import pytest
import torch

from mikv_compile import cache_report, graph_reports, report

transformers = pytest.importorskip("transformers")

from tiny_models import build, compiled, model, prompt  # noqa: E402  (needs transformers)
from transformers import DynamicCache  # noqa: E402
from transformers.generation import GenerationMode  # noqa: E402

FULL = {"budget": 1.0, "lower": "eager"}
INT4 = {"tiers": "int4", "window": 0, "sinks": 0, "flush_every": 1, "quantizer": "mikv", "lower": "eager"}


def named(value) -> str | None:
    """Readable ids of test cases."""
    return "full" if value is FULL else "int4" if value is INT4 else None


BOTH = pytest.mark.parametrize("options", [FULL, INT4], ids=["full", "int4"])


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo():
    """Instead of the reset around each test: the tests of this file share what is compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
    torch._dynamo.reset()


def fast(name: str, options: dict, dtype: torch.dtype = torch.float32):
    return compiled(name, tuple(options.items()), dtype)


def generate(runner, inputs, tokens=8, **kwargs):
    """Exactly `tokens` new tokens, with the raw logits of every step; equal random numbers in every call."""
    torch.manual_seed(0)
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **kwargs}
    return runner.generate(inputs, return_dict_in_generate=True, output_logits=True, **arguments)


def is_compressed(tensor) -> bool:
    return getattr(tensor, "store", None) is not None


def handles(cache) -> list[bool]:
    """Per layer that keeps keys and values: whether both are compressed."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [is_compressed(layer.keys) and is_compressed(layer.values) for layer in layers]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def check(got, want, options, exact=1e-3, close=0.2):
    """Full budget: equal tokens and logits. Otherwise logits are close for as long as both chose the same tokens.

    The first step comes from the prompt, which is attended exactly, so both begin alike: the second step, which reads
    the compressed cache, can always be compared. After the first token that differs there is nothing to compare.
    """
    assert got.sequences.shape == want.sequences.shape
    if options is FULL:
        assert torch.equal(got.sequences, want.sequences)
    beams = getattr(want, "beam_indices", None) is not None  # logits are per beam, and beams change places
    start = want.sequences.shape[1] - len(want.logits)
    same = torch.ones(want.logits[0].shape[0], dtype=torch.bool)
    compared = 0
    for step, (g, w) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert torch.isfinite(g).all()
        if step and not beams:
            column = start + step - 1
            same &= (got.sequences[:, column] == want.sequences[:, column]).cpu()
        if (options is not FULL and beams and step > 1) or not same.any():
            break
        assert relative(g[same], w[same]) < (exact if options is FULL else close), step
        compared += 1
    assert compared > 1


def agree(name, inputs, options, compressed=True, dtype=torch.float32, exact=1e-3, **kwargs):
    """Generate with the dense model and with the compiled one."""
    want = generate(model(name, dtype), inputs, **kwargs)
    got = generate(fast(name, options, dtype), inputs, **kwargs)
    check(got, want, options, exact=exact)
    assert not any(handles(want.past_key_values))
    if compressed:
        assert handles(got.past_key_values) and all(handles(got.past_key_values))
        assert not cache_report(got.past_key_values).fallbacks
    return got


# Modes of generate

LEFT_PADDED = torch.ones(3, 20, dtype=torch.long)
LEFT_PADDED[0, :6] = LEFT_PADDED[2, :3] = 0

MODES = {
    "greedy": (1, {}),
    "greedy batch": (3, {}),
    "sampling": (2, {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95}),
    "num_return_sequences": (2, {"do_sample": True, "num_return_sequences": 3}),
    "beam search": (2, {"num_beams": 3}),
    "beam search, several returned": (2, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}),
    "beam sample": (2, {"num_beams": 3, "do_sample": True, "top_k": 20}),
    "left padded": (3, {"attention_mask": LEFT_PADDED}),
    "left padded beams": (3, {"attention_mask": LEFT_PADDED, "num_beams": 2}),
    "chunked prefill": (2, {"prefill_chunk_size": 7}),
    "processors": (2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
}


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, options):
    batch, kwargs = MODES[mode]
    agree("llama", prompt(batch), options, **kwargs)


@BOTH
def test_prompt_lookup(options):
    """Candidates that repeat the prompt are read as a chunk; what is wrong about them is cropped away."""
    agree("llama", prompt(tokens=8).repeat(1, 4), options, prompt_lookup_num_tokens=3, tokens=12)


@BOTH
@pytest.mark.parametrize("helper", ["another", "the same"])
def test_assisted_generation(helper, options):
    """Both models are compiled, and both crop their caches. One helper is mostly wrong, one mostly right."""
    want = generate(model("llama"), prompt(), tokens=12)
    seen = []
    report._listeners.append(seen.append)
    try:
        assistant = fast("assistant" if helper == "another" else "llama", options)
        got = generate(fast("llama", options), prompt(), tokens=12, assistant_model=assistant)
    finally:
        report._listeners.remove(seen.append)
    check(got, want, options)
    assert all(handles(got.past_key_values))
    assert all(graph.rewritten for graph in seen)


@pytest.mark.parametrize(
    "mode, kwargs",
    [
        (GenerationMode.CONTRASTIVE_SEARCH, {"penalty_alpha": 0.6, "top_k": 4}),
        (GenerationMode.DOLA_GENERATION, {"dola_layers": "low"}),
        (GenerationMode.GROUP_BEAM_SEARCH, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
        (GenerationMode.CONSTRAINED_BEAM_SEARCH, {"num_beams": 2, "force_words_ids": [[5]]}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_modes_that_left_transformers(mode, kwargs):
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    if "/" in GENERATION_MODES_MAPPING[mode]:
        pytest.skip(f"moved to the hub repository {GENERATION_MODES_MAPPING[mode]}, whose code is not downloaded here")
    agree("llama", prompt(), FULL, **kwargs)


def contrastive(runner, input_ids, **_):
    """What contrastive search and its kin do with a cache: repeat each row per candidate, look, keep one, go on."""
    past, ids, seen = DynamicCache(config=runner.config), input_ids, []
    logits = runner(ids, past_key_values=past).logits[:, -1]
    for _ in range(6):
        candidates = logits.topk(3).indices
        past.batch_repeat_interleave(3)
        out = runner(candidates.view(-1, 1), past_key_values=past).logits[:, -1]
        best = out.view(*candidates.shape, -1).amax(-1).argmax(-1)
        rows = best + 3 * torch.arange(len(best))
        past.batch_select_indices(rows)
        logits = out[rows]
        seen.append(logits)
        ids = torch.cat([ids, candidates.gather(1, best[:, None])], 1)
    return ids, torch.stack(seen), past


@BOTH
def test_a_decoding_loop_of_ones_own(options):
    """`custom_generate` gets the original module; its calls are compiled all the same."""
    want, logits, _ = model("llama").generate(prompt(2), custom_generate=contrastive)
    got, seen, cache = fast("llama", options).generate(prompt(2), custom_generate=contrastive)
    assert all(handles(cache)) and not cache_report(cache).fallbacks
    if options is FULL:
        assert torch.equal(got, want)
    assert relative(seen[0], logits[0]) < (1e-4 if options is FULL else 0.2) and torch.isfinite(seen).all()


# Caches that live longer than one call


@torch.no_grad()
def logits(runner, ids, cache, **kwargs):
    return runner(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def limit(options) -> float:
    return 1e-4 if options is FULL else 0.2


@BOTH
def test_right_padded_batch_in_direct_calls(options):
    """Padding stands in the middle of the cache; masks and positions per row keep it out."""
    lengths, ids = torch.tensor([15, 9, 12]), prompt(3, 15)
    mask = (torch.arange(15)[None] < lengths[:, None]).long()
    caches = DynamicCache(config=model("llama").config), DynamicCache(config=model("llama").config)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(3)
    got, want = (
        logits(runner, ids, cache, attention_mask=mask, position_ids=position)[rows, lengths - 1]
        for runner, cache in zip((fast("llama", options), model("llama")), caches, strict=True)
    )
    assert relative(got, want) < 1e-4
    for step in range(5):
        new = want.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        got, want = (
            logits(runner, new, cache, attention_mask=mask, position_ids=(lengths + step)[:, None])[:, -1]
            for runner, cache in zip((fast("llama", options), model("llama")), caches, strict=True)
        )
        assert relative(got, want) < limit(options)
    assert all(handles(caches[0]))
    # The oracle of the oracle: the shortest row alone, without padding.
    alone = logits(model("llama"), ids[1:2, :9], None)[:, -1]
    first = logits(model("llama"), ids, None, attention_mask=(torch.arange(15)[None] < lengths[:, None]).long())
    torch.testing.assert_close(first[1:2, 8], alone, atol=1e-3, rtol=1e-3)


@BOTH
def test_several_turns_on_one_cache(options):
    """The compiled model says what the dense one said, so that every step of every turn can be compared."""
    caches = [DynamicCache(config=model("llama").config) for _ in range(2)]
    ids = prompt(tokens=12)
    for turn in range(3):
        want = generate(model("llama"), ids, tokens=5, past_key_values=caches[0])

        def follow(row, seen, want=want):
            return want.sequences[row, len(seen)].tolist()

        kwargs = {} if options is FULL else {"prefix_allowed_tokens_fn": lambda row, seen: [follow(row, seen)]}
        got = generate(fast("llama", options), ids, tokens=5, past_key_values=caches[1], **kwargs)
        assert torch.equal(got.sequences, want.sequences)
        for g, w in zip(got.logits, want.logits, strict=True):
            assert relative(g, w) < limit(options)
        ids = torch.cat([want.sequences, prompt(tokens=4, seed=turn + 7)], 1)
    assert all(handles(caches[1])) and not cache_report(caches[1]).fallbacks
    assert cache_report(caches[1]).layers[0].length == want.sequences.shape[1] - 1


@BOTH
def test_a_copied_cache_branches(options):
    """Two continuations of one prompt, in turns, and then the first goes on: none sees the other's tokens."""
    results = []
    for runner in (fast("llama", options), model("llama")):
        cache = DynamicCache(config=model("llama").config)
        logits(runner, prompt(2), cache)
        other = copy.deepcopy(cache)
        seen = []
        for step in range(3):
            for branch, seed in ((cache, 20), (other, 30)):
                seen.append(logits(runner, prompt(2, 1, seed=seed + step), branch))
        seen.append(logits(runner, prompt(2, 3, seed=5), cache))
        results.append(seen)
        lengths = cache.get_seq_length(), other.get_seq_length()
        assert lengths == (26, 23)
        assert all(handles(cache) + handles(other)) == (runner is not model("llama"))
    assert max(relative(g, w) for g, w in zip(*results, strict=True)) < limit(options)


@BOTH
@pytest.mark.parametrize("source", ["dense tuples", "handles"])
def test_a_cache_made_from_tuples(source, options):
    """`DynamicCache(tuples)`, as code for the old format and data parallel code does. Its own update copies."""
    runner, first = fast("llama", options), DynamicCache(config=model("llama").config)
    logits(runner if source == "handles" else model("llama"), prompt(), first)
    cache = DynamicCache([(layer.keys, layer.values) for layer in first.layers])
    dense = DynamicCache(config=model("llama").config)
    logits(model("llama"), prompt(), dense)
    for step in range(3):
        got, want = (logits(r, prompt(1, 1, step), c) for r, c in ((runner, cache), (model("llama"), dense)))
        assert relative(got, want) < limit(options)
    assert all(handles(cache))


@BOTH
def test_cropped_and_continued(options):
    """Rewinding, as speculative decoding and regenerating an answer do."""
    results = []
    for runner in (fast("llama", options), model("llama")):
        cache = DynamicCache(config=model("llama").config)
        seen = [logits(runner, prompt(2), cache)]
        for step in range(4):
            seen.append(logits(runner, prompt(2, 1, step), cache))
        cache.crop(-3)
        seen.append(logits(runner, prompt(2, 2, 11), cache))
        cache.reset() if runner is model("llama") else None
        results.append(seen)
    assert max(relative(g, w) for g, w in zip(*results, strict=True)) < limit(options)


@BOTH
def test_offloaded_layers(options):
    """`cache_implementation="offloaded"` needs a GPU; what it does to layers can be done on the CPU."""
    cache, dense = (DynamicCache(config=model("llama").config) for _ in range(2))
    runner = fast("llama", options)
    for c, r in ((cache, runner), (dense, model("llama"))):
        logits(r, prompt(), c)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
        layer.keys, layer.values = layer.keys.to("cpu", copy=True), layer.values.to("cpu", copy=True)
    assert all(handles(cache))
    for layer in dense.layers:
        layer.offload()
    got, want = logits(runner, prompt(1, 1), cache), logits(model("llama"), prompt(1, 1), dense)
    assert relative(got, want) < limit(options)
    for layer in cache.layers:  # and out of the compressed form: the values are dense, and are taken over again
        layer.keys, layer.values = layer.keys.dequantize(), layer.values.dequantize()
    got, want = logits(runner, prompt(1, 1, 2), cache), logits(model("llama"), prompt(1, 1, 2), dense)
    assert relative(got, want) < limit(options) and all(handles(cache))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads to the CPU from a GPU only")
@pytest.mark.gpu
def test_offloaded_generate():
    agree("llama", prompt(), FULL, cache_implementation="offloaded")


# Other kinds of cache


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@BOTH
def test_encoder_decoder(name, options):
    """Self attention grows; what is known of the encoder's output is written once and read from then on."""
    inputs, kwargs = prompt(2), {}
    if name == "whisper":
        inputs = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2))
        kwargs = {"decoder_input_ids": prompt(2, 3)}
    got = agree(name, inputs, options, compressed=False, **kwargs)
    assert all(handles(got.past_key_values))


def test_encoder_decoder_beams():
    agree("bart", prompt(2), FULL, compressed=False, num_beams=3)


def static_by_config(options):
    compile_config = transformers.CompileConfig(backend="mikv", mode=None, options=dict(options))
    compile_config._compile_all_devices = True
    # Transformers keeps the compiled call on the model, so this needs one of its own. Torch takes options or a mode.
    kwargs = {"cache_implementation": "static", "compile_config": compile_config}
    return generate(build("llama"), prompt(2), **kwargs)


def static_by_wrapper(options):
    return generate(fast("llama", options), prompt(2), cache_implementation="static")


@BOTH
@pytest.mark.parametrize("way", [static_by_config, static_by_wrapper])
def test_static_cache_gives_the_same_tokens(way, options):
    check(
        way(options), generate(model("llama"), prompt(2), cache_implementation="static", disable_compile=True), options
    )


@pytest.mark.parametrize("way", [static_by_config, static_by_wrapper])
def test_static_cache_is_compressed(way):
    assert all(handles(way(INT4).past_key_values))


def test_static_caches_of_several_sizes_are_compressed():
    """`generate` makes each as long as prompt and answer; Dynamo calls their size symbolic from the second on."""
    torch._dynamo.reset()
    for tokens in (20, 30, 41):
        got = generate(fast("llama", INT4), prompt(2, tokens), tokens=4, cache_implementation="static")
        assert all(handles(got.past_key_values)), tokens


def test_a_static_cache_that_is_reset_and_used_again():
    runner, results = fast("llama", FULL), []
    for r in (runner, model("llama")):
        cache = transformers.StaticCache(config=model("llama").config, max_cache_len=48)
        seen = []
        for turn in range(2):
            seen.append(logits(r, prompt(2, 12, turn), cache))
            seen += [logits(r, prompt(2, 1, turn + step), cache) for step in range(4)]
            cache.reset()
        results.append(seen)
    assert max(relative(g, w) for g, w in zip(*results, strict=True)) < 1e-4


@pytest.mark.parametrize(
    "name, tokens, options",
    [
        ("mistral", 12, FULL),
        ("mistral", 12, INT4),
        ("mistral", 40, FULL),
        ("mistral", 40, INT4),
        ("gemma2", 40, FULL),
        ("gpt_oss", 40, FULL),
        *(
            # Each length below the window makes a graph of its own.
            pytest.param(name, tokens, options, marks=pytest.mark.slow)
            for name, tokens, options in [
                ("gemma2", 12, FULL),
                ("gemma2", 12, INT4),
                ("gemma2", 40, INT4),
                ("gpt_oss", 12, FULL),
                ("gpt_oss", 12, INT4),
                ("gpt_oss", 40, INT4),
            ]
        ),
    ],
    ids=named,
)
def test_sliding_windows_give_the_same_tokens(name, tokens, options):
    """Mistral: all layers slide. Gemma 2 caps the scores, GPT-OSS has sink columns; of both, one layer slides."""
    agree(name, prompt(2, tokens), options, compressed=False, tokens=16)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_sliding_windows_are_compressed(name):
    agree(name, prompt(2, 40), FULL, tokens=6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("jamba", FULL),
        ("bamba", FULL),
        ("qwen3_next", FULL),
        ("lfm2", FULL),
        ("lfm2", INT4),
        *(pytest.param(name, INT4, marks=pytest.mark.slow) for name in ("jamba", "bamba", "qwen3_next")),
    ],
    ids=named,
)
def test_hybrid_models(name, options):
    """Attention layers are compressed; states of linear attention, SSM and convolution layers stay what they are."""
    got = agree(name, prompt(2), options, compressed=False)
    assert handles(got.past_key_values) == [True]
    states = [layer for layer in got.past_key_values.layers if getattr(layer, "keys", None) is None]
    tensors = [t for layer in states for value in vars(layer).values() for t in tensors_in(value)]
    assert tensors and not any(map(is_compressed, tensors))


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


# What must not matter


class Int8Linear(torch.nn.Module):
    """Weight-only int8, as torchao and bitsandbytes make of a linear layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])

    def forward(self, x):
        return torch.nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale


@BOTH
def test_quantized_weights(options):
    quantized = build("llama")
    for module in list(quantized.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    want = generate(quantized, prompt(2))
    got = generate(torch.compile(quantized, backend="mikv", options=options), prompt(2))
    check(got, want, options)
    assert all(handles(got.past_key_values))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype, options):
    """Sums are taken in another order, so that tokens may differ where two logits are nearly equal: compare logits."""
    want = generate(model("llama", dtype), prompt(2), tokens=5)
    got = generate(fast("llama", options, dtype), prompt(2), tokens=5)
    assert got.past_key_values.layers[0].keys.dtype == dtype and all(handles(got.past_key_values))
    for step in range(2):  # the prompt, and the first step that reads the cache
        assert relative(got.logits[step], want.logits[step]) < (0.03 if options is FULL else 0.2)


@BOTH
def test_layers_compiled_one_by_one(options):
    layered = build("llama")
    for layer in layered.model.layers:
        layer.compile(backend="mikv", options=options)
    seen = []
    report._listeners.append(seen.append)
    try:
        got = generate(layered, prompt(2))
    finally:
        report._listeners.remove(seen.append)
    check(got, generate(model("llama"), prompt(2)), options)
    assert all(handles(got.past_key_values)) and all(graph.rewritten for graph in seen)


# Without recognizers


@pytest.fixture
def no_recognizers(monkeypatch):
    from mikv_compile.passes import attention, cache_updates

    def switch_off():
        torch._dynamo.reset()
        monkeypatch.setattr(attention, "ATTENTION_RECOGNIZERS", ())
        monkeypatch.setattr(cache_updates, "CACHE_UPDATE_RECOGNIZERS", ())

    yield switch_off
    torch._dynamo.reset()  # what was compiled without them must not serve later tests


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_backend_that_recognizes_nothing_leaves_the_model_as_it_is(no_recognizers, kwargs):
    no_recognizers()
    want = generate(model("llama"), prompt(2), **kwargs)
    got = generate(torch.compile(build("llama"), backend="mikv", options=INT4), prompt(2), **kwargs)
    assert torch.equal(got.sequences, want.sequences)
    for g, w in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)
    assert not any(handles(got.past_key_values)) and not graph_reports()[-1].rewritten


@BOTH
def test_a_compressed_cache_meets_a_backend_that_recognizes_nothing(no_recognizers, options):
    """It is read, dequantized, and goes on as a dense cache."""
    runner = torch.compile(build("llama"), backend="mikv", options=options)
    cache, dense = (DynamicCache(config=model("llama").config) for _ in range(2))
    logits(runner, prompt(2), cache)
    logits(model("llama"), prompt(2), dense)
    assert all(handles(cache))
    store = cache.layers[0].keys.store
    no_recognizers()
    for step in range(3):
        got, want = (logits(r, prompt(2, 1, step), c) for r, c in ((runner, cache), (model("llama"), dense)))
        assert relative(got, want) < limit(options)
    assert not any(handles(cache)) and sum(store.fallbacks.values())
