import pytest
import torch
import torch.nn.functional as F
from pass_graphs import B, D, H, capture, new, past

from mikv_compile.passes import CacheUpdate, Declined, find_cache_updates


def found_in(fn, *inputs, **kwargs):
    return find_cache_updates(capture(fn, *inputs, **kwargs).graph)


def accepted(fn, *inputs, **kwargs):
    (found,) = found_in(fn, *inputs, **kwargs)
    assert isinstance(found, CacheUpdate), found
    assert (found.kind, found.layout) == ("cat", "BHTD")
    return found


def refused(text, fn, *inputs):
    (found,) = found_in(fn, *inputs)
    assert isinstance(found, Declined), found
    assert text in found.reason, found.reason
    assert found.stage == "find cache updates"


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, k: torch.cat([p, k * 2], -2),
        lambda p, k: torch.cat((p, k * 2), dim=2),
        lambda p, k: torch.concat(tensors=[p, k * 2], dim=-2),
        lambda p, k: torch.concatenate([p, k * 2], dim=2),
    ],
)
def test_spellings(fn):
    found = accepted(fn, past(), new())
    assert found.past.name == "l_p_" and found.new.target is not None and not found.born
    assert found.outputs == (0,) and found.metadata_users == ()


def test_several_output_positions():
    def fn(p, k):
        joined = torch.cat([p, k + 1], -2)
        return joined, k + 1, joined

    graph = capture(fn, past(), new()).graph
    (found,) = find_cache_updates(graph)
    returned = graph.output_node().args[0]
    assert found.outputs == tuple(i for i, value in enumerate(returned) if value is found.result)


def test_symbolic_length():
    accepted(lambda p, k: torch.cat([p, k + 1], -2), past(), new(), dynamic=True)


@pytest.mark.parametrize(
    "empty", [lambda k: torch.tensor([], dtype=k.dtype), lambda k: torch.empty(B, H, 0, D, dtype=k.dtype)]
)
def test_born(empty):
    found = accepted(lambda k: torch.cat([empty(k), k + 1], -2), new(3))
    assert found.born and found.past is None


def test_born_from_an_empty_input():
    assert accepted(lambda p, k: torch.cat([p, k + 1], -2), past(0), new(3)).born


def test_metadata_users_of_past_and_result():
    def fn(p, k):
        joined = torch.cat([p, k + 1], -2)
        return joined, k * p.numel()

    found = accepted(fn, past(), new(), dynamic=True)
    assert [node.target for node in found.metadata_users] == ["numel"]


def test_tokens_first():
    def fn(p, k, q):
        joined = torch.cat([p, k + 1], 1)
        return F.scaled_dot_product_attention(q, joined.transpose(1, 2), joined.transpose(1, 2)), joined

    (found,) = found_in(fn, torch.randn(B, 5, H, D), torch.randn(B, 1, H, D), torch.randn(B, H, 1, D))
    assert isinstance(found, CacheUpdate) and found.layout == "BTHD"


def test_reversed_declines():
    refused("does not come first", lambda p, k: torch.cat([k + 1, p], -2), past(), new())


def test_empty_last_declines():
    refused("does not come first", lambda k: torch.cat([k + 1, torch.tensor([])], -2), new())


def test_three_tensors_decline():
    refused("3 tensors", lambda p, k: torch.cat([p, k + 1, k + 2], -2), past(), new())


def test_same_tensor_twice_declines():
    refused("does not come first", lambda p: torch.cat([p, p], -2), past())


def test_past_written_in_place_declines():
    def fn(p, k):
        p.mul_(2)
        return torch.cat([p, k + 1], -2)

    refused("mul_", fn, past(), new())


def test_promoting_cat_declines():
    refused("dtype", lambda p, k: torch.cat([p, k + 1], -2), past(), new().bfloat16())


def test_promoting_birth_declines():
    refused("dtype", lambda k: torch.cat([torch.tensor([]), k + 1], -2), new().bfloat16())


def test_not_returned_declines():
    def fn(p, k, q):
        joined = torch.cat([p, k + 1], -2)
        return F.scaled_dot_product_attention(q, joined, joined)

    refused("does not return", fn, past(), new(), new())


def test_sliding_window():
    def fn(p, k, q):
        joined = torch.cat([p, k + 1], -2)
        return F.scaled_dot_product_attention(q, joined, joined), joined[:, :, -3:]

    found = accepted(fn, past(), new(), new())
    assert (found.keep, found.outputs) == (3, (1,))


def rotate(x):
    return torch.cat((-x[..., 2:], x[..., :2]), dim=-1)


def test_other_concatenations_are_silent():
    assert found_in(rotate, new()) == []
    assert found_in(lambda a, b: torch.cat([a * 2, b * 2], dim=2), new(), new()) == []
    assert found_in(lambda a, b: torch.cat([a, b + 1], dim=2).relu() + 1, past(), new()) == []
    assert found_in(lambda a, b: torch.cat([a, b], dim=1), torch.randn(2, 3), torch.randn(2, 3)) == []
