"""Caches that are saved and loaded go on bit for bit as the ones that never left, and nothing else is loaded."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from decoder import Decoder, inputs, run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from idioms import VOCAB, Session, make

from mikv_compile import (
    EvictedTokensError,
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
from mikv_compile.saved import container, stores
from mikv_compile.store import LayerStore

safetensors = pytest.importorskip("safetensors.torch")

DEFAULT = {"lower": "eager"}
EVICTING = {"tiers": "int8:0.1,k4v2:0.3", "window": 8, "flush_every": 64, "lower": "eager"}
H2O = {"policy": "h2o", "window": 8, "lower": "eager"}
DENSE = torch.ones(2)
PAPER = {"preset": "mikv-paper", "window": 4, "lower": "eager"}


def slow(*names):
    """More of what others test already."""
    return [pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow) for name in names]


def compiled(model, options):
    return torch.compile(model, backend="mikv", options=options)


def state_of(store: LayerStore) -> tuple:
    """All that decides how a store goes on, with the bytes of its slots in use."""
    data, tensors = stores.store_to_data(store, 0, "")
    return data, {name: x.reshape(-1).view(torch.uint8).tolist() for name, x in tensors.items()}, store.plan


def rewritten(path: Path, change) -> None:
    """Change a file's state and tensors, with a checksum that fits: it is no signature."""
    with container.opened(path) as file:
        state, tensors = file.state, {name: file.tensor(name).clone() for name in file.names}
    change(state, tensors)
    container.write(path, state, tensors)


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


def empty_store(options) -> LayerStore:
    shape = CacheShape(2, 2, 16, 16, torch.float32)
    return LayerStore(Planner(Options.parse(options)).layer(0, shape), shape, torch.device("cpu"))


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


def test_a_change_of_one_layer_is_noticed(tmp_path):
    model = Decoder()
    save_cache([DENSE], tmp_path / "c", model=model)
    with torch.no_grad():
        model.o[1].weight *= 1.01
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


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load", [load_cache, lambda path: cached_tokens(path, [1])], ids=["load_cache", "cached_tokens"]
)
def test_files_that_are_no_saved_cache(tmp_path, load):
    path = tmp_path / "c"
    with pytest.raises(SavedCacheError, match="there is no such file") as error:
        load(path)
    assert str(path) in str(error.value)
    path.write_text("hello")
    with pytest.raises(SavedCacheError, match="no complete safetensors file"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(SavedCacheError, match="no complete safetensors file"):
        load(path)
    with pytest.raises(SavedCacheError, match="is a folder"):
        load(tmp_path)
    safetensors.save_file({"tokens": torch.ones(1, 1)}, path)
    with pytest.raises(SavedCacheError, match="was not written by"):
        load(path)
    safetensors.save_file({}, path, {"format": "mikv-cache", "version": str(container.VERSION + 1)})
    with pytest.raises(SavedCacheError, match="install a newer mikv-compile"):
        load(path)
    for version in ("", "x", "-1", "1" * 5000):
        safetensors.save_file({}, path, {"format": "mikv-cache", "version": version})
        with pytest.raises(SavedCacheError, match="format version"):
            load(path)


def test_the_folder_must_exist_and_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    with pytest.raises(SavedCacheError, match=r"there is no folder .*none"):
        save_cache([DENSE], tmp_path / "none" / "c")
    with pytest.raises(SavedCacheError, match="is a folder"):
        save_cache([DENSE], tmp_path)
    path = tmp_path / "c"
    save_cache([DENSE], path)

    def half(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors, "save_file", half)
    with pytest.raises(SavedCacheError, match="no space left"):
        save_cache([DENSE, 2], path)
    assert torch.equal(*load_cache(path), DENSE) and os.listdir(tmp_path) == ["c"]


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_cache([DENSE], tmp_path / "c"), lambda: load_cache(tmp_path / "c")):
        with pytest.raises(SavedCacheError, match=r"mikv-compile\[save\]"):
            call()


@pytest.fixture(scope="module")
def saved_file(tmp_path_factory) -> bytes:
    """A small cache of three tiers that evicts, a preallocated one, and one that slides."""
    path = tmp_path_factory.mktemp("saved") / "c"
    torch.manual_seed(0)
    tiers = empty_store({"tiers": "fp:0.1,int8:0.2,int2:0.4", "window": 4, "quantizer": "mikv", "flush_every": 8})
    full = empty_store({"tiers": "int8:0.1,int4", "window": 4, "policy": "knorm"})
    sliding = LayerStore(
        Planner(Options.parse({"window": 4})).layer(0, tiers.site, sliding=True), tiers.site, torch.device("cpu")
    )
    for store in (tiers, full, sliding):
        for tokens in (100, 1, 40):
            store.append(*torch.randn(2, 2, 2, tokens, 16).unbind())
    start = sliding.end - 20
    shown = [KVTensor(sliding, role, start=start) for role in ("key", "value")]
    sliding.drop_before(start)
    assert tiers.evicted and sliding.base and all(tiers.counts)
    cache = {
        "tiers": [KVTensor(tiers, role) for role in ("key", "value")],
        "full": tuple(KVTensor(full, role, capacity=150) for role in ("key", "value")),
        "sliding": shown,
        "dense": torch.randn(3),
    }
    save_cache(cache, path, model=Decoder(layers=1), tokens=[1, 2, 3])
    return path.read_bytes()


def use(cache) -> None:
    """Let every kernel read and write a loaded cache. What it answers does not matter: it may only not crash."""
    handles = [x for part in (cache.values() if isinstance(cache, dict) else ()) if isinstance(part, list | tuple)
               for x in part if isinstance(x, KVTensor)]  # fmt: skip
    for handle in handles:
        store = handle.store
        s, plan = store.site, store.plan
        with contextlib.suppress(Exception):
            handle.dequantize()
        for new in (1, 3, 70):
            with contextlib.suppress(Exception):
                q, k, v = (torch.randn(s.batch, s.kv_heads, new, d) for d in (s.key_dim, s.key_dim, s.value_dim))
                orders = store.prepare(new, fresh=True)
                masked = store.length < 10_000
                mask = torch.ones(1, 1, new, store.length + new, dtype=torch.bool) if masked else None
                step = torch.ops.mikv.step_v1
                step(q, k, v, mask, 1.0, 0.0, store.buffers, orders.encode(), str(plan.format), plan.policy)
                store.commit(orders, new)
        with contextlib.suppress(Exception):
            store.drop_before(store.end - 2)
            store.crop(store.length - 5)
            store.crop(3)
            store.dequantize("key")


def test_the_small_file_loads(tmp_path, saved_file):
    path = tmp_path / "c"
    path.write_bytes(saved_file)
    use(load_cache(path))


FUZZ = settings(
    max_examples=150, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FUZZ
@given(data=st.data())
def test_bytes_that_changed_are_noticed(tmp_path, saved_file, data):
    changed = bytearray(saved_file)
    header = 8 + int.from_bytes(saved_file[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(
            st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(header, len(changed) - 1))
        )
        changed[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed)))]
    assume(changed != saved_file)
    path = tmp_path / "c"
    path.write_bytes(changed)
    with pytest.raises(SavedCacheError, match="c: "):
        load_cache(path)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.integers(), st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30]),
    st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.lists(st.integers(-2, 150), max_size=4),
    st.sampled_from(["float16", "value", "BTHD", "recent", "8:t1c16,8:t1c16", "8:t64c16,fp|4:t48c1,2:t1c16+scored"]),
)  # fmt: skip


def places(node, path=()):
    """The paths to all parts of a JSON document."""
    yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


@FUZZ
@given(data=st.data())
def test_a_file_that_lies_is_refused_or_harmless(tmp_path, saved_file, data):
    """With a checksum that fits. Whatever is loaded must not lead a kernel out of its buffers."""
    path = tmp_path / "c"
    path.write_bytes(saved_file)

    def change(state, tensors):
        for _ in range(data.draw(st.integers(1, 2))):
            if data.draw(st.integers(0, 3)):
                where = data.draw(st.sampled_from([p for p in places(state) if p and p[0] != "model"]))
                part = state
                for key in where[:-1]:
                    part = part[key]
                part[where[-1]] = data.draw(ODD)
                continue
            name = data.draw(st.sampled_from(sorted(tensors)))
            how, x = data.draw(st.sampled_from(["value", "shape", "dtype", "gone"])), tensors[name]
            if how == "value":
                flat = x.reshape(-1)
                flat[data.draw(st.integers(0, flat.numel() - 1))] = data.draw(st.integers(-100, 200)) % 251 - 50
            elif how == "shape":
                tensors[name] = x.flatten()[: data.draw(st.integers(0, x.numel()))].clone()
            elif how == "dtype":
                tensors[name] = x.to(data.draw(st.sampled_from([torch.float32, torch.uint8, torch.int64])))
            else:
                tensors.pop(name)

    with contextlib.suppress(KeyError, IndexError, TypeError):  # the second change may meet what the first has removed
        rewritten(path, change)
    try:
        loaded = load_cache(path)
    except SavedCacheError as error:
        assert str(path) in str(error)
        return
    use(loaded)


def lie(number, **changes):
    """Change what is said of a store."""
    return lambda state, tensors: state["stores"][number].update(changes)


def tell(name, slot, value):
    """Change a position."""

    def change(state, tensors):
        tensors[name][0, 0, slot] = value

    return change


def tier(number, **changes):
    """Change the first tier of a plan."""
    return lambda state, tensors: state["plans"][number]["tiers"][0].update(changes)


def plan(number, **changes):
    return lambda state, tensors: state["plans"][number].update(changes)


@pytest.mark.parametrize(
    "change, match",
    [
        (tell("store0.tier0_positions", 0, -1), "before the first token"),
        (tell("store0.tier0_positions", 0, 141), "behind the last token"),
        (tell("store1.tier1_positions", 0, 1), "stored twice"),
        (lie(0, exact_from=0), "the place of a recent token"),
        (lie(0, length=140), "."),
        (lie(1, length=142), "the number of tokens"),
        (lie(0, base=5), "."),
        (lie(0, recycled=[0, 3000]), "what is overwritten next"),
        (lie(1, recycled=[0, 0]), "what is overwritten next"),
        (lie(1, counts=[77, 64, 0]), "the number of tiers"),
        (lie(1, counts=[141, 0]), "buffer"),
        (lie(1, plan=-1), "the number of a plan"),
        (lie(1, start=500), "the range of tokens"),
        (plan(0, window=-1), "the window"),
        (plan(0, policy="mine"), "'mine', which is not registered"),
        (plan(0, flush_every=0), "flush_every"),
        (plan(1, format="8:t1c16,8:t1c16|4:t48c1,4:t1c16+scored"), "."),
        (tier(1, less=-5), "what a tier's share is short of"),
        (tier(1, share=float("nan")), "a tier's share"),
        (tier(1, key_bits=4), "stored as"),
        (plan(1, flush_every=63), "blocks of 64 tokens"),
        (plan(1, slot_bytes=[0.0, 0.0]), "the bytes of a slot"),
        (plan(1, recent_share=float("nan")), "the recent share"),
        (lambda state, tensors: tensors.pop("store1.tier0_key_codes"), "no tensor 'store1.tier0_key_codes'"),
        (lambda state, tensors: state.pop("plans"), "plans"),
        (lambda state, tensors: state.update(cache=["object", {"class": "X", "attributes": {}}]), "is a X"),
    ],
)
def test_lies_that_are_told_by_name(tmp_path, saved_file, change, match):
    path = tmp_path / "c"
    path.write_bytes(saved_file)
    rewritten(path, change)
    with pytest.raises(SavedCacheError, match=match) as error:
        load_cache(path)
    assert "c: " in str(error.value)


def test_the_order_of_a_sliding_window_is_checked(tmp_path, saved_file):
    path = tmp_path / "c"
    path.write_bytes(saved_file)

    def swap(state, tensors):
        sliding = tensors["store2.tier1_positions"]
        sliding[0, 0, :2] = sliding[0, 0, :2].flip(0)

    rewritten(path, swap)
    with pytest.raises(SavedCacheError, match="the order of a sliding window"):
        load_cache(path)


@pytest.mark.parametrize("name", ["append", "__class__", "theta"])
def test_attributes_that_objects_do_not_have_for_themselves_are_refused(tmp_path, name):
    """A file cannot put something in the place of a method."""
    cache, path = Decoder().new_cache(), tmp_path / "c"
    save_cache(cache, path)
    rewritten(path, lambda state, tensors: state["cache"][1]["attributes"].update({name: ["value", 3]}))
    if name == "theta":  # what transformers sets when a layer is first used
        assert load_cache(path, into=Decoder().new_cache()).theta == 3
        return
    with pytest.raises(SavedCacheError, match=f"cache.{name} makes no sense"):
        load_cache(path, into=Decoder().new_cache())


def test_every_field_of_a_plan_and_a_store_is_in_the_file(saved_file, tmp_path):
    """A field that is added later must be saved, too."""
    path = tmp_path / "c"
    path.write_bytes(saved_file)
    with container.opened(path) as file:
        state = file.state
    assert set(state["plans"][0]) == {f.name for f in dataclasses.fields(type(empty_store({}).plan))}
    known = {"plan", "site", "capacities", "buffers", "device", "anchor", "fallbacks", "recompressed", "untouched",
             "changes", "_spoiled", "_handles", "_derived", "_pending"}  # fmt: skip
    assert {name.lstrip("_") for name in set(vars(empty_store({}))) - known} == set(state["stores"][0]) - {
        "plan",
        "site",
    }


def test_the_checksum_covers_what_it_says(saved_file, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(saved_file)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(metadata["sha256"]) == hashlib.sha256().digest_size * 2
    for key, value in (("state", json.dumps({"cache": ["value", 1]})), ("more", "x")):
        safetensors.save_file(tensors, path, {**metadata, key: value})
        with pytest.raises(SavedCacheError, match="do not match their checksum"):
            load_cache(path)


# Caches of transformers ----------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

from tiny_models import build, model, prompt  # noqa: E402  (needs transformers)
from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402


def logits(runner, ids, cache, **more):
    with torch.no_grad():
        return runner(ids, past_key_values=cache, **more).logits


def by_config(m):
    return DynamicCache(config=m.config)


@pytest.mark.parametrize(
    "name, new, options, dtype",
    [
        ("llama", lambda m: DynamicCache(), DEFAULT, torch.float32),
        ("mistral", by_config, DEFAULT, torch.float32),
        ("lfm2", by_config, DEFAULT, torch.float32),
        ("llama", lambda m: StaticCache(config=m.config, max_cache_len=150), DEFAULT, torch.float32),
        *slow(
            ("llama", by_config, EVICTING, torch.bfloat16),
            ("llama", by_config, H2O, torch.float16),
            ("gemma2", by_config, DEFAULT, torch.float32),
            ("jamba", by_config, DEFAULT, torch.float32),
            ("gemma2", lambda m: StaticCache(config=m.config, max_cache_len=150), DEFAULT, torch.float32),
        ),
    ],
    ids=["llama", "sliding", "conv", "static", "evicting-bf16", "h2o-fp16", "some-slide", "mamba", "static-sliding"],
)
def test_caches_of_transformers_go_on_alike(tmp_path, name, new, options, dtype):
    m = model(name, dtype)
    fast, cache, path = compiled(m, options), new(m), tmp_path / "c"
    logits(fast, prompt(2, 100), cache)
    for step in range(3):
        logits(fast, prompt(2, 1, step), cache)
    save_cache(cache, path, model=m)
    made, filled = load_cache(path, model=fast), load_cache(path, into=new(m))
    assert type(made) is type(cache) and cache_report(made).layers
    assert [type(a) for a in made.layers] == [type(a) for a in cache.layers]
    assert int(made.get_seq_length()) == int(cache.get_seq_length()) == 103
    compressed = [getattr(getattr(x, "keys", None), "store", None) is not None for x in cache.layers]
    assert any(compressed) and compressed == [
        getattr(getattr(x, "keys", None), "store", None) is not None for x in made.layers
    ]
    for step in range(10, 20):
        want = logits(fast, prompt(2, 1, step), cache)
        assert torch.equal(logits(fast, prompt(2, 1, step), made), want)
        assert torch.equal(logits(fast, prompt(2, 1, step), filled), want)


def test_a_dense_static_cache_that_was_filled_early(tmp_path):
    """Tensors that exist already keep their memory."""
    m, path = model("llama"), tmp_path / "c"
    caches = [StaticCache(config=m.config, max_cache_len=40) for _ in range(2)]
    for cache in caches:
        cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    logits(m, prompt(1, 12), caches[0])
    save_cache(caches[0], path)
    address = caches[1].layers[0].keys.data_ptr()
    load_cache(path, into=caches[1])
    assert caches[1].layers[0].keys.data_ptr() == address
    assert torch.equal(logits(m, prompt(1, 1), caches[0]), logits(m, prompt(1, 1), caches[1]))


@pytest.mark.parametrize("name", ["t5", *slow("bart")])
def test_encoder_decoders(tmp_path, name):
    m, path = model(name), tmp_path / "c"
    fast = compiled(m, DEFAULT)
    cache = EncoderDecoderCache(DynamicCache(config=m.config), DynamicCache(config=m.config))
    with torch.no_grad():
        encoded = m.get_encoder()(prompt(2, 30))
    for step in range(3):
        logits(fast, None, cache, encoder_outputs=encoded, decoder_input_ids=prompt(2, 1, step))
    save_cache(cache, path, model=m)
    made = load_cache(path, model=m)
    assert made.is_updated == cache.is_updated
    for step in range(10, 14):
        more = {"encoder_outputs": encoded, "decoder_input_ids": prompt(2, 1, step)}
        assert torch.equal(logits(fast, None, cache, **more), logits(fast, None, made, **more))


def test_a_cache_for_another_model_has_other_layers(tmp_path):
    m, path = model("mistral"), tmp_path / "c"
    cache = by_config(m)
    logits(m, prompt(1, 30), cache)
    save_cache(cache, path, model=m)
    with pytest.raises(SavedCacheError, match="DynamicLayer"):
        load_cache(path, model=model("llama"), check_model=False)


def test_tokens_have_to_be_those_of_the_cache(tmp_path):
    m, path = model("llama"), tmp_path / "c"
    cache = DynamicCache()
    logits(m, prompt(1, 12), cache)
    with pytest.raises(SavedCacheError, match=r"stands for 12 tokens, and 13 are given.*sequences\[:, :-1\]"):
        save_cache(cache, path, tokens=prompt(1, 13))
    save_cache(cache, path, tokens=prompt(1, 12))


FILLS = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny_models import build, prompt
from transformers import DynamicCache
import mikv_compile
model = build("llama")
cache = DynamicCache(config=model.config)
fast = torch.compile(model, backend="mikv", options={options!r})
sequences = fast.generate(prompt(2, 100), past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
mikv_compile.save_cache(cache, {path!r}, model=model, tokens=sequences[:, :-1])
"""


@pytest.mark.parametrize("options", [DEFAULT], ids=["default"])
def test_another_process_goes_on(tmp_path, options):
    """One process reads a prompt and saves; this one loads and generates what an uninterrupted run generates."""
    path = str(tmp_path / "c")
    program = FILLS.format(tests=str(Path(__file__).parent), options=options, path=path)
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    m = build("llama")
    fast = compiled(m, options)
    plain = {"do_sample": False, "pad_token_id": 0}
    want = fast.generate(prompt(2, 100), max_new_tokens=25, min_new_tokens=25, **plain)
    cache = load_cache(path, model=m)
    assert cached_tokens(path, want) == cache.get_seq_length() == 104
    got = fast.generate(want[:, :105], past_key_values=cache, max_new_tokens=20, min_new_tokens=20, **plain)
    assert torch.equal(got, want)
    assert cache_report(cache).layers[0].plan is not None


def test_an_evicting_cache_says_so_after_loading(tmp_path):
    m, path = model("llama"), tmp_path / "c"
    cache = DynamicCache()
    logits(compiled(m, EVICTING), prompt(1, 400), cache)
    save_cache(cache, path)
    loaded = load_cache(path, into=DynamicCache())
    with pytest.raises(EvictedTokensError):
        loaded.layers[0].keys.dequantize()
