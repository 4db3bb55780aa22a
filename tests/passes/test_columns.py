import pytest
import torch
from pass_graphs import B, D, H, capture, dynamo, new

from mikv_compile.passes import CacheUpdate, find_cache_updates
from mikv_compile.passes.columns import NotSeparable, cut_out

CAPACITY = 9


def write(p, k, columns):
    """The cache write whose columns are cut out."""
    return p.index_copy(2, columns, k + 1)


def position(gm):
    (found,) = [u for u in find_cache_updates(gm.graph) if isinstance(u, CacheUpdate)]
    assert isinstance(found.position, torch.fx.Node)
    return found.position


def columns_of(fn, *inputs, symbolic=None):
    """What the cut out part gives on the graph's own inputs, and the names of those that it takes."""
    gm, args = dynamo(fn, torch.zeros(B, H, CAPACITY, D), *inputs, symbolic=symbolic)
    part, taken = cut_out(position(gm))
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert [node.name for node in part.graph.find_nodes(op="placeholder")] == [names[i] for i in taken]
    return part(*[args[i] for i in taken]), [names[i] for i in taken]


def refused(text, fn, *inputs):
    gm = capture(fn, torch.zeros(B, H, CAPACITY, D), *inputs)
    with pytest.raises(NotSeparable, match=text):
        cut_out(position(gm))


def test_arange_behind_a_length():
    def fn(p, k, length):
        return write(p, k, torch.arange(k.shape[2], device=k.device) + length)

    columns, names = columns_of(fn, new(3), torch.tensor(4))
    assert columns.tolist() == [4, 5, 6] and names == ["l_length_"]


def test_symbolic_number_of_tokens():
    def fn(p, k, length):
        return write(p, k, torch.arange(k.shape[2]) + length)

    columns, names = columns_of(fn, new(3), torch.tensor(4), symbolic=3)
    assert columns.tolist() == [4, 5, 6] and len(names) == 2


def test_a_slice_of_a_buffer():
    columns, names = columns_of(lambda p, k, buffer: write(p, k, buffer[0, 2:4]), new(2), torch.arange(8).view(2, 4))
    assert columns.tolist() == [2, 3] and names == ["l_buffer_"]


def test_an_input():
    columns, names = columns_of(lambda p, k, i: write(p, k, i), new(2), torch.tensor([7, 1]))
    assert columns.tolist() == [7, 1] and names == ["l_i_"]


def test_constants_alone():
    columns, names = columns_of(lambda p, k: write(p, k, torch.tensor([1, 2])), new(2))
    assert columns.tolist() == [1, 2] and names == []


def test_ring_buffer():
    columns, _ = columns_of(lambda p, k, n: write(p, k, (n + torch.arange(2)) % CAPACITY), new(2), torch.tensor(8))
    assert columns.tolist() == [8, 0]


def test_a_counter_raised_behind_the_write():
    def fn(p, k, length):
        grown = write(p, k, torch.arange(2) + length)
        length.add_(2)
        return grown

    assert columns_of(fn, new(2), torch.tensor(4))[0].tolist() == [4, 5]


def test_a_slice_of_a_counter_raised_behind_the_write():
    def fn(p, k, buffer):
        grown = write(p, k, buffer[1:3])
        buffer.add_(2)
        return grown

    assert columns_of(fn, new(2), torch.arange(4))[0].tolist() == [1, 2]


def test_the_graph_is_not_changed():
    gm = capture(
        lambda p, k, n: write(p, k, torch.arange(2) + n), torch.zeros(B, H, CAPACITY, D), new(2), torch.tensor(4)
    )
    before = str(gm.graph)
    cut_out(position(gm))
    assert str(gm.graph) == before


# Near-misses.


def test_floats_are_refused():
    refused("floating point tensor `l_x_`", lambda p, k, x: write(p, k, x.long()), new(2), torch.ones(2))


def test_hidden_states_are_refused():
    refused("floating point", lambda p, k: write(p, k, (k + 1).argmax(2)[0, 0, :2]), new(2))
    refused("floating point tensor `l_p_`", lambda p, k: write(p, k, p[0, 0, :2, 0].long()), new(2))


def test_random_numbers_are_refused():
    refused("randint", lambda p, k: write(p, k, torch.randint(0, 4, (2,))), new(2))
    refused("rand", lambda p, k: write(p, k, torch.randperm(2)), new(2))


def test_a_length_raised_before_it_is_read_is_refused():
    def fn(p, k, length):
        length.add_(1)
        return write(p, k, torch.arange(2) + length)

    refused("`add_`", fn, new(2), torch.tensor(4))


def test_a_view_written_before_is_refused():
    def fn(p, k, buffer):
        buffer[0].zero_()
        return write(p, k, buffer + 1)

    refused("`zero_`", fn, new(2), torch.arange(2))


def test_columns_changed_behind_their_computation_are_refused():
    def fn(p, k, length):
        columns = torch.arange(2) + length
        columns.add_(1)
        return write(p, k, columns)

    refused("add_", fn, new(2), torch.tensor(4))


def test_columns_changed_between_their_view_and_the_write_are_refused():
    def fn(p, k, buffer):
        columns = buffer[1:3]
        buffer.add_(1)
        return write(p, k, columns)

    refused("add_", fn, new(2), torch.arange(4))


def test_expanded_columns_changed_before_the_write_are_refused():
    def fn(p, k, buffer):
        index = buffer.view(1, 1, -1, 1).expand(B, H, -1, D)
        buffer.add_(1)
        return p.scatter(2, index, k + 1)

    refused("add_", fn, new(2), torch.arange(2))


def test_long_computations_are_refused():
    def fn(p, k, length):
        for _ in range(70):
            length = length + 0
        return write(p, k, torch.arange(2) + length)

    refused("too much", fn, new(2), torch.tensor(4))
