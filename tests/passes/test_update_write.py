import pytest
import torch
from pass_graphs import B, D, H, capture, new, past, pre_dispatch

from mikv_compile.passes import CacheUpdate, Declined, find_cache_updates

CAPACITY = 8


def cache():
    return torch.zeros(B, H, CAPACITY, D)


def at(*columns):
    return torch.tensor(columns)


def accepted(gm, layout="BHTD"):
    (found,) = find_cache_updates(gm.graph)
    assert isinstance(found, CacheUpdate), found
    assert (found.kind, found.layout, found.tail, found.keep, found.first) == ("write", layout, True, None, 0)
    assert found.capacity == CAPACITY
    return found


def refused(text, fn, *inputs, **kwargs):
    (found,) = find_cache_updates(capture(fn, *inputs, **kwargs).graph)
    assert isinstance(found, Declined), found
    assert found.stage == "find cache updates"
    assert text in found.reason, found.reason


def silent(fn, *inputs):
    """Nothing is found, and nothing is worth a report."""
    assert find_cache_updates(capture(fn, *inputs).graph) == []


def set_slice(p, k):
    p[:, :, 3:5] = k + 1


def set_last_dims(p, k):
    p[..., 3:5, :] = k + 1


def set_whole_slices(p, k):
    p[:B, 0:H, 3:5] = k + 1


def slice_copy(p, k):
    p[:, :, 3:5].copy_(k + 1)


def narrow_copy(p, k):
    p.narrow(2, 3, 2).copy_(k + 1)


def narrow_of_negative_dim(p, k):
    p.narrow(-2, 3, 2).copy_(k + 1)


def aten_slice(p, k):
    torch.ops.aten.copy_(torch.ops.aten.slice(p, 2, 3, 5), k + 1)


@pytest.mark.parametrize(
    "write", [set_slice, set_last_dims, set_whole_slices, slice_copy, narrow_copy, narrow_of_negative_dim, aten_slice]
)
def test_slices_written_in_place(write):
    gm = capture(lambda p, k: write(p, k), cache(), new(2))
    found = accepted(gm)
    (past_node, _) = sorted(gm.graph.find_nodes(op="placeholder"), key=lambda node: node.name != "l_p_")
    assert found.past is past_node and not found.born
    assert found.position == 3 and found.written in found.nodes
    assert past_node in found.all_sources and found.outputs == ()
    assert found.new.target is not None and tuple(found.new.meta["example_value"].shape) == (B, H, 2, D)
    assert set(found.nodes) | {found.new} == {n for n in gm.graph.nodes if n.op not in ("placeholder", "output")}


def set_index(p, k, i):
    p[:, :, i] = k + 1


def set_index_after_ellipsis(p, k, i):
    p[..., i, :] = k + 1


INDEXED = {
    "index_copy_": lambda p, k, i: p.index_copy_(2, i, k + 1),
    "index_copy_ negative": lambda p, k, i: p.index_copy_(dim=-2, index=i, source=k + 1),
    "setitem": set_index,
    "setitem ellipsis": set_index_after_ellipsis,
    "index_put_ slices": lambda p, k, i: torch.ops.aten.index_put_(p, [None, None, i], k + 1),
    "scatter_ view": lambda p, k, i: p.scatter_(2, i.view(1, 1, -1, 1).expand(B, H, -1, D), k + 1),
    "scatter_ negative dim": lambda p, k, i: p.scatter_(-2, i[None, None, :, None].expand(B, H, 2, D), k + 1),
    "scatter_ expand_as": lambda p, k, i: p.scatter_(2, i[:, None].expand_as(k), k + 1),
    "scatter_ two expands": lambda p, k, i: p.scatter_(2, i[:, None].expand(-1, D).expand(B, H, -1, -1), k + 1),
}


@pytest.mark.parametrize("write", INDEXED.values(), ids=INDEXED)
def test_columns_written_in_place(write):
    def fn(p, k, i):
        write(p, k, i)
        return k * 2

    gm = capture(fn, cache(), new(2), at(3, 4))
    found = accepted(gm)
    assert found.position.name == "l_i_" and found.past.name == "l_p_" and found.written is not None
    assert found.past in found.all_sources


OUT_OF_PLACE = {
    "index_copy": lambda p, k, i: p.index_copy(2, i, k + 1),
    "index_copy function": lambda p, k, i: torch.index_copy(p, -2, i, k + 1),
    "index_put": lambda p, k, i: torch.ops.aten.index_put(p, [None, None, i], k + 1),
    "scatter": lambda p, k, i: torch.scatter(p, 2, i.reshape(1, 1, 2, 1).expand(B, H, 2, D), k + 1),
    "slice_scatter": lambda p, k, i: torch.slice_scatter(p, k + 1, dim=2, start=3, end=5),
    "slice_scatter method": lambda p, k, i: p.slice_scatter(k + 1, -2, 3, 5),
    "slice_scatter to the end": lambda p, k, i: p.slice_scatter(k + 1, 2, CAPACITY - 2),
}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_copies_that_the_graph_returns(name):
    found = accepted(capture(lambda p, k, i: OUT_OF_PLACE[name](p, k, i), cache(), new(2), at(3, 4)))
    assert found.written is None and found.outputs == (0,)
    assert found.past is not None and found.past not in found.all_sources, "the past does not show the new tokens"
    place = found.position if isinstance(found.position, int) else found.position.name
    assert place == (CAPACITY - 2 if "end" in name else 3 if "slice" in name else "l_i_")


def test_copies_that_nothing_keeps_decline():
    refused("does not return", lambda p, k, i: p.index_copy(2, i, k + 1).sum(), cache(), new(2), at(3, 4))


@pytest.mark.parametrize(("layout", "dim"), [("BHTD", 2), ("BTHD", 1), ("TBHD", 0), ("BHDT", 3), ("BTD", 1)])
def test_layouts(layout, dim):
    shape = [CAPACITY if i == dim else i + 2 for i in range(len(layout))]
    fresh = torch.randn(*[2 if i == dim else size for i, size in enumerate(shape)])
    found = accepted(capture(lambda p, k, i: p.index_copy_(dim, i, k + 1), torch.zeros(shape), fresh, at(0, 1)), layout)
    assert found.token_dim == dim

    def scatter(p, k, i):
        columns = i.view([-1 if d == dim else 1 for d in range(len(shape))])
        p.scatter_(dim, columns.expand(k.shape), k + 1)

    assert accepted(capture(scatter, torch.zeros(shape), fresh, at(0, 1)), layout).position.name == "l_i_"


def test_zeros_allocated_in_the_graph():
    def fn(k):
        p = torch.zeros(B, H, CAPACITY, D)
        p[:, :, :2] = k + 1
        return p

    found = accepted(capture(fn, new(2)))
    assert found.born and found.past is None and found.position == 0 and found.outputs == (0,)
    assert found.written is not None and found.written.target is not None


def test_zeros_that_nothing_keeps_decline():
    def fn(k):
        p = k.new_zeros(B, H, CAPACITY, D)
        p[:, :, :2] = k + 1
        return p.sum()

    refused("does not return the cache", fn, new(2))


def test_aliases_of_the_same_dtype():
    def fn(p, k, i):
        p.to(torch.float32)[:, :, i] = (k + 1).to(p.dtype)
        return p.float() + 1

    found = accepted(capture(fn, cache(), new(2), at(3, 4)))
    assert found.past.name == "l_p_"


def test_aliases_show_the_new_tokens():
    def fn(p, k, i):
        alias = p.detach()
        p.index_copy_(2, i, k + 1)
        return alias.to(p.dtype) * 2, p.transpose(1, 2) * 2

    found = accepted(capture(fn, cache(), new(2), at(3, 4)))
    sources = {node.target for node in found.all_sources if node.op != "placeholder"}
    assert {"detach", "index_copy_"} <= sources and "transpose" not in sources


def test_symbolic_start():
    def fn(p, k, start):
        p[:, :, start : start + k.shape[2]] = k + 1

    gm = capture(fn, cache(), new(2), 3, dynamic=True)
    (found,) = find_cache_updates(gm.graph)
    assert isinstance(found, CacheUpdate), found
    assert isinstance(found.position, torch.SymInt)


def test_metadata_users():
    def fn(p, k, i):
        p.index_copy_(2, i, k + 1)
        return k * p.numel()

    found = accepted(capture(fn, cache(), new(2), at(3, 4)))
    assert all(node.target == "numel" for node in found.metadata_users)


def test_below_the_dispatcher():
    def fn(p, k, i):
        return [torch.ops.aten.index_copy(p, 2, i, k + 1)]

    gm, _ = pre_dispatch(fn, cache(), new(2), at(3, 4))
    (found,) = find_cache_updates(gm.graph)
    assert isinstance(found, CacheUpdate), found


# Near-misses.


def test_two_writes_decline():
    def fn(p, k, i):
        p.index_copy_(2, i, k + 1)
        p.index_copy_(2, i + 1, k + 2)

    found = find_cache_updates(capture(fn, cache(), new(2), at(3, 4)).graph)
    assert len(found) == 2 and all("more than once" in item.reason for item in found)


def test_a_second_write_through_a_view_declines():
    def fn(p, k, i):
        p.index_copy_(2, i, k + 1)
        p.transpose(1, 2)[:, 0].zero_()

    (found,) = find_cache_updates(capture(fn, cache(), new(2), at(3, 4)).graph)
    assert isinstance(found, Declined) and "more than once" in found.reason


def test_a_cleared_cache_declines():
    def fn(p, k, i):
        p.zero_()
        p.index_copy_(2, i, k + 1)

    refused("more than once", fn, cache(), new(2), at(3, 4))


def test_a_write_into_the_past_of_a_copy_declines():
    def fn(p, k, i):
        grown = p.index_copy(2, i, k + 1)
        p.zero_()
        return grown

    refused("more than once", fn, cache(), new(2), at(3, 4))


def test_a_part_of_the_heads_declines():
    def fn(p, k):
        p[:, :1, 3:5] = k + 1

    refused("only a part", fn, cache(), new(2)[:, :1].clone())


def test_broadcast_over_heads_or_batch_declines():
    def fn(p, k, i):
        p[:, :, i] = k + 1

    refused("only a part", fn, cache(), new(2)[:, :1].clone(), at(3, 4))
    refused("only a part", fn, cache(), new(2)[:1].clone(), at(3, 4))
    refused("only a part", fn, cache(), new(2)[..., :1].clone(), at(3, 4))


def test_a_part_of_the_channels_declines():
    def fn(p, k, i):
        p[:, :, i, : D // 2] = k + 1

    refused("only a part", fn, cache(), new(2)[..., : D // 2].clone(), at(3, 4))


def test_a_part_of_the_batch_declines():
    def fn(p, k, rows, i):
        p[rows, :, i] = k + 1

    refused("only a part", fn, torch.zeros(4, H, CAPACITY, D), torch.randn(1, 2, H, D), at(0, 1), at(3, 4))


def test_one_column_by_an_integer_is_silent_or_declines():
    def fn(p, k):
        p[:, :, 3] = k + 1

    silent(fn, cache(), new(1)[:, :, 0].clone())


def test_other_dtypes_decline():
    def fn(p, k):
        p[:, :, 3:5] = k + 1

    refused("dtype", fn, cache().bfloat16(), new(2))
    refused("dtype", lambda p, k: p[:, :, 3:5].copy_(k + 1), cache().bfloat16(), new(2))


def test_a_converting_alias_is_no_cache():
    def fn(p, k, i):
        wide = p.float()
        wide[:, :, i] = k + 1
        return wide

    silent(fn, cache().bfloat16(), new(2), at(3, 4))


def test_integer_caches_decline():
    def fn(p, k, i):
        p[:, :, i] = k + 1

    refused("not floating point", fn, cache().long(), new(2).long(), at(3, 4))


def test_accumulating_is_no_write():
    silent(lambda p, k, i: torch.ops.aten.index_put_(p, [None, None, i], k + 1, True), cache(), new(2), at(3, 4))
    silent(lambda p, k, i: p.index_add_(2, i, k + 1), cache(), new(2), at(3, 4))
    reduce = lambda p, k, i: p.scatter_(2, i.view(1, 1, -1, 1).expand_as(k), k + 1, reduce="add")  # noqa: E731
    silent(reduce, cache(), new(2), at(3, 4))


def test_step_slices_decline():
    def fn(p, k):
        p[:, :, 0:4:2] = k + 1

    refused("as long as", fn, cache(), new(2))
    silent(lambda p, k: p.slice_scatter(k + 1, 2, 0, 4, 2), cache(), new(2))
    silent(lambda p, k: p[:, :, 0:4:2].copy_(k + 1), cache(), new(2))


def test_negative_starts_decline():
    def fn(p, k):
        p[:, :, -2:] = k + 1

    refused("from the end", fn, cache(), new(2))
    refused("from the end", lambda p, k: p.slice_scatter(k + 1, 2, -2), cache(), new(2))
    refused("from the end", lambda p, k: p[:, :, -2:].copy_(k + 1), cache(), new(2))


def test_ends_from_the_end_decline():
    refused("as long as", lambda p, k: p.slice_scatter(k + 1, 2, 3, -3), cache(), new(2))


def test_a_slice_filled_by_one_token_declines():
    def fn(p, k):
        p[:, :, 3:5] = k + 1

    refused("as long as", fn, cache(), new(1))


def test_a_length_that_is_not_provable_declines():
    def fn(p, k, start, stop):
        p[:, :, start:stop] = k + 1

    found = find_cache_updates(capture(fn, cache(), new(1), 3, 4, dynamic=True).graph)
    assert not any(isinstance(item, CacheUpdate) and not isinstance(item.position, torch.SymInt) for item in found)


@pytest.mark.parametrize(
    "columns",
    [
        lambda i, k: i[:, None, :, None].expand(B, H, 2, 2),  # another place in each row
        lambda i, k: i[0].view(1, 1, 1, -1).expand(B, H, 2, 2),  # another place in each channel
        lambda i, k: i[0].expand(B, H, 2, 2),
        lambda i, k: i[0].expand(2, 2)[None, None].expand(B, H, 2, 2),
        lambda i, k: i[None, None].expand(B, H, 2, 2).transpose(1, 2),
    ],
)
def test_scatter_to_different_columns_declines(columns):
    fresh = torch.randn(B, H, 2, 2)
    wide = torch.zeros(B, H, CAPACITY, 2)
    refused("same columns", lambda p, k, i: p.scatter_(2, columns(i, k), k + 1), wide, fresh, torch.ones(2, 2).long())


@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (B, 1, 2, D), (B, H, 2, 1), (1, H, 2, D)])
def test_scatter_of_a_part_declines(sizes):
    def fn(p, k, i):
        p.scatter_(2, i.view(1, 1, -1, 1).expand(sizes), k + 1)

    refused("a part", fn, cache(), new(2), at(3, 4))


def test_columns_that_are_not_integers_decline():
    def fn(p, k, i):
        p[:, :, i] = k + 1

    mask = torch.zeros(CAPACITY, dtype=torch.bool)
    mask[3:5] = True
    gm = capture(fn, cache(), new(2), at(3, 4))
    (index,) = [node for node in gm.graph.find_nodes(op="placeholder") if node.name == "l_i_"]
    index.meta["example_value"] = index.meta["example_value"].bool()
    (found,) = find_cache_updates(gm.graph)
    assert isinstance(found, Declined) and "integers" in found.reason


def test_one_column_for_two_tokens_declines():
    gm = capture(lambda p, k, i: p.index_copy_(2, i, k + 1), cache(), new(2), at(3, 4))
    (index,) = [node for node in gm.graph.find_nodes(op="placeholder") if node.name == "l_i_"]
    index.meta["example_value"] = index.meta["example_value"][:1]
    (found,) = find_cache_updates(gm.graph)
    assert isinstance(found, Declined) and "one column for each" in found.reason


def test_new_axes_are_not_whole_dimensions():
    def fn(p, k, i):
        p[None, :, i] = k + 1

    gm = capture(fn, torch.zeros(B, CAPACITY, D), torch.randn(1, B, 2, D), at(3, 4))
    assert find_cache_updates(gm.graph) == []


@pytest.mark.parametrize("copy", ["clone", "contiguous", "mul"])
def test_a_copy_is_written_instead(copy):
    def fn(p, k, i):
        other = p * 2 if copy == "mul" else getattr(p, copy)()
        other[:, :, i] = k + 1
        return other

    silent(fn, cache(), new(2), at(3, 4))


def test_weights_are_no_caches():
    weight = torch.nn.Parameter(cache(), requires_grad=False)
    silent(lambda k, i: weight.index_copy(2, i, k + 1), new(2), at(3, 4))


def test_other_ranks_are_silent():
    silent(lambda p, k, i: p.index_copy_(0, i, k + 1), torch.zeros(CAPACITY, D), torch.randn(2, D), at(3, 4))
    silent(lambda p, k, i: p.index_copy_(0, i, k + 1), torch.zeros(CAPACITY), torch.randn(2), at(3, 4))


def test_other_dimensions_of_one_head_decline():
    one = torch.zeros(B, 3, CAPACITY)
    refused("dim=2", lambda p, k, i: p.index_copy_(2, i, k + 1), one, torch.randn(B, 3, 2), at(3, 4))


def test_numbers_and_lower_ranks_are_silent():
    def zero(p, k):
        p[:, :, 3:5] = 0
        return k + 1

    silent(zero, cache(), new(2))
    assert past().shape[2] == 5

    def broadcast(p, k):
        p[:, :, 3:5] = k + 1

    silent(broadcast, cache(), new(2)[0, 0].clone())


def test_writes_into_other_tensors_are_silent():
    def fn(p, k, i):
        other = p * 2
        other[:, :, [3, 4]] = k + 1
        other[:, :, -2:] = k + 1
        other[:, :, -2:].copy_(k + 1)
        return other.scatter(2, i[:, None, :, None].expand(B, H, 2, D), k)

    silent(fn, cache(), new(2), torch.ones(B, 2).long())
