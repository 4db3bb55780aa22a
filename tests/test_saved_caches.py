"""Caches that are saved and loaded go on bit for bit as the ones that never left, and nothing else is loaded."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from decoder import Decoder, inputs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from idioms import VOCAB, Session, make
from saved_caches import DEFAULT, DENSE, EVICTING, H2O, PAPER, compiled, empty_store, rewritten, slow, state_of

from mikv_compile import (
    KVTensor,
    MikvError,
    SavedCacheError,
    UnusableCacheError,
    cache_report,
    cached_tokens,
    graph_reports,
    load_cache,
    save_cache,
)
from mikv_compile.config import Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.preallocated import PreallocatedKV
from mikv_compile.store import LayerStore

safetensors = pytest.importorskip("safetensors.torch")

# Hand-written decoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["cat", "multi_query_3d", "gptfast", *slow("einsum_cat", "value_dim", "window_cat_slice", "einsum_index_copy")],
)
@torch.no_grad()
def test_tuples_and_buffers_of_hand_written_decoders(tmp_path, name):
    """Tuples are made from the file; buffers are filled in place, as the model holds them."""
    with torch._dynamo.config.patch(recompile_limit=64):
        options = {**DEFAULT, "window": 8, "tiers": "int8:0.1,int4"}
        original, other = (Session(model, compiled(model, options)) for model in (make(name), make(name)))
        generator = torch.Generator().manual_seed(3)
        for tokens in (120, 1, 1):
            original.feed(torch.randint(VOCAB, (2, tokens), generator=generator))
        path = tmp_path / "cache.safetensors"
        save_cache(original.cached(), path)
        if name in ("gptfast", "einsum_index_copy"):
            buffers = other.cached()
            loaded = load_cache(path, into=buffers)
            assert all(a is b for x, y in zip(loaded, other.cached(), strict=True) for a, b in zip(x, y, strict=True))
            assert all(isinstance(x, PreallocatedKV) for pair in loaded for x in pair)
        else:
            other.past = load_cache(path)
            assert all(isinstance(x, KVTensor) for pair in other.past for x in pair)
        other.length = original.length
        for _ in range(3):
            ids = torch.randint(VOCAB, (2, 1), generator=generator)
            assert torch.equal(original.feed(ids), other.feed(ids))


@torch.no_grad()
def test_the_buffers_of_a_module(tmp_path):
    model, other = make("gptfast"), make("gptfast")
    original = Session(model, compiled(model, DEFAULT))
    original.feed(torch.randint(VOCAB, (2, 70), generator=torch.Generator().manual_seed(0)))
    save_cache(model, tmp_path / "c")
    assert load_cache(tmp_path / "c", into=other) is other
    continued = Session(other, compiled(other, DEFAULT))
    continued.length = original.length
    ids = torch.randint(VOCAB, (2, 1))
    assert torch.equal(original.feed(ids), continued.feed(ids))


def grown(tmp_path, options=DEFAULT, tokens=300, batch=2, dtype=torch.float32, steps=3):
    """A decoder, what it is compiled to, and a cache that it has filled."""
    model = Decoder(dtype=dtype, dim=32)
    fast, cache = compiled(model, options), model.new_cache()
    run(fast, cache, inputs([tokens, *[1] * steps], batch, 128, dtype))
    return model, fast, cache, tmp_path / "cache.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [DEFAULT, EVICTING, H2O, PAPER], ids=["default", "evicting", "h2o", "paper"])
def test_objects_that_are_given_go_on_alike(tmp_path, options, dtype):
    model, fast, cache, path = grown(tmp_path, options, dtype=dtype)
    save_cache(cache, path, model)
    loaded = load_cache(path, model, into=model.new_cache())
    graphs = len(graph_reports())
    later = inputs([1] * 70, 2, 128, dtype, seed=5)
    for a, b in zip(run(fast, cache, later), run(fast, loaded, later), strict=True):
        assert torch.equal(a, b)
    assert len(graph_reports()) == graphs, "the same graphs serve the loaded cache"
    assert state_of(cache.keys[1].store) == state_of(loaded.keys[1].store)


def test_the_two_handles_of_a_store_share_it_again(tmp_path):
    _, _, cache, path = grown(tmp_path)
    save_cache({"k": cache.keys, "v": cache.values, "first": cache.keys[0]}, path)
    loaded = load_cache(path)
    assert loaded["k"][0].store is loaded["v"][0].store is loaded["first"].store
    assert loaded["k"][0].store is not loaded["k"][1].store
    assert loaded["k"][0].store.plan is loaded["k"][1].store.plan
    assert [x.role for x in (loaded["k"][0], loaded["v"][0])] == ["key", "value"]


def test_a_cropped_cache_and_handles_of_ranges(tmp_path):
    model, fast, cache, path = grown(tmp_path)
    part = cache.keys[0][:, :, 20:90]
    cache.keys, cache.values = ([x[:, :, :-2] for x in tensors] for tensors in (cache.keys, cache.values))
    save_cache([cache.keys, cache.values, part], path)
    keys, values, seen = load_cache(path)
    assert seen.range == (20, 90) and torch.equal(seen.dequantize(), part.dequantize())
    loaded = model.new_cache()
    loaded.keys, loaded.values = keys, values
    later = inputs([1] * 4, 2, 128, seed=5)
    for a, b in zip(run(fast, cache, later), run(fast, loaded, later), strict=True):
        assert torch.equal(a, b)


def test_a_sliding_window_that_has_moved(tmp_path):
    """Its store begins behind the first token, and shows fewer tokens than it holds."""
    shape = CacheShape(2, 2, 16, 16, torch.float32)
    plan = Planner(Options.parse({"tiers": "int8:0.1,int4", "window": 16})).layer(0, shape, sliding=True)
    store = LayerStore(plan, shape, torch.device("cpu"))
    store.append(*torch.randn(2, 2, 2, 300, 16).unbind())
    handles = [KVTensor(store, role, start=203) for role in ("key", "value")]
    store.drop_before(203)
    handles = [KVTensor(store, role, start=210) for role in ("key", "value")]
    store.drop_before(210)
    assert 0 < store.base < store.start == 210
    save_cache(handles, tmp_path / "c")
    loaded = load_cache(tmp_path / "c")
    assert state_of(loaded[0].store) == state_of(store) and loaded[0].range == (210, 300)
    for a, b in zip(handles, loaded, strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())
    for each in (store, loaded[0].store):
        torch.manual_seed(0)
        each.append(*torch.randn(2, 2, 2, 200, 16).unbind())
        each.drop_before(400)
    assert state_of(loaded[0].store) == state_of(store)


HISTORIES = [
    {"tiers": "int8:0.1,k4v2", "window": 8, "flush_every": 64},
    {"tiers": "fp:0.1,int8:0.2,int2:0.4", "window": 4, "quantizer": "mikv", "flush_every": 8},
    {"tiers": "int8:40,k4v2:64", "window": 8, "sinks": 2},
    {"tiers": "int4:0.5", "window": 4, "policy": "knorm", "flush_every": 1},
    {"tiers": "int8:0.2,int4", "window": 8, "policy": "recent", "sinks": 0},
    {"budget": 0.25, "policy": "expected"},
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.sampled_from(HISTORIES),
    sliding=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["append", "crop", "drop"]), st.integers(1, 150)), min_size=1, max_size=8),
)
def test_stores_of_any_history_come_back(tmp_path, options, sliding, steps):
    """What is checked when a file is read holds for every store that operations can make."""
    shape = CacheShape(2, 2, 16, 16, torch.float32)
    plan = Planner(Options.parse(options)).layer(0, shape, sliding=sliding)
    store, path = LayerStore(plan, shape, torch.device("cpu")), tmp_path / "c"
    torch.manual_seed(0)
    for step, amount in [("append", 130), *steps]:
        if step == "append":
            store.append(*torch.randn(2, 2, 2, amount, 16).unbind())
        elif step == "crop":
            store.crop(max(store.length - amount, 1))
        else:
            store.drop_before(max(store.end - amount, store.base))
    save_cache([KVTensor(store, "key")], path)
    loaded = load_cache(path)[0].store
    assert state_of(loaded) == state_of(store)
    for tokens in torch.randn(3, 2, 2, 2, 40, 16):
        for each in (store, loaded):
            each.append(*tokens.unbind())
            each.crop(each.length - 1)
    assert state_of(loaded) == state_of(store)


def test_nan_and_infinity_are_kept(tmp_path):
    store = empty_store({"preset": "full"})
    k = torch.tensor([float("nan"), float("inf"), -0.0, 1.0]).repeat(2, 2, 5, 4)
    store.append(k, -k)
    dense = torch.tensor([float("nan"), -float("inf")])
    save_cache([KVTensor(store, "key"), KVTensor(store, "value"), dense, float("nan")], tmp_path / "c")
    key, value, same, number = load_cache(tmp_path / "c")
    assert torch.equal(key.dequantize().view(torch.int32), k.view(torch.int32))
    assert torch.equal(value.dequantize().view(torch.int32), (-k).view(torch.int32))
    assert torch.equal(same.view(torch.int32), dense.view(torch.int32)) and math.isnan(number)


def test_plain_values_structures_and_shared_tensors_come_back(tmp_path):
    shared = torch.arange(6).reshape(2, 3).t()
    cache = [(1, 2.5, True, None), {"a": [shared, shared], 3: torch.float16}, torch.tensor(7), torch.empty(0), "text"]
    save_cache(cache, tmp_path / "c")
    loaded = load_cache(tmp_path / "c")
    assert loaded[0] == cache[0] and type(loaded[0]) is tuple and loaded[4] == "text"
    assert loaded[1]["a"][0] is loaded[1]["a"][1] and torch.equal(loaded[1]["a"][0], shared)
    assert loaded[1][3] is torch.float16 and loaded[2].item() == 7 and loaded[3].shape == (0,)


def test_dense_tensors_that_are_given_are_filled_in_place(tmp_path):
    cache, given = [torch.randn(2, 3), torch.randn(4)], [torch.zeros(2, 3), torch.zeros(5)]
    save_cache(cache, tmp_path / "c")
    address = given[0].data_ptr()
    loaded = load_cache(tmp_path / "c", into=given)
    assert loaded is given and given[0].data_ptr() == address
    assert torch.equal(given[0], cache[0]) and torch.equal(given[1], cache[1])


def test_views_of_one_memory_are_saved_as_tensors_of_their_own(tmp_path):
    whole = torch.arange(10.0)
    save_cache([whole[:5], whole[3:]], tmp_path / "c")
    loaded = load_cache(tmp_path / "c")
    assert torch.equal(loaded[0], whole[:5]) and torch.equal(loaded[1], whole[3:])


@pytest.mark.parametrize("options", [DEFAULT, EVICTING, H2O], ids=["default", "evicting", "h2o"])
def test_the_file_is_as_large_as_the_cache(tmp_path, options):
    _, _, cache, path = grown(tmp_path, options, tokens=4000, batch=1, steps=0)
    save_cache(cache.keys + cache.values, path)
    nbytes = cache_report(cache).nbytes
    assert nbytes * 0.9 < path.stat().st_size < nbytes * 1.02 + 2000 + 2000 * len(cache.keys)


def test_tokens_that_have_left_a_tier_are_not_in_the_file(tmp_path):
    """Slots behind those in use keep old numbers in memory."""
    store = empty_store({"preset": "full"})
    store.append(torch.full((2, 2, 100, 16), 7.0), torch.full((2, 2, 100, 16), 7.0))
    handles = [KVTensor(store, role, stop=5) for role in ("key", "value")]
    store.crop(5)
    assert bool((store.buffers[0][:, :, 5:] == 7).any())
    save_cache(handles, tmp_path / "c")
    codes = safetensors.load_file(tmp_path / "c")["store0.tier0_key_codes"]
    assert bool((codes[:, :, :5] == 7).all()) and not codes[:, :, 5:].any()


def test_a_save_does_not_change_the_cache(tmp_path):
    _, _, cache, path = grown(tmp_path)
    before = state_of(cache.keys[0].store)
    save_cache(cache, path)
    assert state_of(cache.keys[0].store) == before


def test_a_loaded_cache_can_be_saved_cropped_copied_and_moved(tmp_path):
    model, _, cache, path = grown(tmp_path)
    save_cache(cache.keys + cache.values, path)
    loaded = load_cache(path, device="cpu")
    again = tmp_path / "again"
    save_cache(loaded, again)
    assert path.stat().st_size == again.stat().st_size
    checksums = []
    for each in (path, again):
        with safetensors.safe_open(each, "pt") as file:
            checksums.append(file.metadata()["sha256"])
    assert checksums[0] == checksums[1]
    other = copy.deepcopy(loaded)
    assert torch.equal(other[0].dequantize(), cache.keys[0].dequantize())
    assert torch.equal(loaded[0].index_select(0, torch.tensor([1, 0])).dequantize(), cache.keys[0].dequantize()[[1, 0]])


def test_a_write_to_keys_alone_has_to_be_complete(tmp_path):
    store = empty_store({"preset": "full"})
    handle = KVTensor(store, "key", capacity=8)
    handle[:, :, :3] = 1.0
    with pytest.raises(MikvError, match="keys were written up to position 3"):
        save_cache([handle], tmp_path / "c")


def test_an_unusable_cache_is_not_saved(tmp_path):
    store = empty_store({"preset": "full"})
    handle = KVTensor(store, "key")
    store.spoil("it broke")
    with pytest.raises(UnusableCacheError, match="it broke"):
        save_cache([handle], tmp_path / "c")
    assert not list(tmp_path.iterdir())


class Slotted:
    __slots__ = ("keys",)


@pytest.mark.parametrize(
    "bad, match",
    [
        ([{1, 2}], r"cache\[0\] is a set"),
        ({"a": Slotted()}, r"cache\['a'\] is a Slotted"),
        ({(1, 2): 3}, "a key of tuple"),
        ([torch.eye(2).to_sparse()], r"cache\[0\] is a tensor"),
        ([torch.ones(2, device="meta")], r"cache\[0\] is a tensor"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, bad, match):
    with pytest.raises(SavedCacheError, match=match):
        save_cache(bad, tmp_path / "c")


class Output(dict):
    """As transformers returns it."""


@pytest.mark.parametrize(
    "bad, match",
    [
        (None, "the NoneType that was given.*return_dict_in_generate=True"),
        ("x", "the str"),
        (3, "the int"),
        ([], "the list"),
        (((None, None),), "the tuple"),
        (torch.tensor([[1, 2, 3]]), "the Tensor"),
        (Output(past_key_values=[DENSE]), "Output is no cache.*its past_key_values"),
    ],
)
def test_what_is_no_cache_is_not_written(tmp_path, bad, match):
    with pytest.raises(SavedCacheError, match=match):
        save_cache(bad, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_arguments_of_another_kind(tmp_path):
    path = tmp_path / "c"
    for arguments, match in (
        ({"model": "tiny"}, "model is a str"),
        ({"tokens": "abc"}, "token ids are whole numbers .*'abc'"),
        ({"tokens": [[1, 2], [3]]}, "token ids are whole numbers"),
        ({"tokens": [1.5]}, "these are torch.float32"),
    ):
        with pytest.raises(SavedCacheError, match=match):
            save_cache([DENSE], path, **arguments)
    assert not path.exists()
    save_cache([DENSE], path)
    for arguments, match in (
        ({"model": "tiny"}, "model is a str"),
        ({"device": "gpu"}, "to the device 'gpu'"),
        ({"device": 1.5}, "to the device 1.5"),
        ({"device": "cuda:99"}, "to the device 'cuda:99'"),
    ):
        with pytest.raises(SavedCacheError, match=match):
            load_cache(path, **arguments)


def test_a_file_cannot_switch_on_offloading(tmp_path):
    cache, path = Decoder().new_cache(), tmp_path / "c"

    def told(value, state, tensors):
        state["cache"][1]["attributes"]["offloading"] = ["value", value]

    save_cache(cache, path)
    for value in (True, 1, "yes"):
        rewritten(path, partial(told, value))
        with pytest.raises(SavedCacheError, match="offloading=True"):
            load_cache(path, into=Decoder().new_cache())
    rewritten(path, partial(told, False))
    assert load_cache(path, into=Decoder().new_cache()).offloading is False
    cache.offloading = True
    with pytest.raises(SavedCacheError, match="offloading=True"):
        save_cache(cache, path)


def test_a_cache_that_contains_itself_is_refused(tmp_path):
    cache = []
    cache.append(cache)
    with pytest.raises(SavedCacheError, match="contains itself"):
        save_cache(cache, tmp_path / "c")


def test_an_object_needs_one_to_be_filled(tmp_path):
    _, _, cache, path = grown(tmp_path)
    save_cache(cache, path)
    with pytest.raises(SavedCacheError, match="is a GrowingCache, which is not made from a file; give load_cache"):
        load_cache(path)
    with pytest.raises(SavedCacheError, match="is a dict, and the saved one a GrowingCache"):
        load_cache(path, into={})
    short = Decoder(layers=3).new_cache()
    with pytest.raises(SavedCacheError, match="has 3 entries, and the saved one 2"):
        load_cache(path, into=short)
    assert short.keys == [None] * 3, "nothing was filled"


def test_pickling_points_to_save_cache(tmp_path):
    _, _, cache, _ = grown(tmp_path, tokens=20)
    with pytest.raises(MikvError, match="save_cache"):
        torch.save(cache.keys, tmp_path / "p")


# Models and tokens ---------------------------------------------------------------------------------------------------


class Configured(Decoder):
    """A decoder with a configuration, as those of transformers have one."""

    def __init__(self, theta=1.0, **sizes):
        super().__init__(**sizes)
        self.config = self
        self.theta = theta

    def to_dict(self):
        return {"theta": self.theta, "_name_or_path": str(id(self)), "nested": {"transformers_version": str(id(self))}}


@pytest.mark.parametrize(
    "other, match",
    [
        (lambda: Configured(seed=1), "other weights"),
        (lambda: Configured(theta=2.0), "configurations differ in theta"),
        (lambda: Configured(heads=8), "other names, shapes or dtypes"),
        (lambda: Configured(dtype=torch.float16), "other names, shapes or dtypes"),
        (lambda: Decoder(), "is of a Configured, the model is a Decoder"),
    ],
)
def test_another_model_is_refused(tmp_path, other, match):
    path = tmp_path / "c"
    save_cache([torch.ones(1)], path, model=Configured())
    load_cache(path, model=Configured())
    load_cache(path, model=torch.compile(Configured(), backend="mikv"))
    with pytest.raises(SavedCacheError, match=match) as error:
        load_cache(path, model=other())
    assert "check_model=False" in str(error.value) and str(path) in str(error.value)
    assert load_cache(path, model=other(), check_model=False)[0].item() == 1


@pytest.mark.parametrize("rows", [slice(None), slice(-4, None)], ids=["all of it", "its last rows"])
def test_a_change_of_one_layer_is_noticed(tmp_path, rows):
    model = Decoder()
    save_cache([DENSE], tmp_path / "c", model=model)
    with torch.no_grad():
        model.o[1].weight[rows] *= 1.01
    with pytest.raises(SavedCacheError, match="other weights"):
        load_cache(tmp_path / "c", model=model)


@pytest.mark.parametrize("saved, given, match", [(True, False, "got no model"), (False, True, "without a model")])
def test_what_cannot_be_compared_is_said(tmp_path, saved, given, match):
    """No pytest.fixture: this project's pytest runs without its logging plugin."""
    import logging

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("mikv_compile.saved.api")
    log.addHandler(handler)
    try:
        save_cache([DENSE], tmp_path / "c", model=Decoder() if saved else None)
        load_cache(tmp_path / "c", model=Decoder() if given else None)
    finally:
        log.removeHandler(handler)
    assert [match in record.getMessage() for record in records] == [True]


def test_weights_that_are_not_loaded_cannot_be_compared(tmp_path):
    with pytest.raises(SavedCacheError, match="'meta'"):
        save_cache([DENSE], tmp_path / "c", model=Decoder().to("meta"))


def test_how_much_of_a_prompt_is_cached(tmp_path):
    path = tmp_path / "c"
    save_cache([DENSE], path, tokens=[5, 6, 7])
    assert cached_tokens(path, [5, 6, 7, 8]) == cached_tokens(path, torch.tensor([[5, 6, 7]])) == 3
    assert cached_tokens(path, [5, 6]) == cached_tokens(path, [5, 6, 9, 9]) == 2
    assert cached_tokens(path, [1, 6, 7]) == cached_tokens(path, []) == 0
    save_cache([DENSE], path, tokens=torch.tensor([[5, 6, 7], [1, 2, 3]]))
    assert cached_tokens(path, [[5, 6, 7], [1, 2, 4]]) == 2
    with pytest.raises(SavedCacheError, match="is of tokens"):
        cached_tokens(path, [5, 6])
    with pytest.raises(SavedCacheError, match="have the shape"):
        save_cache([DENSE], path, tokens=torch.zeros(1, 1, 1))
    save_cache([DENSE], path)
    with pytest.raises(SavedCacheError, match="without tokens"):
        cached_tokens(path, [5])
