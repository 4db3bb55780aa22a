"""Budgets against the true bytes of stores, and what generated tokens do to a full cache."""

import pytest
import torch
from decoder import Decoder

from mikv_compile import OptionError, Options, cache_report
from mikv_compile.config import parse_size
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

BUDGETS = (0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.215, 0.225, 0.23, 0.24, 0.245, 0.3, 0.4, 0.55, 0.7, 0.9)
SHAPES = {
    "llama-8b": CacheShape(1, 8, 128, 128, torch.bfloat16, 32),
    "smollm2-135m": CacheShape(1, 3, 64, 64, torch.float16, 30),
    "gemma-2b": CacheShape(1, 1, 256, 256, torch.bfloat16, 18),
    "phi-2": CacheShape(1, 32, 80, 80, torch.float16, 32),
    "keys and values apart": CacheShape(2, 4, 192, 128, torch.float16, 27),
    "no 3-bit codes": CacheShape(1, 4, 100, 100, torch.bfloat16, 12),
    "small heads": CacheShape(1, 2, 32, 32, torch.bfloat16, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [3000, 4096, 4097, 4110, 4128, 4159, 8191])
def test_true_bytes_are_those_of_the_budget(shape, length):
    for budget in BUDGETS[shape.key_dim < 64 :]:  # a block of 64 tokens is more than 3 % of the smallest cache
        plan = Planner(Options(budget=budget)).layer(0, shape)
        counts = plan.fill(length).counts
        store = LayerStore(plan, shape, torch.device("cpu"), counts)
        spent = store.nbytes / shape.dense_nbytes(length) / budget
        least, most = (0.97, 1.01) if length >= 4096 else (0.965, 1.02)
        assert least <= spent <= most, (budget, str(plan.format), counts)
        assert (
            plan.nbytes(length, shape.batch, shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype)
            == store.nbytes
        )


@pytest.mark.parametrize("quantizer", ["mikv", "flexgen", "rotate", "hqq"])
@pytest.mark.parametrize("name", ["llama-8b", "smollm2-135m"])
def test_budgets_hold_for_other_quantizers(quantizer, name):
    shape = SHAPES[name]
    sizes = (shape.batch, shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype)
    for budget in BUDGETS:
        plan = Planner(Options(budget=budget, quantizer=quantizer)).layer(0, shape)
        spent = plan.nbytes(4096, *sizes) / shape.dense_nbytes(4096) / budget
        assert 0.97 <= spent <= 1.005, (budget, str(plan.format))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_token_is_dropped_where_3_bit_keys_and_2_bit_values_fit(shape):
    """What nobody has asked for yet is lost by eviction, at a budget that would hold it (docs/fidelity.md)."""
    if shape.key_dim % 8 or shape.key_dim < 64:
        pytest.skip("3-bit keys cannot be packed, or positions and scales outweigh them")
    for budget in (0.215, 0.225, 0.235, 0.245, 0.26):
        assert not Planner(Options(budget=budget)).layer(0, shape).evicts, budget
    assert Planner(Options(budget=0.18)).layer(0, shape).evicts


@pytest.mark.parametrize("budget", [0.08, 0.12, 0.23, 0.3])
def test_a_compiled_model_keeps_to_its_budget(budget):
    decoder = Decoder(layers=1, heads=2, kv_heads=2, dim=64, dtype=torch.float16)
    fast = torch.compile(decoder, backend="mikv", options={"lower": "eager", "budget": budget})
    cache = decoder.new_cache()
    torch.manual_seed(0)
    with torch.no_grad():
        fast(torch.randn(1, 4096, 128, dtype=torch.float16), cache)
    assert 0.97 * budget <= cache_report(cache).ratio <= 1.01 * budget


def test_a_large_window_leaves_no_bytes_unspent():
    """Where all tokens fit at 8 bits none is demoted, and where the window is most of a cache it pays for itself."""
    shape = CacheShape(1, 8, 128, 128, torch.float32, 32)
    plan = Planner(Options(budget=0.3, window=256)).layer(0, shape)
    assert [(tier.key_bits, tier.share) for tier in plan.tiers] == [(8, None)]
    shape = SHAPES["llama-8b"]
    plan = Planner(Options(budget=0.25, window=1024)).layer(0, shape)
    store = LayerStore(plan, shape, torch.device("cpu"), plan.fill(4096).counts)
    assert 0.97 <= store.nbytes / shape.dense_nbytes(4096) / 0.25 <= 1.01


def test_a_budget_that_window_and_sinks_exceed_is_refused():
    with pytest.raises(OptionError, match=r"below the least that window=64 and sinks=4 allow here, 0\.0"):
        Planner(Options(budget=0.005)).layer(0, SHAPES["llama-8b"])


def test_budgets_that_evict_with_snapkv_weigh_by_value_norms_and_others_do_not():
    def ranked(**options):
        plan = Planner(Options(**options)).layer(0, SHAPES["llama-8b"])
        return plan.evicts, plan.format.rank is not None and plan.format.rank.by_value

    assert ranked(budget=0.12) == ranked(budget="64MiB") == (True, True)
    assert ranked(budget=0.3) == (False, False)
    assert ranked(budget=0.12, policy="h2o") == ranked(budget=0.12, value_norm=False) == (True, False)
    assert ranked(tiers="int8:0.0,int4:0.5") == (True, False)  # tiers by hand are as they were given
    assert ranked(budget=0.12, layers="0=int8:0.1") == (True, False)


@pytest.mark.parametrize("budget", ["1 MiB", "2 MiB", "3 MiB"])
def test_a_store_never_takes_more_than_its_budget_in_bytes_and_at_times_nearly_all_of_it(budget):
    """That is when generated tokens fill the low tier, which grows by a part of its size."""
    shape = CacheShape(1, 2, 64, 64, torch.float16)
    plan = Planner(Options(budget=budget)).layer(0, shape)
    store, tokens = LayerStore(plan, shape, torch.device("cpu")), plan.tiers[1].share - 64
    prompt, most = torch.randn(1, 2, tokens, 64).half(), 0
    for part in (prompt, *[prompt[:, :, :1]] * 400):
        store.append(part, part)
        most = max(most, store.nbytes)
    assert 0.98 < most / parse_size(budget) <= 1


def test_shares_less_some_tokens():
    plan = Planner(Options(tiers="int8:0.1-20,k4v2:0.5-30")).layer(0, SHAPES["llama-8b"])
    assert plan.tiers[0].quota(1000) == 80 and plan.tiers[1].quota(1000) == 470 and plan.tiers[1].quota(40) == 0
    with pytest.raises(OptionError, match="neither from 0 to 1, nor such a part less some tokens"):
        Options(tiers="int8:0.1-x,k4v2")


# Generation in plans that evict


def generated(tokens, steps, **options):
    """Positions in each tier of one store's first head, after a prompt and so many single tokens."""
    decoder = Decoder(layers=1, heads=2, kv_heads=2, dim=16)
    fast = torch.compile(decoder, backend="mikv", options={"lower": "eager", **options})
    cache = decoder.new_cache()
    torch.manual_seed(0)
    with torch.no_grad():
        fast(torch.randn(1, tokens, 32), cache)
        store = cache.keys[0].store
        prompt = [set(t.positions[0, 0, :n].tolist()) for t, n in zip(store.typed().tiers, store.counts, strict=True)]
        order = store.typed().tiers[-1].positions[0, 0, : store.counts[-1]].tolist()
        for _ in range(steps):
            fast(torch.randn(1, 1, 32), cache)
    store = cache.keys[0].store
    after = [set(t.positions[0, 0, :n].tolist()) for t, n in zip(store.typed().tiers, store.counts, strict=True)]
    assert [len(found) for found in after] == list(store.counts)  # no token is there twice
    return prompt, order, after, store


def test_generated_tokens_take_the_place_of_the_least_important_of_a_prompt():
    prompt, order, after, store = generated(600, 300, tiers="int8:0.0,int4:0.5", window=16, sinks=2)
    newest = set(range(600, 900))
    assert newest <= after[0] | after[1]  # none of them is lost
    assert after[0] & set(range(2)) == {0, 1}
    lost = set(order) - after[1]
    grown = store.counts[1] - len(order)
    assert len(lost) > 100 and grown > 100
    # Blocks at the end, which hold the lowest scores, have gone first.
    assert lost == set(order[len(order) - len(lost) :])
    assert store.counts[1] <= 450


def test_the_important_half_of_a_prompt_stays_and_generated_tokens_replace_each_other():
    _, order, after, store = generated(300, 900, tiers="int8:0.0,int4:128", window=8, sinks=0)
    assert store.counts[1] == 128 == len(order)
    assert set(order[:64]) <= after[1]  # the more important half, for good
    newest = set(range(1200 - 8 - 64, 1200))
    assert newest <= after[0] | after[1] and max(after[0]) == 1199
    assert all(place < 300 or place >= 1000 for place in after[1])  # nothing old that nobody chose


def test_a_branch_that_goes_on_elsewhere_is_not_touched():
    import copy

    decoder = Decoder(layers=1, heads=2, kv_heads=2, dim=16)
    fast = torch.compile(
        decoder, backend="mikv", options={"lower": "eager", "tiers": "int8:0.0,int4:0.5", "window": 16}
    )
    cache = decoder.new_cache()
    torch.manual_seed(0)
    xs = [torch.randn(1, n, 32) for n in (600, *[1] * 200)]
    with torch.no_grad():
        fast(xs[0], cache)
        other = copy.deepcopy(cache)
        for x in xs[1:]:
            fast(x, cache)
        again = [fast(x, other) for x in xs[1:]]
        third = decoder.new_cache()
        fast(xs[0], third)
        assert all(torch.equal(fast(x, third), want) for x, want in zip(xs[1:], again, strict=True))


def test_a_long_chunk_finds_room_wherever_the_cursor_is():
    plan = Planner(Options(tiers="int8:4,int4:256", window=16, sinks=0)).layer(0, SHAPES["smollm2-135m"])
    for cursor in (256, 192, 128, 64):
        orders = plan.step(800, (20, 256), 1000, (64, cursor))
        assert orders.replaced == 192 and orders.replaced_at == 64


def test_without_a_prompt_the_oldest_tokens_are_replaced_first():
    _, order, after, store = generated(1, 500, tiers="int8:0.0,int4:128", window=8, sinks=0)
    assert not order and store.counts[1] == 128
    kept = sorted(after[0] | after[1])
    assert kept == list(range(501 - len(kept), 501))
