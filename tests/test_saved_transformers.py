"""Caches of transformers that are saved and loaded go on as the ones that never left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_caches import DEFAULT, EVICTING, H2O, compiled, slow

from mikv_compile import EvictedTokensError, SavedCacheError, cache_report, cached_tokens, load_cache, save_cache

transformers = pytest.importorskip("transformers")

from tiny_models import build, model, prompt  # noqa: E402  (needs transformers)
from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402


def logits(runner, ids, cache, **more):
    with torch.no_grad():
        return runner(ids, past_key_values=cache, **more).logits


def by_config(m):
    return DynamicCache(config=m.config)


@pytest.mark.parametrize(
    "name, new, options, dtype",
    [
        ("llama", lambda m: DynamicCache(), DEFAULT, torch.float32),
        ("mistral", by_config, DEFAULT, torch.float32),
        ("lfm2", by_config, DEFAULT, torch.float32),
        ("llama", lambda m: StaticCache(config=m.config, max_cache_len=150), DEFAULT, torch.float32),
        *slow(
            ("llama", by_config, EVICTING, torch.bfloat16),
            ("llama", by_config, H2O, torch.float16),
            ("gemma2", by_config, DEFAULT, torch.float32),
            ("jamba", by_config, DEFAULT, torch.float32),
            ("gemma2", lambda m: StaticCache(config=m.config, max_cache_len=150), DEFAULT, torch.float32),
        ),
    ],
    ids=["llama", "sliding", "conv", "static", "evicting-bf16", "h2o-fp16", "some-slide", "mamba", "static-sliding"],
)
def test_caches_of_transformers_go_on_alike(tmp_path, name, new, options, dtype):
    m = model(name, dtype)
    fast, cache, path = compiled(m, options), new(m), tmp_path / "c"
    logits(fast, prompt(2, 100), cache)
    for step in range(3):
        logits(fast, prompt(2, 1, step), cache)
    save_cache(cache, path, model=m)
    made, filled = load_cache(path, model=fast), load_cache(path, into=new(m))
    assert type(made) is type(cache) and cache_report(made).layers
    assert [type(a) for a in made.layers] == [type(a) for a in cache.layers]
    assert int(made.get_seq_length()) == int(cache.get_seq_length()) == 103
    compressed = [getattr(getattr(x, "keys", None), "store", None) is not None for x in cache.layers]
    assert any(compressed) and compressed == [
        getattr(getattr(x, "keys", None), "store", None) is not None for x in made.layers
    ]
    for step in range(10, 20):
        want = logits(fast, prompt(2, 1, step), cache)
        assert torch.equal(logits(fast, prompt(2, 1, step), made), want)
        assert torch.equal(logits(fast, prompt(2, 1, step), filled), want)


def test_a_dense_static_cache_that_was_filled_early(tmp_path):
    """Tensors that exist already keep their memory."""
    m, path = model("llama"), tmp_path / "c"
    caches = [StaticCache(config=m.config, max_cache_len=40) for _ in range(2)]
    for cache in caches:
        cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    logits(m, prompt(1, 12), caches[0])
    save_cache(caches[0], path)
    address = caches[1].layers[0].keys.data_ptr()
    load_cache(path, into=caches[1])
    assert caches[1].layers[0].keys.data_ptr() == address
    assert torch.equal(logits(m, prompt(1, 1), caches[0]), logits(m, prompt(1, 1), caches[1]))


@pytest.mark.parametrize("name", ["t5", *slow("bart")])
def test_encoder_decoders(tmp_path, name):
    m, path = model(name), tmp_path / "c"
    fast = compiled(m, DEFAULT)
    cache = EncoderDecoderCache(DynamicCache(config=m.config), DynamicCache(config=m.config))
    with torch.no_grad():
        encoded = m.get_encoder()(prompt(2, 30))
    for step in range(3):
        logits(fast, None, cache, encoder_outputs=encoded, decoder_input_ids=prompt(2, 1, step))
    save_cache(cache, path, model=m)
    made = load_cache(path, model=m)
    assert made.is_updated == cache.is_updated
    for step in range(10, 14):
        more = {"encoder_outputs": encoded, "decoder_input_ids": prompt(2, 1, step)}
        assert torch.equal(logits(fast, None, cache, **more), logits(fast, None, made, **more))


def test_a_cache_for_another_model_has_other_layers(tmp_path):
    m, path = model("mistral"), tmp_path / "c"
    cache = by_config(m)
    logits(m, prompt(1, 30), cache)
    save_cache(cache, path, model=m)
    with pytest.raises(SavedCacheError, match="DynamicLayer"):
        load_cache(path, model=model("llama"), check_model=False)


def test_tokens_have_to_be_those_of_the_cache(tmp_path):
    m, path = model("llama"), tmp_path / "c"
    cache = DynamicCache()
    logits(m, prompt(1, 12), cache)
    with pytest.raises(SavedCacheError, match=r"stands for 12 tokens, and 13 are given.*sequences\[:, :-1\]"):
        save_cache(cache, path, tokens=prompt(1, 13))
    save_cache(cache, path, tokens=prompt(1, 12))


FILLS = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny_models import build, prompt
from transformers import DynamicCache
import mikv_compile
model = build("llama")
cache = DynamicCache(config=model.config)
fast = torch.compile(model, backend="mikv", options={options!r})
sequences = fast.generate(prompt(2, 100), past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
mikv_compile.save_cache(cache, {path!r}, model=model, tokens=sequences[:, :-1])
"""


@pytest.mark.parametrize("options", [DEFAULT], ids=["default"])
def test_another_process_goes_on(tmp_path, options):
    """One process reads a prompt and saves; this one loads and generates what an uninterrupted run generates."""
    path = str(tmp_path / "c")
    program = FILLS.format(tests=str(Path(__file__).parent), options=options, path=path)
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    m = build("llama")
    fast = compiled(m, options)
    plain = {"do_sample": False, "pad_token_id": 0}
    want = fast.generate(prompt(2, 100), max_new_tokens=25, min_new_tokens=25, **plain)
    cache = load_cache(path, model=m)
    assert cached_tokens(path, want) == cache.get_seq_length() == 104
    got = fast.generate(want[:, :105], past_key_values=cache, max_new_tokens=20, min_new_tokens=20, **plain)
    assert torch.equal(got, want)
    assert cache_report(cache).layers[0].plan is not None


def test_an_evicting_cache_says_so_after_loading(tmp_path):
    m, path = model("llama"), tmp_path / "c"
    cache = DynamicCache()
    logits(compiled(m, EVICTING), prompt(1, 400), cache)
    save_cache(cache, path)
    loaded = load_cache(path, into=DynamicCache())
    with pytest.raises(EvictedTokensError):
        loaded.layers[0].keys.dequantize()
