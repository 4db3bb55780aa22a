"""The benchmarks run, write what they say they write, and hide nothing. Their numbers are not looked at."""

import collections
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mikv_compile.report
from benchmarks import attention, compilation, decode, harness, memory, report, targets
from benchmarks.harness import Deadline, Failures, Quartiles, quartiles, ratios

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def in_this_process(monkeypatch):
    """Child processes take seconds to import torch; one real one is tested below."""

    def call(function, arguments, variables, timeout=None):
        module, _, name = function.partition(":")
        torch._dynamo.reset()
        # A fresh process has counted nothing yet.
        torch._dynamo.utils.counters.clear()
        torch._dynamo.utils.clear_compilation_metrics()
        return getattr(importlib.import_module(module), name)(**arguments)

    monkeypatch.setattr(harness, "in_child", call)


def written(folder, name):
    """The result, after a look at the other files."""
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["quick"] and result["environment"]["versions"]["torch"] and result["environment"]["commit"]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return result, (folder / f"{name}.md").read_text()


def test_attention(tmp_path, monkeypatch):
    shape = attention.Shape("headline", 1, 2, 2, 64, 128, torch.float32, 1)
    monkeypatch.setattr(attention, "shapes", lambda device, quick: [shape])
    monkeypatch.setattr(attention, "BANDWIDTH_BYTES", 2**20)
    attention.run(CPU, True, tmp_path, 0.01)
    result, text = written(tmp_path, "attention")
    (case,) = result["cases"]
    found = case["candidates"]
    dense = [name for name, candidate in found.items() if candidate["kind"] == "dense"]
    assert len(dense) == 4 and {"fp", "int8", "int4", "int2", "mixed", "default", "mikv-paper"} < found.keys()
    assert not result["failures"]
    assert all(found[name]["error"] < 1e-5 for name in found if name not in dense)
    assert len({len(candidate["samples"]) for candidate in found.values()}) == 1
    # 4-bit codes, a scale and a zero of 16 bits for 64 numbers, keys and values of two heads.
    assert found["int4"]["bytes"] == 2 * 2 * 128 * (32 + 4)
    assert found["SDPA, rows"]["bytes"] == 2 * 2 * 128 * 64 * 4

    best = min(dense, key=lambda name: quartiles(found[name]["samples"]).median)
    ratio = ratios(found[best]["samples"], found["int4"]["samples"])
    assert attention.speedup(case, "int4") == ratio and f"fastest dense form: {best}" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| int4 ")]
    assert ratio.text() in row


def test_attention_says_when_it_times_the_reference(tmp_path, monkeypatch):
    shape = attention.Shape("headline", 1, 1, 1, 64, 64, torch.float32, 1)
    monkeypatch.setattr(attention, "shapes", lambda device, quick: [shape])
    monkeypatch.setattr(attention, "BANDWIDTH_BYTES", 2**20)
    with attention.dispatch.use("triton"):
        attention.run(CPU, True, tmp_path, 0.0)
    assert (
        "T=64 float32 threads=1, and maybe after it: the reference was timed" in (tmp_path / "attention.md").read_text()
    )


def test_decode(tmp_path, monkeypatch):
    # As many reports as are kept, as after a long time in one process.
    kept = mikv_compile.report.GraphReport(0, (), (), "eager")
    monkeypatch.setattr(mikv_compile.report, "_graphs", collections.deque([kept] * 8, maxlen=8))
    decode.run(CPU, True, tmp_path, "tiny", [decode.Scenario.parse("96x1")], 1.0, "eager", Deadline())
    result, text = written(tmp_path, "decode")
    (case,) = result["cases"]
    found = case["configurations"]
    assert list(found) == ["inductor", "mikv", "mikv budget=1.0", "uncompiled"] and not result["failures"]
    for name in ("mikv", "mikv budget=1.0"):
        assert (found[name]["graphs"], found[name]["rewritten"], found[name]["declined"]) == (1, 2, [])
        assert len(found[name]["steps"]) == decode.CYCLE
        pair = [sum(found[n]["steps"]) for n in ("inductor", name)]
        assert decode.speedup(case, name).median == pytest.approx(pair[0] / pair[1])
    assert found["mikv"]["cache_bytes"] < 0.5 * found["inductor"]["cache_bytes"]
    assert decode.speedup(case, "mikv").text() in text
    assert decode.speedup(case, "uncompiled") is None  # it did not alternate with the others


def test_decode_counts_demotions_in_every_cycle():
    steps = [1.0] * 128
    steps[10] = steps[74] = 9.0
    found = {"steps": steps, "batch": 2}
    assert decode.cycle_seconds(found) == [72.0] * 5
    assert decode.tokens_per_second(found).median == 2 * 64 / 72


def test_decode_stops_at_the_deadline(tmp_path):
    scenarios = [decode.Scenario(96, 1)]
    decode.run(CPU, True, tmp_path, "tiny", scenarios, 1.0, "eager", Deadline(time.time()))
    result, text = written(tmp_path, "decode")
    assert not result["cases"] and "96x1: not run" in text


def test_compile(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setitem(compilation.CONFIGURATIONS, "broken", 0)
    monkeypatch.delitem(compilation.CONFIGURATIONS, "mikv")
    monkeypatch.setattr(harness, "in_child", failing_for("broken", harness.in_child))
    compilation.run(CPU, True, tmp_path, "tiny", 16, "eager", False, None, Deadline())
    result, text = written(tmp_path, "compile")
    assert [case["configuration"] for case in result["cases"]] == ["inductor", "mikv regional"]
    for case in result["cases"]:
        assert case["seconds"] >= sum(case["calls"])
        assert len(case["calls"]) == 1 + compilation.STEPS and len(case["guards"]) == case["graphs"] > 1
    assert "broken, cold: RuntimeError: no such thing" in text


def failing_for(wanted, call):
    def check(function, arguments, *rest):
        if arguments["configuration"] == wanted:
            raise RuntimeError("no such thing")
        return call(function, arguments, *rest)

    return check


def test_memory(tmp_path, in_this_process):
    memory.run(CPU, True, tmp_path, "tiny", 256, 64, 8, Deadline())
    result, text = written(tmp_path, "memory")
    assert len(result["cases"]) == 6 and not result["failures"]
    dense, ours = (memory.find_case(result, "prompt", name) for name in ("dense", "mikv"))
    assert dense["cache"] == 2 * 2 * 2 * 256 * 16 * 4
    ratio = memory.of_dense(result, ours, "cache")
    assert ratio == ours["cache"] / dense["cache"] < 0.5 and f"{ratio:.2f}" in text
    assert len(memory.find_case(result, "single tokens", "mikv")["steps"]) == 8


def test_failed_candidates_are_reported(tmp_path):
    def broken():
        raise ValueError("does not work\nat all")

    failures = Failures()
    samples = harness.interleave({"good": time.time, "bad": broken}, CPU, 0.01, (3, 5), failures)
    assert list(samples) == ["good"] and 3 <= len(samples["good"]) <= 5
    assert [(f["configuration"], f["error"]) for f in failures.found] == [("bad", "ValueError: does not work")]
    result = harness.Result("some", CPU, True, {}, tmp_path, failures=failures)
    result.write(lambda made: "table\n", None)
    assert "* bad: ValueError: does not work" in (tmp_path / "some.md").read_text()


def test_child_process():
    with pytest.raises(RuntimeError, match="TypeError"):
        harness.in_child("platform:python_version", {"unknown": 1}, {})
    assert harness.in_child("os:getenv", {"key": "MIKV_TEST"}, {"MIKV_TEST": "yes"}) == "yes"


def test_ratios():
    assert ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Quartiles(2.0, 2.0, 2.5)
    assert quartiles([3.0]) == Quartiles(3.0, 3.0, 3.0)


def attention_result(seconds):
    candidates = {
        "slow": {"kind": "dense", "bytes": 8, "samples": [9.0, 9.0]},
        "fast": {"kind": "dense", "bytes": 8, "samples": [6.0, 8.0]},
        "SDPA, enable_gqa": {"kind": "dense", "bytes": 8, "samples": [16.0, 16.0]},
        "int4": {"kind": "ours", "bytes": 1, "samples": seconds},
    }
    return {"cases": [{"name": "headline", "threads": 1, "dtype": "float32", "candidates": candidates}]}


@pytest.mark.parametrize(
    ("seconds", "figure", "verdict"),
    [
        ([1.0, 1.0], "7.00x [6.50x - 7.50x]", "stretch reached"),
        ([2.0, 2.0], "3.50x [3.25x - 3.75x]", "reached"),
        ([3.0, 4.0], "2.00x [2.00x - 2.00x]", "**not reached**"),
        (None, "-", "not measured"),
    ],
)
def test_targets(seconds, figure, verdict):
    results = {("attention", "cpu"): attention_result(seconds)} if seconds else {}
    row = targets.TARGETS[0].row(results)
    assert row[1:] == [">= 3.00x (stretch 6.00x)", figure, verdict]
    assert all(target.row(results)[3] == "not measured" for target in targets.TARGETS if target.device == "cuda")


def test_upper_bounds():
    target = targets.Target("cpu", "", 60.0, lambda results: None, at_most=True, unit="{:.0f} s")
    assert [target.verdict(value) for value in (59.0, 61.0)] == ["reached", "**not reached**"]


def test_page_is_what_the_command_makes():
    assert report.PAGE.read_text() == report.page(report.newest(), report.NOTES.read_text())
