import math

import pytest
import torch
import torch.nn.functional as F
from pass_graphs import HQ, B, D, capture, query

from mikv_compile.passes import Attention, Declined, find_attentions

T = 6


def operands():
    return query(3), torch.randn(B, HQ, T, D), torch.randn(B, HQ, T, D)


def only(fn, *inputs, **kwargs):
    (found,) = find_attentions(capture(fn, *inputs, **kwargs).graph)
    return found


def test_defaults():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *operands())
    assert isinstance(found, Attention)
    assert (found.form, found.mask, found.is_causal, found.enable_gqa) == ("sdpa", None, False, False)
    assert found.scale == 1 / math.sqrt(D)
    assert found.nodes == (found.output,)
    assert (found.query.name, found.key.name, found.value.name) == ("l_q_", "l_k_", "l_v_")


def test_keywords():
    found = only(
        lambda q, k, v, m: F.scaled_dot_product_attention(
            value=v, key=k, query=q, attn_mask=m, scale=0.3, enable_gqa=True, dropout_p=0.0, is_causal=False
        ),
        *operands(),
        torch.zeros(3, T),
    )
    assert isinstance(found, Attention)
    assert (found.mask.name, found.scale, found.enable_gqa) == ("l_m_", 0.3, True)
    assert (found.query.name, found.key.name, found.value.name) == ("l_q_", "l_k_", "l_v_")


def test_all_by_position():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=2), *operands())
    assert isinstance(found, Attention)
    assert (found.is_causal, found.scale) == (True, 2.0)


def test_bool_mask_is_kept():
    mask = torch.ones(B, 1, 3, T, dtype=torch.bool)
    found = only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *operands(), mask)
    assert isinstance(found, Attention)
    assert found.mask.name == "l_m_" and not found.is_causal


def test_symbolic_sizes():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), *operands(), dynamic=True)
    assert isinstance(found, Attention)


def test_default_scale_of_a_symbolic_head_dim_declines():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *operands(), dynamic=True)
    assert isinstance(found, Declined) and "head_dim" in found.reason


def test_dropout_declines():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), *operands())
    assert isinstance(found, Declined) and "dropout_p=0.1" in found.reason and found.stage == "canonicalize"


def test_mask_and_causal_declines():
    graph = capture(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *operands(), torch.zeros(3, T)).graph
    node = find_attentions(graph)[0].output
    node.kwargs = {**node.kwargs, "is_causal": True}
    (found,) = find_attentions(graph)
    assert isinstance(found, Declined) and "both" in found.reason


@pytest.mark.parametrize("changed", [{"scale": "x"}, {"dropout_p": None}, {"is_causal": None}])
def test_odd_arguments_decline(changed):
    graph = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *operands()).graph
    node = find_attentions(graph)[0].output
    node.kwargs = {**node.kwargs, **changed}
    (found,) = find_attentions(graph)
    assert isinstance(found, Declined)


def test_six_dimensions_decline():
    found = only(
        lambda q, k, v: F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None]), *operands()
    )
    assert isinstance(found, Declined) and "6 dimensions" in found.reason


def test_grouped_heads_without_a_batch_decline():
    found = only(lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], enable_gqa=True), *operands())
    assert isinstance(found, Declined) and "enable_gqa" in found.reason


def test_unknown_rank_declines():
    graph = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *operands()).graph
    find_attentions(graph)[0].key.meta.clear()
    (found,) = find_attentions(graph)
    assert isinstance(found, Declined) and "key" in found.reason
