import pytest
import torch
import torch.nn.functional as F
from pass_graphs import B, D, H, capture, new, past, query

from mikv_compile.passes import CacheUpdate, Declined, analyze, find_cache_updates

WINDOW = 6


def window():
    return past(WINDOW)


def updates(fn, *inputs, **kwargs):
    return [u for u in find_cache_updates(capture(fn, *inputs, **kwargs).graph) if isinstance(u, CacheUpdate)]


def accepted(fn, *inputs, **kwargs):
    (found,) = find_cache_updates(capture(fn, *inputs, **kwargs).graph)
    assert isinstance(found, CacheUpdate), found
    assert (found.capacity, found.keep, found.tail, found.outputs) == (WINDOW, WINDOW, False, ())
    return found


def roll(p, k, shift=-1, dim=2, index=None):
    moved = p.roll(shift, dim)
    moved[:, :, torch.tensor([-1]) if index is None else index] = k + 1
    p.copy_(moved)


def roll_by_keywords(p, k):
    moved = torch.roll(p, shifts=(-1,), dims=(-2,))
    moved[:, :, [-1], :] = k + 1
    p.copy_(moved)


@pytest.mark.parametrize("fn", [roll, roll_by_keywords, lambda p, k: roll(p, k, index=slice(-1, None))])
def test_rolled_window(fn):
    found = accepted(fn, window(), new())
    assert (found.kind, found.layout, found.first, found.position) == ("roll", "BHTD", 1, None)
    assert found.past is not None and found.past.name == "l_p_"
    assert found.written is found.result and found.written.target == "copy_"
    assert found.all_sources == (found.result, found.past)
    assert {"roll", "copy_"} <= {getattr(node.target, "__name__", node.target) for node in found.nodes}
    assert found.new not in found.nodes


def test_rolled_window_of_tokens_first():
    def fn(p, k):
        moved = p.roll(-1, 1)
        moved[:, [-1]] = k + 1
        p.copy_(moved)

    (found,) = updates(fn, torch.randn(B, WINDOW, H, D), torch.randn(B, 1, H, D))
    assert found.layout == "BTHD" and found.capacity == WINDOW


@pytest.mark.parametrize("tokens", [WINDOW, WINDOW + 3])
def test_a_prompt_replaces_the_window(tokens):
    found = accepted(lambda p, k: p.copy_((k + 1)[:, :, -WINDOW:]) is None, window(), new(tokens))
    assert (found.kind, found.layout, found.first, found.position) == ("replace", "BHTD", 0, 0)
    assert found.result is found.new and found.new.meta["example_value"].shape[2] == tokens
    assert found.sources == () and found.written is not None and found.written.target == "copy_"


def test_a_prompt_in_a_window_allocated_here():
    def fn(k):
        p = torch.zeros(B, H, WINDOW, D)
        p.copy_((k + 1)[:, :, -WINDOW:])
        return p

    (found,) = updates(fn, new(WINDOW + 1))
    assert found.born and found.outputs == (0,) and found.kind == "replace"


def test_a_joined_window_copied_back_is_a_concatenation():
    def fn(p, k):
        joined = torch.cat([p[:, :, 1:], k + 1], 2)
        p.copy_(joined[:, :, -WINDOW:])
        return k @ joined.mT

    (found,) = updates(fn, window(), new())
    assert (found.kind, found.first, found.keep, found.capacity) == ("cat", 1, WINDOW, WINDOW)


def test_the_cached_window_is_what_attention_reads():
    def step(q, k, v, pk, pv, mask):
        roll(pk, k)
        roll(pv, v)
        return F.scaled_dot_product_attention(q, pk, pv, mask)

    mask = torch.zeros(1, 1, 1, WINDOW)
    (site,) = analyze(capture(step, query(heads=H), new(), new(), window(), window(), mask)).sites
    assert site.key.kind == site.value.kind == "roll" and len(site.reads) == 1


# Near-misses.


def after_the_copy(p, k):
    moved = p.roll(-1, 2)
    p.copy_(moved)
    moved[:, :, [-1]] = k + 1


def twice(p, k):
    moved = p.roll(-1, 2)
    moved[:, :, [-1]] = k + 1
    moved[:, :, [0]] = k + 2
    p.copy_(moved)


def another_writer(p, k):
    roll(p, k)
    p[:, :, 0].zero_()


def cleared_before(p, k):
    p.mul_(0.5)
    roll(p, k)


def another_index_tensor(p, k):
    index = torch.tensor([-1])
    index.add_(1)
    roll(p, k, index=index)


def into_another_cache(p, k):
    moved = p.roll(-1, 2)
    moved[:, :, [-1]] = k + 1
    other = torch.zeros_like(p)
    other.copy_(moved)
    return other


def zeros_rolled(p, k):
    fresh = torch.zeros_like(p)
    roll(fresh, k)
    return fresh


def nothing_new(p, k):
    p.copy_(p.roll(-1, 2))
    return k + 1


def more_arithmetic(p, k):
    moved = p.roll(-1, 2)
    moved[:, :, [-1]] = k + 1
    p.copy_(moved * 2)


NEAR_ROLLS = {
    "by two": lambda p, k: roll(p, k, shift=-2),
    "to the right": lambda p, k: roll(p, k, shift=1),
    "heads": lambda p, k: roll(p, k, dim=1),
    "channels": lambda p, k: roll(p, k, dim=3),
    "everything": lambda p, k: roll(p, k, dim=None),
    "two dimensions": lambda p, k: roll(p, k, shift=(-1, -1), dim=(2, 3)),
    "first column": lambda p, k: roll(p, k, index=[0]),
    "last but one": lambda p, k: roll(p, k, index=torch.tensor([-2])),
    "slice of the first": lambda p, k: roll(p, k, index=slice(0, 1)),
    "after the copy": after_the_copy,
    "twice": twice,
    "another writer": another_writer,
    "cleared before": cleared_before,
    "another index tensor": another_index_tensor,
    "into another cache": into_another_cache,
    "zeros": zeros_rolled,
    "nothing new": nothing_new,
    "arithmetic": more_arithmetic,
}


@pytest.mark.parametrize("fn", NEAR_ROLLS.values(), ids=NEAR_ROLLS)
def test_near_rolls(fn):
    assert updates(fn, window(), new()) == []


def test_rolls_of_a_part_or_of_another_kind():
    assert updates(roll, window(), new()[:, :1].clone()) == [], "one head for all"
    assert updates(roll, window(), new()[:1].clone()) == [], "one row for all"
    assert updates(roll, window(), new()[0, 0].clone()) == []
    assert updates(lambda p, k: roll(p, k, index=slice(-1, None)), window(), new().bfloat16()) == []
    assert updates(lambda p, k: roll(p, k.long(), index=slice(-1, None)), window().long(), new()) == []


def short_slice(p, k):
    p.copy_((k + 1)[:, :, -1:])


def from_the_start(p, k):
    p.copy_((k + 1)[:, :, :WINDOW])


def without_the_newest(p, k):
    p.copy_((k + 1)[:, :, -WINDOW - 1 : -1])


def of_the_heads(p, k):
    p.copy_((k + 1)[:, -H:, :WINDOW])


def whole(p, k):
    p.copy_(k + 1)


def written_again(p, k):
    p.copy_((k + 1)[:, :, -WINDOW:])
    p[:, :, 0].zero_()


NEAR_REPLACEMENTS = {
    "slice of one token": (short_slice, new(WINDOW + 1)),
    "oldest tokens": (from_the_start, new(WINDOW + 1)),
    "without the newest": (without_the_newest, new(WINDOW + 1)),
    "heads": (of_the_heads, new(WINDOW + 1)),
    "no slice": (whole, new(WINDOW)),
    "written again": (written_again, new(WINDOW + 1)),
    "fewer tokens, broadcast": (lambda p, k: p.copy_((k + 1)[:, :, -WINDOW:]), new(1)),
    "one head for all": (lambda p, k: p.copy_((k + 1)[:, :, -WINDOW:]), new(WINDOW + 1)[:, :1].clone()),
    "another dtype": (lambda p, k: p.copy_((k + 1)[:, :, -WINDOW:]), new(WINDOW + 1).bfloat16()),
    "a window that is not kept": (lambda p, k: torch.zeros_like(p).copy_((k + 1)[:, :, -WINDOW:]) * 2, new(WINDOW)),
}


@pytest.mark.parametrize(("fn", "k"), NEAR_REPLACEMENTS.values(), ids=NEAR_REPLACEMENTS)
def test_near_replacements(fn, k):
    assert updates(fn, window(), k) == []


def test_a_window_that_is_a_weight():
    weight = torch.nn.Parameter(window(), requires_grad=False)
    assert updates(lambda k: roll(weight, k), new()) == []


def test_reports_of_near_misses_name_their_stage():
    for item in find_cache_updates(capture(another_writer, window(), new()).graph):
        assert isinstance(item, Declined) and item.stage == "find cache updates"
