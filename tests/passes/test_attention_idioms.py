"""Every way to write attention, from every tracer, against the documented meaning of the record it gives."""

import math

import canonical_oracle
import pytest
import torch
import torch.nn.functional as F
from pass_graphs import TRACERS, decomposed, dynamo

from mikv_compile.passes import Attention, find_attentions

B, H, G, R, T, D, DV = 2, 3, 2, 5, 63, 80, 48
HQ = H * G
LOWEST = torch.finfo(torch.float32).min


def operands(heads=HQ):
    torch.manual_seed(0)
    return torch.randn(B, heads, R, D), torch.randn(B, heads, T, D), torch.randn(B, heads, T, DV)


def grouped():
    torch.manual_seed(0)
    return torch.randn(B, HQ, R, D), torch.randn(B, H, T, D), torch.randn(B, H, T, DV)


def bias(*shape):
    return torch.randn(*shape)


def hidden(*shape):
    """A bool mask, True where masked; the first token is never masked."""
    mask = torch.rand(*shape) < 0.3
    mask[..., 0] = False
    return mask


def checked(tracer, fn, *inputs):
    """The one record of `fn`, shown to give the value of its output."""
    gm, args = tracer(fn, *inputs)
    (found,) = find_attentions(gm.graph)
    assert isinstance(found, Attention), found
    canonical_oracle.check(gm, args, [found])
    return found


def flat(x):
    return x.reshape(-1, *x.shape[2:])


def repeat(x):
    return x[:, :, None].expand(B, H, G, *x.shape[2:]).reshape(B, HQ, *x.shape[2:])


def bmm_with_views(q, k, v, m):
    scores = torch.bmm(flat(q), flat(k).transpose(1, 2)).view(B, HQ, R, -1) + m
    weights = F.softmax(scores.view(B * HQ, R, -1), dim=-1).view(B, HQ, R, -1).view(B * HQ, R, -1)
    return torch.bmm(F.dropout(weights, p=0.1, training=False), flat(v)).view(B, HQ, R, DV)


def baddbmm_with_bias(q, k, v, alibi, m):
    scores = alibi.baddbmm(batch1=flat(q), batch2=flat(k).transpose(-1, -2), beta=0.5, alpha=0.25)
    weights = F.softmax(scores.view(B, HQ, R, -1) + m, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * HQ, R, -1), flat(v))


def baddbmm_of_zeros(q, k, v, m):
    empty = torch.zeros(B * HQ, R, T, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, flat(q), flat(k).transpose(1, 2), beta=1.0, alpha=0.3).view(B, HQ, R, -1)
    return torch.matmul(F.softmax(scores + m, dim=-1), v)


def lower_bound(q, k, v, m):
    scores = torch.max(q @ k.mT * 0.1 + m, torch.full((), LOWEST))
    return torch.softmax(scores, -1) @ v


def lower_bound_behind_fill(q, k, v, m):
    scores = (q @ k.mT * 0.1).masked_fill(m, -math.inf).clamp(min=LOWEST)
    return torch.softmax(scores, -1) @ v


def where_then_add(q, k, v, keep, m):
    lowest = torch.tensor(LOWEST, dtype=torch.float32)
    return torch.softmax(torch.where(keep, q @ k.mT * 0.1, lowest) + m, -1) @ v


def sinks_with_maximum(q, k, v, m, sinks):
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([q @ k.mT * 0.1 + m, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return F.dropout(weights, p=0.0, training=False).to(v.dtype) @ v


def sinks_in_front(q, k, v, sinks):
    logits = torch.cat([sinks.view(1, HQ, 1, 2).expand(B, HQ, R, 2), q @ k.mT * 0.1], dim=3)
    return torch.softmax(logits.float(), 3)[:, :, :, 2:] @ v


def softmax_off_by_one(q, k, v):
    scores = q @ k.mT
    logits = torch.cat([scores, torch.zeros(B, HQ, R, 1)], -1)
    return torch.softmax(logits, -1)[..., :T] @ v


def maximum_subtracted(q, k, v, m):
    scores = q @ k.mT / 8 + m
    scores = scores - torch.amax(scores, dim=-1, keepdim=True).detach()
    return torch.softmax(scores, dim=-1) @ v


def in_place_on_the_scores(q, k, v, m):
    scores = torch.matmul(q, k.transpose(2, 3)) / 8
    scores.masked_fill_(m.view(B, 1, 1, T).expand_as(scores), LOWEST)
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return F.dropout(weights, p=0.1, training=False) @ v


def softcap(q, k, v, m):
    scores = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    return torch.softmax(scores + m, -1) @ v


def softcap_before_scale(q, k, v, m):
    return torch.softmax((20.0 * torch.tanh((q @ k.mT) / 30.0)) * -0.5 + m, -1) @ v


def packed_rows(q, k, v, m):
    """All query heads of a KV head as rows of one product."""
    rows = q.view(B, H, G * R, D)
    scores = (rows @ k.transpose(2, 3)).view(B, H, G, R, -1) * 0.1 + m
    return (torch.softmax(scores, -1).view(B, H, G * R, -1) @ v).view(B, HQ, R, DV)


def five_dimensions(q, k, v, m):
    scores = q.view(B, H, G, R, D) @ k[:, :, None].transpose(-1, -2) * 0.1 + m
    return torch.softmax(scores, -1) @ v.unsqueeze(2)


def einsum_grouped(q, k, v, m):
    scores = torch.einsum("bkgrd,bktd->bkgrt", q.view(B, H, G, R, D), k) / math.sqrt(D)
    return torch.einsum("bkgrt,bktd->bkgrd", torch.softmax(scores + m, -1), v)


def einsum_tokens_first(q, k, v, m):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) * 0.1
    return torch.einsum("bhqk,bkhd->bqhd", (scores + m).softmax(dim=-1), v)


def einsum_tokens_before_rows(q, k, v, m):
    """Scores `[B, H, T, R]`, masked as they are and turned before the softmax."""
    scores = torch.einsum("bhrd,bhtd->bhtr", q, k) * 0.1 + m
    return torch.softmax(scores.transpose(2, 3), -1) @ v


def einsum_rows_between(q, k, v):
    """Queries `[B, R, H, G, D]`, the query heads of a KV head behind it."""
    q = q.view(B, H, G, R, D).permute(0, 3, 1, 2, 4)
    weights = torch.einsum("bsngd,btnd->bngst", q, k.transpose(1, 2)).mul(0.1).softmax(-1)
    return torch.einsum("bngst,btnd->bsngd", weights, v.transpose(1, 2))


def multi_query(q, k, v):
    weights = torch.softmax(torch.einsum("bhrd,btd->bhrt", q, k[:, 0]) * 0.1, -1)
    return torch.einsum("bhrt,btd->bhrd", weights, v[:, 0])


IDIOMS = {
    "plain": (lambda q, k, v: torch.softmax(q @ k.mT * 0.1, -1) @ v, operands),
    "softmax of torch.special": (lambda q, k, v: torch.special.softmax(q @ k.mT * 0.1, -1) @ v, operands),
    "key stored transposed": (lambda q, k, v: torch.softmax(q @ k, -1) @ v, lambda: _transposed_key()),
    "scale on query and key": (lambda q, k, v: torch.softmax((q * 0.5) @ (k.mT / 4), -1) @ v, operands),
    "scale by a constant tensor": (lambda q, k, v: torch.softmax(q @ k.mT / torch.full([], 8.0), -1) @ v, operands),
    "mask": (lambda q, k, v, m: torch.softmax(m + q @ k.mT * 0.1, -1) @ v, operands, (B, 1, R, T)),
    "mask times alpha": (
        lambda q, k, v, m: torch.softmax(torch.add(q @ k.mT, m, alpha=2), -1) @ v,
        operands,
        (1, HQ, 1, T),
    ),
    "mask then scale": (lambda q, k, v, m: torch.softmax((q @ k.mT + m) / 8, -1) @ v, operands, (R, T)),
    "mask from which the scores are taken": (
        lambda q, k, v, m: torch.softmax(m - q @ k.mT * 0.1, -1) @ v,
        operands,
        (R, T),
    ),
    "two terms": (
        lambda q, k, v, a, m: torch.softmax((q @ k.mT - a) * 0.1 + m, -1) @ v,
        operands,
        (HQ, 1, T),
        (B, 1, 1, T),
    ),
    "a number is added": (lambda q, k, v: torch.softmax(q @ k.mT * 0.1 + 3, -1) @ v, operands),
    "per-row bias": (lambda q, k, v, m: torch.softmax(q @ k.mT * 0.1 + m, -1) @ v, operands, (B, 1, R, 1)),
    "masked_fill": (lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, LOWEST), -1) @ v, operands, "hidden"),
    "masked_fill of -inf": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -math.inf) * 0.1, -1) @ v,
        operands,
        "hidden",
    ),
    "fill then scale": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -1e9) / 8, -1) @ v,
        operands,
        "hidden",
    ),
    "where keeps": (lambda q, k, v, m: torch.softmax(torch.where(~m, q @ k.mT, -math.inf), -1) @ v, operands, "hidden"),
    "where fills": (
        lambda q, k, v, m: torch.softmax(torch.where(m, torch.full_like(q[..., :1], -1e10), q @ k.mT), -1) @ v,
        operands,
        "hidden",
    ),
    "where then add": (where_then_add, operands, "hidden", (B, 1, 1, T)),
    "in place on the scores": (in_place_on_the_scores, operands, "hidden rows"),
    "softcap": (softcap, operands, (B, 1, R, T)),
    "softcap before scale": (softcap_before_scale, operands, (B, 1, R, T)),
    "maximum subtracted": (maximum_subtracted, operands, (B, 1, R, T)),
    "lower bound": (lower_bound, operands, (B, 1, R, T)),
    "lower bound behind fill": (lower_bound_behind_fill, operands, "hidden"),
    "sinks": (sinks_with_maximum, operands, (B, 1, R, T), (HQ,)),
    "sinks in front": (sinks_in_front, operands, (HQ, 2)),
    "softmax off by one": (softmax_off_by_one, operands),
    "bmm": (bmm_with_views, operands, (B, 1, R, T)),
    "baddbmm": (baddbmm_with_bias, operands, (B * HQ, 1, T), (B, 1, R, T)),
    "baddbmm of zeros": (baddbmm_of_zeros, operands, (B, 1, R, T)),
    "packed rows": (packed_rows, grouped, (B, 1, 1, R, T)),
    "five dimensions": (five_dimensions, grouped, (B, 1, 1, R, T)),
    "repeated heads": (lambda q, k, v: torch.softmax(q @ repeat(k).mT * 0.1, -1) @ repeat(v), grouped),
    "einsum grouped": (einsum_grouped, grouped, (B, 1, 1, R, T)),
    "einsum tokens first": (einsum_tokens_first, operands, (B, 1, R, T)),
    "einsum tokens before rows": (einsum_tokens_before_rows, operands, (B, 1, T, R)),
    "einsum rows between": (einsum_rows_between, grouped),
    "einsum ellipsis": (
        lambda q, k, v: torch.einsum("...rt,...td->...rd", torch.einsum("...rd,...td->...rt", q, k).softmax(-1), v),
        operands,
    ),
    "multi query": (multi_query, grouped),
    "two dimensions": (lambda q, k, v: torch.softmax(q[0, 0] @ k[0, 0].t() * 0.1, -1) @ v[0, 0], operands),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), operands),
    "sdpa causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2), operands),
    "sdpa bool mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, ~m), operands, "hidden"),
    "sdpa float mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), operands, (B, HQ, R, T)),
    "sdpa grouped": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), grouped),
    "sdpa flat": (lambda q, k, v: F.scaled_dot_product_attention(flat(q), flat(k), flat(v)), operands),
    "sdpa five dimensions": (
        lambda q, k, v, m: F.scaled_dot_product_attention(
            q.view(B, H, G, R, D), repeat(k).view(B, H, G, T, D), repeat(v).view(B, H, G, T, DV), m
        ),
        grouped,
        (B, 1, 1, R, T),
    ),
}


def _transposed_key():
    q, k, v = operands()
    return q, k.mT.contiguous(), v


def _inputs(make, *extra):
    special = {"hidden": lambda: hidden(B, 1, R, T), "hidden rows": lambda: hidden(B, T)}
    return (*make(), *(special[x]() if isinstance(x, str) else bias(*x) for x in extra))


@pytest.mark.parametrize("tracer", TRACERS, ids=lambda tracer: tracer.__name__)
@pytest.mark.parametrize("idiom", IDIOMS.values(), ids=IDIOMS)
def test_idiom_has_its_documented_meaning(idiom, tracer):
    fn, *rest = idiom
    if fn is einsum_rows_between and tracer is decomposed:
        pytest.skip("declined there: see test_attention_decoys")
    checked(tracer, fn, *_inputs(*rest))


@pytest.mark.parametrize("idiom", ["mask", "bmm", "sinks", "packed rows", "einsum tokens first", "sdpa bool mask"])
def test_idiom_with_symbolic_sizes(idiom):
    fn, *rest = IDIOMS[idiom]
    inputs = _inputs(*rest)
    gm, args = dynamo(fn, *inputs, symbolic=T)
    (found,) = find_attentions(gm.graph)
    assert isinstance(found, Attention), found
    assert any(isinstance(x, int) for x in args)  # a size is an input
    canonical_oracle.check(gm, args, [found])


def test_one_query_row_and_one_batch_row():
    """Sizes of one hold no information; every dimension must still be found."""
    q, k, v, m = (x[:1] for x in _inputs(operands, (B, 1, 1, T)))
    q = q[:, :, :1]

    def fn(q, k, v, m):
        scores = torch.bmm(flat(q), flat(k).transpose(1, 2)).view(1, HQ, 1, T) + m
        return torch.bmm(F.softmax(scores.view(HQ, 1, T), dim=-1), flat(v))

    found = checked(dynamo, fn, q, k, v, m)
    assert found.terms[0].dims == ("b", "kg", "r", "t") and found.key_dims == ("bkg", "t", "d")


def records():
    """What the records of some idioms must look like."""
    softcapped, capped = {"scale": 0.3, "softcap": 5.0}, {"scale": -10 / 30, "softcap": 10.0}
    return {
        "mask then scale": {"scale": 1 / 8},
        "softcap": softcapped,
        "softcap before scale": capped,
        "bmm": {"query_dims": ("bkg", "r", "d"), "key_dims": ("bkg", "t", "d"), "output_dims": ("bkg", "r", "d")},
        "baddbmm of zeros": {"key_dims": ("bkg", "t", "d"), "value_dims": ("b", "kg", "t", "d")},
        "packed rows": {"query_dims": ("b", "k", "gr", "d"), "key_dims": ("b", "k", "t", "d")},
        "five dimensions": {"query_dims": ("b", "k", "g", "r", "d"), "key_dims": ("b", "k", "1", "t", "d")},
        "einsum grouped": {"query_dims": ("b", "k", "g", "r", "d"), "key_dims": ("b", "k", "t", "d")},
        "einsum tokens first": {"query_dims": ("b", "r", "kg", "d"), "key_dims": ("b", "t", "kg", "d")},
        "einsum rows between": {"query_dims": ("b", "r", "k", "g", "d"), "key_dims": ("b", "t", "k", "d")},
        "multi query": {"query_dims": ("bk", "g", "r", "d"), "key_dims": ("bk", "t", "d")},
        "key stored transposed": {"key_dims": ("b", "kg", "d", "t")},
    }


@pytest.mark.parametrize("idiom", records())
def test_record(idiom):
    fn, *rest = IDIOMS[idiom]
    found = checked(dynamo, fn, *_inputs(*rest))
    for name, value in records()[idiom].items():
        assert getattr(found, name) == (pytest.approx(value) if isinstance(value, float) else value)


def test_score_terms_in_order():
    fn, *rest = IDIOMS["where then add"]
    fill, add = checked(dynamo, fn, *_inputs(*rest)).terms
    assert (fill.kind, fill.value, fill.inverted) == ("fill", LOWEST, True)
    assert (add.kind, add.value) == ("add", 1.0)
    fn, *rest = IDIOMS["fill then scale"]
    (fill,) = checked(dynamo, fn, *_inputs(*rest)).terms
    assert (fill.kind, fill.value, fill.inverted) == ("fill", -1.25e8, False)
    fn, *rest = IDIOMS["where keeps"]
    (keep,) = checked(dynamo, fn, *_inputs(*rest)).terms
    assert keep.kind == "keep"
    fn, *rest = IDIOMS["mask times alpha"]
    assert [term.value for term in checked(dynamo, fn, *_inputs(*rest)).terms] == [2.0]


def test_upcasts_belong_to_the_idiom():
    """Queries, keys and values in bfloat16, everything between in float32."""

    def fn(q, k, v):
        scores = q.float() @ k.float().transpose(2, 3) * 0.1
        return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)

    gm, args = dynamo(fn, *(x.bfloat16() for x in operands()))
    (found,) = find_attentions(gm.graph)
    assert (found.query.name, found.key.name, found.value.name) == ("l_q_", "l_k_", "l_v_")
    canonical_oracle.check(gm, args, [found], tolerance=1e-2)


def test_upcast_of_the_scores():
    def fn(q, k, v):
        return torch.softmax((q @ k.mT * 0.1).float(), -1).to(q.dtype) @ v

    gm, args = dynamo(fn, *(x.bfloat16() for x in operands()))
    (found,) = find_attentions(gm.graph)
    canonical_oracle.check(gm, args, [found], tolerance=3e-2)


def test_two_attentions_on_one_key():
    """The transpose that both read stays outside."""

    def fn(q, k, v):
        turned = k.transpose(2, 3)
        return torch.softmax(q @ turned, -1) @ v, torch.softmax((-q) @ turned, -1) @ v

    gm, args = dynamo(fn, *operands())
    found = find_attentions(gm.graph)
    assert [record.key_dims for record in found] == [("b", "kg", "d", "t")] * 2
    canonical_oracle.check(gm, args, found)
