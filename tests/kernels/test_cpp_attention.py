"""The C++ attention of the CPU against the plain-PyTorch reference."""

import math
import os
import shutil

import pytest
import torch

from mikv_compile.kernels import attention, cpp_attention, cpp_common, dispatch, tokens
from mikv_compile.kernels.formats import LayerFormat, StoreBuffers, buffer_shapes

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)

POISON_POSITION = 1 << 30


def build_store(text, counts, dim, value_dim=None, batch=1, kv_heads=2, dtype=torch.float32, spare=2):
    """A store with random tokens in the first ``counts`` slots and poison in all others."""
    fmt = LayerFormat.parse(text)
    value_dim = value_dim or dim
    capacities = [(count // tier.block + spare) * tier.block for count, tier in zip(counts, fmt.tiers, strict=True)]
    shapes = buffer_shapes(fmt, batch, kv_heads, dim, value_dim, capacities, dtype)
    flat = [torch.full(s, math.nan if d.is_floating_point else 255, dtype=d) for s, d in shapes]
    buffers = StoreBuffers.from_list(flat)
    buffers.balancer.copy_(torch.rand(buffers.balancer.shape) + 0.5)
    order = torch.rand(batch, kv_heads, sum(counts)).argsort(dim=-1).int()
    start = 0
    for tier, tier_fmt, count in zip(buffers.tiers, fmt.tiers, counts, strict=True):
        tier.positions.fill_(POISON_POSITION)
        if count:
            k, v = torch.randn(batch, kv_heads, count, dim), torch.randn(batch, kv_heads, count, value_dim)
            balancer = buffers.balancer if tier_fmt.key.balanced else None
            positions = order[:, :, start : start + count].contiguous()
            tokens.write_tokens(tier, tier_fmt, 0, k, v, None, 0, positions, balancer)
        start += count
    return fmt, buffers


def make_mask(kind, batch, heads, rows, columns):
    if kind == "none":
        return None
    if kind == "bool":
        return torch.rand(batch, 1, rows, columns) > 0.3
    if kind == "per_head":
        return torch.rand(batch, heads, rows, columns) > 0.5
    if kind == "broadcast":
        return torch.rand(1, 1, 1, columns) > 0.5
    if kind == "expanded":
        return (torch.rand(batch, 1, 1, columns) > 0.5).expand(batch, heads, rows, columns)
    if kind == "longer":
        return torch.rand(batch, 1, rows, columns + 9) > 0.3
    if kind == "strided":
        return torch.rand(batch, 1, rows, 2 * columns)[..., ::2] > 0.3
    mask = torch.randn(batch, heads if kind == "float_per_head" else 1, rows, columns)
    return mask.masked_fill(torch.rand(mask.shape) > 0.7, -math.inf).to(
        torch.bfloat16 if kind == "bf16" else torch.float32
    )


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def assert_equal_to_reference(args, tolerance=2e-6):
    out, lse = cpp_attention.attend(*args)
    want, want_lse = attention.attend(*args)
    assert out.dtype == want.dtype and out.shape == want.shape
    assert lse.dtype == torch.float32 and lse.shape == want_lse.shape
    assert torch.isfinite(want).all()
    assert relative_error(out, want) <= tolerance
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def make_args(
    text,
    counts,
    dim=64,
    group=1,
    rows=1,
    mask="none",
    value_dim=None,
    batch=1,
    kv_heads=2,
    own=1,
    softcap=0.0,
    dtype=torch.float32,
):
    torch.manual_seed(0)
    fmt, buffers = build_store(text, counts, dim, value_dim, batch, kv_heads, dtype)
    heads, length = group * kv_heads, sum(counts)
    q = torch.randn(batch, heads, rows, dim).to(dtype)
    k = torch.randn(batch, kv_heads, own, dim).to(dtype)
    v = torch.randn(batch, kv_heads, own, value_dim or dim).to(dtype)
    mask = make_mask(mask, batch, heads, rows, length + own)
    return q, k, v, mask, dim**-0.5, softcap, buffers, fmt, tuple(counts), length


@pytest.mark.parametrize(
    ("text", "counts", "options"),
    [
        # Every width of keys with every width of values, over all lengths, dims, groups, rows and masks.
        ("fp,fp", [1], {"dim": 64}),
        ("fp,fp", [257], {"dim": 128, "group": 8, "rows": 5, "mask": "bool"}),
        ("fp,fp", [63], {"dim": 80, "group": 3, "rows": 33, "mask": "per_head"}),
        ("fp,8:t1c64", [64], {"dim": 128, "group": 3, "mask": "float"}),
        ("fp,4:t1c16", [63], {"dim": 80, "group": 8, "rows": 5}),
        ("fp,2:t1c32", [257], {"dim": 64, "group": 1, "rows": 33, "mask": "broadcast"}),
        ("8:t1c64,fp", [257], {"dim": 64, "group": 3, "rows": 5, "mask": "float_per_head"}),
        ("8:t1c64,8:t1c64", [63], {"dim": 128, "group": 1, "mask": "expanded"}),
        ("8:t1c16,4:t1c40", [64], {"dim": 80, "group": 8, "rows": 33}),
        ("8:t1c80,2:t1c20", [1], {"dim": 80, "group": 3, "rows": 5, "mask": "bool"}),
        ("4:t1c64,fp", [64], {"dim": 64, "group": 8, "mask": "per_head"}),
        ("4:t1c128,8:t1c32", [1], {"dim": 128, "group": 3, "rows": 33}),
        ("4:t1c64,4:t1c64", [257], {"dim": 128, "group": 3, "rows": 1, "mask": "bf16"}),
        ("4:t1c80,2:t1c16", [257], {"dim": 80, "group": 1, "rows": 5, "mask": "broadcast"}),
        ("2:t1c8,fp", [63], {"dim": 80, "group": 1, "rows": 1, "mask": "longer"}),
        ("2:t1c32,8:t1c64", [257], {"dim": 64, "group": 8, "rows": 33, "mask": "bool"}),
        ("2:t1c64,4:t1c32", [1], {"dim": 64, "group": 1, "rows": 5, "mask": "strided"}),
        ("2:t1c32,2:t1c128", [64], {"dim": 128, "group": 3, "rows": 5}),
        ("3:t1c64,3:t1c32", [257], {"dim": 128, "group": 3}),
        ("3:t1c20,3:t1c80", [63], {"dim": 80, "group": 8, "rows": 5, "mask": "float"}),
        ("3:t1c8,4:t1c1", [63], {"dim": 64, "group": 1, "rows": 33, "mask": "bool"}),
        # Planes that are narrower than a vector, with several groups each.
        ("2:t1c8,2:t1c8", [63], {"dim": 32, "group": 8}),
        ("3:t1c8,3:t1c8", [70], {"dim": 64, "group": 4}),
        ("2:t1c5,2:t1c5", [63], {"dim": 20, "group": 2}),
        ("3:t1c12,3:t1c4", [63], {"dim": 96, "group": 8}),
        ("3:t1c4,4:t1c2", [63], {"dim": 32, "group": 8}),
        # Dims that are no multiple of a vector.
        ("8:t1c4,8:t1c12", [63], {"dim": 12, "group": 3, "mask": "bool"}),
        ("4:t1c2,2:t1c4", [64], {"dim": 20, "group": 8}),
        # Blocks of slots that share scales, also split between tiles.
        ("4:t64c1,4:t1c64", [256], {"dim": 128, "group": 3}),
        ("2:t64c1,2:t64c32", [320], {"dim": 64, "group": 8, "rows": 5, "mask": "bool"}),
        ("8:t32c80,3:t16c1", [96], {"dim": 80, "group": 1, "rows": 33}),
        ("4:t48c2,8:t1c1", [144], {"dim": 80, "group": 3, "mask": "float"}),
        ("2:t128c64,4:t1c64", [384], {"dim": 64, "group": 3}),
        # Several tiers, keys and values of different dims, several batch rows, more own tokens.
        ("8:t1c64,8:t1c64|4:t64c1,2:t1c32", [300, 640], {"group": 3, "batch": 2, "mask": "bool"}),
        ("8:t1c64,8:t1c64|4:t64c1b,2:t1c32", [77, 128], {"group": 3, "rows": 5, "own": 5, "mask": "per_head"}),
        ("4:t1c16b,4:t1c16", [63], {"dim": 80, "group": 8, "rows": 1}),
        ("8:t1c32,4:t1c40|3:t1c32,2:t1c20", [5, 257], {"dim": 128, "value_dim": 80, "rows": 33, "own": 33}),
        ("fp,fp|8:t1c40,8:t1c64|2:t64c1,3:t1c64", [7, 9, 64], {"dim": 80, "value_dim": 64, "own": 2, "batch": 2}),
        ("8:t1c64,8:t1c64|4:t64c1,2:t1c32", [0, 64], {"group": 3, "mask": "bool"}),
        ("fp,fp", [0], {"own": 5, "rows": 5, "mask": "bool"}),
        # Long enough for several ranges of slots, with and without more than one block of rows.
        ("4:t1c64,4:t1c64", [3000], {"group": 3, "kv_heads": 1, "mask": "bool"}),
        ("fp,fp", [1500], {"group": 3, "kv_heads": 1, "rows": 33, "mask": "bool"}),
        # Capped scores.
        (
            "fp,fp",
            [63],
            {"dim": 80, "kv_heads": 3, "group": 3, "rows": 5, "own": 2, "softcap": 1.5, "mask": "float_per_head"},
        ),
        ("8:t1c64,8:t1c64|4:t64c1b,2:t1c32", [77, 128], {"group": 3, "rows": 5, "softcap": 0.7, "mask": "bool"}),
        ("4:t1c64,4:t1c64", [3000], {"group": 3, "kv_heads": 1, "softcap": 50.0}),
        # No own tokens.
        ("8:t1c20,4:t1c40", [63], {"dim": 80, "value_dim": 40, "group": 3, "rows": 5, "own": 0, "mask": "bool"}),
        ("fp,fp|4:t64c1,2:t1c32", [1, 320], {"own": 0, "rows": 3, "softcap": 2.0}),
        ("fp,fp", [0], {"own": 0, "rows": 3, "group": 2}),
    ],
)
def test_equals_reference(text, counts, options):
    assert_equal_to_reference(make_args(text, counts, **options))


def test_softcap_over_its_whole_range():
    """Every row sees one key, so that its log-sum-exp is its score."""
    scores = torch.cat([torch.logspace(-6, 4, 200), torch.tensor([0.0, 1e30, 30.0, 79.0])])
    scores = torch.cat([scores, -scores])
    q = torch.zeros(1, 1, len(scores), 16)
    q[..., 0] = scores
    k = torch.zeros(1, 1, 1, 16)
    k[..., 0] = 1.0
    fmt, buffers = build_store("fp,fp", [0], 16, kv_heads=1)
    _, lse = cpp_attention.attend(q, k, k, None, 1.0, 10.0, buffers, fmt, (0,), 0)
    torch.testing.assert_close(lse[0, 0].double(), 10.0 * (scores.double() / 10.0).tanh(), rtol=1e-6, atol=0)
    q[0, 0, 0, 0] = math.nan
    _, lse = cpp_attention.attend(q, k, k, None, 1.0, 10.0, buffers, fmt, (0,), 0)
    assert lse[0, 0, 0].isnan() and lse[0, 0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["fp,fp", "fp16,bf16", "8:t1c64,8:t1c64|fp,4:t1c64"])
def test_half_precision(dtype, text):
    counts = [257] if "|" not in text else [63, 70]
    args = make_args(text, counts, group=3, rows=5, mask="bool", dtype=dtype)
    # Both round a float32 result once; the lse shows that they agree before.
    assert_equal_to_reference(args, tolerance=4e-3)


def test_half_precision_buffers_with_float_queries():
    assert_equal_to_reference(make_args("bf16,fp16|fp16,bf16", [65, 63], dim=80, group=3))


def test_half_precision_extremes():
    args = make_args("fp16,fp16", [19], dim=20)
    tier = args[6].tiers[0]
    tier.key.codes[:, :, 0, 0] = 6e-8  # subnormal
    tier.value.codes[:, :, 1] = 65504.0
    tier.value.codes[:, :, 2] = -3e-6
    assert_equal_to_reference(args)


def test_non_contiguous_inputs():
    q, k, v, mask, *rest = make_args("8:t1c64,8:t1c64", [100], group=3, rows=5, own=5, batch=2, mask="bool")

    def shuffled(x):  # [B, H, R, D] as the transpose of [B, R, H, D], as models make it
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(x):  # every other channel of a wider tensor
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1).flatten(-2)[..., ::2]

    want = cpp_attention.attend(q, k, v, mask, *rest)
    for change in (shuffled, spread):
        got = cpp_attention.attend(change(q), change(k), change(v), mask.transpose(2, 3).contiguous().mT, *rest)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_buffers_may_be_views():
    args = make_args("4:t64c1,2:t1c32|fp,fp", [128, 9], group=3, batch=2, mask="bool")
    buffers = args[6]
    wider = [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] if x.dim() == 4 else x for x in buffers.to_list()]
    got = cpp_attention.attend(*args[:6], StoreBuffers.from_list(wider), *args[7:])
    assert torch.equal(got[0], cpp_attention.attend(*args)[0])


@pytest.mark.parametrize("counts", [[20], [1100]])
def test_row_that_may_attend_to_nothing(counts):
    q, k, v, _, *rest = make_args("8:t1c64,8:t1c64", counts, group=3, rows=2)
    mask = torch.ones(1, 1, 2, sum(counts) + 1, dtype=torch.bool)
    mask[:, :, 0] = False
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        out, lse = cpp_attention.attend(q, k, v, m, *rest)
        assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -math.inf).all()
        assert (out[:, :, 1] != 0).any() and lse[:, :, 1].isfinite().all()
        assert_equal_to_reference((q, k, v, m, *rest))


def test_large_scores():
    q, *rest = make_args("fp,fp", [300], group=3)
    assert_equal_to_reference((q * 300, *rest))


def test_nan_is_not_hidden():
    args = make_args("fp,fp", [100], group=2)
    args[6].tiers[0].key.codes[0, 1, 50] = math.nan
    out, lse = cpp_attention.attend(*args)
    assert out[:, :2].isfinite().all() and out[:, 2:].isnan().all() and lse[:, 2:].isnan().all()


@pytest.mark.parametrize("rows", [1, 33])
def test_same_bits_for_any_number_of_threads(rows):
    args = make_args("8:t1c64,8:t1c64|4:t64c1,2:t1c32", [300, 2048], group=3, rows=rows, mask="bool")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpp_attention.attend(*args))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("what", ["queries", "buffers", "mask", "short mask"])
def test_reference_takes_what_the_kernel_does_not(what):
    dtype = torch.float64 if what == "buffers" else torch.float32
    q, k, v, mask, *rest = make_args("fp,fp", [9], group=2, dtype=dtype)
    q, k, v = q.float(), k.float(), v.float()
    if what == "queries":
        q = q.double()
    elif what == "mask":
        mask = torch.zeros(1, 1, 1, 10, dtype=torch.float64)
    elif what == "short mask":
        mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    args = (q, k, v, mask, *rest)
    with pytest.raises(dispatch.NotCovered):
        cpp_attention.attend(*args)
    if what in ("queries", "buffers"):
        with dispatch.use("cpp"):
            out, _ = dispatch.run("attend", q.device, *args)
        assert torch.equal(out, attention.attend(*args)[0])


def test_dispatch_serves_the_cpu_with_it(monkeypatch):
    args = make_args("4:t1c64,4:t1c64", [70])
    monkeypatch.setattr(dispatch, "_forced", None)
    out, lse = dispatch.run("attend", torch.device("cpu"), *args)
    want, want_lse = cpp_attention.attend(*args)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_build_failure_falls_back_with_one_warning(monkeypatch):
    def fail(source, name, exact):
        raise RuntimeError("no compiler here")

    args = make_args("4:t1c64,4:t1c64", [70])
    monkeypatch.setattr(cpp_common, "load_cpp_library", fail)
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(cpp_common, "_failed", {})
    warnings = []
    monkeypatch.setattr(dispatch.log, "warning", lambda text, *values: warnings.append(text % values))
    cpp_attention.kernels.cache_clear()
    try:
        with dispatch.use("cpp"):
            for _ in range(3):
                out, lse = dispatch.run("attend", torch.device("cpu"), *args)
    finally:
        cpp_attention.kernels.cache_clear()
    want, want_lse = attention.attend(*args)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert len(warnings) == 1 and "no compiler here" in warnings[0]


def test_source_that_does_not_compile_raises():
    from mikv_compile._compat import load_cpp_library

    with pytest.raises(RuntimeError, match="broken"):
        load_cpp_library("this is not C++", "broken")
