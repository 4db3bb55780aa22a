"""Several threads share a compiled model, each with a cache of its own."""

import concurrent.futures
import threading

import pytest
import torch
from decoder import Decoder, inputs, run

import mikv_compile
from mikv_compile import _compat

THREADS = 3
OPTIONS = {
    "default": {},
    "paper": {"preset": "mikv-paper"},
    "evicting": {"tiers": "int8:0.1,int4:0.3", "quantizer": "mikv", "window": 4, "sinks": 2, "flush_every": 4},
    "watched": {"tiers": "fp:0.2,int4", "policy": "tova", "quantizer": "mikv", "window": 4, "flush_every": 8},
}


def in_threads(work):
    """``work(number)`` of each thread, all begun at one moment."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait()
        return work(number)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [future.result(timeout=300) for future in [pool.submit(begin, i) for i in range(THREADS)]]


def conversation(model, number):
    """Outputs of a prompt and steps; each thread has its own tokens and lengths."""
    cache = (getattr(model, "_orig_mod", model)).new_cache()
    xs = inputs([50 + 7 * number, *[1] * 30], width=32, seed=number)
    return torch.cat(run(model, cache, xs), 1)


@pytest.fixture(autouse=True)
def _room_for_graphs():
    """Threads that meet at Dynamo's lock each make the same graph, which counts against its limit of 8."""
    before, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 64
    yield
    torch._dynamo.config.recompile_limit = before


@pytest.mark.parametrize("warm", [False, True], ids=["first calls at once", "compiled before"])
@pytest.mark.parametrize("name", OPTIONS)
def test_threads_get_what_they_get_alone(name, warm):
    options = {"lower": "eager", **OPTIONS[name]}
    fast = torch.compile(Decoder(heads=2, kv_heads=1), backend="mikv", options=options)
    if warm:
        conversation(fast, 0)
    together = in_threads(lambda number: conversation(fast, number))
    alone = [conversation(fast, number) for number in range(THREADS)]
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


def test_threads_with_inductor():
    """The graphs are made before, as those of other shapes may add up in another order."""
    fast = torch.compile(Decoder(layers=1, heads=2, kv_heads=1), backend="mikv", options={"preset": "mikv-paper"})
    conversation(fast, 0)
    alone = [conversation(fast, number) for number in range(THREADS)]
    together = in_threads(lambda number: conversation(fast, number))
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("warm", [False, True], ids=["first calls at once", "compiled before"])
@torch.no_grad()
def test_threads_with_regional_compilation(warm):
    """Evicting: a layer that ran uncompiled because another thread compiles could not read its cache."""
    pytest.importorskip("transformers")
    import tiny_models
    import transformers

    options = {"tiers": "int8:0.1,int4:0.4", "quantizer": "mikv", "window": 4, "flush_every": 4, "lower": "eager"}
    model = mikv_compile.compile(tiny_models.build("llama"), regional=True, **options)

    def talk(number):
        with torch.no_grad():
            cache, found = transformers.DynamicCache(), []
            for tokens in [60 + number, *[1] * 12]:
                found.append(model(tiny_models.prompt(tokens=tokens, seed=number), past_key_values=cache).logits)
            assert mikv_compile.cache_report(cache).fallbacks == {}
            return torch.cat(found, 1)

    if warm:
        for number in range(THREADS):
            talk(number)
    together = in_threads(talk)
    for got, want in zip(together, map(talk, range(THREADS)), strict=True):
        assert torch.equal(got, want)


def test_another_thread_that_compiles_does_not_change_what_eager_code_sees():
    """Torch's own flag counts for all threads; a preallocated cache would be read where it has no memory."""
    from test_preallocated import fill, pair

    key, value = pair()
    tokens = fill((key, value))
    entered, leave = threading.Event(), threading.Event()

    def slow(gm, _):
        entered.set()
        assert leave.wait(60)
        return gm.forward

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow)(torch.ones(2)))
    thread.start()
    try:
        assert entered.wait(60) and torch.compiler.is_compiling() and not _compat.is_traced()
        seen = (key + 0)[:, :, :5]
        written = torch.ones_like(tokens[0][:, :, :1])
        key[:, :, 5:6] = written
        value[:, :, 5:6] = written
    finally:
        leave.set()
        thread.join()
    assert torch.equal(seen, tokens[0])
    assert torch.equal((key + 0)[:, :, 5:6], written) and key.store.length == 6
