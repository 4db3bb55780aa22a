"""Random sequences of operations on handles against the same operations on dense tensors (hypothesis).

``Growing`` has handles that are concatenated to, sliced, reordered and branched; ``Preallocated`` has tensors of a
fixed size that are written into, of both classes. Both look for leaked stores after each example.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mikv_compile.store as store_module
from mikv_compile import KVTensor
from mikv_compile.config import Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.preallocated import make_preallocated
from mikv_compile.store import LayerStore, to_layout

DIM = 8
ROLES = ("key", "value")

# Options, sliding, heads, half of a quantization step of values in [-1, 1] (keys, values).
HAND_MADE = {"quantizer": "mikv", "window": 3}  # blocks of one token, so that tiers fill early
PLANS = {
    "fp": ({"budget": 1.0}, False, 2, (0.0, 0.0)),
    "fp in two tiers": ({**HAND_MADE, "tiers": "fp:0.2,fp", "sinks": 2, "flush_every": 4}, False, 1, (0.0, 0.0)),
    "fp by age": ({**HAND_MADE, "tiers": "fp:0.2,fp", "flush_every": 4}, True, 2, (0.0, 0.0)),
    "int8": ({"tiers": "int8", "quantizer": "mikv"}, False, 2, (1 / 255, 1 / 255)),
    "k4v2": ({"tiers": "int8:0.05,k4v2", "window": 4, "sinks": 2}, False, 2, (1 / 15, 1 / 3)),
    "k4v2 by age": ({"tiers": "int8:0.05,k4v2", "window": 4}, True, 1, (1 / 15, 1 / 3)),
    "three": ({**HAND_MADE, "tiers": "fp:0.1,int8:0.3,int4", "flush_every": 2}, False, 2, (1 / 15, 1 / 15)),
}
LAYOUTS = {1: ("BHTD", "BTHD", "BTD", "TBD"), 2: ("BHTD", "BTHD", "TBHD", "BHDT")}

living: weakref.WeakSet[LayerStore] = weakref.WeakSet()


@pytest.fixture(autouse=True)
def _stores_are_counted(monkeypatch):
    made, like = LayerStore.__init__, LayerStore._like

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        living.add(self)

    def copied(self, *args, **kwargs):
        other = like(self, *args, **kwargs)
        living.add(other)
        return other

    monkeypatch.setattr(LayerStore, "__init__", init)
    monkeypatch.setattr(LayerStore, "_like", copied)
    monkeypatch.setattr(store_module, "DROP_STEP", 4)  # so that short sequences drop their front too
    living.clear()


def check_store(store: LayerStore) -> None:
    """Every token is in one slot of every (row, head); by age, the lower tier has the oldest in order."""
    tiers = [t.positions[:, :, :n] for t, n in zip(store.typed().tiers, store.counts, strict=True)]
    everything = torch.cat(tiers, 2)
    want = torch.arange(store.length, dtype=torch.int32).expand_as(everything)
    assert torch.equal(everything.sort(dim=2).values, want)
    if store.plan.is_fifo and len(tiers) == 2:
        assert torch.equal(tiers[1], want[:, :, : store.counts[1]])
    assert store.base <= store.start <= store.end


def check_close(got: torch.Tensor, want: torch.Tensor, bound: float, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if bound == 0:
        assert torch.equal(got, want), what
    elif bound < 0.8 and got.numel():  # beyond, the bound says nothing about values in [-1, 1]
        assert (got - want).abs().max() <= bound + 1e-3, what


class Machine(RuleBasedStateMachine):
    def start(self, name: str, layout: int, batch: int, seed: int) -> LayerStore:
        options, sliding, heads, self.steps = PLANS[name]
        self.layout = LAYOUTS[heads][layout % 4]
        self.token_dim, self.batch_dim = self.layout.index("T"), self.layout.index("B")
        self.random = torch.Generator().manual_seed(seed)
        shape = CacheShape(batch, heads, DIM, DIM, torch.float32)
        plan = Planner(Options.parse(options)).layer(0, shape, sliding=sliding)
        return LayerStore(plan, shape, torch.device("cpu"))

    def tokens(self, count: int, batch: int, heads: int) -> list[torch.Tensor]:
        """New keys and values [B, H, T, D] in [-1, 1]."""
        return [torch.rand(batch, heads, count, DIM, generator=self.random) * 2 - 1 for _ in ROLES]

    def at(self, dim: int, index: object) -> tuple[object, ...]:
        return (*[slice(None)] * dim, index)

    def forget(self) -> None:
        raise NotImplementedError

    def compiles(self, name: str) -> bool:
        return COMPILED.get(name) == self.layout

    def query(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape[self.batch_dim], like.shape[self.layout.index("H")], 1, DIM, generator=self.random)

    def teardown(self) -> None:
        self.forget()
        if sys.exc_info()[0] is not None:
            return  # a failure's traceback holds stores
        if len(living):
            gc.collect()
        assert not len(living), f"{len(living)} stores leaked"


COMPILED = {"fp": "BHTD", "fp by age": "BTHD", "k4v2": "BHTD"}
"""Plans and the layout in which steps also run as compiled code; each combination is traced."""


def step(cache, new, query, layout):
    """What a model does with a growing cache."""
    heads_dim = layout.index("H")
    cache.handles = [
        torch.cat([old, x], dim=layout.index("T")) for old, x in zip(cache.handles, new.unbind(0), strict=True)
    ]
    k, v = (x.transpose(heads_dim, 1) for x in cache.handles)
    return F.scaled_dot_product_attention(query, k, v)


def write_step(cache, new, query, position, layout):
    """What a model does with a preallocated cache, whose columns up to the new ones are seen."""
    token_dim, heads_dim = layout.index("T"), layout.index("H")
    for held, x in zip(cache.handles, new.unbind(0), strict=True):
        held.index_copy_(token_dim, position, x)
    k, v = (x.transpose(heads_dim, 1) for x in cache.handles)
    mask = torch.arange(k.shape[2])[None, :] <= position[:, None]
    return F.scaled_dot_product_attention(query, k, v, attn_mask=mask)


class Branch:
    """Handles, and the dense tensors that they stand for."""

    def __init__(self, handles, dense, requantized=0):
        self.handles, self.dense, self.requantized = handles, dense, requantized

    def mapped(self, function) -> Branch:
        return Branch([function(h) for h in self.handles], [function(d) for d in self.dense], self.requantized)


class Growing(Machine):
    @initialize(
        name=st.sampled_from(list(PLANS)), layout=st.integers(0, 3), batch=st.integers(1, 3), seed=st.integers(0, 99)
    )
    def begin(self, name, layout, batch, seed):
        self.name = name
        store = self.start(name, layout, batch, seed)
        self.branches: list[Branch] = []
        self.plan, self.site = store.plan, store.site
        self.fresh(store, 12)

    def forget(self):
        self.branches = []

    def fresh(self, store, count):
        new = self.tokens(count, store.site.batch, store.site.kv_heads)
        store.append(*new)
        handles = [KVTensor(store, role, self.layout) for role in ROLES]
        self.put(Branch(handles, [to_layout(x, self.layout).clone() for x in new]))

    def put(self, branch, at=None):
        if at is not None and at < len(self.branches):
            self.branches[at] = branch
        elif len(self.branches) < 4:
            self.branches.append(branch)
        else:
            self.branches[0] = branch

    def one(self, which) -> tuple[int, Branch]:
        at = which % len(self.branches)
        return at, self.branches[at]

    which = st.integers(0, 3)

    @rule(which=which, count=st.sampled_from([1, 1, 1, 2, 5, 9, 70]), keep=st.booleans())
    def append(self, which, count, keep):
        at, branch = self.one(which)
        key, value = branch.handles
        if branch.dense[0].shape[self.token_dim] > 250:
            return
        before = key.store.recompressed
        store = key.store.continued_from((key, value))
        if store.plan.is_fifo and key.range[0] > store.base:
            store.drop_before(key.range[0])
        start = key.range[0]
        new = self.tokens(count, store.site.batch, store.site.kv_heads)
        store.append(*new)
        handles = [KVTensor(store, role, self.layout, start) for role in ROLES]
        dense = [
            torch.cat([old, to_layout(x, self.layout)], self.token_dim)
            for old, x in zip(branch.dense, new, strict=True)
        ]
        made = Branch(handles, dense, branch.requantized + store.recompressed - before)
        self.put(made, None if keep else at)

    @precondition(lambda self: self.compiles(self.name))
    @rule(which=which, count=st.sampled_from([1, 1, 3]))
    def compiled_step(self, which, count):
        """Attention over all that the branch shows, and one or more tokens more."""
        at, branch = self.one(which)
        batch, heads = branch.dense[0].shape[self.batch_dim], branch.dense[0].shape[self.layout.index("H")]
        new = torch.stack([to_layout(x, self.layout) for x in self.tokens(count, batch, heads)])
        query = self.query(branch.dense[0])
        plain = Branch(branch.handles, list(branch.dense), branch.requantized)
        before = branch.handles[0].store.recompressed
        fast = Branch(list(branch.handles), plain.dense)
        with torch.no_grad():
            got = compiled[step](fast, new, query, self.layout)
            dense = Branch(plain.dense, [])
            want = step(dense, new, query, self.layout)
        assert all(isinstance(h, KVTensor) for h in fast.handles)
        if not self.steps[0]:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        again = fast.handles[0].store.recompressed - before
        self.put(Branch(fast.handles, dense.handles, branch.requantized + again), at)

    @rule(which=which, data=st.data(), front=st.booleans(), keep=st.booleans())
    def crop(self, which, data, front, keep):
        at, branch = self.one(which)
        length = branch.dense[0].shape[self.token_dim]
        place = data.draw(st.integers(0, length - 1) if front else st.integers(1, length))
        index = self.at(self.token_dim, slice(place, None) if front else slice(None, place))
        made = branch.mapped(lambda t: t[index])
        assert all(isinstance(h, KVTensor) and h.store is branch.handles[0].store for h in made.handles)
        self.put(made, None if keep else at)

    @rule(which=which, data=st.data())
    def middle(self, which, data):
        at, branch = self.one(which)
        length = branch.dense[0].shape[self.token_dim]
        start, stop = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True)))
        made = branch.mapped(lambda t: t.narrow(self.token_dim, start, stop - start))
        assert all(isinstance(h, KVTensor) for h in made.handles)
        self.put(made, at)

    @rule(which=which, data=st.data(), how=st.integers(0, 3))
    def rows(self, which, data, how):
        at, branch = self.one(which)
        batch = branch.dense[0].shape[self.batch_dim]
        if how == 0 and batch < 4:
            made = branch.mapped(lambda t: t.repeat_interleave(2, dim=self.batch_dim))
        elif how == 1:
            start = data.draw(st.integers(0, batch - 1))
            made = branch.mapped(lambda t: t[self.at(self.batch_dim, slice(start, None))])
        else:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
            if how == 2:
                made = branch.mapped(lambda t: t.index_select(self.batch_dim, rows))
            else:
                made = branch.mapped(lambda t: t[self.at(self.batch_dim, rows)])
        assert made.handles[0].store is made.handles[1].store
        self.put(made, at)

    @rule(which=which, how=st.sampled_from(["clone", "deepcopy", "same", "detach", "copy"]))
    def branch(self, which, how):
        _, branch = self.one(which)
        if how == "deepcopy":
            handles = copy.deepcopy(branch.handles)
        elif how == "same":
            handles = list(branch.handles)
        else:
            handles = [copy.copy(h) if how == "copy" else getattr(h, how)() for h in branch.handles]
        assert handles[0].store is handles[1].store
        self.put(Branch(handles, list(branch.dense), branch.requantized))

    @rule(which=which)
    def move(self, which):
        at, branch = self.one(which)
        assert branch.handles[0].to("meta").shape == branch.dense[0].shape
        self.put(branch.mapped(lambda t: t.to("cpu", copy=True)), at)

    @rule(count=st.integers(1, 80))
    def reset(self, count):
        self.fresh(LayerStore(self.plan, self.site, torch.device("cpu")), count)

    @precondition(lambda self: len(self.branches) > 1)
    @rule(which=which)
    def drop(self, which):
        del self.branches[which % len(self.branches)]

    @rule(which=which)
    def drop_front(self, which):
        _, branch = self.one(which)
        if branch.handles[0].store.plan.is_fifo:
            branch.handles[0].store.drop_before(branch.handles[0].range[0])

    @rule(which=which, role=st.integers(0, 1))
    def read(self, which, role):
        _, branch = self.one(which)
        handle, dense, bound = branch.handles[role], branch.dense[role], self.bound(branch, role)
        check_close(handle + 0, dense + 0, bound, "sum")
        check_close(handle.transpose(0, 1), dense.transpose(0, 1), bound, "transpose")
        check_close(torch.cat([handle, dense], 0), torch.cat([dense, dense], 0), bound, "cat")

    def bound(self, branch, role):
        # Compressed once on arrival, once when demoted, and whenever a crop has had to compress the rest again.
        store = branch.handles[role].store
        return self.steps[role] * (2 + max(branch.requantized, store.recompressed))

    @invariant()
    def same_as_dense(self):
        for branch in getattr(self, "branches", []):
            for role, (handle, dense) in enumerate(zip(branch.handles, branch.dense, strict=True)):
                assert handle.shape == dense.shape and len(handle) == len(dense)
                check_close(handle.dequantize(), dense, self.bound(branch, role), ROLES[role])
            check_store(branch.handles[0].store)


class Preallocated(Machine):
    CAPACITY = 40

    @initialize(
        name=st.sampled_from(list(PLANS)), layout=st.integers(0, 3), batch=st.integers(1, 3), seed=st.integers(0, 99),
        taken_over=st.booleans(),
    )  # fmt: skip
    def begin(self, name, layout, batch, seed, taken_over):
        store = self.start(name, layout, batch, seed)
        self.name, self.heads = name, store.site.kv_heads
        handles = [
            make_preallocated(store, role, self.layout, self.CAPACITY)
            if taken_over
            else KVTensor(store, role, self.layout, capacity=self.CAPACITY)
            for role in ROLES
        ]
        self.pair = Branch(handles, [torch.zeros(h.shape) for h in handles])
        self.others: list[tuple[Branch, list[torch.Tensor]]] = []
        self.frozen: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self.writes = 0

    def forget(self):
        self.pair, self.others, self.frozen = None, [], []

    def bound(self, role):
        # Writing in the middle compresses what lies behind again.
        return self.steps[role] * (2 + self.writes)

    def apply(self, function, roles=(0, 1)):
        """The same to handles and dense tensors; ``function(tensor, new tokens)``."""
        self.writes += 1
        for role in roles:
            function(self.pair.handles[role], role)
            function(self.pair.dense[role], role)

    def new(self, count):
        batch = self.pair.dense[0].shape[self.batch_dim]
        return [to_layout(x, self.layout) for x in self.tokens(count, batch, self.heads)]

    place = st.tuples(st.integers(0, CAPACITY - 1), st.integers(1, 12))
    which_roles = st.sampled_from([(0, 1), (0, 1), (0, 1), (1, 0), (0,), (1,)])

    @rule(
        place=place, roles=which_roles,
        how=st.sampled_from(["index_copy_", "slice", "index", "narrow", "view", "scattered", "row", "number"]),
    )  # fmt: skip
    def write(self, place, how, roles):
        first, count = place[0], min(place[1], self.CAPACITY - place[0])
        new, dim = self.new(count), self.token_dim
        index = torch.arange(first, first + count)

        def put(t, role):
            if how == "index_copy_":
                t.index_copy_(dim, index, new[role])
            elif how == "slice":
                t[self.at(dim, slice(first, first + count))] = new[role]
            elif how == "index":
                t[self.at(dim, index)] = new[role]
            elif how == "narrow":
                t.narrow(dim, first, count).copy_(new[role])
            elif how == "view":
                t[self.at(dim, slice(first, first + count))].copy_(new[role])
            elif how == "scattered":
                t.index_copy_(dim, index.flip(0), new[role])
            elif how == "row":
                part = t[self.at(self.batch_dim, slice(0, 1))].narrow(dim, first, count)
                part[:] = new[role][self.at(self.batch_dim, slice(0, 1))]
            else:
                t[self.at(dim, first)] = new[role].select(dim, 0)

        self.apply(put, roles)

    @rule(new=st.integers(1, 20), reads=st.booleans(), how=st.sampled_from(["index_copy_", "slice"]))
    def append(self, new, reads, how):
        """What models do: keys, then values, behind what is there."""
        stop = max(h.range[1] - h.range[0] for h in self.pair.handles)
        count = min(new, self.CAPACITY - stop)
        if count < 1:
            return
        tokens = self.new(count)
        for role in (0, 1):
            for t in (self.pair.handles[role], self.pair.dense[role]):
                if how == "slice":
                    t[self.at(self.token_dim, slice(stop, stop + count))] = tokens[role]
                else:
                    t.index_copy_(self.token_dim, torch.arange(stop, stop + count), tokens[role])
            if reads:
                self.same_as_dense()

    @precondition(lambda self: self.compiles(self.name))
    @rule(rewind=st.integers(0, 3))
    def compiled_step(self, rewind):
        """A step at the end, or a bit before: what lies behind is gone afterwards, unless the site was declined."""
        stop = self.pair.handles[0].range[1] - self.pair.handles[0].range[0]
        ends = [h.range for h in self.pair.handles]
        place = max(stop - rewind, 0)
        if ends[0] != ends[1] or place >= self.CAPACITY:
            return
        new, position = torch.stack(self.new(1)), torch.tensor([place])
        query = self.query(self.pair.dense[0])
        dense = Branch(self.pair.dense, [])
        with torch.no_grad():
            got = compiled[write_step](self.pair, new, query, position, self.layout)
            want = write_step(dense, new, query, position, self.layout)
        self.writes += 1
        if self.pair.handles[0].store.length == place + 1:
            for d in self.pair.dense:
                d[self.at(self.token_dim, slice(place + 1, None))] = 0
        if not self.steps[0]:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    @rule(
        roles=which_roles,
        how=st.sampled_from(
            ["zero_", "fill_", "neg_", "mul_", "copy_", "roll", "iadd", "out", "masked_fill_", "foreach"]
        ),
    )
    def in_place(self, roles, how):
        new = self.new(self.CAPACITY)

        def change(t, role):
            if how in ("zero_", "neg_"):
                getattr(t, how)()
            elif how == "fill_":
                t.fill_(0.25)
            elif how == "mul_":
                t.mul_(0.5)
            elif how == "copy_":
                t.copy_(new[role])
            elif how == "roll":
                rolled = t.roll(-1, self.token_dim)
                rolled[self.at(self.token_dim, slice(self.CAPACITY - 1, None))] = new[role].narrow(self.token_dim, 0, 1)
                t.copy_(rolled)
            elif how == "iadd":
                t *= 0.9
            elif how == "out":
                torch.mul(t, 0.5, out=t)
            elif how == "masked_fill_":
                # The same columns on both sides: values near a threshold may lie on different ones.
                mask = torch.zeros(t.shape, dtype=torch.bool)
                mask[self.at(self.token_dim, slice(None, None, 3))] = True
                t.masked_fill_(mask, 0.0)
            else:
                torch._foreach_mul_([t], 0.5)

        self.apply(change, roles)

    @rule()
    def clear(self):
        for t in (*self.pair.handles, *self.pair.dense):
            t.zero_()
        assert self.pair.handles[0].store.length == 0

    @rule(
        how=st.sampled_from(["clone", "deepcopy", "rows", "repeat", "to"]),
        go_on_with_copy=st.booleans(),
        data=st.data(),
    )
    def copies(self, how, go_on_with_copy, data):
        batch = self.pair.dense[0].shape[self.batch_dim]
        rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
        handles, dense = self.pair.handles, self.pair.dense
        if how == "deepcopy":
            made = Branch(copy.deepcopy(handles), [d.clone() for d in dense])
        elif how == "clone":
            made = self.pair.mapped(lambda t: t.clone())
        elif how == "rows":
            made = self.pair.mapped(lambda t: t.index_select(self.batch_dim, rows))
        elif how == "repeat":
            made = self.pair.mapped(lambda t: t.repeat_interleave(2, dim=self.batch_dim) if batch < 4 else t.clone())
        else:
            made = self.pair.mapped(lambda t: t.to("cpu", copy=True))
        assert made.handles[0].store is made.handles[1].store is not handles[0].store
        assert [type(h) for h in made.handles] == [type(h) for h in handles]
        other = made
        if go_on_with_copy:
            self.pair, other = made, self.pair
        self.others = [(other, [self.bound(0), self.bound(1)]), *self.others[:1]]

    @rule()
    def freeze(self):
        """A handle of a fixed range on the same store is a branch: it keeps its tokens."""
        store = self.pair.handles[0].store
        if store._pending or not store.length:
            return
        kept = KVTensor(store, "key", self.layout)
        self.frozen = [(kept, kept.dequantize().clone(), self.bound(0)), *self.frozen[:1]]

    @rule(role=st.integers(0, 1), data=st.data())
    def read(self, role, data):
        handle, dense = self.pair.handles[role], self.pair.dense[role]
        check_close(handle + 0, dense + 0, self.bound(role), "sum")
        start = data.draw(st.integers(0, self.CAPACITY - 1))
        index = self.at(self.token_dim, slice(start, start + 7))
        check_close(handle[index] + 0, dense[index] + 0, self.bound(role), "slice")
        assert handle.is_contiguous() and handle.numel() == dense.numel() and handle.stride() == dense.stride()

    @invariant()
    def same_as_dense(self):
        if getattr(self, "pair", None) is None:
            return
        bounds = [self.bound(0), self.bound(1)]
        for pair, limits in [(self.pair, bounds), *self.others]:
            for role, (handle, dense) in enumerate(zip(pair.handles, pair.dense, strict=True)):
                check_close(handle.dequantize(), dense, limits[role], ROLES[role])
            check_store(pair.handles[0].store)
        for kept, want, bound in self.frozen:
            # Its tokens may have been demoted since, together with those of its sibling.
            check_close(kept.dequantize(), want, bound, "kept")


compiled = {}


def run(machine, examples, steps):
    for function in (step, write_step):
        compiled[function] = torch.compile(function, backend="mikv", options={"lower": "eager", "budget": 1.0})
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck),
        derandomize=examples < 1000,
    )  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("machine", [Growing, Preallocated])
def test_random_operations(machine):
    run(machine, 150, 12)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Growing, Preallocated])
def test_many_random_operations(machine):
    run(machine, 2000, 20)
