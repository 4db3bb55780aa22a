import pytest
import torch
import torch.nn.functional as F
from pass_graphs import HQ, B, D, capture, query

from mikv_compile.passes import Attention, Declined, find_attentions

T = 6


def operands(dtype=torch.float32):
    return tuple(x.to(dtype) for x in (query(3), torch.randn(B, HQ, T, D), torch.randn(B, HQ, T, D)))


def found_in(fn, *inputs, **kwargs):
    return find_attentions(capture(fn, *inputs, **kwargs).graph)


def accepted(fn, *inputs, **kwargs):
    (found,) = found_in(fn, *inputs, **kwargs)
    assert isinstance(found, Attention), found
    assert (found.form, found.is_causal, found.enable_gqa) == ("eager", False, False)
    assert found.nodes[-1] is found.output
    assert (found.query.name, found.key.name, found.value.name) == ("l_q_", "l_k_", "l_v_")
    return found


def refused(text, fn, *inputs):
    (found,) = found_in(fn, *inputs)
    assert isinstance(found, Declined), found
    assert text in found.reason, found.reason
    assert found.stage == "canonicalize"


def attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.5, -1) @ v


ACCEPTED = {
    "matmul functions": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1), v),
    "methods": lambda q, k, v: q.matmul(k.transpose(-1, -2)).softmax(dim=-1).matmul(v),
    "operators": lambda q, k, v: F.softmax(q @ k.mT, dim=3) @ v,
    "permute": lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v,
    "contiguous transpose": lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1).contiguous(), -1) @ v,
    "softmax in float32": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "type_as": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).type_as(q) @ v,
    "no-op cast of the scores": lambda q, k, v: torch.softmax((q @ k.mT).to(q.dtype), -1) @ v,
    "dropout in eval": lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=False) @ v,
    "dropout p=0": lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), p=0.0) @ v,
}


@pytest.mark.parametrize("fn", ACCEPTED.values(), ids=ACCEPTED)
def test_spellings(fn):
    found = accepted(fn, *operands())
    assert found.scale == 1.0 and found.mask is None


def test_bfloat16_with_softmax_in_float32():
    accepted(ACCEPTED["softmax in float32"], *operands(torch.bfloat16))


SCALES = {
    "mul": lambda q, k, v: torch.softmax(q @ k.mT * 0.5, -1) @ v,
    "mul from the left": lambda q, k, v: torch.softmax(0.5 * (q @ k.mT), -1) @ v,
    "div": lambda q, k, v: torch.softmax(q @ k.mT / 2, -1) @ v,
    "in place": lambda q, k, v: torch.softmax((q @ k.mT).mul_(0.5), -1) @ v,
    "query before": lambda q, k, v: torch.softmax((q * 0.5) @ k.mT, -1) @ v,
    "query divided": lambda q, k, v: torch.softmax((q / 2.0) @ k.mT, -1) @ v,
    "key before the transpose": lambda q, k, v: torch.softmax(q @ (k * 0.5).mT, -1) @ v,
    "key after the transpose": lambda q, k, v: torch.softmax(q @ (k.mT * 0.5), -1) @ v,
    "query and key": lambda q, k, v: torch.softmax((q * 2.0) @ (k * 0.25).transpose(2, 3), -1) @ v,
    "twice": lambda q, k, v: torch.softmax((q @ k.mT) * 2 / 4, -1) @ v,
}


@pytest.mark.parametrize("fn", SCALES.values(), ids=SCALES)
def test_scale(fn):
    assert accepted(fn, *operands()).scale == 0.5


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v, m: torch.softmax(q @ k.mT * 0.5 + m, -1) @ v,
        lambda q, k, v, m: torch.softmax(m + q @ k.mT * 0.5, -1) @ v,
        lambda q, k, v, m: torch.softmax(torch.add(q @ k.mT * 0.5, m), -1) @ v,
    ],
)
def test_mask(fn):
    found = accepted(fn, *operands(), torch.zeros(B, 1, 3, T))
    assert found.mask.name == "l_m_" and found.scale == 0.5


def test_sliced_mask_is_kept_as_the_model_sliced_it():
    def fn(q, k, v, m):
        return torch.softmax(q @ k.mT + m[:, :, :, : k.shape[-2]], -1) @ v

    found = accepted(fn, *operands(), torch.zeros(B, 1, 3, T + 4))
    assert found.mask.meta["example_value"].shape[-1] == T


def test_in_place_mask():
    def fn(q, k, v, m):
        scores = q @ k.mT
        scores += m
        return torch.softmax(scores, -1) @ v

    assert accepted(fn, *operands(), torch.zeros(B, 1, 3, T)).mask.name == "l_m_"


def test_symbolic_sizes():
    accepted(attend, *operands(), dynamic=True)


def test_scores_with_another_user_decline():
    def fn(q, k, v):
        scores = q @ k.mT
        return torch.softmax(scores * 0.5, -1) @ v, scores.sum()

    refused("scores are also read", fn, *operands())


def test_returned_probabilities_decline():
    def fn(q, k, v):
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    refused("output_attentions", fn, *operands())


def test_probabilities_with_another_user_decline():
    def fn(q, k, v):
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights.amax()

    refused("probabilities are also read", fn, *operands())


def test_dropout_in_training_declines():
    refused("model.eval()", lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.1) @ v, *operands())


def test_two_products_decline():
    refused(
        "second term",
        lambda q, k, v, r: torch.softmax(q @ k.mT + q @ r.mT, -1) @ v,
        *operands(),
        torch.randn(B, HQ, T, D),
    )


def test_tensor_scale_declines():
    refused("plain number", lambda q, k, v, s: torch.softmax(q @ k.mT * s, -1) @ v, *operands(), torch.tensor(0.5))


def test_bool_mask_added_declines():
    refused(
        "floating point mask",
        lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v,
        *operands(),
        torch.ones(3, T, dtype=torch.bool),
    )


def test_probabilities_on_the_right_decline():
    x = torch.randn(B, HQ, T, T)
    refused("right side", lambda q, k, v: v @ torch.softmax(q @ k.mT, -1), x, x.clone(), x.clone())


def test_softmax_over_another_dim_is_not_attention():
    x = torch.randn(B, HQ, T, T)
    assert found_in(lambda q, k, v: torch.softmax(q @ k.mT, 2) @ v, x, x.clone(), x.clone()) == []


def test_router_is_not_attention():
    def router(x, w, experts):
        weights, chosen = torch.softmax(F.linear(x, w), dim=-1).topk(2)
        return weights, experts[chosen]

    assert found_in(router, torch.randn(6, D), torch.randn(8, D), torch.randn(8, D)) == []


def test_router_by_matmul_is_not_attention():
    def router(x, w):
        return torch.softmax(x @ w, dim=-1).topk(2).values

    assert found_in(router, torch.randn(6, D), torch.randn(D, 8)) == []


def test_softmax_of_a_gate_before_a_product_is_not_attention():
    def gate(x, w, v):
        return torch.softmax(F.linear(x, w), dim=-1) @ v

    assert found_in(gate, torch.randn(6, D), torch.randn(8, D), torch.randn(8, D)) == []


def test_long_elementwise_chains_end_soon():
    def fn(x, v):
        for _ in range(60):
            x = x + x * 2
        return torch.softmax(x, -1) @ v

    assert found_in(fn, torch.randn(4, 4), torch.randn(4, 4)) == []
