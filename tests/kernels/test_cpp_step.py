"""The decode step with little Python does what attention and update do one after the other."""

import os
import shutil

import pytest
import torch

from mikv_compile.kernels import attention, cpp_attention, cpp_common, cpp_step, cpp_tokens, dispatch, masks, store_ops
from mikv_compile.kernels.dispatch import BuildError
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers
from mikv_compile.kernels.ops import _library  # noqa: F401  (declares the ops)
from tests.kernels.test_cpp_attention import build_store, make_mask

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)

ops = torch.ops.mikv
SCORED = "8:t1c64,8:t1c64|4:t64c1,2:t1c64"


def make_call(text, counts, victims=0, rows=1, dim=64, dtype=torch.float32, mask="none", batch=2):
    torch.manual_seed(0)
    fmt, stored = build_store(text, counts, dim, batch=batch, dtype=dtype, spare=64)
    if fmt.has_scores:
        stored.scores.copy_(torch.rand(stored.scores.shape))
    q, k, v = (torch.randn(batch, heads, rows, dim).to(dtype) for heads in (6, 2, 2))
    length = sum(counts)
    moves = (victims, *(0,) * (len(counts) - 2)) if len(counts) > 1 else ()
    orders = Orders(length, 2, length - 8, tuple(counts), victims, moves)
    return (q, k, v, make_mask(mask, batch, 6, rows, length + rows), dim**-0.5, 0.0), stored.to_list(), orders, str(fmt)


@pytest.mark.parametrize(
    ("text", "counts", "options"),
    [
        ("fp,fp", (100,), {}),
        ("fp,fp", (63,), {"rows": 5, "mask": "bool"}),
        (SCORED, (90, 128), {}),
        (SCORED, (90, 128), {"victims": 64, "mask": "float"}),
        (SCORED, (90, 128), {"dtype": torch.bfloat16, "mask": "longer"}),
        (SCORED + "+watch:r0p1n1", (90, 128), {"victims": 64}),
        (SCORED + "+watch:r0p7n1", (90, 0), {"rows": 5, "mask": "per_head", "dtype": torch.float16}),
        ("8:t1c40b,8:t1c80|2:t1c40b,2:t1c40", (70, 33), {"dim": 80, "victims": 16}),
    ],
)
def test_equals_attention_and_update(monkeypatch, text, counts, options):
    args, buffers, orders, fmt = make_call(text, counts, **options)
    served = []
    step = cpp_step.step
    monkeypatch.setattr(cpp_step, "step", lambda *a: served.append(step(*a)) or served[-1])
    apart = [x.clone() for x in buffers]
    got = ops.step_v1(*args, buffers, orders.encode(), fmt, "h2o")
    assert served == [got] or served[0] is not None
    out, lse = ops.attend_v2(*args, apart, orders.encode(), fmt)
    ops.update_v2(*args[:3], lse, *args[3:], apart, orders.encode(), fmt, "h2o")
    for a, b in zip((*got, *buffers), (out, lse, *apart), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_calls_that_it_leaves_to_the_ops():
    args, buffers, orders, fmt = make_call(SCORED + "+watch:r3p7n2", (90, 128), rows=5)
    before = [x.clone() for x in buffers]
    for refused in (orders, orders._replace(fresh=True)):
        assert cpp_step.step(*args, buffers, refused, fmt) is None
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(buffers, before, strict=True))


def test_a_store_in_memory_that_another_one_had():
    """What is known of a store goes by addresses, so the sizes have to tell stores in one place apart."""
    memory = {}

    def placed(tensors):
        made = []
        for i, x in enumerate(tensors):
            block = memory.setdefault(i, torch.zeros(1 << 20, dtype=torch.uint8))
            made.append(block[: x.numel() * x.element_size()].view(x.dtype).view(x.shape).copy_(x))
        return made

    half, brain = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
    cases = [((100,), {}), ((300,), {}), ((100,), {"batch": 1}), ((300,), {"rows": 4}), ((100,), {}), ((100,), half)]
    for counts, options in (*cases, ((100,), brain), ((100,), half)):
        args, buffers, orders, fmt = make_call("fp,fp", counts, **options)
        got = ops.step_v1(*args, placed(buffers), orders.encode(), fmt, "h2o")
        stored = StoreBuffers.from_list(buffers)
        want = attention.attend(*args, stored, LayerFormat.parse(fmt), orders.counts, orders.length)
        torch.testing.assert_close(got, want)


def test_stale_columns_are_refused_before_anything_is_written():
    args, buffers, orders, fmt = make_call("fp,fp", (100,))
    before = [x.clone() for x in buffers]
    with pytest.raises(masks.StaleColumnsError):
        ops.step_v1(*args, buffers, orders._replace(stale=3).encode(), fmt, "h2o")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(buffers, before, strict=True))


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr(cpp_step, "_MOST_KEPT", 2)
    for count in (64, 128, 192, 256):
        args, buffers, orders, fmt = make_call("fp,fp", (count,))
        ops.step_v1(*args, buffers, orders.encode(), fmt, "h2o")
        assert len(cpp_step._known) <= 2


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("mask", ["none", "bool", "float_per_head"])
@pytest.mark.parametrize("text", ["fp,fp|4:t64c1,fp+scored", "8:t1c40b,fp|fp,fp+scored", "4:t1c80,fp|fp,fp+scored"])
def test_scores_equal_the_reference(text, mask, rows):
    (q, k, _, given, scale, _), buffers, orders, fmt = make_call(text, (150, 64), rows=rows, dim=80, mask=mask)
    parsed = LayerFormat.parse(fmt)
    for softcap in (0.0, 5.0):
        stored, other = (StoreBuffers.from_list([x.clone() for x in buffers]) for _ in range(2))
        args = (q, k, k, given, scale, softcap, stored, parsed, orders.counts, orders.length)
        _, lse = attention.attend(*args)
        lse[:, :, 0] = float("-inf")
        rest = (lse, given, scale, softcap)
        got = cpp_attention.add_scores(q, k, *rest, stored, parsed, 150, orders.length)
        want = attention.add_scores(q, k, *rest, other, parsed, 150, orders.length)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(stored.scores, other.scores, rtol=2e-5, atol=2e-6)


def test_scores_for_any_number_of_threads():
    (q, k, _, _, scale, _), buffers, orders, fmt = make_call("fp,fp|fp,fp+scored", (3000, 64), rows=3)
    found = []
    for threads in (1, 2):
        stored = StoreBuffers.from_list([x.clone() for x in buffers])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with dispatch.use("cpp"):
                lse = torch.zeros(q.shape[:3])
                own = dispatch.run(
                    "add_scores", q.device, q, k, lse, None, scale, 0.0, stored, LayerFormat.parse(fmt), 3000, 3064
                )
        finally:
            torch.set_num_threads(before)
        found.append((own, stored.scores))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_kernels_are_built_ahead(monkeypatch):
    built = []
    monkeypatch.setattr(cpp_step, "_ahead", None)
    monkeypatch.setattr(cpp_attention, "kernels", lambda: built.append("attention"))
    monkeypatch.setattr(cpp_tokens, "kernels", lambda: built.append("tokens"))
    with dispatch.use("reference"):
        cpp_step.build_ahead()
    assert cpp_step._ahead is None
    with dispatch.use("cpp"):
        for _ in range(2):
            cpp_step.build_ahead()
        cpp_step._ahead.join()
    assert built == ["attention", "tokens"]


def test_a_build_ahead_that_fails_says_nothing(monkeypatch):
    def fail():
        raise BuildError("no compiler here")

    warnings = []
    monkeypatch.setattr(dispatch.log, "warning", lambda *args: warnings.append(args))
    monkeypatch.setattr(cpp_step, "_ahead", None)
    for module in (cpp_attention, cpp_tokens):
        monkeypatch.setattr(module, "kernels", fail)
    with dispatch.use("cpp"):
        cpp_step.build_ahead()
        cpp_step._ahead.join()
    assert not warnings and not cpp_step._ahead.is_alive()


def test_a_build_that_fails_is_tried_once(monkeypatch):
    """A new store asks for kernels anew, and a compiler that fails may take seconds."""
    tried = []

    def fail(source, name, exact):
        tried.append(name)
        raise RuntimeError("no compiler here")

    kernels = (cpp_attention.kernels, cpp_tokens.kernels)
    monkeypatch.setattr(cpp_common, "load_cpp_library", fail)
    monkeypatch.setattr(cpp_common, "_failed", {})
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(cpp_step, "_known", {})
    for each in kernels:
        each.cache_clear()
    try:
        with dispatch.use("cpp"):
            for _ in range(3):
                (q, k, v, *how), buffers, orders, text = make_call("8:t1c64,8:t1c64|4:t1c64,4:t1c64", [40, 70])
                assert cpp_step.step(q, k, v, *how, buffers, orders, text) is None
                store_ops.append(k, v, None, StoreBuffers.from_list(buffers), LayerFormat.parse(text), orders)
    finally:
        for each in kernels:
            each.cache_clear()
    assert sorted(tried) == ["attention", "tokens"]
