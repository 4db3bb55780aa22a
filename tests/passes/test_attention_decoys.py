"""Near misses: what only looks like attention of a supported form is declined with a reason, or left alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from pass_graphs import decomposed, dynamo
from test_attention_idioms import HQ, LOWEST, B, R, T, einsum_rows_between, grouped, hidden, operands

from mikv_compile.passes import Attention, Declined, find_attentions
from mikv_compile.passes.node_utils import operation


def refused(text, fn, *inputs, tracer=dynamo):
    gm, _ = tracer(fn, *inputs)
    (found,) = find_attentions(gm.graph)
    assert isinstance(found, Declined), found
    assert text in found.reason, found.reason


def top_k(q, k, v):
    scores = q @ k.mT
    kept = scores.topk(8, dim=-1)
    return torch.softmax(torch.full_like(scores, -math.inf).scatter(-1, kept.indices, kept.values), -1) @ v


def joined_twice(q, k, v):
    scores = q @ k.mT
    return torch.softmax(torch.cat([scores, scores], -1), -1)[..., :T] @ v


def sinks_kept(q, k, v):
    scores = torch.cat([q @ k.mT, torch.zeros(B, HQ, R, 1)], -1)
    return torch.softmax(scores, -1) @ F.pad(v, (0, 0, 0, 1))


def wrong_column_cut(q, k, v):
    scores = torch.cat([q @ k.mT, torch.zeros(B, HQ, R, 1)], -1)
    return torch.softmax(scores, -1)[..., 1:] @ v


def maximum_subtracted_before_sinks(q, k, v):
    scores = q @ k.mT
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.softmax(torch.cat([scores, torch.zeros(B, HQ, R, 1)], -1), -1)[..., :-1] @ v


def scores_kept(q, k, v):
    scores = q @ k.mT
    return torch.softmax(scores, -1) @ v, scores.amax(-1)


def mask_from_scores(q, k, v):
    scores = q @ k.mT
    return torch.softmax(scores.masked_fill(scores < 0, -math.inf), -1) @ v


def mask_changed_between(q, k, v, m):
    weights = torch.softmax(q @ k.mT + m, -1)
    m.zero_()
    return weights @ v


def overwritten_scores(q, k, v):
    scores = q @ k.mT
    scores[..., 0] = 0
    return torch.softmax(scores, -1) @ v


def bias_of_tokens_not_last(q, k, v, m):
    """`m` is `[T, 1]` and differs from token to token, though its last dimension is 1."""
    scores = torch.einsum("bhrd,bhtd->bhtr", q, k) + m
    return torch.softmax(scores.transpose(2, 3), -1) @ v


BIAS = (torch.randn(R, T),)
HIDDEN = (hidden(R, T),)
SCALE = (torch.tensor(0.5),)
DECOYS = {
    "bias of tokens that are not last": ("not the tokens yet", bias_of_tokens_not_last, (torch.randn(T, 1),)),
    "infinite number": ("floating point mask", lambda q, k, v: torch.softmax(q @ k.mT + math.inf, -1) @ v, ()),
    "fill with zero": ("does not mask", lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, 0), -1) @ v, HIDDEN),
    "fill with -100": (
        "does not mask",
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -100.0), -1) @ v,
        HIDDEN,
    ),
    "fill becomes weak by a scale": (
        "does not mask",
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -1e4) / 8, -1) @ v,
        HIDDEN,
    ),
    "fill with a tensor": (
        "not a plain number",
        lambda q, k, v, m, s: torch.softmax(torch.where(m, s, q @ k.mT), -1) @ v,
        HIDDEN + SCALE,
    ),
    "fill with a number added later in place": (
        "not a plain number",
        lambda q, k, v, m: torch.softmax(torch.where(m, torch.full((1,), LOWEST).add_(1e38), q @ k.mT), -1) @ v,
        HIDDEN,
    ),
    "sign of masked scores": (
        "sign",
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -1e9) * -1.0, -1) @ v,
        HIDDEN,
    ),
    "scale by a tensor": ("plain number", lambda q, k, v, s: torch.softmax(q @ k.mT * s, -1) @ v, SCALE),
    "multiplied by a mask": ("plain number", lambda q, k, v, m: torch.softmax(q @ k.mT * m, -1) @ v, BIAS),
    "divides by the scores": ("divides", lambda q, k, v: torch.softmax(2 / (q @ k.mT), -1) @ v, ()),
    "rounded scores": (
        "rounds",
        lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 2, rounding_mode="floor"), -1) @ v,
        (),
    ),
    "softcap of masked scores": (
        "soft-caps",
        lambda q, k, v, m: torch.softmax(torch.tanh((q @ k.mT + m) / 5) * 5, -1) @ v,
        BIAS,
    ),
    "two softcaps": ("soft-caps", lambda q, k, v: torch.softmax(torch.tanh(torch.tanh(q @ k.mT)) * 5, -1) @ v, ()),
    "nan_to_num": ("not supported", lambda q, k, v: torch.softmax(torch.nan_to_num(q @ k.mT), -1) @ v, ()),
    "relu": ("not supported", lambda q, k, v: torch.softmax(torch.relu(q @ k.mT), -1) @ v, ()),
    "bounded from above": ("from above", lambda q, k, v: torch.softmax((q @ k.mT).clamp(-1e9, 5), -1) @ v, ()),
    "bounded at -1": ("bounds", lambda q, k, v: torch.softmax((q @ k.mT).clamp(min=-1.0), -1) @ v, ()),
    "scores times scores": ("with themselves", lambda q, k, v: _squared(q @ k.mT, v), ()),
    "softmax in a lower precision": (
        "lower precision",
        lambda q, k, v: torch.softmax((q @ k.mT).bfloat16(), -1).float() @ v,
        (),
    ),
    "softmax with a lower dtype": (
        "lower precision",
        lambda q, k, v: torch.softmax(q @ k.mT, -1, dtype=torch.bfloat16).float() @ v,
        (),
    ),
    "dropout of the scores": ("not supported", lambda q, k, v: torch.softmax(F.dropout(q @ k.mT, 0.1), -1) @ v, ()),
    "head mask": (
        "changed between softmax",
        lambda q, k, v, m: (torch.softmax(q @ k.mT, -1) * m) @ v,
        (torch.ones(HQ, 1, 1),),
    ),
    "scores joined to themselves": ("joins the scores to themselves", joined_twice, ()),
    "sinks kept": ("not cut off", sinks_kept, ()),
    "another column cut off": ("exactly the sink column", wrong_column_cut, ()),
    "sinks behind a shift": ("subtracted before", maximum_subtracted_before_sinks, ()),
    "scores read by others": ("scores are also read by `amax`", scores_kept, ()),
    "mask from the scores": ("from the scores", mask_from_scores, ()),
    "mask that changes": ("changed in place", mask_changed_between, BIAS),
    "overwritten scores": ("not supported", overwritten_scores, ()),
    "integer bias": (
        "floating point mask",
        lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v,
        (torch.ones(R, T, dtype=torch.long),),
    ),
    "broadcast query": ("broadcast", lambda q, k, v: torch.softmax(q[:1] @ k.mT, -1) @ v, ()),
    "values of every row": (
        "from query row to",
        lambda q, k, v: torch.einsum(
            "bhrt,bhrtd->bhrd", torch.softmax(q @ k.mT, -1), v[:, :, None].expand(-1, -1, R, -1, -1)
        ),
        (),
    ),
    "diagonal": (
        "diagonal",
        lambda q, k, v: torch.softmax(torch.einsum("bhrr,bhtr->bht", q[..., :R], k[..., :R]), -1)[:, :, None] @ v,
        (),
    ),
    "float64 output": ("dtype of the operand", lambda q, k, v: torch.softmax((q @ k.mT).double(), -1) @ v.double(), ()),
}


def _squared(scores, v):
    return torch.softmax(scores * scores, -1) @ v


@pytest.mark.parametrize("decoy", DECOYS.values(), ids=DECOYS)
def test_decoy_is_declined(decoy):
    text, fn, extra = decoy
    refused(text, fn, *operands(), *extra)


def test_top_k_of_the_scores_is_not_matched():
    gm, _ = dynamo(top_k, *operands())
    assert not any(isinstance(found, Attention) for found in find_attentions(gm.graph))


def test_softmax_over_the_heads_is_not_attention():
    gm, _ = dynamo(lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, *operands())
    assert find_attentions(gm.graph) == []


def test_product_into_another_tensor():
    def fn(q, k, v, out):
        torch.bmm(q[0], k[0].mT, out=out)
        return torch.softmax(out, -1) @ v[0]

    gm, _ = dynamo(fn, *operands(), torch.empty(HQ, R, T))
    assert not any(isinstance(found, Attention) for found in find_attentions(gm.graph))


def test_rows_and_groups_merged_in_two_orders():
    refused("in another", einsum_rows_between, *grouped(), tracer=decomposed)


def test_other_results_of_a_fused_kernel():
    def fn(q, k, v):
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, log_sum

    refused("more than the output", fn, *(operands()[i][..., :48] for i in range(3)), tracer=decomposed)


def test_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k = torch.randn(1, 4, 128, 16), torch.randn(1, 2, 128, 16)
    found = []

    def backend(gm, inputs):
        found.append(find_attentions(gm.graph))
        return lambda *args: (torch.zeros_like(q),)

    def compiled(fn):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(fn, backend=backend)(q, k)
        (record,) = found.pop()
        return record

    plain = compiled(lambda q, k: flex.flex_attention(q, k, k, enable_gqa=True, scale=0.3))
    assert isinstance(plain, Attention) and plain.enable_gqa and plain.scale == 0.3
    changed = compiled(lambda q, k: flex.flex_attention(q, k, k, score_mod=lambda s, *_: s * 2, enable_gqa=True))
    assert isinstance(changed, Declined) and 'attn_implementation="sdpa"' in changed.reason
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 128, 128, device="cpu")
    masked = compiled(lambda q, k: flex.flex_attention(q, k, k, block_mask=mask, enable_gqa=True))
    assert isinstance(masked, Declined) and "block_mask" in masked.reason


def test_operation_of_foreign_functions_is_unknown():
    graph = torch.fx.Graph()

    def softmax(x):
        return x

    node = graph.call_function(softmax, (graph.placeholder("x"),))
    assert operation(node) is None
