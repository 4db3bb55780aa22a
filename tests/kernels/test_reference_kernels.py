"""The reference kernels against plain formulas that share no code with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mikv_compile.kernels import attention, tokens
from mikv_compile.kernels.formats import LayerFormat, SideBuffers, SideFormat, StoreBuffers, buffer_shapes
from mikv_compile.kernels.packing import pack, unpack
from mikv_compile.kernels.quantize import channel_balancer, dequantize, quantize
from mikv_compile.kernels.scoring import AttentionArgs

BATCH, KV_HEADS = 2, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def empty_store(fmt, key_dim, value_dim, capacities):
    shapes = buffer_shapes(fmt, BATCH, KV_HEADS, key_dim, value_dim, capacities, torch.float32)
    store = StoreBuffers.from_list(
        [torch.full(s, float("nan") if d.is_floating_point else 111, dtype=d) for s, d in shapes]
    )
    store.balancer.uniform_(0.5, 2.0)
    return store


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [8, 40, 64])
def test_every_code_survives_packing(bits, dim):
    codes = torch.arange(dim * (1 << bits)).reshape(1 << bits, dim) % (1 << bits)
    codes = codes[:, torch.randperm(dim)].to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == dim * bits // 8
    assert torch.equal(unpack(packed, bits, dim), codes)


def test_planes_lie_apart():
    codes = torch.tensor([1, 2, 3, 0, 2, 1, 0, 3], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [1 | 2 << 4, 2 | 1 << 4, 3, 3 << 4]
    assert pack(codes, 2).tolist() == [1 | 3 << 2 | 2 << 4, 2 | 1 << 4 | 3 << 6]
    assert pack(codes | 4 * (codes == 3), 3).tolist() == [*pack(codes, 2).tolist(), 1 << 2 | 1 << 7]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("block", "channels"), [(1, 64), (1, 16), (16, 1), (8, 8)])
def test_quantization_error(bits, block, channels):
    fmt = SideFormat(bits, block, channels)
    x = torch.randn(BATCH, KV_HEADS, 32, 64) * torch.logspace(-2, 2, 64)
    codes, scales, zeros = quantize(x, fmt)
    found = dequantize(SideBuffers(codes, scales, zeros), fmt, 64)

    def each(params):
        return params.float().repeat_interleave(block, dim=2).repeat_interleave(channels, dim=3)

    # Half a step; rounding zero and scale to float16 moves the ends of the range.
    half_unit = 2.0**-11
    bound = each(scales) * (0.5 + ((1 << bits) - 1) * half_unit) + each(zeros).abs() * half_unit
    assert ((found - x).abs() <= bound * 1.0001 + 1e-6).all()


def test_group_without_range_reads_back_as_it_is():
    fmt = SideFormat(2, 1, 8)
    x = torch.full((1, 1, 3, 16), -1.25)
    side = SideBuffers(*quantize(x, fmt))
    assert not side.codes.any() and torch.equal(dequantize(side, fmt, 16), x)


def test_channel_balancer():
    q, k = torch.randn(BATCH, 6, 5, 16), torch.randn(BATCH, KV_HEADS, 7, 16)
    k[..., 3], q[..., 5] = 0.0, 0.0
    k[0, 0, 0, 7] = float("inf")
    found = channel_balancer(q, k)
    for b, h, d in [(0, 0, 1), (1, 1, 15), (1, 0, 8)]:
        expected = math.sqrt(q[b, 3 * h : 3 * h + 3, :, d].abs().max() / k[b, h, :, d].abs().max())
        assert found[b, h, d] == pytest.approx(expected, rel=1e-6)
    assert (found[..., 3] == 1).all() and (found[..., 5] == 1).all()
    assert found[0, 0, 7] == 1  # one infinite key says nothing of its channel's other keys


def test_write_in_chunks_equals_one_quantization(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 20)
    fmt = LayerFormat.parse("4:t8c1b,2:t1c16")
    store = empty_store(fmt, 16, 32, [80])
    k, v = torch.randn(BATCH, KV_HEADS, 90, 16), torch.randn(BATCH, KV_HEADS, 90, 32)
    index = torch.rand(BATCH, KV_HEADS, 90).argsort(dim=2)[:, :, :64]
    tokens.write_tokens(store.tiers[0], fmt.tiers[0], 8, k, v, index, 5, None, store.balancer)
    picked = [x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v)]
    picked[0] = picked[0] * store.balancer[:, :, None]
    tier = store.tiers[0]
    for side, x, side_fmt in zip((tier.key, tier.value), picked, (fmt.tiers[0].key, fmt.tiers[0].value), strict=True):
        codes, scales, zeros = quantize(x, side_fmt)
        first, stop = 8 // side_fmt.tokens, 72 // side_fmt.tokens
        assert torch.equal(side.codes[:, :, 8:72], codes)
        assert torch.equal(side.scales[:, :, first:stop], scales) and torch.equal(side.zeros[:, :, first:stop], zeros)
        assert (side.codes[:, :, :8] == 111).all() and side.scales[:, :, stop:].isnan().all()
    assert torch.equal(tier.positions[:, :, 8:72].long(), index + 5)


def test_read_and_copy():
    fmt = LayerFormat.parse("8:t1c16b,4:t1c8|fp,fp")
    store = empty_store(fmt, 16, 24, [40, 8])
    k, v = torch.randn(BATCH, KV_HEADS, 30, 16), torch.randn(BATCH, KV_HEADS, 30, 24)
    tier, tier_fmt = store.tiers[0], fmt.tiers[0]
    tokens.write_tokens(tier, tier_fmt, 0, k, v, None, 0, None, store.balancer)
    store.scores[:, :, :30] = torch.rand(BATCH, KV_HEADS, 30)
    source = torch.tensor([29, 28, 27]).expand(BATCH, KV_HEADS, -1)
    target = torch.tensor([4, 9, 27]).expand(BATCH, KV_HEADS, -1)
    read = (tier, tier_fmt, source, 16, 24, store.balancer)
    before, scores = tokens.read_tokens(*read), store.scores[:, :, 27:30].flip(2).clone()
    torch.testing.assert_close(before[0], k[:, :, 27:].flip(2), atol=0.05, rtol=0)
    torch.testing.assert_close(before[1], v[:, :, 27:].flip(2), atol=0.25, rtol=0)
    tokens.copy_slots(tier, tier_fmt, store.scores, source, target)
    after = tokens.read_tokens(tier, tier_fmt, target, 16, 24, store.balancer)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert torch.equal(tier.positions.gather(2, target), source.int())
    assert torch.equal(store.scores.gather(2, target), scores)


def dense_case(text, counts, own, group, key_dim=16, value_dim=24):
    """A filled store, and the same tokens as dense float32 keys and values in the order of their positions."""
    fmt = LayerFormat.parse(text)
    store = empty_store(fmt, key_dim, value_dim, [count + 16 for count in counts])
    length = sum(counts)
    keys = torch.randn(BATCH, KV_HEADS, length + own, key_dim)
    values = torch.randn(BATCH, KV_HEADS, length + own, value_dim)
    order, stop = torch.rand(BATCH, KV_HEADS, length).argsort(dim=2), 0
    k, v = keys[:, :, length:].clone(), values[:, :, length:].clone()
    for tier, tier_fmt, count in zip(store.tiers, fmt.tiers, counts, strict=True):
        index = order[:, :, stop : stop + count]
        tokens.write_tokens(tier, tier_fmt, 0, keys, values, index, 0, None, store.balancer)
        slots = torch.arange(count).expand(BATCH, KV_HEADS, -1)
        found = tokens.read_tokens(tier, tier_fmt, slots, key_dim, value_dim, store.balancer)
        for dense, stored in zip((keys, values), found, strict=True):
            dense.scatter_(2, index[..., None].expand_as(stored), stored)
        stop += count
    q = torch.randn(BATCH, KV_HEADS * group, own, key_dim)
    return fmt, store, length, q, k, v, keys, values


CASES = [
    ("fp,fp", [21], 1, 1),
    ("fp,fp", [21], 3, 4),
    ("8:t1c16b,4:t1c8|4:t16c1,2:t1c24", [21, 32], 2, 3),
    ("3:t16c1b,8:t16c1|2:t1c4b,3:t1c24", [16, 9], 1, 2),
]


@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize(("text", "counts", "own", "group"), CASES)
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_attention_over_tiers_is_dense_attention(text, counts, own, group, kind, softcap):
    fmt, store, length, q, k, v, keys, values = dense_case(text, counts, own, group)
    mask = None
    if kind is not None:
        mask = torch.rand(BATCH, 1, own, length + own) < 0.6
        mask[..., 0] = True
        if kind == "additive":
            mask = torch.randn(mask.shape).masked_fill(~mask, float("-inf"))
    out, lse = attention.attend(q, k, v, mask, 0.3, softcap, store, fmt, tuple(counts), length)
    weights = (q @ keys.repeat_interleave(group, dim=1).transpose(2, 3) * 0.3).double()
    if softcap:
        weights = softcap * (weights / softcap).tanh()
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf) if kind == "bool" else weights + mask
    torch.testing.assert_close(lse.double(), weights.logsumexp(-1), atol=1e-5, rtol=1e-5)
    expected = weights.softmax(-1).float() @ values.repeat_interleave(group, dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if not softcap:
        model = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out, model, atol=1e-5, rtol=1e-5)

    received = weights.softmax(-1).sum(2).reshape(BATCH, KV_HEADS, group, -1).sum(2).float()
    count = counts[0]
    if not store.scores.numel():
        store = store._replace(scores=torch.full((BATCH, KV_HEADS, count + 16), float("nan")))
    store.scores[:, :, :count] = 1.0
    own_scores = attention.add_scores(q, k, lse, mask, 0.3, softcap, store, fmt, count, length)
    torch.testing.assert_close(own_scores, received[:, :, length:], atol=1e-5, rtol=1e-5)
    places = store.tiers[0].positions[:, :, :count].long()
    torch.testing.assert_close(store.scores[:, :, :count], 1 + received.gather(2, places), atol=1e-5, rtol=1e-5)
    assert store.scores[:, :, count:].isnan().all()


def test_row_that_may_attend_to_nothing():
    fmt, store, length, q, k, v, _, _ = dense_case("fp,fp", [5], 2, 2)
    mask = torch.ones(1, 1, 2, 7, dtype=torch.bool)
    mask[:, :, 1] = False
    out, lse = attention.attend(q, k, v, mask, 1.0, 0.0, store, fmt, (5,), length)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -math.inf).all() and lse[:, :, 0].isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("sinks", [None, "heads", "rows"])
@pytest.mark.parametrize(("is_causal", "last"), [(False, 0), (True, 0), (True, 7), (False, 7)])
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_column_sums_are_sums_of_the_softmax(monkeypatch, is_causal, last, kind, sinks, softcap):
    monkeypatch.setattr(attention, "ROW_CHUNK", 6)
    rows, columns = 20, 23
    q, k = torch.randn(BATCH, KV_HEADS * 3, rows, 16), torch.randn(BATCH, KV_HEADS, columns, 16)
    scores = q @ k.repeat_interleave(3, dim=1).transpose(2, 3) * 0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    mask = None
    if kind is not None:
        mask = torch.rand(1, KV_HEADS * 3, rows, columns) < 0.7
        mask[..., 0] = True
        mask[:, :, -1] = False
        if kind == "additive":
            mask = torch.randn(mask.shape).masked_fill(~mask, -math.inf)
        scores = scores.masked_fill(~mask, -math.inf) if kind == "bool" else scores + mask
    if is_causal:
        scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(), -math.inf)
    given = torch.zeros(BATCH, KV_HEADS * 3, rows, 0)
    if sinks:
        sinks = torch.randn(1, KV_HEADS * 3, rows if sinks == "rows" else 1, 2)
        given = sinks.expand(BATCH, -1, rows, -1)
    weights = (
        torch.cat([scores, given], -1).softmax(-1)[..., :columns].nan_to_num(0.0)[:, :, rows - last if last else 0 :]
    )
    expected = weights.sum(2).reshape(BATCH, KV_HEADS, 3, columns).sum(2)
    found = attention.column_sums(q, k, AttentionArgs(mask, 0.5, is_causal, softcap, sinks), last)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
