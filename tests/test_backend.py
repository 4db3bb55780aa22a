"""The backend as users call it: equality, graph counts, masks, dtypes, declined sites and bad input."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from decoder import Decoder, inputs, run

import mikv_compile
from mikv_compile import KVTensor, OptionError, cache_report
from mikv_compile.kernels import dispatch


def compiled(model, lower="eager", **options):
    return torch.compile(model, backend="mikv", options={"lower": lower, **options})


def stats():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _counters():
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_full_budget_equals_the_uncompiled_model_in_two_graphs(lower):
    model = Decoder()
    fast = torch.compile(model, backend="mikv", options={"lower": lower, "budget": 1.0}, fullgraph=True)
    xs = inputs([70] + [1] * 80, batch=2)
    dense, cache = model.new_cache(), model.new_cache()
    torch.testing.assert_close(run(fast, cache, xs), run(model, dense, xs), atol=1e-5, rtol=1e-5)
    assert stats() == 2
    assert all(isinstance(k, KVTensor) for k in cache.keys + cache.values)
    assert torch.equal(cache.keys[0].dequantize(), dense.keys[0])


def test_inductor_writes_the_buffers_in_place():
    """What Inductor runs leaves the same bytes in the store as the graph run node by node."""
    model, caches = Decoder(), []
    for lower in ("eager", "inductor"):
        torch._dynamo.reset()
        cache = model.new_cache()
        with dispatch.use("reference"):
            run(compiled(model, lower, preset="mikv-paper"), cache, inputs([60] + [1] * 20))
        caches.append(cache)
    for a, b in zip(caches[0].keys, caches[1].keys, strict=True):
        assert a.store.counts == b.store.counts
        for left, right in zip(a.store.typed().tiers, b.store.typed().tiers, strict=True):
            assert torch.equal(left.positions, right.positions)
            assert (left.value.codes != right.value.codes).float().mean() < 0.01


def test_a_second_prompt_of_another_length_compiles_once_more_and_no_further():
    model = Decoder()
    fast = compiled(model)
    for length in (50, 60, 71, 90):
        cache = model.new_cache()
        run(fast, cache, inputs([length, 1, 1]))
        assert cache.length == length + 2
    assert stats() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = Decoder(dtype=dtype, dim=80, heads=3, kv_heads=1)
    xs = inputs([63] + [1] * 10, width=240, dtype=dtype)
    for options, limit in (({"budget": 1.0}, 0.02), ({}, 0.1), ({"preset": "int4"}, 0.1)):
        torch._dynamo.reset()
        cache = model.new_cache()
        got, want = run(compiled(model, **options), cache, xs), run(model, model.new_cache(), xs)
        assert got[-1].dtype == dtype and cache.keys[0].dtype == dtype
        assert (torch.cat(got, 1) - torch.cat(want, 1)).abs().max() < limit * torch.cat(want, 1).abs().max()


def test_keys_and_values_of_different_width():
    model = Decoder(dim=32, value_dim=16, heads=2, kv_heads=2)
    xs = inputs([100] + [1] * 5)
    cache = model.new_cache()
    torch.testing.assert_close(run(compiled(model, budget=1.0), cache, xs), run(model, model.new_cache(), xs))
    assert cache.values[0].shape == (1, 2, 105, 16)


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
def test_masks_follow_tokens_into_their_tiers(kind):
    """Left padding: whatever tier a padded token lies in, nobody attends to it."""
    model = Decoder(heads=4, kv_heads=2)
    fast = compiled(model, tiers="fp:0.1,fp", window=4, flush_every=1, policy="h2o")
    cache, dense = model.new_cache(), model.new_cache()
    xs = inputs([40] + [1] * 12, batch=2)
    length = 0
    for x in xs:
        rows = x.shape[1]
        mask = torch.ones(2, 1, rows, length + rows, dtype=torch.bool).tril(length)
        mask[1, :, :, :7] = False
        if kind == "per head":
            mask = mask.repeat(1, 4, 1, 1)
            mask[:, 2, :, 10:13] = False
        mask |= torch.eye(rows, length + rows, dtype=torch.bool).roll(length, 1)  # no row is empty
        if kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, cache, mask), model(x, dense, mask), atol=1e-5, rtol=1e-5)
        length += rows
    assert cache.keys[0].store.counts[1] > 30


def test_a_dense_cache_from_elsewhere_is_taken_over():
    model = Decoder()
    xs = inputs([200, 1, 1, 1])
    cache, dense = model.new_cache(), model.new_cache()
    run(model, cache, xs[:1])
    got = run(compiled(model), cache, xs[1:])
    want = run(model, dense, xs)[1:]
    assert isinstance(cache.keys[0], KVTensor) and cache.length == 203
    torch.testing.assert_close(got, want, atol=0.2, rtol=0)


def test_a_dense_cache_is_not_taken_over_by_an_evicting_plan():
    model = Decoder()
    cache = model.new_cache()
    run(model, cache, inputs([200]))
    run(compiled(model, preset="evict"), cache, inputs([1]))
    assert not isinstance(cache.keys[0], KVTensor)
    assert "filled before this call" in mikv_compile.graph_reports()[-1].declined[0].reason


# Declined


def declined_reasons():
    return " ".join(d.reason for d in mikv_compile.graph_reports()[-1].declined)


def stays_dense(model, xs, **options):
    """The compiled model gives what the model gives, with a dense cache."""
    cache, dense = model.new_cache(), model.new_cache()
    torch.testing.assert_close(run(compiled(model, **options), cache, xs), run(model, dense, xs))
    for got, want in zip(cache.keys + cache.values, dense.keys + dense.values, strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, want)


def test_head_dim_that_does_not_pack():
    stays_dense(Decoder(heads=2, kv_heads=1, dim=6), inputs([20, 1, 1], width=12))
    assert "2-bit codes need a head_dim that 4 divides; it is 6" in declined_reasons()
    model, cache = Decoder(heads=2, kv_heads=1, dim=6), Decoder().new_cache()
    run(compiled(model, tiers="int8"), cache, inputs([20], width=12))
    assert isinstance(cache.keys[0], KVTensor)


def test_double_precision_stays_dense():
    stays_dense(Decoder(dtype=torch.float64), inputs([20, 1], dtype=torch.float64))
    assert "float64" in declined_reasons()


def test_recorded_gradients_stay_dense_and_trainable():
    model = Decoder()
    cache = model.new_cache()
    (x,) = inputs([20])
    compiled(model)(x, cache).sum().backward()
    assert type(cache.keys[0]) is torch.Tensor and model.q[0].weight.grad is not None
    assert "torch.no_grad()" in declined_reasons()


def test_cuda_without_triton_is_declined(monkeypatch):
    from mikv_compile import lowering

    class Key:
        dtype, device, shape = torch.float16, torch.device("cuda"), (1, 1, 1, 64)

    monkeypatch.setattr(lowering, "fake", lambda node: Key)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(lowering._CannotServeError, match="need the package triton"):
        lowering._check_storage(_Site(), 1, None)


class _Site:
    class key:
        new = past = capacity = None
        layout = "BHTD"

    value = key


def test_a_step_that_uses_the_keys_for_something_else_reads_them_densely():
    model = Decoder(layers=1)
    cache = model.new_cache()
    run(compiled(model, budget=1.0), cache, inputs([30]))
    handle = cache.keys[0]

    def step(x, cache):
        out = model(x, cache)
        return out + cache.keys[0].sum()

    dense = model.new_cache()
    with torch.no_grad():
        (x0,), (x1,) = inputs([30]), inputs([1], seed=3)
        model(x0, dense)
        torch.testing.assert_close(compiled(step)(x1, cache), step(x1, dense), atol=1e-4, rtol=1e-5)
    assert cache.keys[0].store is handle.store and handle.store.length == 31
    report = mikv_compile.graph_reports()[-1]
    (site,) = report.rewritten
    assert site.reads == "dense" and "also read by `sum_1`" in site.reason and "read densely" in str(report)


def test_a_compressed_cache_meets_a_graph_that_cannot_be_rewritten():
    """Nothing attends to the cache after the step has appended to it in an unknown way: it gets dense values."""
    model = Decoder(layers=1)
    cache = model.new_cache()
    run(compiled(model, budget=1.0), cache, inputs([30]))
    handle = cache.keys[0]

    def step(cache):
        cache.keys[0] = torch.cat([cache.keys[0], cache.keys[0][:, :, -1:]], 2)
        return cache.keys[0].sum()

    with torch.no_grad():
        compiled(step)(cache)
    assert type(cache.keys[0]) is torch.Tensor and cache.keys[0].shape[2] == 31
    assert handle.store.fallbacks == {"declined site": 1}


@pytest.mark.parametrize("tokens", [9, 200])
@pytest.mark.parametrize("options", [{"budget": 1.0}, {"tiers": "int4", "window": 0, "sinks": 0}])
def test_cross_attention_fills_its_cache_once_and_only_reads_it_later(tokens, options):
    def cross(q, cache, k=None, v=None):
        if k is not None:
            cache.append(0, k, v)
        return F.scaled_dot_product_attention(q, cache.keys[0], cache.values[0])

    dense, cache = Decoder(layers=1).new_cache(), Decoder(layers=1).new_cache()
    k, v = torch.randn(2, 1, 2, tokens, 8)
    fast = compiled(cross, **options)
    with torch.no_grad():
        for rows in (9, 1, 1):
            q = torch.randn(1, 2, rows, 8)
            args = (k, v) if rows == 9 else ()
            want, got = cross(q, dense, *args), fast(q, cache, *args)
            torch.testing.assert_close(got, want, atol=1e-5 if "budget" in options else 0.3, rtol=1e-5)
    assert isinstance(cache.keys[0], KVTensor) and cache.keys[0].shape == k.shape
    assert not cache.keys[0].store.fallbacks
    assert [site.phase for site in mikv_compile.graph_reports()[-1].rewritten] == ["read"]


def test_an_evicting_plan_leaves_cross_attention_dense():
    def cross(q, k, v, cache):
        cache.append(0, k, v)
        return F.scaled_dot_product_attention(q, cache.keys[0], cache.values[0])

    cache = Decoder(layers=1).new_cache()
    k, v = torch.randn(2, 1, 2, 90, 8)
    with torch.no_grad():
        compiled(cross, tiers="fp:0.25", window=4)(torch.randn(1, 2, 3, 8), k, v, cache)
    assert type(cache.keys[0]) is torch.Tensor and "no guide to an encoder's tokens" in declined_reasons()


def test_a_budget_in_bytes_holds_for_every_batch_size():
    model = Decoder()
    fast = compiled(model, budget="200KiB")
    for batch in (1, 4, 2):
        cache = model.new_cache()
        run(fast, cache, inputs([3000, 1], batch=batch))
        assert cache_report(cache).nbytes <= 200 * 1024 and isinstance(cache.keys[0], KVTensor)


# Bad input


def test_unknown_option_names_the_nearest():
    model = Decoder()
    with pytest.raises(Exception, match="did you mean 'policy'") as caught:
        compiled(model, polcy="h2o")(inputs([4])[0], model.new_cache())
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, OptionError)


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65])
def test_short_prompts(tokens):
    model = Decoder()
    xs = inputs([tokens, 1, 1])
    got = run(compiled(model), model.new_cache(), xs)
    torch.testing.assert_close(got, run(model, model.new_cache(), xs), atol=0.05, rtol=0)


def test_mismatched_keys_and_values():
    """Torch's attention takes more values than keys, so this stays with torch."""

    def step(q, k, v, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v), k, v

    q = torch.randn(1, 2, 1, 8)
    args = (q, q, q, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8))
    with torch.no_grad():
        out, keys, values = compiled(step)(*args)
    # What torch computes from a value without a key differs from call to call, so only the caches are compared.
    assert torch.equal(keys, step(*args)[1]) and torch.equal(values, step(*args)[2])
    assert "different numbers of tokens" in declined_reasons()


def test_a_kernel_that_cannot_be_built_falls_back_with_one_warning(monkeypatch, caplog):
    def broken(*args):
        raise dispatch.BuildError("no compiler")

    module = type("module", (), dict.fromkeys(dispatch._IMPLEMENTATIONS["cpp"], staticmethod(broken)))
    real, built = dispatch.importlib.import_module, set(dispatch._IMPLEMENTATIONS["cpp"].values())
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module if name in built else real(name))
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(dispatch, "_forced", "cpp")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    dispatch.log.addHandler(handler)
    try:
        model = Decoder()
        xs = inputs([20, 1, 1])
        got = run(compiled(model, budget=1.0), model.new_cache(), xs)
    finally:
        dispatch.log.removeHandler(handler)
    torch.testing.assert_close(got, run(model, model.new_cache(), xs))
    assert len([m for m in messages if "could not be built" in m]) == 1


# Fidelity of the special cases


def test_more_bits_give_a_smaller_error():
    model = Decoder(heads=4, kv_heads=2, dim=32)
    xs = inputs([200] + [1] * 8, width=128)
    want = torch.cat(run(model, model.new_cache(), xs)[1:], 1)
    errors = []
    for tiers in ("int2", "int3", "int4", "int8", "fp"):
        torch._dynamo.reset()
        got = torch.cat(run(compiled(model, tiers=tiers, quantizer="mikv"), model.new_cache(), xs)[1:], 1)
        errors.append(float((got - want).abs().mean()))
    assert all(a > 1.7 * b for a, b in itertools.pairwise(errors))


def test_eviction_with_recency_is_a_sliding_window_with_sinks():
    """policy='recent' without a low tier equals attention masked to sinks and the newest tokens."""
    model = Decoder(layers=1)
    cache, dense = model.new_cache(), model.new_cache()
    fast = compiled(model, tiers="fp:0.0", policy="recent", window=16, sinks=2, flush_every=1)
    xs = inputs([50] + [1] * 20)
    run(fast, cache, xs[:1])
    run(model, dense, xs[:1])
    for x in xs[1:]:
        past = dense.length
        mask = torch.zeros(1, past + 1, dtype=torch.bool)
        mask[:, :2] = mask[:, past - 16 :] = True
        with torch.no_grad():
            torch.testing.assert_close(fast(x, cache), model(x, dense, mask))
        assert cache.keys[0].store.counts == (18,)
    assert cache_report(cache).layers[0].length == 70


def test_h2o_keeps_the_tokens_with_most_accumulated_attention():
    """Scores in the store are column sums of the attention over prompt and steps."""
    model = Decoder(layers=1, heads=2, kv_heads=1)
    cache, dense = model.new_cache(), model.new_cache()
    xs = inputs([40] + [1] * 6, width=32)
    fast = compiled(model, tiers="fp:0.9,fp", policy="h2o", window=0, sinks=0, flush_every=1, recent_share=0.5)
    run(fast, cache, xs)
    run(model, dense, xs)
    x = torch.cat(xs, 1)
    q = model.q[0](x).view(1, 46, 2, 16).transpose(1, 2)
    k = dense.keys[0].repeat_interleave(2, 1)
    weights = (q @ k.transpose(2, 3) / 4).masked_fill(~torch.ones(46, 46, dtype=torch.bool).tril(), -torch.inf)
    total = weights.softmax(-1).sum(dim=(1, 2))[0]
    store = cache.keys[0].store
    tier, count = store.typed().tiers[0], store.counts[0]
    kept = tier.positions[0, 0, :count].long()
    torch.testing.assert_close(store.typed().scores[0, 0, :count], total[kept], atol=1e-4, rtol=1e-4)
    gone = sorted(set(range(46)) - set(kept.tolist()))
    assert len(gone) == 46 - count and max(gone) < 46 - int(0.5 * int(0.9 * 46))


def test_later_chunks_are_scored_like_the_first():
    """A prompt read in two chunks: tokens of the second that its own last rows look at stay in the high tier."""
    model = Decoder(layers=1, heads=2, kv_heads=1)
    fast = compiled(model, tiers="fp:0.1,fp", window=4, sinks=0, flush_every=1, policy="snapkv")
    first, second = inputs([100, 100], width=32)
    cache, dense = model.new_cache(), model.new_cache()
    run(fast, cache, [first, second])
    run(model, dense, [first, second])
    store = cache.keys[0].store
    kept = store.typed().tiers[0].positions[0, 0, : store.counts[0]]
    assert store.counts == (24, 176)
    assert (kept >= 100).sum() > 8  # the window is 4 of them
    assert torch.equal(cache.keys[0].dequantize(), dense.keys[0])


@pytest.mark.parametrize("how", ["inference_mode", "dynamic"])
def test_other_ways_to_trace(how):
    model = Decoder()
    fast = torch.compile(
        model, backend="mikv", options={"lower": "eager", "budget": 1.0}, dynamic=how == "dynamic" or None
    )
    context = torch.inference_mode if how == "inference_mode" else torch.no_grad
    xs = inputs([30, 1, 5, 1], batch=3)
    cache, dense = model.new_cache(), model.new_cache()
    with context():
        for x in xs:
            torch.testing.assert_close(fast(x, cache), model(x, dense))
        cache.keys = [k.index_select(0, torch.tensor([2, 0])) for k in cache.keys]
        cache.values = [v.index_select(0, torch.tensor([2, 0])) for v in cache.values]
        dense.keys = [k[[2, 0]] for k in dense.keys]
        dense.values = [v[[2, 0]] for v in dense.values]
        torch.testing.assert_close(fast(x[:2], cache), model(x[:2], dense))
    assert isinstance(cache.keys[0], KVTensor)
