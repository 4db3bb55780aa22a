"""Options, tier lists and budgets: what is accepted, what is refused, and with what words."""

import pytest
import torch

from mikv_compile import OptionError, Options
from mikv_compile.config import PRESETS
from mikv_compile.plan import CacheShape, parse_tiers
from mikv_compile.planner import BUDGET_LENGTH, Planner

SHAPE = CacheShape(1, 3, 64, 64, torch.float16, layers=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "h2o"}, "did you mean 'policy'"),
        ({"policy": "h20"}, "did you mean 'h2o'"),
        ({"quantizer": "kiwi"}, "did you mean 'kivi'"),
        ({"preset": "int5"}, "did you mean 'int4'"),
        ({"window": -1}, "whole number"),
        ({"window": 1.5}, "whole number"),
        ({"window": True}, "whole number"),
        ({"flush_every": 0}, "at least 1"),
        ({"recent_share": 1.5}, "from 0 to 1"),
        ({"budget": 0}, "fraction above 0"),
        ({"budget": 1.2}, "fraction above 0"),
        ({"budget": "lots"}, "such as '2GiB'"),
        ({"budget": 0.2, "tiers": "int8"}, "both choose"),
        ({"lower": "llvm"}, "'inductor' or 'eager'"),
        ({"inductor": 3}, "dict of Inductor"),
        ({"tiers": 4}, "a string"),
        ({"plan": ""}, "expected the name of a plan file"),
    ],
)
def test_refused_with_a_hint(options, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(options)


@pytest.mark.parametrize("options", [[1], 3, "abc", [], 0, b"", ("budget", 1)])
def test_options_that_are_no_dict(options):
    with pytest.raises(OptionError, match="must be a dict"):
        Options.parse(options)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ("int5", "unknown format 'int5'"),
        ("k5v2", "unknown format 'k5v2'"),
        ("int8,int4", "needs a share"),
        ("int8:1.5,int4", "neither from 0 to 1"),
        ("int8:-0.1,int4", "neither from 0 to 1"),
        ("int8:x,int4", "neither from 0 to 1"),
        ("int8:0.7,int4:0.7", "more than 1"),
        ("", "unknown format"),
    ],
)
def test_tier_lists_that_do_not_parse(tiers, message):
    with pytest.raises(OptionError, match=message):
        Planner(Options(tiers=tiers))


def test_layers_that_do_not_parse():
    for text, message in [("0-1:fp", "not of the form"), ("3-1=fp", "not of the form"), ("0=fp;0=int8", "twice")]:
        with pytest.raises(OptionError, match=message):
            Planner(Options(layers=text))


def test_flush_must_fill_blocks():
    with pytest.raises(OptionError, match="multiple of 64"):
        Planner(Options(flush_every=1))
    Planner(Options(flush_every=1, quantizer="mikv"))


def test_inductor_options_are_passed_on():
    options = Options.parse({"inductor.max_autotune": True, "inductor": {"trace.enabled": False}})
    assert options.inductor == {"max_autotune": True, "trace.enabled": False}


def test_presets_hold_only_options_and_all_make_plans():
    for name, preset in PRESETS.items():
        Options(**preset)
        plan = Planner(Options(preset=name)).layer(0, SHAPE)
        for length in (0, 1, 63, 64, 257, 5000):
            counts = plan.fill(length).counts
            assert sum(counts) <= length and all(c >= 0 for c in counts)
            assert plan.evicts or sum(counts) == length


@pytest.mark.parametrize("dim", [64, 128])
def test_the_preset_of_the_paper_is_what_the_paper_says(dim):
    """MiKV (arXiv 2402.18096): a fifth as it is, half of that the newest; the rest at 2 bits, in groups of D/2."""
    plan = Planner(Options(preset="mikv-paper")).layer(0, CacheShape(1, 2, dim, dim, torch.float16))
    high, low = plan.tiers
    assert plan.tiers == parse_tiers("fp:0.2,int2") and not plan.evicts
    assert (high.key_bits, high.value_bits, high.share, high.less) == (16, 16, 0.2, 0)
    assert (low.key_bits, low.value_bits, low.share) == (2, 2, None)
    assert str(plan.format) == f"fp,fp|2:t1c{dim // 2}b,2:t1c{dim // 2}+scored+watch:r0p1n1"
    key, value = plan.format.tiers[1].key, plan.format.tiers[1].value
    assert (key.channels, key.balanced) == (dim // 2, True) and (value.channels, value.balanced) == (dim // 2, False)
    assert (plan.policy, plan.window, plan.sinks, plan.recent_share, plan.flush_every) == ("h2o", 0, 0, 0.5, 1)
    assert plan.fill(1000).counts == (200, 800) and plan.recent_from(1000) == 900


def test_options_beside_a_preset_replace_its_own():
    plan = Planner(Options(preset="mikv-paper", window=32, flush_every=8)).layer(0, SHAPE)
    assert (plan.window, plan.flush_every, plan.policy, plan.sinks) == (32, 8, "h2o", 0)


def test_layers_take_other_tiers():
    planner = Planner(Options(layers="0-1=fp; 3=int8:0.5,int4"))
    assert [str(planner.layer(i, SHAPE).format.tiers[0]) for i in range(4)] == [
        "fp,fp", "fp,fp", "8:t1c64,8:t1c64", "8:t1c64,8:t1c64",
    ]  # fmt: skip
    assert str(planner.layer(3, SHAPE).format.tiers[1].value) == "4:t1c64~unbiased"
    assert len(planner.layer(0, SHAPE).tiers) == 1


@pytest.mark.parametrize("fraction", [1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fractional_budget_is_met_and_not_exceeded(fraction, dtype):
    if dtype == torch.float32 and fraction == 0.07:
        fraction = 0.035
    shape = CacheShape(2, 8, 128, 128, dtype)
    plan = Planner(Options(budget=fraction)).layer(0, shape)
    spent = plan.nbytes(BUDGET_LENGTH, 2, 8, 128, 128, dtype) / shape.dense_nbytes(BUDGET_LENGTH)
    if fraction == 1.0:
        assert str(plan.format) == "fp,fp"
    else:
        assert 0.93 * fraction < spent <= fraction


def test_budget_below_what_window_and_sinks_take():
    with pytest.raises(OptionError, match="raise it, or lower"):
        Planner(Options(budget=0.001)).layer(0, SHAPE)
    with pytest.raises(OptionError, match="too small"):
        Planner(Options(budget="1 KB")).layer(0, SHAPE)


def test_budget_in_bytes_holds_at_any_length():
    plan = Planner(Options(budget="1MiB")).layer(0, SHAPE)
    for length in (10, 1000, 5000, 100_000, 1_000_000):
        assert plan.nbytes(length, 1, 3, 64, 64, torch.float16) * SHAPE.layers <= 2**20
    counts, length = plan.fill(20_000).counts, 20_000
    for _ in range(500):
        orders = plan.step(length, counts, 1)
        counts = (counts[0] + 1 - orders.victims, counts[1] + orders.moves[0])
        length += 1
    assert counts[1] == plan.fill(10**6).counts[1] and counts[0] <= 68 + 64 + 64


def test_steps_keep_every_token_of_a_plan_without_eviction():
    plan = Planner(Options(tiers="int8:0.1,int4:0.3,int2")).layer(0, SHAPE)
    counts, length = plan.fill(500).counts, 500
    for _ in range(1000):
        orders = plan.step(length, counts, 1)
        counts = (counts[0] + 1 - orders.victims, *(c + m for c, m in zip(counts[1:], orders.moves, strict=True)))
        length += 1
        assert sum(counts) == length
        assert plan.high_target(length) <= counts[0] < plan.high_target(length) + 3 * plan.flush_every
    assert abs(counts[1] - 0.3 * length) < 130


def test_parse_shares():
    a, b, c = parse_tiers("bf16:512, k8v4:0.25, int2")
    assert (a.share, b.share, c.share) == (512, 0.25, None)
    assert (a.float_name, b.key_bits, b.value_bits) == ("bf16", 8, 4)
    assert (a.quota(100), a.quota(1000), b.quota(1000), c.quota(7)) == (100, 512, 250, 7)


def test_steps_of_an_evicting_plan_keep_its_shares():
    plan = Planner(Options(tiers="int8:0.05,k4v2:0.45")).layer(0, SHAPE)
    counts, length = plan.fill(1000).counts, 1000
    for _ in range(3000):
        orders = plan.step(length, counts, 1)
        assert orders.victims == 0 or orders.victims >= plan.flush_every
        counts = (counts[0] + 1 - orders.victims, counts[1] + orders.moves[0])
        length += 1
        assert 0.45 * length - 64 - 1 <= counts[1] <= 0.45 * length
        assert plan.high_target(length) <= counts[0] < plan.high_target(length) + 2 * plan.flush_every + 1


def test_shares_that_add_up_to_one_evict_nothing():
    plan = Planner(Options(tiers="int8:0.5,k4v2:0.5", window=0, sinks=0)).layer(0, SHAPE)
    assert not plan.evicts and sum(plan.fill(100).counts) == 100
