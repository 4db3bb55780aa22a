"""The declared ops: schemas, fake implementations and mutation by torch's own checks, and what they mean end to end."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import mikv_compile.kernels.ops
import mikv_compile.policies  # noqa: F401  (registers the scorers)
from mikv_compile.kernels import store_ops
from mikv_compile.kernels.dispatch import use
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, buffer_shapes
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

B, H_Q, H_KV, D, T = 2, 4, 2, 16, 70
FORMAT = "8:t1c16,8:t1c16|4:t64c1,2:t1c16+scored+watch:r0p1n1"
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
FILL = Orders(0, 2, 60, (6, 64), 0, (0,))
ops = torch.ops.mikv


def poisoned(fmt, capacities, key_dim=D, value_dim=D, dtype=torch.float32):
    """Buffers in which every unwritten number is seen when it is used."""
    shapes = buffer_shapes(fmt, B, H_KV, key_dim, value_dim, capacities, dtype)
    return [torch.full(s, math.nan if d.is_floating_point else torch.iinfo(d).max, dtype=d) for s, d in shapes]


def randn(*shape):
    """Random numbers with a seed of their own, so that no test depends on another."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    q = torch.randn(B, H_Q, T, D)
    k, v = torch.randn(B, H_KV, T, D), torch.randn(B, H_KV, T, D)
    return q, k, v, poisoned(LayerFormat.parse(FORMAT), (96, 128))


def check(op, *args):
    torch.library.opcheck(op.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "recent"])
def test_importance(tensors, policy):
    q, k, v, _ = tensors
    check(ops.importance_v2, q, k, v, None, 0.25, True, 0.0, None, policy)
    mask = torch.rand(B, 1, T, T + 5) < 0.7
    check(ops.importance_v2, q, k, v, mask, 0.25, False, 20.0, torch.randn(1, H_Q, 1, 1), policy)


def test_compress_attend_update(tensors):
    q, k, v, buffers = tensors
    for x in buffers:  # torch's checks compare with ==, which poison fails
        x.zero_()
    scores = torch.rand(B, H_KV, T)
    check(ops.compress_v1, q, k, v, scores, buffers, FILL.encode(), FORMAT)
    ops.compress_v1(q, k, v, scores, buffers, FILL.encode(), FORMAT)
    one = (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    mask = torch.ones(B, 1, 1, T + 1, dtype=torch.bool)
    # Position 2 is the first to be seen: the mask has two columns more than tokens.
    for first, columns, softcap in ((2, mask, 20.0), (0, None, 0.0)):
        step = Orders(T, 2, T, (6, 64), 1, (0,), first).encode()
        check(ops.attend_v2, *one, columns, 0.25, softcap, buffers, step, FORMAT)
        _, lse = ops.attend_v2(*one, columns, 0.25, softcap, buffers, step, FORMAT)
    check(ops.update_v2, *one, lse, mask, 0.25, 0.0, buffers, step, FORMAT, "h2o")
    check(ops.append_v1, *one[1:], buffers, step, FORMAT)
    check(ops.read_v1, buffers, step, FORMAT, T + 4, D, D, torch.bfloat16)
    fresh = FILL._replace(fresh=True).encode()
    check(ops.update_v2, q, k, v, torch.zeros(q.shape[:3]), None, 0.25, 0.0, buffers, fresh, FORMAT, "h2o")
    check(ops.append_v1, k, v, buffers, fresh, FORMAT)


def test_a_mask_that_broadcasts_over_columns(tensors):
    q, k, v, buffers = tensors
    ops.compress_v1(q, k, v, torch.rand(B, H_KV, T), buffers, FILL.encode(), FORMAT)
    orders = Orders(T, 2, T, (6, 64), 0, (0,)).encode()
    one = (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    narrow = torch.ones(1, 1, dtype=torch.bool)
    with_mask, _ = ops.attend_v2(*one, narrow, 0.25, 0.0, buffers, orders, FORMAT)
    without, _ = ops.attend_v2(*one, None, 0.25, 0.0, buffers, orders, FORMAT)
    torch.testing.assert_close(with_mask, without)
    with pytest.raises(ValueError, match="69 columns for 71 tokens"):
        ops.attend_v2(*one, torch.ones(1, 69, dtype=torch.bool), 0.25, 0.0, buffers, orders, FORMAT)


def dense_attention(q, k, v, mask, scale, softcap):
    """Softmax attention in float64, and its log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def make_mask(kind, rows, columns, n):
    """A mask of ``columns`` columns, ``n`` of them written; its row 0 sees nothing."""
    if kind is None:
        return None
    dtype, tail, *dims = kind.split()
    shape = [full if name in dims else 1 for name, full in (("b", B), ("h", H_Q), ("r", rows))]
    allowed = torch.rand(*shape, columns) < 0.6
    allowed[..., 0] = True
    if tail == "hidden":
        allowed[..., n:] = False
    if "r" in dims:
        allowed[:, :, 0] = False
    return allowed if dtype == "bool" else torch.randn(allowed.shape).masked_fill(~allowed, -math.inf)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(
    ("first", "own", "rows", "kind", "unwritten"),
    [
        (0, 3, 3, "bool hidden b r", 9),
        (0, 3, 3, "bool seen b h r", 9),
        (0, 1, 1, "bool seen", 9),
        (0, 3, 2, "float seen h r", 9),
        (0, 3, 2, "float hidden b", 9),
        (5, 3, 3, None, 0),
        (5, 3, 5, "bool seen b r", 0),
        (5, 1, 3, "float seen h r", 7),
        (70, 2, 2, "bool hidden b h r", 3),
        (0, 0, 3, None, 0),
        (7, 0, 2, "bool seen h r", 4),
        (70, 0, 2, None, 0),
        (70, 0, 2, "bool seen b r", 4),
    ],
)
def test_attention_over_a_preallocated_cache(backend, softcap, first, own, rows, kind, unwritten):
    torch.manual_seed(0)
    fmt = LayerFormat.parse("fp,fp|fp,fp")
    buffers = poisoned(fmt, (20, 80), value_dim=24)
    k, v = torch.randn(B, H_KV, T + own, D), torch.randn(B, H_KV, T + own, 24)
    q = torch.randn(B, H_Q, rows, D)
    fill = Orders(0, 0, T, (7, 63), 0, (0,)).encode()
    ops.compress_v1(q, k[:, :, :T], v[:, :, :T], torch.rand(B, H_KV, T), buffers, fill, str(fmt))
    n = T - first + own
    mask = make_mask(kind, rows, n + unwritten, n)
    orders = Orders(T, 0, T, (7, 63), 0, (0,), first).encode()
    with use(backend):
        out, lse = ops.attend_v2(q, k[:, :, T:], v[:, :, T:], mask, 0.3, softcap, buffers, orders, str(fmt))
    dense = [torch.nn.functional.pad(x[:, :, first:], (0, 0, 0, unwritten)) for x in (k, v)]
    expected, expected_lse = dense_attention(q, *dense, mask, 0.3, softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    if not softcap and n + unwritten:
        model = scaled_dot_product_attention(q, *dense, attn_mask=mask, scale=0.3, enable_gqa=True).nan_to_num(0.0)
        torch.testing.assert_close(out, model, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unwritten_columns_behind_an_additive_mask(low, dtype):
    """The lowest numbers of several dtypes hide a column; a small bias does not."""
    torch.manual_seed(0)
    buffers = poisoned(LayerFormat.parse("fp,fp"), (T,))
    k, v, q = torch.randn(B, H_KV, T, D), torch.randn(B, H_KV, T, D), 12 * torch.randn(B, H_Q, 2, D)
    fill = Orders(0, 0, T, (T,), 0, (), fresh=True)
    ops.append_v1(k, v, buffers, fill.encode(), "fp,fp")
    mask = torch.zeros(B, 1, 2, T + 9, dtype=dtype)
    mask[..., T:] = low
    mask[..., 5:30] = low
    mask = mask.expand(-1, H_Q, -1, -1)
    none = k[:, :, :0]
    orders = Orders(T, 0, T, (T,), 0, ()).encode()
    out, lse = ops.attend_v2(q, none, none, mask, 0.3, 0.0, buffers, orders, "fp,fp")
    dense = [torch.nn.functional.pad(x, (0, 0, 0, 9)) for x in (k, v)]
    expected, expected_lse = dense_attention(q, *dense, mask.double(), 0.3, 0.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_queries_of_another_dtype():
    fmt = LayerFormat.parse("fp,8:t1c16")
    buffers = poisoned(fmt, (80,), dtype=torch.bfloat16)
    q, k, v = randn(B, H_Q, 2, D), randn(B, H_KV, T, D).bfloat16(), randn(B, H_KV, T + 1, D)[:, :, :T].bfloat16()
    ops.append_v1(k, v, buffers, Orders(0, 0, T, (T,), 0, (), fresh=True).encode(), str(fmt))
    orders = Orders(T, 0, T, (T,), 0, ()).encode()
    own = (k[:, :, :3], v[:, :, :3])
    for backend in ("reference", "cpp"):
        with use(backend):
            out, lse = ops.attend_v2(q, *own, None, 0.3, 0.0, buffers, orders, str(fmt))
        assert out.dtype == torch.float32 and lse.dtype == torch.float32
        dense = ops.read_v1(buffers, orders, str(fmt), T, D, D, torch.float32)
        both = [torch.cat([a, b.float()], 2) for a, b in zip(dense, own, strict=True)]
        torch.testing.assert_close(out.double(), dense_attention(q, *both, None, 0.3, 0.0)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "recent"])
@pytest.mark.parametrize("text", [FORMAT, "8:t1c8b,8:t1c16|4:t1c16b,2:t1c16", "fp,fp", "fp,fp+scored"])
def test_a_fresh_update_is_importance_and_compress(tensors, policy, text):
    q, k, v, _ = tensors
    fmt = LayerFormat.parse(text)
    counts = (6, 64) if len(fmt.tiers) > 1 else (T,)
    fill = Orders(0, 2, 60, counts, 0, (0,) * (len(counts) - 1))
    # The mask of a preallocated cache: causal, and with columns that nobody has written.
    mask = torch.zeros(B, 1, T, T + 9, dtype=torch.bool)
    mask[..., :T] = torch.ones(T, T, dtype=torch.bool).tril()
    expected, found = (poisoned(fmt, [c + 64 for c in counts]) for _ in range(2))
    scores = ops.importance_v2(q, k, v, None, 0.25, True, 1.5, None, policy)
    ops.compress_v1(q, k, v, scores, expected, fill.encode(), text)
    fresh = fill._replace(fresh=True).encode()
    before = [x.clone() for x in found]
    out, lse = ops.attend_v2(q, k, v, mask, 0.25, 1.5, found, fresh, text)
    for a, b in zip(found, before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(out.double(), dense_attention(q, k, v, causal, 0.25, 1.5)[0], atol=1e-5, rtol=1e-5)
    ops.update_v2(q, k, v, lse, mask, 0.25, 1.5, found, fresh, text, policy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("text", [FORMAT, "8:t1c8b,8:t1c16|4:t1c16b,2:t1c16", "fp,fp"])
def test_append_is_update_without_attention(tensors, text):
    q, k, v, _ = tensors
    fmt = LayerFormat.parse(text)
    tiers = len(fmt.tiers)
    counts = (6, 64) if tiers > 1 else (T,)
    fill = Orders(0, 2, 60, counts, 0, (0,) * (tiers - 1), fresh=True).encode()
    found = poisoned(fmt, [c + 128 for c in counts])
    ops.append_v1(k, v, found, fill, text)
    stored = StoreBuffers.from_list(found)
    if fmt.is_balanced:
        torch.testing.assert_close(stored.balancer, torch.ones(B, H_KV, D))
    if fmt.has_scores:
        assert (stored.scores[:, :, : counts[0]] == 0).all()
        stored.scores[:, :, : counts[0]] = torch.rand(B, H_KV, counts[0])
    # Without watching, an update is an append.
    expected = [x.clone() for x in found]
    orders = Orders(T, 2, T + 60, counts, 64 if tiers > 1 else 0, (64,) * (tiers - 1)).encode()
    ops.append_v1(k, v, found, orders, text)
    blind = str(LayerFormat(fmt.tiers, fmt.scored))
    ops.update_v2(q, k, v, torch.zeros(q.shape[:3]), None, 0.25, 0.0, expected, orders, blind, "h2o")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_scores_count_what_a_view_sees():
    """Positions below ``first`` get nothing, columns that nobody has written take their share."""
    torch.manual_seed(0)
    text = "fp,fp+scored+watch:r0p1n1"
    buffers = poisoned(LayerFormat.parse(text), (80,))
    k, v, q = torch.randn(B, H_KV, T + 2, D), torch.randn(B, H_KV, T + 2, D), torch.randn(B, H_Q, 2, D)
    ops.append_v1(k[:, :, :T], v[:, :, :T], buffers, Orders(0, 0, T, (T,), 0, (), fresh=True).encode(), text)
    first, n = 9, T - 9 + 2
    mask = torch.rand(B, 1, 2, n + 4) < 0.7
    orders = Orders(T, 0, T, (T,), 0, (), first).encode()
    own = (q, k[:, :, T:], v[:, :, T:])
    for given, softcap in ((mask, 0.0), (None, 1.5)):
        StoreBuffers.from_list(buffers).scores[:, :, :T] = 0.0
        _, lse = ops.attend_v2(*own, given, 0.3, softcap, buffers, orders, text)
        ops.update_v2(*own, lse, given, 0.3, softcap, buffers, orders, text, "h2o")
        unwritten = 0 if given is None else 4
        eye = torch.eye(n + unwritten).expand(B, H_KV, -1, -1)
        keys = torch.nn.functional.pad(k[:, :, first:], (0, 0, 0, unwritten))
        weights, _ = dense_attention(q, keys, eye, given, 0.3, softcap)
        received = weights.reshape(B, H_KV, -1, n + unwritten).sum(2)[..., :n].float()
        scores = StoreBuffers.from_list(buffers).scores
        assert (scores[:, :, :first] == 0).all()
        torch.testing.assert_close(scores[:, :, first : T + 2], received, atol=1e-5, rtol=1e-5)


def test_a_call_without_tokens_stores_nothing():
    text = FORMAT.replace("8:t1c16,", "8:t1c16b,")
    buffers = poisoned(LayerFormat.parse(text), (96, 128))
    q, none = torch.randn(B, H_Q, 3, D), torch.randn(B, H_KV, 0, D)
    lse = torch.zeros(B, H_Q, 3)
    fresh = Orders(0, 2, 0, (0, 0), 0, (0,), fresh=True).encode()
    before = [x.clone() for x in buffers[:-1]]
    ops.update_v2(q, none, none, lse, None, 0.3, 0.0, buffers, fresh, text, "snapkv")
    ops.append_v1(none, none, buffers, fresh, text)
    out, lse = ops.attend_v2(q, none, none, None, 0.3, 0.0, buffers, fresh, text)
    assert (out == 0).all() and (lse == -math.inf).all()
    ops.update_v2(q, none, none, lse, None, 0.3, 0.0, buffers, Orders(0, 2, 0, (0, 0), 0, (0,)).encode(), text, "h2o")
    for a, b in zip(buffers[:-1], before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"quantizer": "mikv"}, {"tiers": "bf16:0.2,int8:0.3,int4"}, {"budget": 1.0}])
def test_read_is_the_dense_cache(monkeypatch, options, dtype):
    from mikv_compile.config import Options

    monkeypatch.setattr(store_ops, "READ_CHUNK", 50)
    torch.manual_seed(0)
    length, dim, value_dim = 300, 64, 32
    shape = CacheShape(B, H_KV, dim, value_dim, dtype, 1)
    plan = Planner(Options(**options)).layer(0, shape)
    fill = plan.fill(length)
    store = LayerStore(plan, shape, torch.device("cpu"), fill.counts)
    for x in store.buffers:
        x.fill_(math.nan if x.is_floating_point() else 111)
    k, v = torch.randn(B, H_KV, length, dim).to(dtype), torch.randn(B, H_KV, length, value_dim).to(dtype)
    text = str(plan.format)
    ops.compress_v1(k * 3, k, v, torch.rand(B, H_KV, length), store.buffers, fill.encode(), text)
    store.filled(fill, length)
    for first, unwritten in ((0, 0), (0, 7), (40, 0), (40, 7), (length, 3)):
        orders = store.prepare(0)._replace(first=first).encode()
        keys, values = ops.read_v1(store.buffers, orders, text, length - first + unwritten, dim, value_dim, dtype)
        for found, role in ((keys, "key"), (values, "value")):
            expected = torch.nn.functional.pad(store.dequantize(role)[:, :, first:], (0, 0, 0, unwritten))
            assert found.dtype == dtype and torch.equal(found, expected)
    with pytest.raises(ValueError, match="300 tokens do not fit into 299"):
        ops.read_v1(store.buffers, store.prepare(0).encode(), text, length - 1, dim, value_dim, dtype)


def test_formats_read_back_what_they_print():
    for text in (FORMAT, "fp,fp", "bf16,fp16+scored", "3:t1c8b,2:t1c8|2:t64c1,2:t1c16+scored+watch:r32p7n2"):
        assert str(LayerFormat.parse(text)) == text
    assert StoreBuffers.from_list([torch.empty(0)] * 16).to_list().__len__() == 16
