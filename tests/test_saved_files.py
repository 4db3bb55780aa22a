"""Files of saved caches: what is no such file, was changed, or lies, is refused or harmless."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from decoder import Decoder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from saved_caches import DENSE, empty_store, rewritten

from mikv_compile import KVTensor, SavedCacheError, cached_tokens, load_cache, save_cache
from mikv_compile.config import Options
from mikv_compile.planner import Planner
from mikv_compile.saved import container
from mikv_compile.store import LayerStore

safetensors = pytest.importorskip("safetensors.torch")


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
    name = max(tensors)  # the prompt's tokens, int64
    others = {key: x for key, x in tensors.items() if key != name}
    # The same bytes in the same order under another name, of another shape or dtype.
    told = [{f"{name}x": tensors[name]}, {name: tensors[name].reshape(-1)}, {name: tensors[name].view(torch.float64)}]
    changes = [(tensors, {"state": json.dumps({"cache": ["value", 1]})}), (tensors, {"more": "x"})]
    for changed, more in [*changes, *(({**others, **x}, {}) for x in told)]:
        safetensors.save_file(changed, path, {**metadata, **more})
        with pytest.raises(SavedCacheError, match="do not match their checksum"):
            load_cache(path)
