"""Generating for a long time in a plan of fixed size takes no more memory, of tensors or of Python."""

import gc
import itertools
import sys

import pytest
import torch
from decoder import Decoder, inputs, run

from mikv_compile.config import Options
from mikv_compile.handle import KVTensor
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

PLANS = {
    "recycling": {"tiers": "int8:16,int4:64", "quantizer": "mikv", "window": 8, "sinks": 2, "flush_every": 8},
    "one tier": {"tiers": "fp:48", "window": 8, "sinks": 2, "flush_every": 4},
}


def objects():
    """How many Python objects there are, and how many of them are tensors."""
    gc.collect()
    found = gc.get_objects()
    return len(found), sum(issubclass(type(x), torch.Tensor) for x in found)


def steps(name, count):
    shape = CacheShape(1, 1, 8, 8, torch.float32)
    store = LayerStore(Planner(Options.parse(PLANS[name])).layer(0, shape), shape, torch.device("cpu"))
    token = torch.randn(1, 1, 1, 8)
    store.append(token.expand(1, 1, 200, 8), token.expand(1, 1, 200, 8))
    handles, seen, before = None, set(), None
    for step in range(count):
        store = store if handles is None else store.continued_from(handles)
        store.append(token, token)
        handles = tuple(KVTensor(store, role) for role in ("key", "value"))
        if step == count // 10:
            before = objects()
        if step >= count // 10:
            seen.add((store.nbytes, store.capacities))
            assert len(store._handles) <= 4
    after = objects()
    assert store.length == 200 + count and store.evicted == store.length - sum(store.counts)
    assert len(seen) == 1, seen
    # Fewer: what earlier tests have left may be collected late.
    assert after[1] <= before[1] and after[0] - before[0] < 50
    assert all(t.positions.min() >= 0 and t.positions.max() < store.length for t in store.typed().tiers)


@pytest.mark.parametrize("name", PLANS)
def test_memory_stays_flat(name):
    steps(name, 1500)


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_steps_of_a_compiled_model_leave_nothing_behind(name):
    """No list or table of the graph or of its kernels has an entry per step: not even a number is kept of one."""
    model = Decoder(layers=1)
    fast = torch.compile(model, backend="mikv", options={"lower": "eager", **PLANS[name]})
    cache, (x,) = model.new_cache(), inputs([1])
    run(fast, cache, inputs([200]))
    blocks, sizes = [], set()
    for step in range(1000):
        fast(x, cache)
        if step % 200 == 199:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
            sizes.add(cache.keys[0].store.nbytes)
    assert len(sizes) == 1
    # An entry per step would be 200 blocks or more each time; what else the process does comes once.
    assert min(after - before for before, after in itertools.pairwise(blocks)) < 100, blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_memory_stays_flat_for_100000_steps(name):
    steps(name, 100_000)
