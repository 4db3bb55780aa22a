"""The Triton kernels in Triton's interpreter against the references: run with ``TRITON_INTERPRET=1``.

``test_triton_suite.py`` does so in a process of its own, because Triton looks at the variable when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

import mikv_compile.kernels.ops
import mikv_compile.policies  # noqa: F401  (registers the scorers)
from mikv_compile.kernels import attention, tokens
from mikv_compile.kernels.dispatch import use
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, buffer_shapes
from mikv_compile.kernels.scoring import AttentionArgs

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton")
from mikv_compile.kernels import triton_attention, triton_decode, triton_tokens

ops = torch.ops.mikv
BATCH, KV_HEADS = 2, 2
HALF_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def poisoned(shape, dtype):
    """A buffer in which every unwritten number is seen when it is used."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, torch.iinfo(dtype).max, dtype=dtype)


def new_store(fmt, key_dim, value_dim, capacities, dtype):
    """Poisoned buffers, with a balancer that is set."""
    shapes = buffer_shapes(fmt, BATCH, KV_HEADS, key_dim, value_dim, capacities, dtype)
    store = StoreBuffers.from_list([poisoned(*spec) for spec in shapes])
    store.balancer.uniform_(0.5, 2.0)
    return store


def copy_of(store):
    return StoreBuffers.from_list([t.clone() for t in store.to_list()])


def assert_same_bits(actual, expected):
    """Equal in every bit, poison included."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a.nan_to_num(-7) if a.is_floating_point() else a,
                                   e.nan_to_num(-7) if e.is_floating_point() else e, rtol=0, atol=0)  # fmt: skip


def head_last(batch, heads, rows, dim, dtype):
    """Random [batch, heads, rows, dim] with the strides of a projection that was split into heads."""
    return torch.randn(batch, rows, heads, dim).to(dtype).transpose(1, 2)


def filled_store(fmt, key_dim, value_dim, counts, capacities, dtype):
    """A store whose tiers hold random tokens at shuffled positions; returns it and the number of tokens."""
    store = new_store(fmt, key_dim, value_dim, capacities, dtype)
    length = sum(counts)
    k = head_last(BATCH, KV_HEADS, length, key_dim, dtype) * 2 + torch.randn(key_dim).to(dtype)
    v = head_last(BATCH, KV_HEADS, length, value_dim, dtype)
    order = torch.rand(BATCH, KV_HEADS, length).argsort(dim=2)
    stop = 0
    for tier, tier_fmt, count in zip(store.tiers, fmt.tiers, counts, strict=True):
        index = order[:, :, stop : stop + count]
        tokens.write_tokens(tier, tier_fmt, 0, k, v, index, 0, None, store.balancer)
        stop += count
    if store.scores.numel():
        store.scores[:, :, : counts[0]] = torch.rand(BATCH, KV_HEADS, counts[0])
    return store, length


def random_mask(kind, heads, rows, columns):
    """A mask of the named kind; its row 0 may attend to nothing."""
    if kind is None:
        return None
    dtype, *dims = kind
    shape = [full if wanted else 1 for full, wanted in zip((BATCH, heads, rows), dims, strict=True)]
    allowed = torch.rand(*shape, columns) < 0.7
    allowed[:, :, 0] = False
    if dtype == "bool":
        return allowed
    low = float("-inf") if dtype == "inf" else torch.finfo(torch.float32).min
    return torch.randn(allowed.shape).masked_fill(~allowed, low)


# T = start + written tokens; (key format, value format, T, start, D_k, D_v, dtype, indexed, positions given)
WRITES = [
    ("8:t1c64", "8:t1c64", 1, 0, 64, 64, torch.float32, False, False),
    ("4:t1c64", "2:t1c32", 63, 5, 64, 64, torch.bfloat16, True, False),
    ("4:t64c1", "2:t1c40", 128, 64, 80, 80, torch.float16, True, False),
    ("3:t64c1b", "3:t1c16", 64, 0, 128, 80, torch.bfloat16, False, True),
    ("2:t16c8b", "4:t1c1", 48, 16, 80, 64, torch.float32, True, True),
    ("8:t1c16b", "fp", 257, 0, 64, 128, torch.float16, True, False),
    ("fp", "3:t16c128", 64, 0, 16, 128, torch.bfloat16, False, False),
    ("fp", "fp16", 17, 3, 40, 80, torch.float32, True, False),
    ("2:t3c20", "8:t1c256", 21, 6, 40, 256, torch.float32, False, False),
    ("4:t128c128b", "2:t64c4", 128, 0, 128, 16, torch.float32, False, False),
]


@pytest.mark.parametrize(("key", "value", "stop", "start", "key_dim", "value_dim", "dtype", "indexed", "given"), WRITES)
def test_write_tokens(key, value, stop, start, key_dim, value_dim, dtype, indexed, given):
    torch.manual_seed(0)
    fmt = LayerFormat.parse(f"{key},{value}")
    block, count, seen = fmt.tiers[0].block, stop - start, stop - start + 3 * indexed
    store = new_store(fmt, key_dim, value_dim, [(stop // block + 2) * block], dtype)
    k = head_last(BATCH, KV_HEADS, seen, key_dim, dtype) * torch.logspace(-3, 3, key_dim).to(dtype)
    v = head_last(BATCH, KV_HEADS, seen, value_dim, dtype)
    v[:, :, 0] = 0.25
    k[:, :, -1] *= 1e3
    index = torch.rand(BATCH, KV_HEADS, seen).argsort(dim=2)[:, :, :count] if indexed else None
    positions = torch.randint(0, 1 << 20, (BATCH, KV_HEADS, seen), dtype=torch.int32) if given else None
    expected = copy_of(store)
    args = (start, k, v, index, 11, positions)
    tokens.write_tokens(expected.tiers[0], fmt.tiers[0], *args, expected.balancer)
    triton_tokens.write_tokens(store.tiers[0], fmt.tiers[0], *args, store.balancer)
    assert_same_bits(store.to_list(), expected.to_list())


def test_write_bfloat16():
    """Triton's interpreter cuts bits off where a GPU rounds, so this cast is compared within one unit."""
    torch.manual_seed(0)
    fmt = LayerFormat.parse("bf16,bf16")
    store = new_store(fmt, 64, 80, [20], torch.float32)
    k, v = (head_last(BATCH, KV_HEADS, 17, dim, torch.float32) for dim in (64, 80))
    expected = copy_of(store)
    tokens.write_tokens(expected.tiers[0], fmt.tiers[0], 2, k, v, None, 0, None, None)
    triton_tokens.write_tokens(store.tiers[0], fmt.tiers[0], 2, k, v, None, 0, None, None)
    for actual, wanted in zip(store.to_list(), expected.to_list(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_write_extremes(bits):
    """Ties, NaN, infinities, numbers beyond float16, groups without range and subnormal scales."""
    torch.manual_seed(0)
    fmt = LayerFormat.parse(f"{bits}:t1c16,{bits}:t8c2")
    levels = (1 << bits) - 1
    rows = torch.randn(8, 64)
    rows[0] = torch.arange(64) % (2 * levels + 1) * 0.5
    rows[1] = 1e6 * rows[1]
    rows[2] = 1e-7 * rows[2]
    rows[3, ::2] = rows[3, 0]
    rows[4, 5] = float("nan")
    rows[5, 20], rows[5, 40] = float("inf"), float("-inf")
    rows[6] = float("inf")
    rows[7] = 0.0
    x = rows.expand(BATCH, KV_HEADS, -1, -1)
    store = new_store(fmt, 64, 64, [8], torch.float32)
    expected = copy_of(store)
    tokens.write_tokens(expected.tiers[0], fmt.tiers[0], 0, x, x, None, 0, None, None)
    triton_tokens.write_tokens(store.tiers[0], fmt.tiers[0], 0, x, x, None, 0, None, None)
    assert_same_bits(store.to_list(), expected.to_list())


READS = [
    ("8:t1c64b", "4:t1c32", 64, 64, torch.float32),
    ("3:t16c1b", "2:t8c10", 80, 40, torch.bfloat16),
    ("fp", "3:t1c16", 128, 80, torch.bfloat16),
    ("2:t16c128", "fp16", 128, 16, torch.float32),
]


@pytest.mark.parametrize(("key", "value", "key_dim", "value_dim", "dtype"), READS)
def test_read_tokens(key, value, key_dim, value_dim, dtype):
    torch.manual_seed(0)
    fmt = LayerFormat.parse(f"{key},{value}")
    store, length = filled_store(fmt, key_dim, value_dim, [48], [64], dtype)
    index = torch.rand(BATCH, KV_HEADS, length).argsort(dim=2)[:, :, :19]
    args = (store.tiers[0], fmt.tiers[0], index, key_dim, value_dim, store.balancer)
    assert_same_bits(triton_tokens.read_tokens(*args), tokens.read_tokens(*args))


@pytest.mark.parametrize("text", ["8:t1c64,3:t1c16|4:t1c64,4:t1c80", "bf16,2:t1c8", "fp,fp|2:t1c8,2:t1c8"])
def test_copy_slots(text):
    torch.manual_seed(0)
    fmt = LayerFormat.parse(text)
    store, _ = filled_store(fmt, 64, 80, [40] * len(fmt.tiers), [50] * len(fmt.tiers), torch.float32)
    order = torch.rand(BATCH, KV_HEADS, 40).argsort(dim=2)
    source, target = order[:, :, :18], order[:, :, 18:36].clone()
    target[:, :, -2:] = source[:, :, -2:]
    expected = copy_of(store)
    tokens.copy_slots(expected.tiers[0], fmt.tiers[0], expected.scores, source, target)
    triton_tokens.copy_slots(store.tiers[0], fmt.tiers[0], store.scores, source, target)
    assert_same_bits(store.to_list(), expected.to_list())


# (format, counts, own tokens, D_k, D_v, group, dtype, mask kind and whether it has its own batch, heads, rows)
DECODES = [
    ("fp,fp", [1], 1, 64, 64, 1, torch.float32, None),
    ("fp,fp", [257], 2, 80, 80, 3, torch.float32, ("bool", 1, 0, 1)),
    ("fp,fp", [64], 3, 128, 64, 8, torch.bfloat16, ("inf", 0, 1, 1)),
    ("8:t1c64,8:t1c64", [63], 1, 64, 64, 8, torch.float16, None),
    ("8:t1c64,8:t1c64|4:t64c1,2:t1c32", [63, 64], 1, 64, 64, 1, torch.bfloat16, ("bool", 1, 1, 0)),
    ("8:t1c128,8:t1c64|4:t64c1,2:t1c32", [33, 192], 4, 128, 64, 3, torch.float16, ("min", 1, 0, 1)),
    ("4:t1c80b,4:t1c80|2:t1c40b,2:t1c80", [20, 237], 1, 80, 80, 3, torch.float32, None),
    ("fp,3:t1c128|3:t64c1b,3:t16c128", [1, 64], 2, 64, 128, 1, torch.bfloat16, ("min", 0, 0, 1)),
    ("3:t1c80,fp|fp16,bf16|2:t16c8,8:t16c1", [64, 1, 48], 5, 80, 40, 8, torch.float32, ("inf", 1, 1, 1)),
    ("4:t32c1,4:t32c1|2:t16c16,2:t64c1", [0, 64], 1, 16, 256, 3, torch.float16, ("bool", 0, 1, 0)),
    ("4:t1c8,2:t1c4", [40], 1, 80, 80, 1, torch.float32, None),
    ("2:t1c256,3:t1c16", [100], 70, 256, 16, 1, torch.float32, ("bool", 1, 0, 1)),
]

# The same, with query rows and softcap.
ATTENDS = [(*case, case[2], 0.0) for case in DECODES] + [
    ("fp,fp", [63], 3, 80, 40, 3, torch.float32, ("inf", 0, 1, 1), 5, 1.5),
    ("8:t1c64,8:t1c64|4:t64c1b,2:t1c32", [63, 64], 1, 64, 64, 3, torch.float16, ("bool", 1, 0, 0), 1, 0.7),
    ("4:t1c80,3:t1c16", [65], 2, 80, 80, 1, torch.bfloat16, None, 2, 50.0),
    ("fp,fp|2:t1c16,4:t1c80", [33, 63], 0, 64, 80, 3, torch.float32, ("bool", 1, 1, 1), 3, 2.0),
    ("8:t1c80,8:t1c40", [63], 0, 80, 40, 1, torch.float32, None, 2, 0.0),
]


def attend_case(text, counts, own, key_dim, value_dim, group, dtype, kind, rows):
    torch.manual_seed(0)
    fmt = LayerFormat.parse(text)
    capacities = [(-(-count // tier.block) + 1) * tier.block for count, tier in zip(counts, fmt.tiers, strict=True)]
    store, length = filled_store(fmt, key_dim, value_dim, counts, capacities, dtype)
    heads = KV_HEADS * group
    q = head_last(BATCH, heads, rows, key_dim, dtype)
    k, v = (head_last(BATCH, KV_HEADS, own, dim, dtype) for dim in (key_dim, value_dim))
    mask = random_mask(kind, heads, rows, length + own)
    return fmt, store, length, q, k, v, mask


@pytest.mark.parametrize("case", ATTENDS)
def test_attend(case):
    *case, softcap = case
    _, counts, _, key_dim, _, _, dtype, kind, _ = case
    fmt, store, length, q, k, v, mask = attend_case(*case)
    before = copy_of(store)
    args = (q, k, v, mask, key_dim**-0.5, softcap, store, fmt, tuple(counts), length)
    out, lse = triton_attention.attend(*args)
    expected_out, expected_lse = attention.attend(*args)
    assert out.dtype == dtype
    tolerance = HALF_TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), expected_out.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    if kind is not None and kind[0] != "min":
        assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == float("-inf")).all()
    assert_same_bits(store.to_list(), before.to_list())


# As ATTENDS, with few packed rows: all parts are one launch, and a tile has 64 slots.
SPLITS = [
    # Tiers of one slot, an empty one, blocks, and tiles that are full or not; three tiers and own tokens.
    ("8:t1c64,8:t1c64|4:t64c1,2:t1c32|2:t64c1b,2:t1c64", [1, 128, 64], 2, 64, 64, 4, torch.float16, None, 2, 0.0),
    ("8:t1c64,8:t1c64|4:t64c1,2:t1c32|2:t64c1b,2:t1c64", [65, 0, 64], 1, 64, 64, 1, torch.float32, ("inf", 0, 1, 1), 3,
     0.0),
    ("fp,fp|2:t1c32b,2:t1c32", [0, 129], 0, 64, 64, 2, torch.bfloat16, ("bool", 1, 1, 0), 1, 0.0),
    # 3-bit codes in groups of planes, of half a plane and of single channels.
    ("3:t1c128,3:t1c32|3:t64c1,3:t1c64", [64, 64], 1, 128, 128, 3, torch.float16, None, 1, 0.0),
    # 8-bit codes whose groups split the row, and rows that are padded to words.
    ("8:t1c32,8:t1c16|4:t1c16,4:t16c16", [63, 16], 1, 64, 64, 8, torch.float32, None, 1, 0.0),
    ("4:t1c40,2:t1c20|4:t64c1,2:t1c80", [17, 64], 1, 80, 80, 2, torch.float32, ("bool", 0, 0, 1), 4, 1.5),
    # More tiers than one launch takes.
    ("fp,fp|8:t1c64,4:t1c64|4:t1c32,4:t1c64|2:t1c64,2:t1c16", [3, 5, 70, 1], 1, 64, 64, 2, torch.float32, None, 1, 0.0),
]


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("processors", [1, 64])
def test_splits(case, processors, monkeypatch):
    """One split for everything and one for each tile. Whatever is not in use is poison."""
    monkeypatch.setattr(triton_decode, "processors", lambda device: processors)
    *case, softcap = case
    _, counts, _, key_dim, _, _, dtype, _, _ = case
    fmt, store, length, q, k, v, mask = attend_case(*case)
    args = (q, k, v, mask, key_dim**-0.5, softcap, store, fmt, tuple(counts), length)
    tolerance = HALF_TOLERANCE[dtype]
    for actual, expected in zip(triton_attention.attend(*args), attention.attend(*args), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_converted_codes(monkeypatch):
    """As on GPUs whose dots may not take subnormal numbers."""
    monkeypatch.setattr(triton_decode, "is_amd", lambda: True)
    fmt, store, length, q, k, v, _ = attend_case(*SPLITS[3][:-1])
    args = (q, k, v, None, 0.1, 0.0, store, fmt, tuple(SPLITS[3][1]), length)
    for actual, expected in zip(triton_attention.attend(*args), attention.attend(*args), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attend_to_extremes(size, dtype):
    """Channels and tokens of very different size, constant groups, and queries far from 1."""
    torch.manual_seed(0)
    fmt = LayerFormat.parse("8:t1c64,8:t1c64|4:t64c1,2:t1c32")
    store = new_store(fmt, 64, 64, [64, 128], dtype)
    k = head_last(BATCH, KV_HEADS, 192, 64, torch.float32) * torch.logspace(-3, 1.5, 64)
    v = head_last(BATCH, KV_HEADS, 192, 64, torch.float32) * torch.logspace(-4, 1, 192)[:, None]
    k[..., 5], v[:, :, 7] = 1.25, 0.5
    for i, tier in enumerate(store.tiers):
        index = torch.arange(64 * i, 64 + 128 * i).expand(BATCH, KV_HEADS, -1)
        tokens.write_tokens(tier, fmt.tiers[i], 0, k.to(dtype), v.to(dtype), index, 0, None, None)
    q = (head_last(BATCH, KV_HEADS, 2, 64, torch.float32) * size).to(dtype)
    own = torch.zeros(BATCH, KV_HEADS, 0, 64, dtype=dtype)
    args = (q, own, own, None, 0.01 / size, 0.0, store, fmt, (64, 128), 192)
    tolerance = HALF_TOLERANCE[dtype]
    for actual, expected in zip(triton_attention.attend(*args), attention.attend(*args), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_split_plan():
    """Equal costs, no split without a tile, and no more splits than are wanted or worth it."""
    cases = [([1], [1.0], 66), ([6, 500], [2.0, 1.0], 50), ([1000], [3.0], 1), ([40, 1], [1.0, 9.0], 400)]
    for tiles, costs, wanted in cases:
        blocks = triton_decode.plan_splits(tiles, costs, wanted)
        splits = [-(-n // block) for n, block in zip(tiles, blocks, strict=True)]
        assert all(1 <= block <= n for n, block in zip(tiles, blocks, strict=True))
        assert sum(splits) <= max(1.5 * wanted, len(tiles))
        assert sum(splits) <= max(triton_decode.SHORT_SPLITS, sum(tiles) / 2) + len(tiles)
    assert triton_decode.plan_splits([], [], 4) == []
    # Half the cost, twice the tiles.
    assert triton_decode.plan_splits([100, 100], [2.0, 1.0], 30) == [5, 10]


@pytest.mark.parametrize("case", [c for c in ATTENDS if c[1][0]][1:])
def test_add_scores(case):
    *case, softcap = case
    text, counts, _, key_dim, *_ = case
    _, store, length, q, k, v, mask = attend_case(*case)
    fmt = LayerFormat.parse(text + "+scored")
    if not store.scores.numel():
        scores = poisoned((BATCH, KV_HEADS, store.tiers[0].capacity), torch.float32)
        scores[:, :, : counts[0]] = torch.rand(BATCH, KV_HEADS, counts[0])
        store = store._replace(scores=scores)
    scale = key_dim**-0.5
    _, lse = attention.attend(q, k, v, mask, scale, softcap, store, fmt, tuple(counts), length)
    expected_store = copy_of(store)
    args = (q, k, lse, mask, scale, softcap)
    own = triton_attention.add_scores(*args, store, fmt, counts[0], length)
    expected = attention.add_scores(*args, expected_store, fmt, counts[0], length)
    tolerance = HALF_TOLERANCE[q.dtype]
    torch.testing.assert_close(own, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(store.scores, expected_store.scores, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert_same_bits(store.to_list()[:-2], expected_store.to_list()[:-2])


# (query rows, keys, D, group, dtype, mask, causal, last rows, softcap)
PREFILLS = [
    (1, 1, 64, 1, torch.float32, None, False, 0, 0.0),
    (63, 63, 80, 3, torch.bfloat16, None, True, 0, 0.0),
    (130, 130, 64, 1, torch.float32, None, True, 32, 1.5),
    (64, 100, 128, 8, torch.float16, ("bool", 1, 0, 1), False, 16, 0.7),
    (40, 70, 40, 1, torch.float32, ("inf", 0, 1, 0), True, 0, 0.0),
    (70, 40, 16, 3, torch.float32, ("min", 1, 1, 1), False, 0, 0.0),
]


@pytest.mark.parametrize(("rows", "columns", "dim", "group", "dtype", "kind", "causal", "last", "softcap"), PREFILLS)
def test_column_sums(rows, columns, dim, group, dtype, kind, causal, last, softcap):
    torch.manual_seed(0)
    heads = KV_HEADS * group
    q, k = head_last(BATCH, heads, rows, dim, dtype), head_last(BATCH, KV_HEADS, columns, dim, dtype)
    mask = random_mask(kind, heads, rows, columns)
    args = (q, k, AttentionArgs(mask, dim**-0.5, causal, softcap), last)
    tolerance = HALF_TOLERANCE[dtype]
    torch.testing.assert_close(
        triton_attention.column_sums(*args), attention.column_sums(*args), atol=tolerance, rtol=tolerance
    )


def test_channels_that_are_not_neighbours():
    torch.manual_seed(0)
    fmt, store, length, q, k, v, _ = attend_case("fp,fp", [16], 2, 16, 16, 1, torch.float32, None, 2)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    args = (q, k, v, None, 0.25, 0.0, store, fmt, (16,), length)
    torch.testing.assert_close(triton_attention.attend(*args), attention.attend(*args))


def test_queries_of_another_dtype_than_the_cache():
    fmt, store, length, q, k, v, _ = attend_case("fp,8:t1c80", [63], 3, 64, 80, 3, torch.bfloat16, None, 2)
    q = q.float() + 1e-4 * torch.randn(q.shape)
    args = (q, k, v, None, 0.125, 0.0, store, fmt, (63,), length)
    out, lse = triton_attention.attend(*args)
    assert out.dtype == torch.float32
    torch.testing.assert_close((out, lse), attention.attend(*args), atol=2e-5, rtol=2e-5)


def test_nothing_to_attend_to():
    fmt, store, _, q, k, v, _ = attend_case("fp,fp", [16], 0, 16, 40, 3, torch.float32, None, 2)
    out, lse = triton_attention.attend(q, k, v, None, 0.25, 0.0, store, fmt, (0,), 0)
    assert out.shape == (BATCH, KV_HEADS * 3, 2, 40)
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("own_rows", [False, True])
def test_column_sums_with_sinks(own_rows):
    torch.manual_seed(0)
    q, k = head_last(BATCH, KV_HEADS * 3, 63, 80, torch.float32), head_last(BATCH, KV_HEADS, 63, 80, torch.float32)
    sinks = torch.randn(1, KV_HEADS * 3, 63 if own_rows else 1, 2) + 2.0
    sinks[:, 0] = float("-inf")
    mask = random_mask(("bool", 1, 0, 1), KV_HEADS * 3, 63, 63)
    args = (q, k, AttentionArgs(mask, 0.2, True, 1.5, sinks), 40)
    torch.testing.assert_close(triton_attention.column_sums(*args), attention.column_sums(*args), atol=2e-5, rtol=2e-5)


def test_ops_on_these_kernels():
    """A store's life by the ops: the same as on the references."""
    torch.manual_seed(0)
    text = "8:t1c40b,8:t1c48|4:t16c1b,2:t1c16+scored+watch:r0p3n1"
    q = torch.randn(BATCH, KV_HEADS * 3, 63, 80)
    k, v = torch.randn(BATCH, KV_HEADS, 63, 80), torch.randn(BATCH, KV_HEADS, 63, 48)
    mask = torch.ones(63, 80, dtype=torch.bool).tril()[None, None]
    view = torch.rand(BATCH, 1, 3, 65) < 0.7
    found = {}
    for backend in ("reference", "triton"):
        buffers = new_store(LayerFormat.parse(text), 80, 48, [96, 64], torch.float32).to_list()
        with use(backend):
            orders = Orders(0, 2, 55, (15, 48), 0, (0,), fresh=True).encode()
            first = ops.attend_v2(q, k, v, mask, 0.1, 20.0, buffers, orders, text)
            ops.update_v2(q, k, v, first[1], mask, 0.1, 20.0, buffers, orders, text, "h2o")
            step = (q[:, :, :3], k[:, :, :2], v[:, :, :2])
            orders = Orders(63, 2, 60, (15, 48), 0, (0,), 7).encode()
            second = ops.attend_v2(*step, view, 0.1, 0.0, buffers, orders, text)
            ops.update_v2(*step, second[1], view, 0.1, 0.0, buffers, orders, text, "h2o")
            orders = Orders(65, 2, 60, (17, 48), 16, (16,)).encode()
            ops.append_v1(k[:, :, :30], v[:, :, :30], buffers, orders, text)
            orders = Orders(95, 2, 60, (31, 64), 0, (0,), 7).encode()
            dense = ops.read_v1(buffers, orders, text, 90, 80, 48, torch.float32)
            found[backend] = (*first, *second, *dense)
    torch.testing.assert_close(found["triton"], found["reference"], atol=2e-5, rtol=2e-5)
