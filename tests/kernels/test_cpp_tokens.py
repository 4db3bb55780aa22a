"""The C++ kernels that write, read and move tokens against the plain-PyTorch references: the same bits."""

from __future__ import annotations

import math
import os
import random
import shutil
import weakref

import pytest
import torch

from mikv_compile.kernels import cpp_common, cpp_tokens, dispatch, store_ops, tokens
from mikv_compile.kernels.formats import LayerFormat, Orders, SideFormat, StoreBuffers, TierFormat, buffer_shapes

pytestmark = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def poisoned(fmt, capacities, key_dim, value_dim, batch=2, heads=3, dtype=torch.float32):
    """Buffers with noise in every byte, so that a write to a wrong place is seen; a balancer that is set."""
    shapes = buffer_shapes(fmt, batch, heads, key_dim, value_dim, capacities, dtype)
    flat = []
    for shape, kind in shapes:
        size = math.prod(shape) * kind.itemsize
        flat.append(torch.randint(0, 256, (size,), dtype=torch.uint8).view(kind).reshape(shape))
    store = StoreBuffers.from_list(flat)
    store.balancer.uniform_(0.5, 2.0)
    return store


def copy_of(store):
    return StoreBuffers.from_list([x.clone() for x in store.to_list()])


def bits(x, zeros_are_equal):
    if not x.is_floating_point():
        return x
    if zeros_are_equal:
        x = torch.where(x == 0, torch.zeros_like(x), x)
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(found, expected):
    """All buffers are equal bit by bit. All NaNs are one; in scales and zeros, so are both zeros."""
    for i, (a, b) in enumerate(zip(found.to_list(), expected.to_list(), strict=True)):
        parameters = i % 7 in (1, 2, 4, 5) and i < len(found.tiers) * 7
        assert torch.equal(bits(a, parameters), bits(b, parameters)), f"buffer {i}"


def nasty(*shape, dtype):
    """Random tokens [B, H, T, D] of every kind: outlying channels, constants, subnormals, ties, overflow, inf, NaN."""
    x = torch.randn(shape)
    x = x * torch.logspace(-2, 2, shape[-1])[torch.randperm(shape[-1])]
    kinds = torch.randint(0, 24, shape[:3])
    values = {
        0: torch.full(shape, 0.3),
        1: torch.zeros(shape),
        2: x * 1e-6,  # scales that are subnormal halves
        3: x * 1e-9,  # scales that are 0
        4: x * 1e-41,  # subnormal floats
        5: x * 1e36,  # beyond the range of halves
        6: torch.randint(0, 256, shape).float(),  # codes exactly in the middle, where the scale is 1 or 2
        7: x.round() / 2,
        8: x.sign() * 65519.0,
        9: torch.where(torch.rand(shape) < 0.02, math.inf, x),
        10: torch.where(torch.rand(shape) < 0.02, -math.inf, x),
        11: torch.where(torch.rand(shape) < 0.02, math.nan, x),
        12: torch.full(shape, math.inf),
        13: torch.where(torch.rand(shape) < 0.5, math.inf, -math.inf),
        14: x * 3e38,
        15: x - 1e5,
    }
    for kind, value in values.items():
        x = torch.where((kinds == kind)[..., None], value, x)
    return x.to(dtype)


def laid_out(x, layout):
    """The same tokens with other strides."""
    if layout == "BTHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "spread":  # channels that are not neighbours
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    if layout == "slice":
        return torch.cat([x, x, x], dim=2)[:, :, x.shape[2] : 2 * x.shape[2]]
    return x


def groups_of(dim):
    return [c for c in range(1, dim + 1) if dim % c == 0]


def random_side(dim, generator, tokens, balanced=False):
    """Any side that can store ``dim`` channels, in blocks of one or of ``tokens`` tokens."""
    planes = {8: 1, 4: 2, 2: 4, 3: 8}
    bits = [b for b in (8, 4, 3, 2) if dim % planes[b] == 0]
    chosen = generator.choice([*bits, 16])
    if chosen == 16:
        return SideFormat(16, float_name=generator.choice(["fp", "bf16", "fp16"]))
    return SideFormat(
        chosen, generator.choice([1, tokens]), generator.choice(groups_of(dim)), balanced and generator.random() < 0.5
    )


def check_write(tier_fmt, dim, value_dim, blocks, start_blocks, dtype, layout, indexed, given, batch=2, heads=3):
    """Write with the kernel and with the reference, and compare all buffers."""
    fmt = LayerFormat((tier_fmt,), scored=True)
    block = math.lcm(tier_fmt.key.tokens, tier_fmt.value.tokens)
    count, start = blocks * block, start_blocks * block
    seen = count + 5 * indexed
    store = poisoned(fmt, [start + count + 2 * block], dim, value_dim, batch, heads, dtype)
    k = laid_out(nasty(batch, heads, seen, dim, dtype=dtype), layout)
    v = laid_out(nasty(batch, heads, seen, value_dim, dtype=dtype), layout)
    index = torch.rand(batch, heads, seen).argsort(dim=2)[:, :, :count] if indexed else None
    positions = torch.randint(0, 1 << 30, (batch, heads, seen), dtype=torch.int32) if given else None
    balancer = store.balancer if tier_fmt.key.balanced else None
    expected = copy_of(store)
    args = (k, v, index, 7, positions, balancer)
    tokens.write_tokens(expected.tiers[0], tier_fmt, start, *args)
    cpp_tokens.write_tokens(store.tiers[0], tier_fmt, start, *args)
    assert_same_bits(store, expected)
    return store, start + count


def side(text):
    return SideFormat.parse(text)


# key format, value format, D_k, D_v, blocks written, blocks before them, dtype, layout, index given, positions given
WRITES = [
    ("8:t1c64", "8:t1c64", 64, 64, 1, 0, torch.float32, "BHTD", False, False),
    ("8:t1c128", "8:t1c64", 128, 128, 1, 69, torch.bfloat16, "BTHD", False, False),
    ("4:t1c64", "2:t1c32", 64, 64, 58, 5, torch.bfloat16, "slice", True, False),
    ("4:t64c1", "2:t1c64", 128, 128, 5, 1, torch.float32, "BTHD", True, False),
    ("4:t64c1", "2:t1c40", 80, 80, 2, 1, torch.float16, "BTHD", True, False),
    ("3:t64c1b", "3:t1c16", 128, 80, 1, 0, torch.bfloat16, "spread", False, True),
    ("2:t16c8b", "4:t1c1", 80, 64, 3, 1, torch.float32, "BHTD", True, True),
    ("8:t1c16b", "fp", 64, 128, 257, 0, torch.float16, "slice", True, False),
    ("fp", "3:t16c128", 16, 128, 4, 0, torch.bfloat16, "BHTD", False, False),
    ("fp", "fp16", 40, 80, 17, 3, torch.float32, "spread", True, False),
    ("bf16", "fp16", 80, 20, 63, 0, torch.float32, "BTHD", False, True),
    ("bf16", "fp16", 64, 64, 63, 1, torch.float16, "BHTD", False, False),
    ("bf16", "fp16", 64, 36, 63, 1, torch.bfloat16, "BHTD", False, False),
    ("2:t3c20", "8:t1c256", 40, 256, 7, 2, torch.float32, "BHTD", False, False),
    ("4:t128c128b", "2:t64c4", 128, 16, 1, 0, torch.float32, "BTHD", False, False),
    ("3:t1c8", "2:t1c4", 8, 4, 63, 0, torch.float32, "BHTD", False, False),
    ("4:t1c1", "8:t48c1", 2, 1, 3, 1, torch.float32, "BHTD", True, True),
    ("4:t1c80", "2:t1c80", 80, 80, 63, 9, torch.float32, "BTHD", False, False),
]


@pytest.mark.parametrize("case", WRITES, ids=lambda case: "-".join(map(str, case[:4])))
def test_write_tokens(case):
    torch.manual_seed(0)
    key, value, *rest = case
    check_write(TierFormat(side(key), side(value)), *rest)


@pytest.mark.parametrize("seed", range(8))
def test_random_writes_and_reads(seed):
    torch.manual_seed(seed)
    generator = random.Random(seed)
    for _ in range(12):
        dim, value_dim = generator.choices([1, 8, 12, 16, 20, 24, 40, 64, 80, 96, 128], k=2)
        block = generator.choice([2, 3, 16, 48, 64])
        tier_fmt = TierFormat(random_side(dim, generator, block, True), random_side(value_dim, generator, block))
        dtype, layout = generator.choice(DTYPES), generator.choice(["BHTD", "BTHD", "spread", "slice"])
        indexed, given = generator.random() < 0.5, generator.random() < 0.5
        store, stop = check_write(
            tier_fmt, dim, value_dim, generator.randint(0, 4), generator.randint(0, 2), dtype, layout, indexed, given
        )
        check_read(store, tier_fmt, dim, value_dim)


def check_read(store, tier_fmt, dim, value_dim):
    """Read random slots, with the noise of unwritten ones."""
    tier = store.tiers[0]
    index = torch.randint(0, tier.capacity, (*tier.positions.shape[:2], 70))
    balancer = store.balancer if tier_fmt.key.balanced else None
    args = (tier, tier_fmt, index, dim, value_dim, balancer)
    for a, b in zip(cpp_tokens.read_tokens(*args), tokens.read_tokens(*args), strict=True):
        assert a.shape == b.shape and torch.equal(bits(a, False), bits(b, False))


# Tiers whose slots can be moved.
TIERS = [
    ("8:t1c64,8:t1c64", 64, 64, torch.float32),
    ("fp,fp", 80, 64, torch.bfloat16),
    ("fp16,4:t1c20", 64, 40, torch.float32),
    ("3:t1c8b,2:t1c1", 24, 20, torch.float16),
]


def filled(text, dim, value_dim, counts, dtype=torch.float32, more=None, batch=2, heads=3):
    """A store whose tiers hold ``counts`` tokens at shuffled positions, with room for ``more``; scores with ties."""
    fmt = LayerFormat.parse(text)
    most = [a + b for a, b in zip(counts, more or [0] * len(counts), strict=True)]
    capacities = [(count // tier.block + 3) * tier.block for count, tier in zip(most, fmt.tiers, strict=True)]
    store = poisoned(fmt, capacities, dim, value_dim, batch, heads, dtype)
    order = torch.rand(batch, heads, sum(counts)).argsort(dim=2).int()
    start = 0
    for tier, tier_fmt, count in zip(store.tiers, fmt.tiers, counts, strict=True):
        k, v = (torch.randn(batch, heads, count, d).to(dtype) for d in (dim, value_dim))
        balancer = store.balancer if tier_fmt.key.balanced else None
        places = order[:, :, start : start + count].contiguous()
        tokens.write_tokens(tier, tier_fmt, 0, k, v, None, 0, places, balancer)
        start += count
    if store.scores.numel():
        store.scores[:, :, : counts[0]] = torch.randint(0, 20, (batch, heads, counts[0])) / 8
    return fmt, store


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("text, dim, value_dim, dtype", TIERS)
def test_copy_slots(text, dim, value_dim, dtype, scored):
    torch.manual_seed(0)
    fmt, store = filled(text + "+scored" * scored, dim, value_dim, [63], dtype)
    expected = copy_of(store)
    slots = torch.rand(2, 3, 63).argsort(dim=2)
    source, target = slots[:, :, :30], slots[:, :, 30:60]
    target = torch.where(torch.rand(target.shape) < 0.2, source, target)  # pairs that change nothing
    for module, found in ((tokens, expected), (cpp_tokens, store)):
        module.copy_slots(found.tiers[0], fmt.tiers[0], found.scores, source, target)
    assert_same_bits(store, expected)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_for_any_number_of_threads(threads):
    """Enough tokens for several work items, the last of them shorter."""
    torch.manual_seed(0)
    tier_fmt = TierFormat(side("4:t64c1b"), side("2:t1c64"))
    fmt = LayerFormat((tier_fmt,))
    k, v = nasty(1, 3, 64 * 21, 128, dtype=torch.float32), nasty(1, 3, 64 * 21, 64, dtype=torch.float32)
    before = poisoned(fmt, [64 * 22], 128, 64, 1, 3)
    index = torch.rand(1, 3, 64 * 21).argsort(dim=2)
    expected = copy_of(before)
    tokens.write_tokens(expected.tiers[0], tier_fmt, 64, k, v, index, 0, None, before.balancer)
    want = tokens.read_tokens(expected.tiers[0], tier_fmt, index, 128, 64, before.balancer)
    for number in (1, 2, 3):
        threads(number)
        store = copy_of(before)
        cpp_tokens.write_tokens(store.tiers[0], tier_fmt, 64, k, v, index, 0, None, before.balancer)
        assert_same_bits(store, expected)
        found = cpp_tokens.read_tokens(store.tiers[0], tier_fmt, index, 128, 64, before.balancer)
        assert all(torch.equal(bits(a, False), bits(b, False)) for a, b in zip(found, want, strict=True))


def test_tensors_in_other_layouts():
    """Expanded and strided indices, positions and balancer; buffers that are slices of larger ones."""
    torch.manual_seed(0)
    tier_fmt = TierFormat(side("4:t1c8b"), side("8:t1c16"))
    fmt = LayerFormat((tier_fmt,), scored=True)
    larger = poisoned(fmt, [90], 16, 16, 2, 6)
    store = StoreBuffers.from_list([x[:, ::2] for x in larger.to_list()])
    expected, found = copy_of(store), store
    k, v = torch.randn(2, 3, 1, 16).expand(-1, -1, 40, -1), torch.randn(2, 3, 40, 16)
    index = torch.arange(0, 40, 2)[None, None].expand(2, 3, -1).mT.contiguous().mT
    positions = torch.arange(40).expand(2, 3, -1)  # int64, as nobody has to know
    for module, stored in ((tokens, expected), (cpp_tokens, found)):
        module.write_tokens(stored.tiers[0], tier_fmt, 3, k, v, index, 0, positions, stored.balancer)
    assert_same_bits(found, expected)
    args = (found.tiers[0], tier_fmt, index, 16, 16, store.balancer)
    for a, b in zip(cpp_tokens.read_tokens(*args), tokens.read_tokens(*args), strict=True):
        assert torch.equal(bits(a, False), bits(b, False))


@pytest.mark.parametrize("value", [-1, 63])
def test_indices_out_of_range_raise(value):
    fmt, store = filled("8:t1c16,8:t1c16", 16, 16, [9])
    before = copy_of(store)
    k = torch.randn(2, 3, 63, 16)
    index = torch.zeros(2, 3, 5, dtype=torch.int64)
    bad = index.index_fill(2, torch.tensor([4]), value)
    tier, tier_fmt = store.tiers[0], fmt.tiers[0]
    with pytest.raises(IndexError):
        cpp_tokens.write_tokens(tier, tier_fmt, 0, k, k, bad, 0, None, None)
    with pytest.raises(IndexError):
        cpp_tokens.read_tokens(tier, tier_fmt, bad, 16, 16, None)
    for pair in ((bad, index), (index, bad)):
        with pytest.raises(IndexError):
            cpp_tokens.copy_slots(tier, tier_fmt, store.scores, *pair)
    assert_same_bits(store, before)


def test_reference_takes_what_the_kernels_do_not():
    fmt, store = filled("8:t1c16,8:t1c16", 16, 16, [9])
    tier, tier_fmt = store.tiers[0], fmt.tiers[0]
    k = torch.randn(2, 3, 2, 16)
    scattered = tier._replace(positions=torch.stack([tier.positions] * 2, dim=-1)[..., 0])
    blocks = TierFormat(side("8:t2c16"), side("8:t1c16"))
    for arguments in (
        (tier, tier_fmt, 9, k.double(), k.double()),
        (tier, tier_fmt, tier.capacity - 1, k, k),
        (scattered, tier_fmt, 0, k, k),
        (tier, blocks, 1, k, k),
    ):
        with pytest.raises(dispatch.NotCovered):
            cpp_tokens.write_tokens(*arguments, None, 0, None, None)
    with pytest.raises(dispatch.NotCovered):
        cpp_tokens.copy_slots(tier, blocks, store.scores, *[torch.zeros(2, 3, 1, dtype=torch.int64)] * 2)
    expected = copy_of(store)
    tokens.write_tokens(expected.tiers[0], tier_fmt, 9, k.double(), k.double(), None, 9, None, None)
    with dispatch.use("cpp"):
        dispatch.run("write_tokens", k.device, tier, tier_fmt, 9, k.double(), k.double(), None, 9, None, None)
    assert_same_bits(store, expected)


@pytest.mark.parametrize("text, dim, value_dim, dtype", [*TIERS, ("4:t1c64,4:t1c64", 64, 64, torch.float32)])
def test_append_plan(text, dim, value_dim, dtype, threads):
    torch.manual_seed(0)
    fmt, store = filled(text + "+scored", dim, value_dim, [20], dtype)
    expected = copy_of(store)
    plan = cpp_tokens.AppendPlan(store, fmt, dim, value_dim)
    start = 20
    for own, layout, scored in ((1, "BHTD", False), (0, "BHTD", False), (1, "BTHD", True), (3, "spread", True)):
        k, v = (laid_out(nasty(2, 3, own, d, dtype=dtype), layout) for d in (dim, value_dim))
        own_scores = torch.rand(2, 3, 2 * own)[..., ::2] if scored else None
        balancer = store.balancer if fmt.is_balanced else None
        tokens.write_tokens(expected.tiers[0], fmt.tiers[0], start - 20, k, v, None, start, None, balancer)
        expected.scores[:, :, start - 20 : start - 20 + own] = own_scores if scored else 0.0
        plan(k, v, start - 20, start, own_scores)
        assert_same_bits(store, expected)
        start += own


def test_append_plan_of_many_tokens(threads):
    fmt, store = filled("8:t1c64,8:t1c64", 128, 128, [1000], batch=1)
    expected = copy_of(store)
    k = torch.randn(1, 3, 900, 128)
    plan = cpp_tokens.AppendPlan(store, fmt, 128, 128)
    tokens.write_tokens(expected.tiers[0], fmt.tiers[0], 50, k, k, None, 7, None, None)
    threads(2)
    plan(k, k, 50, 7)
    assert_same_bits(store, expected)


def test_append_plan_takes_nothing_else():
    fmt, store = filled("8:t1c16,8:t1c16", 16, 16, [9])
    before = copy_of(store)
    plan = cpp_tokens.AppendPlan(store, fmt, 16, 16)
    k = torch.randn(2, 3, 2, 16)
    capacity = store.tiers[0].capacity
    for arguments in (
        (k, k, capacity - 1), (k, k, -1), (k[:1], k[:1], 0), (k[:, :2], k[:, :2], 0), (k[..., :8], k, 0),
        (k, k[:, :, :1], 0), (k, k[..., :8], 0), (k.double(), k, 0), (k, k.to("meta"), 0),
    ):  # fmt: skip
        with pytest.raises(dispatch.NotCovered):
            plan(*arguments, 5)
    assert_same_bits(store, before)
    blocks = LayerFormat((TierFormat(side("8:t64c1"), side("8:t1c16")),))
    with pytest.raises(dispatch.NotCovered):
        cpp_tokens.AppendPlan(poisoned(blocks, [64], 16, 16), blocks, 16, 16)


def test_append_plan_keeps_no_tensor_alive():
    fmt, store = filled("8:t1c16,8:t1c16", 16, 16, [9])
    plan = cpp_tokens.AppendPlan(store, fmt, 16, 16)
    codes = weakref.ref(store.tiers[0].key.codes)
    del store
    assert codes() is None and plan is not None


def test_demotion_that_the_kernel_does_not_take():
    fmt, store = filled("8:t1c16,8:t1c16|4:t64c1,2:t1c16", 16, 16, [100, 64], more=[0, 64])
    before = copy_of(store)
    blocks = LayerFormat((TierFormat(side("8:t2c16"), side("8:t1c16")), fmt.tiers[1]))
    for victims, moves, used, text in ((3, (3,), 100, fmt), (101, (64,), 100, fmt), (64, (128,), 100, fmt),
                                       (64, (64,), 1000, fmt), (64, (64,), 100, blocks)):  # fmt: skip
        with pytest.raises(dispatch.NotCovered):
            cpp_tokens.demote(store, text, Orders(164, 4, 100, (100, 64), victims, moves), used, 16, 16)
    full = Orders(164, 4, 100, (100, store.tiers[1].capacity), 64, (64,))
    with pytest.raises(dispatch.NotCovered):
        cpp_tokens.demote(store, fmt, full, 100, 16, 16)
    assert_same_bits(store, before)


def test_build_failure_falls_back_with_one_warning(monkeypatch):
    def fail(source, name, exact):
        raise RuntimeError("no compiler here")

    fmt, store = filled("8:t1c16,8:t1c16", 16, 16, [9])
    expected = copy_of(store)
    k = torch.randn(2, 3, 1, 16)
    monkeypatch.setattr(cpp_common, "load_cpp_library", fail)
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(cpp_common, "_failed", {})
    warnings = []
    monkeypatch.setattr(dispatch.log, "warning", lambda text, *values: warnings.append(text % values))
    cpp_tokens.kernels.cache_clear()
    try:
        with dispatch.use("cpp"):
            for start in (9, 10):
                dispatch.run("write_tokens", k.device, store.tiers[0], fmt.tiers[0], start, k, k, None, 9, None, None)
        with pytest.raises(dispatch.BuildError, match="no compiler here"):
            cpp_tokens.AppendPlan(store, fmt, 16, 16)
    finally:
        cpp_tokens.kernels.cache_clear()
    for start in (9, 10):
        tokens.write_tokens(expected.tiers[0], fmt.tiers[0], start, k, k, None, 9, None, None)
    assert_same_bits(store, expected)
    assert len(warnings) == 1 and "no compiler here" in warnings[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision(dtype):
    """All halves, the middles between neighbours, and the floats next to them."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    middles = halves.float().view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)
    # Subnormal halves are as far apart as their floats say.
    subnormal = (torch.arange(0, 2048) + 0.5) * 2.0**-24
    x = torch.cat([halves.float(), *((middles + i).view(torch.float32) for i in (-1, 0, 1)), subnormal, -subnormal])
    x = x[: len(x) // 16 * 16].reshape(1, 1, -1, 16)
    fmt = LayerFormat.parse("fp16,fp16" if dtype == torch.float16 else "bf16,bf16")
    store = poisoned(fmt, [x.shape[2]], 16, 16, 1, 1)
    cpp_tokens.write_tokens(store.tiers[0], fmt.tiers[0], 0, x, x, None, 0, None, None)
    assert torch.equal(bits(store.tiers[0].key.codes, False), bits(x.to(dtype), False))


ODD = (0.0, -0.0, math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max)
"""Zeros of both signs and infinities are equals of other scores, NaN is above all."""


def with_odd(scores):
    """Some scores replaced by odd ones."""
    which = torch.randint(0, 40, scores.shape)
    return torch.where(which < len(ODD), torch.tensor(ODD)[which.clamp(max=len(ODD) - 1)], scores)


@pytest.mark.parametrize("counts", [(63,), (50,), (6, 50), (7, 32, 24), (0, 63), (63, 0), (5, 0, 9), (0, 0)])
def test_select_tokens(counts, threads):
    torch.manual_seed(0)
    scores = with_odd(torch.randint(-9, 20, (2, 3, 63)) / 8)
    for sinks, recent_from in ((0, 63), (4, 50), (40, 30)):
        orders = Orders(0, sinks, recent_from, counts, 0, (0,) * (len(counts) - 1))
        want = store_ops.select_tokens(scores, orders)
        for given in (scores, laid_out(scores[..., None], "BTHD")[..., 0], torch.stack([scores] * 2, -1)[..., 0]):
            found = cpp_tokens.select_tokens(given, orders)
            assert len(found) == len(want)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(dispatch.NotCovered):
        cpp_tokens.select_tokens(scores[..., : sum(counts) - 1] if sum(counts) else scores.double(), orders)


def test_select_tokens_of_a_long_prompt(threads):
    torch.manual_seed(0)
    scores = with_odd(torch.rand(1, 3, 20000).to(torch.bfloat16).float())
    orders = Orders(0, 4, 19936, (300, 2048, 1024), 0, (0, 0))
    want = store_ops.select_tokens(scores, orders)
    for number in (1, 2):
        threads(number)
        found = cpp_tokens.select_tokens(scores, orders)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


ONE, THREE = "8:t1c64,8:t1c64", "8:t1c16b,4:t1c8|4:t16c1b,fp16|2:t1c16,2:t32c4"
# format, D_k, D_v, tokens of each tier, victims, moves, sinks, the newest tokens that are held
DEMOTIONS = [
    (f"{ONE}|4:t64c1,2:t1c64", 64, 64, [210, 128], 64, [64], 4, 64),
    (f"{ONE}|4:t64c1,2:t1c64", 128, 64, [130, 0], 128, [128], 0, 0),
    (f"{ONE}|4:t64c1,2:t1c64", 64, 64, [1100, 0], 1024, [1024], 4, 64),  # enough for several threads
    (f"{ONE}|4:t64c1,2:t1c64", 64, 64, [64, 64], 64, [64], 4, 30),  # all leave, the held ones last
    (f"{ONE}|fp,fp", 64, 64, [63, 5], 7, [7], 4, 16),
    ("fp,fp|8:t1c80,3:t1c16", 80, 16, [63, 5], 39, [39], 0, 9),
    (THREE, 16, 16, [100, 32, 64], 70, [16, 32], 3, 20),  # the others are evicted
    (THREE, 16, 16, [100, 32, 64], 50, [0, 32], 3, 20),
    (THREE, 16, 16, [100, 32, 64], 9, [0, 0], 90, 100),  # more are held than may stay
    ("8:t1c16,8:t1c16+scored", 16, 32, [50], 1, [], 4, 10),
    ("bf16,4:t1c1+scored", 16, 8, [50], 50, [], 4, 10),
    ("4:t1c16,4:t1c16+scored", 16, 32, [50], 0, [], 4, 10),
    ("8:t1c16,8:t1c16|4:t1c16,4:t1c16", 16, 16, [400, 3], 300, [299], 4, 32),  # several chunks
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", DEMOTIONS, ids=lambda case: f"{case[0]}-{case[4]}")
def test_demote(case, dtype, threads):
    torch.manual_seed(0)
    text, dim, value_dim, counts, victims, moves, sinks, newest = case
    fmt, store = filled(text, dim, value_dim, counts, dtype, [0, *moves])
    used, length = counts[0], sum(counts)
    scores = store.scores[:, :, :used]
    scores.copy_(with_odd(scores))
    orders = Orders(length, sinks, length - newest, tuple(counts), victims, tuple(moves))
    expected = copy_of(store)
    with dispatch.use("reference"):
        store_ops.demote(expected, fmt, orders, used, dim, value_dim)
    before = copy_of(store)
    for number in (1, 2):
        threads(number)
        store = copy_of(before)
        cpp_tokens.demote(store, fmt, orders, used, dim, value_dim)
        assert_same_bits(store, expected)
