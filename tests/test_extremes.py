"""Numbers and sizes at the border: NaN and infinity, no tokens, no rows, buffers beyond 2**31 elements."""

import ast
import math
from pathlib import Path

import pytest
import torch
from decoder import Decoder, inputs, run

import mikv_compile
from mikv_compile.config import Options
from mikv_compile.kernels import dispatch
from mikv_compile.kernels.dispatch import run as run_primitive
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, buffer_shapes
from mikv_compile.kernels.rotation import as_given
from mikv_compile.kernels.store_ops import compress
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

PLANS = {
    "default": {},
    "kivi": {"quantizer": "kivi"},
    "hqq": {"quantizer": "hqq"},
    "nuq": {"quantizer": "nuq"},
    "rotate": {"quantizer": "rotate"},
    "mikv": {"quantizer": "mikv", "tiers": "int8:0.1,int4"},
    "full": {"preset": "full"},
}
B, HEADS, DIM, TOKENS = 2, 2, 16, 200
BAD = (1, 1, 37)
"""Row, head and position of the token that is no number."""


def held(options, bad, side, late=False):
    """Keys and values that a store reads back, of random tokens of which one has a broken channel."""
    torch.manual_seed(0)
    shape = CacheShape(B, HEADS, DIM, DIM, torch.float32)
    plan = Planner(Options.parse(options)).layer(0, shape)
    store = LayerStore(plan, shape, torch.device("cpu"))
    given = {name: torch.randn(B, HEADS, TOKENS, DIM) for name in ("key", "value")}
    q, scores = torch.randn(B, 2 * HEADS, TOKENS, DIM), torch.rand(B, HEADS, TOKENS)
    given[side][(*BAD, 3)] = bad
    prompt = 20 if late else 100
    orders = store.prepare(prompt, fresh=True)
    k, v = (given[name][:, :, :prompt] for name in ("key", "value"))
    compress(q[:, :, :prompt], k, v, scores[:, :, :prompt], store.typed(), plan.format, orders)
    store.commit(orders, prompt)
    for begin in range(prompt, TOKENS, 20):
        store.append(*(given[name][:, :, begin : begin + 20] for name in ("key", "value")))
    found = {name: torch.empty(B, HEADS, TOKENS, DIM) for name in ("key", "value")}
    tier_of = torch.empty(B, HEADS, TOKENS, dtype=torch.long)
    slot_of = torch.empty(B, HEADS, TOKENS, dtype=torch.long)
    for number, count in enumerate(store.counts):
        *stored, positions = store._read_tier(number)
        for name, part in zip(found, as_given(plan.format, *stored), strict=True):
            found[name].scatter_(2, positions[..., None].expand_as(part), part)
        tier_of.scatter_(2, positions, torch.full_like(positions, number))
        slot_of.scatter_(2, positions, torch.arange(count).expand_as(positions))
    tier = int(tier_of[BAD])
    block = plan.format.tiers[tier].key.tokens if side == "key" else plan.format.tiers[tier].value.tokens
    together = (tier_of[BAD[:2]] == tier) & (slot_of[BAD[:2]] // block == slot_of[BAD] // block)
    return found, given, together


@pytest.mark.parametrize("late", [False, True], ids=["prompt", "later"])
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_a_broken_number_spoils_its_block_at_most(name, bad, side, late):
    """Tokens that share no scale with it read back as they should, and other rows and heads have the same bits."""
    backends = {}
    for backend in ("cpp", "reference"):
        with dispatch.use(backend):
            found, given, together = held(PLANS[name], bad, side, late)
            clean, _, _ = held(PLANS[name], 0.0, side, late)
        backends[backend] = found
        assert bool(together[BAD[2]]) and (side == "key" or together.sum() == 1)
        for what in ("key", "value"):
            others = torch.ones(B, HEADS, dtype=torch.bool)
            others[BAD[:2]] = False
            assert torch.equal(found[what][others], clean[what][others])
            apart = ~together if what == side else torch.ones(TOKENS, dtype=torch.bool)
            got, want = found[what][BAD[:2]][apart], given[what][BAD[:2]][apart]
            assert got.isfinite().all()
            # MiKV's balancer follows the largest key of a channel, as far as it is a number.
            if not (name == "mikv" and math.isfinite(bad)):
                assert (got - want).square().mean() < 0.25
        if math.isnan(bad):
            assert found[side][BAD].isnan().any()  # it is not hidden
    for what in ("key", "value"):
        torch.testing.assert_close(backends["cpp"][what], backends["reference"][what], rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_a_broken_token_stays_in_its_row(name):
    """Through a compiled model: row 0 has a NaN, row 1 gives what it gives beside a whole row."""
    model = Decoder(layers=1)
    fast = torch.compile(model, backend="mikv", options={"lower": "eager", **PLANS[name]})
    outputs = []
    for broken in (False, True):
        xs, cache = inputs([150, 1, 1, 70, 1], batch=2), model.new_cache()
        if broken:
            xs[0][0, 30, 5] = math.nan
        outputs.append(torch.cat(run(fast, cache, xs), 1))
    assert outputs[1][0].isnan().any() and torch.equal(outputs[0][1], outputs[1][1])


# No tokens, no rows ---------------------------------------------------------------------------------------------------

SMALL = {"window": 2, "sinks": 1, "flush_every": 4, "quantizer": "mikv"}
SIZED = {
    "default": {},
    "full": {"budget": 1.0},
    "paper": {"preset": "mikv-paper"},
    "three tiers": {**SMALL, "tiers": "int8:0.1,int4:0.3,int2"},
    "evicting": {**SMALL, "tiers": "int8:0.1,int4:0.3"},
    "one tier that evicts": {**SMALL, "tiers": "fp:0.3", "policy": "h2o"},
}


@torch.no_grad()
@pytest.mark.parametrize(("batch", "prompt"), [(0, 2), (1, 1)])
@pytest.mark.parametrize("name", SIZED)
def test_a_prompt_of_one_token_and_one_without_rows(name, prompt, batch):
    model = Decoder(layers=1)
    fast = torch.compile(model, backend="mikv", options={"lower": "eager", **SIZED[name]})
    cache, dense = model.new_cache(), model.new_cache()
    xs = inputs([prompt, *[1] * 12], batch=batch)
    got, want = run(fast, cache, xs), run(model, dense, xs)
    assert cache.keys[0].shape == dense.keys[0].shape
    assert [x.shape for x in got] == [x.shape for x in want] and all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)  # a call's own tokens are exact
    if batch:
        assert mikv_compile.cache_report(cache).nbytes > 0


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", SIZED)
def test_calls_without_tokens_change_nothing(name, backend):
    shape = CacheShape(2, 2, 16, 16, torch.float32)
    plan = Planner(Options.parse(SIZED[name])).layer(0, shape)
    with dispatch.use(backend):
        store = LayerStore(plan, shape, torch.device("cpu"))
        for tokens in (0, 30, 0, 1, 0):
            k, v = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)
            before = [b.clone() for b in store.buffers], store.counts, store.length
            store.append(k, v)
            q = torch.randn(2, 4, tokens, 16)
            args = (store.typed(), plan.format, store.counts, store.length)
            out, lse = run_primitive("attend", q.device, q, k, v, None, 0.25, 0.0, *args)
            assert out.shape == q.shape and lse.shape == q.shape[:3] and out.isfinite().all()
            if not tokens:
                assert (store.counts, store.length) == before[1:]
                assert all(map(torch.equal, store.buffers, before[0]))


# Buffers beyond 2**31 elements ----------------------------------------------------------------------------------------

SLOTS = 2**24 + 64
"""So many slots of 64 bytes: the third head begins behind 2**31 bytes. Pages that are not touched take no memory."""


def stores(text, capacity):
    """A store of three heads with some tokens; of its buffers only the used slots are ever touched."""
    fmt = LayerFormat.parse(text)
    shapes = buffer_shapes(fmt, 1, 3, 64, 16, [capacity] * len(fmt.tiers), torch.float32)
    try:
        return fmt, StoreBuffers.from_list([torch.empty(shape, dtype=dtype) for shape, dtype in shapes])
    except RuntimeError as error:
        pytest.skip(f"this machine promises no such memory: {error}")


@pytest.mark.parametrize("text", ["8:t1c64,8:t1c16|4:t64c1,4:t1c16+scored", "8:t1c64,8:t1c16|8:t1c64,2:t1c16+scored"])
def test_buffers_beyond_what_32_bits_count(text):
    """Each C++ kernel on the last head of a huge buffer does what it does in a small one."""
    found = []
    for capacity in (192, SLOTS):
        torch.manual_seed(0)
        fmt, store = stores(text, capacity)
        k, v = torch.randn(1, 3, 128, 64), torch.randn(1, 3, 128, 16)
        with dispatch.use("cpp"):
            for tier, tier_fmt in zip(store.tiers, fmt.tiers, strict=True):
                run_primitive("write_tokens", k.device, tier, tier_fmt, 0, k, v, None, 0, None, None)
            store.scores[:, :, :128] = torch.rand(1, 3, 128)
            # The last slots as well: within a head, too, offsets are large.
            last = capacity - 64
            run_primitive("write_tokens", k.device, store.tiers[1], fmt.tiers[1], last, k[:, :, :64], v[:, :, :64],
                          None, 500, None, None)  # fmt: skip
            at_end = torch.arange(last, capacity).expand(1, 3, -1)
            got = [*run_primitive("read_tokens", k.device, store.tiers[1], fmt.tiers[1], at_end, 64, 16, None)]
            pairs = torch.tensor([100, 101]).expand(1, 3, -1), torch.tensor([3, 7]).expand(1, 3, -1)
            run_primitive("copy_slots", k.device, store.tiers[0], fmt.tiers[0], store.scores, *pairs)
            orders = Orders(256, 2, 250, (128, 64), 64, (64,))
            run_primitive("demote", k.device, store, fmt, orders, 128, 64, 16, None)
            q, own = torch.randn(1, 6, 1, 64), (torch.randn(1, 3, 1, 64), torch.randn(1, 3, 1, 16))
            told = (store, fmt, (64, 128), 256)
            out, lse = run_primitive("attend", k.device, q, *own, None, 0.125, 0.0, *told)
            got += [
                out,
                lse,
                run_primitive("add_scores", k.device, q, own[0], lse, None, 0.125, 0.0, store, fmt, 64, 256),
            ]
        got += [store.scores[:, :, :64], store.tiers[0].positions[:, :, :64], store.tiers[1].positions[:, :, :128]]
        found.append([x.clone() for x in got])
    for small, large in zip(*found, strict=True):
        assert torch.equal(small, large)


def test_triton_kernels_count_heads_in_64_bits():
    """What is multiplied by the size of a head has to be int64: heads x slots x channels go beyond 2**31."""
    folder = Path(dispatch.__file__).parent
    seen = 0
    for file in sorted(folder.glob("triton_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Assign) and "tl.program_id" in ast.unparse(node.value)):
                continue
            names = ast.unparse(node.targets[0])
            if names.split(",")[0] in ("head", "(head") or "program_id(2)" in ast.unparse(node.value):
                assert "tl.program_id(" in ast.unparse(node.value) and ".to(tl.int64)" in ast.unparse(node.value), node
                seen += 1
    assert seen >= 7
