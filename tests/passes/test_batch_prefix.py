"""Caches that are allocated for a larger batch: writes and reads of `cache[:rows]`."""

import pytest
import torch
from pass_graphs import B, D, H, capture_calls

from mikv_compile.passes import analyze

ROOM, C = B + 2, 16


def attend(q, keys, values, mask=None):
    scores = q.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * 0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ values.transpose(1, 2)


def write_setitem(cache, rows, start, stop, x):
    cache[:rows, start:stop] = x


def write_alias(cache, rows, start, stop, x):
    cache.to(x)[0:rows, start:stop] = x


def write_copy(cache, rows, start, stop, x):
    cache[:rows, start:stop].copy_(x)


def write_narrows(cache, rows, start, stop, x):
    cache.narrow(0, 0, rows).narrow(1, start, stop - start).copy_(x)


def write_view(cache, rows, start, stop, x):
    cache[:rows][:, start:stop] = x


def write_columns(cache, rows, start, stop, x):
    cache[:rows, torch.arange(start, stop)] = x


def write_index_copy(cache, rows, start, stop, x):
    cache[:rows].index_copy_(1, torch.arange(start, stop), x)


READS = {
    "one slice": lambda cache, rows, stop: cache[:rows, :stop],
    "two slices": lambda cache, rows, stop: cache[:rows][:, :stop],
    "narrow": lambda cache, rows, stop: cache.narrow(0, 0, rows)[:, :stop],
    "tokens first": lambda cache, rows, stop: cache[:, :stop][:rows],
}


def step(write, read):
    def run(q, k, v, keys, values, start):
        rows, tokens, *_ = k.shape
        write(keys, rows, start, start + tokens, k)
        write(values, rows, start, start + tokens, v)
        return attend(q, read(keys, rows, start + tokens), read(values, rows, start + tokens))

    return run


def inputs(rows=B, tokens=1, start=5, room=ROOM):
    new = [torch.randn(rows, tokens, H, D) for _ in range(3)]
    return *new, torch.zeros(room, C, H, D), torch.zeros(room, C, H, D), start


def analysed(fn, *calls, dynamic=None):
    return analyze(capture_calls(fn, *calls, dynamic=dynamic)[-1])


def one_site(fn, *calls, dynamic=None):
    analysis = analysed(fn, *calls, dynamic=dynamic)
    assert analysis.declined == ()
    (site,) = analysis.sites
    assert site.dense is None and site.key.past.name == "l_keys_" and site.value.past.name == "l_values_"
    return site


def refused(text, fn, *calls):
    analysis = analysed(fn, *calls)
    assert not analysis.sites
    assert any(text in d.reason for d in analysis.declined), analysis.declined


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("write", [write_setitem, write_alias, write_copy, write_narrows, write_view])
def test_writes(write, rows):
    site = one_site(step(write, READS["one slice"]), inputs(rows))
    assert (site.key.rows, site.value.rows, site.key.layout, site.key.capacity) == (rows, rows, "BTHD", C)


@pytest.mark.parametrize("write", [write_columns, write_index_copy])
def test_columns_by_number_with_a_mask(write):
    def fn(q, k, v, keys, values, mask):
        for cache, new in ((keys, k), (values, v)):
            write(cache, B, 5, 6, new)
        return attend(q, keys[:B], values[:B], mask)

    site = one_site(fn, (*inputs()[:5], torch.zeros(1, C)))
    assert site.key.rows == B and site.reads[0].whole


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads(read, rows):
    site = one_site(step(write_setitem, read), inputs(rows, tokens=2, start=4))
    assert site.key.rows == rows and not site.reads[0].whole


def test_a_symbolic_batch():
    site = one_site(step(write_setitem, READS["one slice"]), inputs(3), inputs(2, start=6), inputs(2, start=7))
    assert isinstance(site.key.rows, torch.SymInt)


def test_the_whole_batch_is_no_part():
    site = one_site(step(write_setitem, READS["one slice"]), inputs(room=B))
    assert site.key.rows is None


def test_a_prompt_begins_at_column_0():
    site = one_site(step(write_setitem, READS["one slice"]), inputs(tokens=4, start=0))
    assert site.key.rows == B and site.starts_empty


@pytest.mark.parametrize(
    "read", [lambda c, rows, stop: c[: rows + 1, :stop][:rows], lambda c, rows, stop: c[: rows + 1][:rows, :stop]]
)
def test_a_slice_of_a_slice(read):
    assert one_site(step(write_setitem, read), inputs()).key.rows == B


@pytest.mark.parametrize(
    "read",
    [
        lambda cache, rows, stop: cache[: rows + 1, :stop],
        lambda cache, rows, stop: cache[:, :stop],
        lambda cache, rows, stop: cache[: rows - 1, :stop],
    ],
)
def test_reads_of_other_rows(read):
    def fn(q, k, v, keys, values, start):
        write_setitem(keys, B, start, start + 1, k)
        write_setitem(values, B, start, start + 1, v)
        k, v = read(keys, B, start + 1), read(values, B, start + 1)
        return attend(q[:1].expand(k.shape[0], -1, -1, -1), k, v)

    refused("does not surely read the same rows", fn, inputs())


def test_reads_of_other_rows_than_the_first():
    refused("takes only a slice", step(write_setitem, lambda cache, rows, stop: cache[1 : rows + 1, :stop]), inputs())


def test_part_of_a_batch_that_is_written_whole():
    """A growing cache, of which attention reads the first row."""

    def fn(q, k, v, keys, values, start):
        write_setitem(keys, B, start, start + 1, k)
        write_setitem(values, B, start, start + 1, v)
        return attend(q[:1], keys[:1, : start + 1], values[:1, : start + 1])

    analysis = analysed(fn, inputs(room=B))
    (site,) = analysis.sites
    assert not site.reads and site.key.rows is None and "the same rows" in site.dense


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, start, x: cache[1 : B + 1, start : start + 1].copy_(x),
        lambda cache, start, x: cache[: B + 1, start : start + 1].copy_(x[:1]),
        lambda cache, start, x: cache[:B, start : start + 1, :1].copy_(x[:, :, :1]),
        lambda cache, start, x: cache[-B:, start : start + 1].copy_(x),
        lambda cache, start, x: cache[: B * 2 : 2, start : start + 1].copy_(x),
        lambda cache, start, x: cache.__setitem__((slice(1, B + 1), slice(start, start + 1)), x),
        lambda cache, start, x: cache.__setitem__((slice(None, B + 1), slice(start, start + 1)), x[:1]),
    ],
)
def test_writes_of_other_rows(write):
    def fn(q, k, v, keys, values, start):
        write(keys, start, k)
        write(values, start, v)
        return attend(q, keys[:B, : start + 1], values[:B, : start + 1])

    analysis = analysed(fn, inputs())
    assert not analysis.sites and analysis.declined


def test_keys_of_some_rows_and_values_of_all():
    def fn(q, k, v, keys, values, start):
        write_setitem(keys, B, start, start + 1, k)
        values[:, start : start + 1] = v
        return attend(q, keys[:B, : start + 1], values[:, : start + 1])

    *rest, _, start = inputs()
    refused("keys and values are cached in different ways", fn, (*rest, torch.zeros(B, C, H, D), start))


def test_not_read_as_a_dense_tensor():
    def fn(q, k, v, keys, values, start):
        return step(write_setitem, READS["one slice"])(q, k, v, keys, values, start), keys[:B].sum()

    refused("only some rows of the cache's batch are written", fn, inputs())


def test_not_where_the_cache_is_allocated():
    def fn(q, k, v):
        keys, values = (torch.zeros(ROOM, C, H, D) for _ in range(2))
        keys[:B, :1] = k
        values[:B, :1] = v
        return attend(q, keys[:B, :1], values[:B, :1]), keys, values

    refused("allocated in this graph", fn, inputs()[:3])
