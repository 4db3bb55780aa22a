"""Preallocated caches that were taken over: what eager code and Dynamo see, and what is refused."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mikv_compile import EvictedTokensError, KVTensor, MikvError, graph_reports
from mikv_compile.config import Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.preallocated import PreallocatedKV, give_back, make_preallocated, take_over
from mikv_compile.store import LayerStore, shape_in

B, H, C, D = 2, 2, 24, 8


def new_store(sliding=False, **options):
    shape = CacheShape(B, H, D, D, torch.float32)
    plan = Planner(Options.parse(options or {"budget": 1.0})).layer(0, shape, sliding=sliding)
    return LayerStore(plan, shape, torch.device("cpu"))


def pair(layout="BHTD", **options):
    """Keys and values that were dense tensors of the model."""
    store = new_store(**options)
    caches = [torch.ones(shape_in(store, role, layout, C)) for role in ("key", "value")]
    for cache, role in zip(caches, ("key", "value"), strict=True):
        assert take_over(cache, store, role, layout) is cache
    return caches


def fill(caches, count=5, first=0):
    tokens = [torch.randn(B, H, count, D) for _ in caches]
    for cache, new in zip(caches, tokens, strict=True):
        cache.index_copy_(2, torch.arange(first, first + count), new)
    return tokens


class Model(nn.Module):
    """Writes into its cache, and attends."""

    def __init__(self, keep, caches):
        super().__init__()
        for name, cache in zip("kv", caches, strict=True):
            if keep == "buffer":
                self.register_buffer(name, cache)
            else:
                setattr(self, name, cache)
            if keep == "static address":
                torch._dynamo.mark_static_address(cache)

    def forward(self, x, position):
        self.k.index_copy_(2, position, x)
        self.v[:, :, position] = x
        return F.scaled_dot_product_attention(x, self.k[:, :, :8], self.v[:, :, :8])


def test_memory_is_released_and_the_rest_stays():
    cache = torch.ones(B, C, H, D)
    strides = cache.stride()
    take_over(cache, new_store(), "key", "BTHD")
    assert isinstance(cache, PreallocatedKV) and cache.untyped_storage().nbytes() == 0
    assert (cache.shape, cache.dtype, cache.stride(), cache.numel()) == (
        (B, C, H, D),
        torch.float32,
        strides,
        B * C * H * D,
    )
    assert len(cache) == B and cache.is_contiguous() and cache.device.type == "cpu" and cache.dim() == 4
    assert (cache.capacity, cache.range, cache.role, cache.kv_layout) == (C, (0, 0), "key", "BTHD")
    assert cache.plan is cache.store.plan
    assert torch.equal(cache + 0, torch.zeros(B, C, H, D))


@pytest.mark.parametrize("tags", [False, True], ids=["", "dict tags"])
@pytest.mark.parametrize("keep", ["attribute", "buffer", "static address"])
def test_the_graph_has_plain_operations(keep, tags):
    """Taken over between two calls: one more compilation, for the class, and none after that.

    So also where Dynamo skips modules whose dicts hold the same objects as before: the default of torch 2.11.
    """
    graphs, seen = [], []

    def backend(gm, inputs):
        graphs.append(gm)
        seen.append([type(i) for i in inputs])
        return lambda *args: (torch.zeros(()),)

    caches = [torch.zeros(B, H, C, D) for _ in range(2)]
    model = Model(keep, caches)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(B, H, 1, D)
    with torch.no_grad(), torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=tags):
        compiled(x, torch.tensor([0]))
        store = new_store()
        for cache, role in zip(caches, ("key", "value"), strict=True):
            take_over(cache, store, role)
        for i in range(3):
            compiled(x, torch.tensor([i]))
    assert len(graphs) == 2
    before, after = ([(n.op, str(n.target)) for n in gm.graph.nodes if n.op.startswith("call")] for gm in graphs)
    assert before == after
    assert sum(issubclass(kind, PreallocatedKV) for kind in seen[1]) == 2
    handles = [n for n in graphs[1].graph.find_nodes(op="placeholder") if issubclass(n.type, PreallocatedKV)]
    assert [n.meta["example_value"].shape for n in handles] == [(B, H, C, D)] * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_get_graphs_without_it(backend):
    caches = pair()
    tokens = fill(caches)
    model, x = Model("attribute", caches), torch.randn(B, H, 1, D)
    want = Model("attribute", [c + 0 for c in caches])
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(x, torch.tensor([5]))
        torch.testing.assert_close(got, want(x, torch.tensor([5])))
        assert torch.equal(model.k[:, :, :6], torch.cat([tokens[0], x], 2)) and model.k.store.length == 6
        with pytest.raises(Exception, match="only graphs compiled with backend='mikv'"):
            torch.compile(lambda k: k * 2, backend=backend, fullgraph=True)(caches[0])


def test_fake_handles_with_a_capacity_take_writes():
    store = new_store()
    caches = [KVTensor(store, role, capacity=C) for role in ("key", "value")]
    model, seen = Model("attribute", caches), []

    def backend(gm, inputs):
        seen.extend(n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder"))
        return lambda *args: (torch.zeros(()),)

    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(B, H, 1, D), torch.tensor([5]))
    fakes = [value for value in seen if isinstance(value, KVTensor)]
    assert [(f.is_preallocated, f.capacity, f.kv_layout, f.role) for f in fakes] == [
        (True, C, "BHTD", r) for r in ("key", "value")
    ]
    assert all(isinstance(f.shape[2], int) for f in fakes)
    with pytest.raises(MikvError, match="the range"):
        _ = fakes[0].range


def test_keys_are_seen_before_their_values_arrive():
    key, value = pair()
    fill([key, value])
    new = torch.randn(B, H, 2, D)
    before = value + 0
    key[:, :, 5:7] = new
    assert torch.equal(key[:, :, 5:7], new) and torch.equal(value + 0, before)
    with pytest.raises(MikvError, match=r"keys were written up to position 7 and its values up to 5"):
        key.store.prepare(1)
    value[:, :, 5:7] = new
    assert key.store.length == 7 and key.store.prepare(1).length == 7


def test_rewinding_drops_what_lies_behind_in_the_store():
    store = new_store()
    k, v = torch.randn(B, H, 10, D), torch.randn(B, H, 10, D)
    store.append(k, v)
    store.write(4, k[:, :, :2], v[:, :, :2])
    assert store.length == 6 and torch.equal(store.dequantize("key"), torch.cat([k[:, :, :4], k[:, :, :2]], 2))
    store.write(9, k[:, :, :1], v[:, :, :1])
    assert store.length == 10 and not store.dequantize("value")[:, :, 6:9].any()
    store.clear()
    assert store.length == 0 and store.nbytes == 0


def test_a_view_follows_its_cache_and_writes_into_it():
    key, value = pair()
    tokens = fill([key, value])
    view = key[:, :, 1:4]
    key[:, :, 2] = 7.0
    assert (view[:, :, 1] == 7).all() and torch.equal(view[:, :, 0], tokens[0][:, :, 1])
    view[:, 1].mul_(2)
    assert torch.equal(key[:, 1, 1], 2 * tokens[0][:, 1, 1]) and (key[:, 1, 2] == 14).all()
    first, second = key.split(C // 2, 2)
    second.fill_(1)
    assert (key[:, :, C // 2 :] == 1).all() and torch.equal(first, key[:, :, : C // 2])
    with torch.inference_mode():
        key.zero_()
        value.zero_()
        key[:, :, :2].add_(1)
        assert (key * 1).sum() == 2 * B * H * D


def test_copies_are_independent():
    key, value = pair()
    tokens = fill([key, value])
    for make in (
        copy.deepcopy,
        lambda both: [t.clone() for t in both],
        lambda both: [t.to("cpu", copy=True) for t in both],
    ):
        twins = make([key, value])
        assert twins[0].store is twins[1].store is not key.store and all(isinstance(t, PreallocatedKV) for t in twins)
        twins[0].neg_()
        assert torch.equal(twins[0][:, :, :5], -tokens[0]) and torch.equal(key[:, :, :5], tokens[0])
    rows = [t.index_select(0, torch.tensor([1, 1, 0])) for t in (key, value)]
    assert rows[0].store is rows[1].store and torch.equal(rows[0][:, :, :5], tokens[0][[1, 1, 0]])
    assert key.to("meta").is_meta and key.to(torch.float64).dtype == torch.float64
    assert key.to("cpu") is key and copy.copy(key).store is key.store


@pytest.mark.parametrize("gap", [0, 3])
def test_a_cache_that_is_dense_again_lets_go_of_its_store(gap):
    """Its memory would be taken twice; and others that show the store go on without it."""
    store = new_store()
    caches = [torch.ones(B, H, gap + C, D)[:, :, gap:].data for _ in range(2)]  # with a gap: a part of larger memory
    for cache, role in zip(caches, ("key", "value"), strict=True):
        take_over(cache, store, role)
    tokens = fill(caches)
    others = [copy.copy(cache) for cache in caches]
    store, reference = None, weakref.ref(store)
    for cache, want in zip(caches, tokens, strict=True):
        give_back(cache)
        assert type(cache) is torch.Tensor and torch.equal(cache[:, :, :5], want) and not cache[:, :, 5:].any()
    fill(others, 2, first=5)
    assert others[0].store.length == 7 and not caches[0][:, :, 5:].any()
    del others
    gc.collect()
    assert reference() is None


def test_a_module_with_it_as_a_buffer():
    caches = pair()
    tokens = fill(caches)
    module = Model("buffer", caches)
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    for name, new in zip("kv", tokens, strict=True):
        assert torch.equal(state[name][:, :, :5], new) and not state[name][:, :, 5:].any()
        assert type(loaded[name]) is torch.Tensor and torch.equal(loaded[name][:, :, :5], new)
    twin = copy.deepcopy(module)
    assert twin.k.store is twin.v.store is not module.k.store
    twin.load_state_dict({name: torch.zeros(B, H, C, D) for name in "kv"})
    assert not (twin.k + 0).any() and torch.equal(module.k[:, :, :5], tokens[0])
    assert isinstance(module.to("cpu").k, PreallocatedKV) and type(twin.double().k) is torch.Tensor


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t.data_ptr(), lambda t: t.set_(torch.zeros(1)), lambda t: t.resize_(1), lambda t: t.share_memory_(),
        lambda t: t.requires_grad_(True), lambda t: t.__dlpack__(), lambda t: t.storage(),
        lambda t: setattr(t, "data", torch.zeros(1)), lambda t: t.unsqueeze_(0),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(operation):
    (key, _) = caches = pair()
    tokens = fill(caches)
    with pytest.raises(MikvError, match="of a compressed KV cache"):
        operation(key)
    assert key.shape == (B, H, C, D) and torch.equal(key[:, :, :5], tokens[0])


def test_numpy_is_a_copy_that_cannot_be_written():
    (key, _) = caches = pair()
    tokens = fill(caches)
    array = key.numpy()
    assert (array[:, :, :5] == tokens[0].numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 1


def test_reads_are_counted():
    (key, _) = caches = pair()
    fill(caches)
    assert key.store.fallbacks == {}
    key.sum()
    assert key.store.fallbacks == {"sum": 1}


def test_evicting_plans_take_appends_and_clear_but_no_reads():
    (key, value) = pair(tiers="fp:0.2", window=2, sinks=0, flush_every=1)
    fill([key, value], 10)
    fill([key, value], 5, first=10)
    assert key.store.length == 15 and key.store.evicted
    with pytest.raises(EvictedTokensError):
        key.sum()
    key.zero_()
    value.zero_()
    assert key.store.length == 0 and not key.sum()


def test_an_unusable_store_is_usable_again_after_reset():
    (key, value) = pair()
    fill([key, value])
    key.store.spoil("interrupted")
    with pytest.raises(MikvError, match="interrupted"):
        key.sum()
    key.zero_()
    value.zero_()
    fill([key, value])
    assert key.store.length == 5


def test_what_cannot_be_taken_over():
    store, whole = new_store(), torch.zeros(2, B, H, C, D)
    for tensor, why in (
        (whole[0], "shared with other tensors"),
        (nn.Parameter(torch.zeros(B, H, C, D)), "only plain tensors"),
        (torch.zeros(B, H, C, D).requires_grad_(), "requires gradients"),
        (torch.zeros(B, H, C, D + 1), "does not belong to a store"),
        (torch.zeros(B, H, C, D, dtype=torch.float16), "does not belong to a store"),
    ):
        with pytest.raises(MikvError, match=why):
            take_over(tensor, store, "key")
    assert whole.untyped_storage().nbytes() > 0


def test_a_ring_shows_the_newest_tokens():
    store = new_store(sliding=True)
    cache = make_preallocated(store, "key", "BHTD", C)
    tokens = torch.randn(B, H, 300, D)
    for i in range(300):
        store.append(tokens[:, :, i : i + 1], tokens[:, :, i : i + 1])
        store.drop_before(cache.range[0])
    assert cache.range == (300 - C, 300) and store.base > 0
    assert torch.equal(cache + 0, tokens[:, :, -C:])
    cache.copy_(cache.roll(-1, 2))
    assert torch.equal(cache[:, :, :-1], tokens[:, :, -C + 1 :])


def test_another_branch_keeps_its_tokens():
    key, value = pair()
    tokens = fill([key, value])
    kept = KVTensor(key.store, "key")
    new = fill([key, value], 3, first=2)
    assert torch.equal(kept.dequantize(), tokens[0]) and kept.store is not key.store
    assert key.store is value.store and torch.equal(key[:, :, 2:5], new[0])


@pytest.mark.parametrize("capacity", [None, C])
def test_a_graph_that_is_declined_writes_through(capacity):
    """torch calls a backend's function with ``__torch_function__`` turned off."""
    key, value = (
        pair()
        if capacity is None
        else (KVTensor(s := new_store(), "key", capacity=C), KVTensor(s, "value", capacity=C))
    )
    tokens = fill([key, value])

    def step(key, value, x):
        key[:, :, 1::2] = x  # no attention, and no neighbouring columns
        value.mul_(2)
        return key.sum() + value.sum()

    x = torch.randn(B, H, 1, D)
    dense = [key + 0, value + 0]
    with torch.no_grad():
        got = torch.compile(step, backend="mikv", options={"lower": "eager"})(key, value, x)
        want = step(*dense, x)
    torch.testing.assert_close(got, want)
    assert torch.equal(key + 0, dense[0]) and torch.equal(value + 0, dense[1])
    assert torch.equal(value[:, :, :5], 2 * tokens[1])


def test_a_call_that_reads_only_the_last_columns_moves_none():
    """A store forgets what no call sees, but the columns of a preallocated cache are still there."""
    key, value = pair()
    tokens = fill([key, value])
    key.store.drop_before(3)
    assert key.range == (0, 5) and torch.equal(key[:, :, :5], tokens[0])


def test_a_graph_meets_no_store_of_another_plan():
    """Plans with as many buffers but other formats: a graph that took both would misread one of them."""
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return lambda *args: (torch.zeros(()),)

    compiled = torch.compile(Model.forward, backend=backend)
    x, position = torch.randn(B, H, 1, D), torch.tensor([0])
    with torch.no_grad():
        for options in ({"tiers": "int8"}, {"tiers": "int4"}, {"tiers": "int8"}):
            compiled(Model("attribute", pair(quantizer="mikv", **options)), x, position)
    assert len(graphs) == 2
    kinds = [n.type for n in graphs[1].graph.find_nodes(op="placeholder") if issubclass(n.type, PreallocatedKV)]
    assert [kind.known[1:] for kind in kinds] == [("key", "BHTD"), ("value", "BHTD")]


# More rows than the store has


ROOM = B + 2


def partial(layout="BTHD", **options):
    """Handles of ROOM rows over a store of B, with five tokens, and the dense tensors that they stand for."""
    store = new_store(**options)
    tokens = [torch.randn(B, H, 5, D) for _ in range(2)]
    store.append(*tokens)
    caches = [torch.zeros(shape_in(store, role, layout, C, ROOM)) for role in ("key", "value")]
    for cache, role in zip(caches, ("key", "value"), strict=True):
        take_over(cache, store, role, layout)
    return caches, [cache.dequantize() for cache in caches]


def test_rows_beyond_the_store_are_zeros():
    (key, value), (dense, _) = partial()
    assert key.shape == (ROOM, C, H, D) and key.store.site.batch == B
    assert dense[:B, :5].any() and not dense[B:].any() and torch.equal(key[1:3], dense[1:3])
    with pytest.raises(MikvError, match="does not belong to a store"):
        take_over(torch.zeros(B - 1, C, H, D), key.store, "key", "BTHD")
    twin, moved = key.clone(), copy.deepcopy([key, value])[0]
    for other in (twin, moved, copy.copy(key), key.to("cpu", copy=True)):
        assert isinstance(other, PreallocatedKV) and torch.equal(other + 0, dense)
    rows = torch.tensor([3, 1, 0])
    assert torch.equal(key.index_select(0, rows), dense[rows])
    assert torch.equal(key.repeat_interleave(2, 0), dense.repeat_interleave(2, 0))


SMALL = {"window": 0, "sinks": 0, "flush_every": 1, "quantizer": "mikv"}


@pytest.mark.parametrize("tiers", [None, "int4", "fp:0.3,int8", "int8:0.3,int4"])
@pytest.mark.parametrize(
    "write",
    [
        lambda c: c.__setitem__((slice(None, 3), 5), 2.0),
        lambda c: c.__setitem__((slice(None), slice(5, 7)), torch.arange(ROOM).view(-1, 1, 1, 1).expand(-1, 2, H, D)),
        lambda c: c[3].fill_(1),
        lambda c: c[2, 3].copy_(torch.ones(H, D)),
        lambda c: c.copy_(torch.arange(C * H * D).view(C, H, D).expand(ROOM, C, H, D) / 500),
        lambda c: c.index_copy_(1, torch.tensor([5]), torch.ones(ROOM, 1, H, D)),
        lambda c: c.mul_(2),
        lambda c: c[B:].zero_(),
    ],
)
def test_eager_writes_reach_all_rows(write, tiers):
    """Rows that are written get a place in the store, and the others stay as they are."""
    caches, dense = partial(**({"tiers": tiers, **SMALL} if tiers else {"budget": 1.0}))
    for cache, plain in zip(caches, dense, strict=True):
        write(cache)
        write(plain)
    key, value = caches
    assert key.store is value.store
    for cache, plain in zip(caches, dense, strict=True):
        torch.testing.assert_close(cache + 0, plain, atol=0.5 if tiers else 0, rtol=0)
        assert not (cache + 0)[~plain.flatten(2).any(2)].any()


def test_a_wider_store_keeps_codes_and_scores_of_the_rows_it_had():
    (key, _), (dense, _) = partial(tiers="fp:0.3,int4", **SMALL)
    wide = key.store.widened(3)
    assert key.store is wide and wide.site.batch == 3 and wide.recompressed == 0
    assert torch.equal(key + 0, dense)


class Prefix(nn.Module):
    """Writes and reads the first rows of its cache."""

    def __init__(self, rows=ROOM):
        super().__init__()
        self.k, self.v = torch.zeros(rows, C, H, D), torch.zeros(rows, C, H, D)

    def forward(self, x, start):
        rows, tokens = x.shape[:2]
        self.k[:rows, start : start + tokens] = x
        self.v[:rows, start : start + tokens] = x * 2
        k, v = self.k[:rows, : start + tokens], self.v[:rows, : start + tokens]
        mask = torch.ones(tokens, start + tokens, dtype=torch.bool).tril(start)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (x, k, v)), attn_mask=mask)


def play(steps, prepare=lambda model: None, rows=ROOM, **options):
    """Steps (rows, tokens, start) with a dense model and a compiled one: both, and whether the last one was fused."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense, model = Prefix(rows), Prefix(rows)
    prepare(dense)
    prepare(model)
    fast = torch.compile(model, backend="mikv", options={"lower": "eager", **(options or {"budget": 1.0})})
    with torch.no_grad():
        for batch, tokens, start in steps:
            x = torch.randn(batch, tokens, H, D)
            torch.testing.assert_close(fast(x, start), dense(x, start), atol=1e-4, rtol=1e-4)
    return dense, model


def same(model, dense, rows=ROOM, columns=C):
    for name in "kv":
        got, want = getattr(model, name) + 0, getattr(dense, name)
        torch.testing.assert_close(got[:rows, :columns], want[:rows, :columns], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 3, ROOM])
def test_a_part_of_the_batch_is_served(batch):
    dense, model = play([(batch, 6, 0), (batch, 1, 6), (batch, 1, 7), (batch, 3, 8)])
    assert model.k.store is model.v.store and model.k.store.site.batch == batch and model.k.store.length == 11
    assert not model.k.store.fallbacks and graph_reports()[-1].rewritten
    same(model, dense)


def test_conversations_of_other_batches():
    """A new one gets a store of its own size, also where the graph has symbols for the batch and the start."""
    talks = [[(b, 4, 0), (b, 1, 4), (b, 1, 5)] for b in (3, 2, ROOM, 1, 2, 3)]
    dense, model = play([step for talk in talks for step in talk])
    assert model.k.store.site.batch == 3 and model.k.store.length == 6 and not model.k.store.fallbacks
    same(model, dense, 3, 6)


@pytest.mark.parametrize("other", [1, 3, ROOM])
def test_another_batch_in_the_middle_runs_as_it_was(other):
    steps = [(2, 4, 0), (2, 1, 4), (2, 1, 5), (other, 1, 6), (other, 1, 7), (2, 1, 8), (1, 1, 9), (ROOM, 1, 10)]
    dense, model = play(steps)
    assert model.k.store.fallbacks and isinstance(model.k, PreallocatedKV)
    same(model, dense)
    assert model.k.store.site.batch == ROOM


def test_it_goes_on_compressed_once_the_rows_are_there():
    dense, model = play([(2, 4, 0), (2, 1, 4), (3, 1, 5), (3, 1, 6), (3, 1, 7)])
    assert set(model.k.store.fallbacks.values()) == {2} and model.k.store.site.batch == 3
    same(model, dense)


@pytest.mark.parametrize("where", [(ROOM - 1, 0), (2, C - 1)])
@pytest.mark.parametrize("name", ["k", "v"])
def test_values_in_other_rows_are_not_lost(where, name):
    def prepare(model):
        getattr(model, name)[where] = 1.0

    dense, model = play([(2, 4, 0), (2, 1, 4), (2, 1, 5)], prepare)
    assert type(model.k) is type(model.v) is torch.Tensor
    same(model, dense)


def test_a_dense_cache_that_is_partly_filled_is_taken_over():
    def prepare(model):
        torch.manual_seed(1)
        for cache in (model.k, model.v):
            cache[:2, :5] = torch.randn(2, 5, H, D)

    dense, model = play([(2, 1, 5), (2, 1, 6)], prepare)
    assert model.k.store.site.batch == 2 and model.k.store.length == 7
    same(model, dense)
    dense, model = play([(1, 1, 5), (1, 1, 6)], prepare)
    assert type(model.k) is torch.Tensor
    same(model, dense)


def test_eager_code_between_calls_writes_other_rows():
    dense, model = play([(2, 4, 0), (2, 1, 4)])
    fast = torch.compile(model, backend="mikv", options={"lower": "eager", "budget": 1.0})
    with torch.no_grad():
        for one in (dense, model):
            one.k[2, :5], one.v[2, :5] = 1.0, 2.0
        for rows, start in ((3, 5), (3, 6), (2, 7)):
            x = torch.randn(rows, 1, H, D)
            torch.testing.assert_close(fast(x, start), dense(x, start), atol=1e-4, rtol=1e-4)
    same(model, dense)


def test_reset_and_an_evicting_plan():
    """Evicted tokens cannot run as the model wrote it; a new conversation can have any batch."""
    options = {"tiers": "fp:0.2", "window": 2, "sinks": 0, "flush_every": 1, "lower": "eager"}
    model = Prefix()
    fast = torch.compile(model, backend="mikv", options=options)
    with torch.no_grad():
        for batch in (2, 3, 1):
            for start, tokens in ((0, 10), (10, 1), (11, 1)):
                fast(torch.randn(batch, tokens, H, D), start)
            assert model.k.store.site.batch == batch and model.k.store.evicted
        with pytest.raises(EvictedTokensError):
            fast(torch.randn(2, 1, H, D), 12)
        model.k.zero_()
        model.v.zero_()
        fast(torch.randn(2, 3, H, D), 0)
        assert model.k.store.site.batch == 2 and model.k.store.length == 3


class Buffered(torch.nn.Module):
    """One layer whose cache is a ring of 8 columns, or has 64 and is used from the start."""

    def __init__(self, columns, ring, masked=True):
        super().__init__()
        torch.manual_seed(0)
        self.columns, self.ring, self.masked = columns, ring, masked
        self.project = torch.nn.Linear(32, 96)
        for name in "kv":
            self.register_buffer(name, torch.zeros(1, 2, columns, 16))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))
        self.register_buffer("held", torch.full((columns,), -1))

    def forward(self, x):
        tokens = x.shape[1]
        position = torch.arange(tokens) + self.length
        where = position % self.columns if self.ring else position
        self.length += tokens  # before the attention: a call that runs a second time must not count twice
        q, k, v = self.project(x).view(1, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
        self.k.index_copy_(2, where, k)
        self.v.index_copy_(2, where, v)
        self.held.index_copy_(0, where, position)
        if not self.masked:
            return torch.nn.functional.scaled_dot_product_attention(q, self.k, self.v)
        held = self.held if self.ring else torch.arange(self.columns)
        mask = (held <= position[:, None]) & (held >= 0) & (held > position[:, None] - self.columns)
        return torch.nn.functional.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)


@pytest.mark.parametrize(
    "columns, ring, masked, rewind, stays",
    [(8, True, True, None, False), (64, False, True, 4, True), (64, False, True, 9, True), (64, False, False, 4, True)],
    ids=["ring", "rewound", "started over", "rewound without a mask"],
)
def test_writing_before_the_end_is_exact(columns, ring, masked, rewind, stays):
    """Columns behind the new tokens are dropped only if no mask shows them; a ring buffer goes on dense."""
    torch._dynamo.reset()
    dense, model = Buffered(columns, ring, masked), Buffered(columns, ring, masked)
    fast = torch.compile(model, backend="mikv", options={"budget": 1.0, "lower": "eager"})
    with torch.no_grad():
        for step in range(20):
            if step == 7 and rewind is not None:
                dense.length.sub_(rewind)
                model.length.sub_(rewind)
            x = torch.randn(1, 3 if step in (0, 15) else 1, 32)
            torch.testing.assert_close(fast(x), dense(x), atol=1e-5, rtol=1e-5)
            if step == 2:
                assert isinstance(model.k, PreallocatedKV) or not masked
    assert torch.equal(model.length, dense.length)
    assert isinstance(model.k, PreallocatedKV) is stays
    assert model.k.untyped_storage().nbytes() == (0 if stays else dense.k.nbytes)


def test_keys_alone_written_by_eager_code_leave_the_cache_dense_and_right():
    torch._dynamo.reset()
    dense, model = Buffered(64, False), Buffered(64, False)
    fast = torch.compile(model, backend="mikv", options={"budget": 1.0, "lower": "eager"})
    with torch.no_grad():
        for step in range(6):
            if step == 3:
                dense.k[:, :, 40] = 1.0
                model.k[:, :, 40] = 1.0
            x = torch.randn(1, 3 if step == 0 else 1, 32)
            torch.testing.assert_close(fast(x), dense(x), atol=1e-5, rtol=1e-5)
    assert type(model.k) is torch.Tensor and torch.equal(model.k[:, :, 40], dense.k[:, :, 40])


def test_garbage_behind_the_tokens_of_a_new_cache_is_hidden_by_the_mask():
    torch._dynamo.reset()
    dense, model = Buffered(64, False), Buffered(64, False)
    for m in (dense, model):
        m.k.fill_(3.0)
        m.v.fill_(5.0)
    fast = torch.compile(model, backend="mikv", options={"budget": 1.0, "lower": "eager"})
    with torch.no_grad():
        for step in range(4):
            x = torch.randn(1, 3 if step == 0 else 1, 32)
            torch.testing.assert_close(fast(x), dense(x), atol=1e-5, rtol=1e-5)
    assert isinstance(model.k, PreallocatedKV)


def test_changed_copies_of_a_cache_are_branches():
    """`index_copy` returns another cache; the one before, and others made of it, go on showing what they showed."""

    def step(x, keys, values, start):
        tokens = x.shape[1]
        q, k, v = x.view(1, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
        position = torch.arange(tokens) + start
        keys, values = keys.index_copy(2, position, k), values.index_copy(2, position, v)
        mask = torch.arange(64) <= position[:, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask), (keys, values)

    def play(step):
        generator = torch.Generator().manual_seed(1)
        outputs = []

        def call(past, tokens, start):
            out, past = step(torch.randn(1, tokens, 96, generator=generator), *past, start)
            outputs.append(out)
            return past

        first = call((torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16)), 5, 0)
        left, right = call(first, 1, 5), call(first, 1, 5)
        call(left, 1, 6)
        call(right, 1, 3)
        call(right, 1, 6)
        call(first, 1, 5)
        return outputs + [x + 0 for past in (first, left, right) for x in past], left[0]

    torch._dynamo.reset()
    with torch.no_grad():
        want, _ = play(step)
        got, handle = play(torch.compile(step, backend="mikv", options={"budget": 1.0, "lower": "eager"}))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert isinstance(handle, KVTensor) and handle.is_preallocated


def test_a_rolled_window_that_is_read_densely():
    """The model rolls what it is given, so what it is given must not be rolled already."""

    def step(x, keys, values):
        q, k, v = x.view(1, 1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        for cache, new in ((keys, k), (values, v)):
            rolled = cache.roll(-1, dims=-2)
            rolled[:, :, torch.tensor([-1])] = new
            cache.copy_(rolled)
        return F.scaled_dot_product_attention(q, keys, values) + keys[:, :, :2].sum()

    torch._dynamo.reset()
    fast = torch.compile(step, backend="mikv", options={"budget": 1.0, "lower": "eager"})
    keys, values = torch.randn(2, 1, 2, 8, 16)
    copies = keys.clone(), values.clone()
    with torch.no_grad():
        for _ in range(12):
            x = torch.randn(1, 1, 96)
            torch.testing.assert_close(fast(x, *copies), step(x, keys, values), atol=1e-5, rtol=1e-5)
    assert isinstance(copies[0], PreallocatedKV) and graph_reports()[-1].rewritten[0].reads == "dense"
