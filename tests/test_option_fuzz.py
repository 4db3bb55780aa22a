"""Random options: they parse, or OptionError names what is wrong; what parses runs."""

import hypothesis
import torch
from hypothesis import strategies as st

from mikv_compile import MikvError, OptionError
from mikv_compile.config import PRESETS, Options
from mikv_compile.kernels.dispatch import run as run_primitive
from mikv_compile.kernels.rotation import as_stored, output_as_given
from mikv_compile.kernels.scoring import AttentionArgs, score
from mikv_compile.kernels.store_ops import compress, update
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.policies import POLICIES
from mikv_compile.quantizers import QUANTIZERS
from mikv_compile.store import LayerStore

FORMATS = st.sampled_from(["fp", "bf16", "fp16", "int8", "int4", "int3", "int2", "k4v2", "k16v8", "k8v3"])
SHARES = st.sampled_from(["", ":0.1", ":0.25", ":0.5", ":0.0", ":8", ":100", ":0.4-10", ":1.0"])
TIERS = st.lists(st.tuples(FORMATS, SHARES).map("".join), min_size=1, max_size=3).map(",".join)
NAMES = {"preset": PRESETS, "policy": POLICIES, "key_quantizer": QUANTIZERS, "value_quantizer": QUANTIZERS}
VALID = {
    **{name: st.sampled_from(sorted(known)) for name, known in NAMES.items()},
    "quantizer": st.sampled_from(sorted(QUANTIZERS)),
    "tiers": TIERS,
    "layers": TIERS.map(lambda tiers: f"0={tiers}"),
    "budget": st.sampled_from([1.0, 0.7, 0.5, 0.25, 0.1, 0.02, "1MB", "20KB", "300"]),
    "layer_budget": st.sampled_from(["pyramid", "uniform"]),
    "heads": st.sampled_from(["sum", "max"]),
    "value_norm": st.booleans(),
    "window": st.integers(0, 70),
    "sinks": st.integers(0, 5),
    "recent_share": st.floats(0, 1),
    "flush_every": st.sampled_from([1, 3, 8, 64, 128]),
    "lower": st.sampled_from(["inductor", "eager"]),
    "inductor": st.just({"max_autotune": False}),
}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=1), st.tuples(),
    st.sampled_from([
        "", ",", ":", "int8:", "fp:1e400", "fp:nan", "int4:0.5-", "k4", "k99v2", "0-", "=fp", "0=", "0-9=x",
        "1e9999GiB", "-1", "0", "9" * 400, "9" * 5000, "0=fp;0=fp", "fp:\u0661", "fp:\u00b2", "\u0661-\u0662=fp",
        "0-9999999999=fp", "nowhere.json",
    ]),
)  # fmt: skip
NAME = st.one_of(st.sampled_from(sorted(VALID) + ["plan"]), st.text(max_size=8), st.integers(), st.just("inductor.x"))
BROKEN = st.one_of(st.dictionaries(NAME, st.one_of(ODD, *VALID.values()), max_size=4), ODD)
SOUND = st.fixed_dictionaries({}, optional=VALID)


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.given(given=BROKEN)
def test_options_of_any_kind(given):
    try:
        options = Options.parse(given)
        Planner(options).layer(0, CacheShape(1, 2, 16, 16, torch.float32, 2))
    except OptionError as error:
        said = str(error)
        names = given if isinstance(given, dict) else ()
        words = [*map(str, names), "tier", "share", "budget", "option", "flush_every"]
        assert any(word in said for word in words if word) or "" in names
    except ValueError as error:  # a plan for other head dimensions
        assert type(error) is ValueError and "head_dim" in str(error)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(given=SOUND, seed=st.integers(0, 3), prompt=st.sampled_from([1, 30, 150]))
def test_what_parses_runs(given, seed, prompt):
    shape = CacheShape(1, 2, 16, 16, torch.float32, 2)
    try:
        plan = Planner(Options.parse(given)).layer(0, shape)
    except OptionError:
        return
    except ValueError as error:
        assert "head_dim" in str(error)
        return
    torch.manual_seed(seed)
    store = LayerStore(plan, shape, torch.device("cpu"))
    fmt = plan.format
    try:
        for number, tokens in enumerate([prompt, 1, 1, 40, *[1] * 4]):
            q, k, v = (torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2))
            orders = store.prepare(tokens, fresh=not number)
            if orders.fresh:
                scores = (
                    score(plan.policy, q, k, v, AttentionArgs(None, 0.25, True)) if fmt.has_scores else k.new_empty(0)
                )
                compress(q, k, v, scores, store.typed(), fmt, orders)
            else:
                args = (None, 0.25, 0.0, store.typed(), fmt)
                out, lse = run_primitive(
                    "attend", q.device, *as_stored(fmt, q, k, v=v), *args, store.counts, store.length
                )
                assert output_as_given(fmt, out, q.dtype).isfinite().all()
                update(q, k, v, lse, *args, orders)
            store.commit(orders, tokens)
    except MikvError as error:
        raise AssertionError(f"{given} parses and does not run: {error}") from error
    assert store.nbytes > 0 and store.length == prompt + 46 and all(b.isfinite().all() for b in store.buffers)
    assert sum(store.counts) <= store.length and all(map(int.__le__, store.counts, store.capacities))
