"""The builder of tiny models, one run of it, the table, the pool, and (slow) all architectures."""

import dataclasses
import json
import sys

import pytest
import torch

pytest.importorskip("transformers")

from mikv_compile.coverage import Setting, attentions, build, names, pool, read_rows, render, run, run_all, select
from mikv_compile.coverage import summarize as summary
from mikv_compile.coverage.command import plan
from mikv_compile.coverage.shrink import DROP, tiny_config


def one(name):
    (architecture,) = select([name])
    return architecture


def test_names_are_unique_and_each_class_comes_once():
    every = names()
    assert len({a.name for a in every}) == len({a.class_name for a in every}) == len(every) > 300
    llama = one("llama")
    assert (llama.kind, llama.class_name) == ("causal", "LlamaForCausalLM") and llama.aliases
    assert {a.kind for a in select(["whisper"])} == {"causal", "seq2seq"}
    assert one(llama.aliases[0]) == llama
    with pytest.raises(KeyError):
        select(["no_such_decoder"])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "seq2seq:t5", "vlm:qwen2_vl"])
def test_tiny_models_run(name):
    tiny = build(one(name), attentions(one(name))[0])
    assert sum(p.numel() for p in tiny.model.parameters()) < 5_000_000
    cache = tiny.new_cache("dynamic")
    with torch.no_grad():
        output = tiny.model(**tiny.first(cache))
        output = tiny.model(**tiny.step(torch.tensor([[7]]), tiny.cache_of(output, cache)))
    assert torch.isfinite(output.logits).all() and output.logits.shape[1] == 1
    assert tiny.cache_of(output, cache).get_seq_length() == 13


def test_any_config_shrinks():
    @dataclasses.dataclass
    class Inner:
        hidden_size: int = 4096
        unknown: int = 7

    @dataclasses.dataclass
    class Config:
        hidden_size: int = 4096
        num_key_value_heads: int = 1
        sliding_window: int | None = None
        layer_types: tuple[str, ...] = ("full", "sliding", "full", "sliding")
        bos_token_id: int = 5
        image_token_id: int = 99999
        inner: Inner | None = dataclasses.field(default_factory=Inner)

    Config.sub_configs = {"inner": Inner}
    made = Config(**{k: v for k, v in vars(tiny_config(_with_layers(Config), {"inner": {"unknown": 3}})).items()
                     if k != "num_hidden_layers"})  # fmt: skip
    assert (made.hidden_size, made.num_key_value_heads, made.sliding_window) == (64, 1, None)
    assert made.layer_types == ["full", "sliding"]
    assert (made.bos_token_id, made.image_token_id) == (5, 127)
    assert (made.inner.hidden_size, made.inner.unknown) == (64, 3)
    assert tiny_config(_with_layers(Config), {"hidden_size": DROP}).hidden_size == 4096


def _with_layers(config):
    fields = [("num_hidden_layers", int, dataclasses.field(default=48))]
    return dataclasses.make_dataclass("Layered", fields, bases=(config,))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_run_of_llama(cache):
    row = run(one("llama"), Setting(cache))
    assert row["status"] == "ok" and row["same_tokens"] and row["difference"] < 1e-5, row
    assert row["grown"] == 2 and row["cross"] == 0
    json.dumps(row)
    if cache == "dynamic":
        assert row["compressed"] == 2 and row["sites"] == {"prefill": 2, "decode": 2} and row["graphs"] == [1, 1, 0, 0]
        assert row["int4"]["finite"] and row["int4"]["low"] == 1.0 and 1e-4 < row["int4"]["difference"] < 0.3


def test_what_cannot_be_built_is_a_row():
    row = run(one("gemma4_assistant"), Setting())
    assert row["status"] == "not built" and "drafter" in row["error"]


def row_of(name="llama", **changes):
    setting = Setting(changes.pop("cache", "dynamic"), changes.pop("attention", "sdpa"))
    row = {
        "key": setting.key(name), "name": name, "kind": "causal", "class": "X", **dataclasses.asdict(setting),
        "status": "ok", "grown": 2, "cross": 0, "side": 0, "attentions": 4, "sites": {"prefill": 2, "decode": 2},
        "dense_reads": {}, "declined": {}, "compressed": 2, "compressed_cross": 0, "graphs": [1, 1, 0, 0],
        "breaks": {}, "same_tokens": True, "difference": 1e-7, "dense_at_runtime": {}, "seconds": 1.0,
        "int4": {"difference": 0.05, "finite": True, "low": 1.0},
    }  # fmt: skip
    return {**row, **changes}


def recorded():
    return [
        row_of(),
        row_of("half", compressed=1, declined={"pair: a reason | with a bar": 3}, cross=2, breaks={"why": 2}),
        row_of("dense", compressed=0, dense_reads={"too odd": 2}, cache="static"),
        row_of("wrong", status="differs", same_tokens=False, difference=0.5),
        {k: v for k, v in row_of("broken", status="crash", error="ValueError: x").items() if k != "compressed"},
        {"key": "k", **dataclasses.asdict(Setting()), "name": "odd", "status": "not built", "error": "no such file"},
    ]


def test_summary_counts():
    total = summary(recorded())
    assert (total["architectures"], total["runs"], total["run_under_torch_compile"]) == (6, 6, 4)
    assert len(total["own_failures"]) == 2 and len(total["differing_tokens"]) == 1
    counts = total["settings"]["dynamic, sdpa"]
    assert counts["caches"] == {"all": 2, "some": 1, "none": 0, "nothing grows": 0}
    assert (counts["layers_compressed"], counts["layers"], counts["cross"]) == (5, 6, 2)


def test_table_shows_every_row_and_reason():
    text = render(recorded(), "mikv coverage --jobs 2")
    assert "`mikv coverage --jobs 2`" in text
    assert "| half | 1/2 | 0/2 | 2+2 | same | 1e-07 | 0.05 | 1+1+0+0 b2 | 1 |" in text
    assert "| dense | 0/2 |  | 2+2 ~2 | same | 1e-07 | 0.05 | 1+1+0+0 | 2 |" in text
    assert "1. pair: a reason \\| with a bar (1: half)" in text
    assert "CRASH: broken (dynamic, sdpa): ValueError: x" in text
    assert all(len(line) < 1000 for line in text.splitlines())


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    architecture = one("gemma4_assistant")  # its row needs no model, so this is quick
    tasks = [(architecture, Setting("dynamic")), (architecture, Setting("static"))]
    first = run_all(tasks[:1], path)
    path.write_text(path.read_text() + '{"key": "half a li')
    new = []
    rows = run_all(tasks, path, jobs=2, progress=new.append)
    assert [r["key"] for r in rows] == [s.key(a.name) for a, s in tasks]
    assert rows[0] == first[0] and [r["key"] for r in new] == [tasks[1][1].key(architecture.name)]
    assert set(read_rows(path)) == {r["key"] for r in rows}


def test_a_run_that_takes_too_long_or_dies_costs_one_row():
    slow, quick = (one("llama"), Setting()), (one("gemma4_assistant"), Setting())
    worker = pool._Worker(timeout=-100.0)
    try:
        worker.give(slow)
        assert pool._finished([worker])[0]["status"] == "timeout" and worker.process is None
        worker.timeout = 60.0
        worker.give(slow)
        worker.process.kill()
        (row,) = pool._finished([worker])
        assert row["status"] == "crash" and "exit code -9" in row["error"]
    finally:
        worker.stop()
    hung, fine = run_all([slow, quick], timeout=2.0)
    assert hung["status"] == "timeout" and fine["status"] == "not built"


def test_settings_of_a_plan():
    tasks = plan([one("llama"), one("bloom")], prefill="both")
    made = [(a.name, s.cache, s.attention, s.prefill, s.bits4) for a, s in tasks]
    assert ("llama", "dynamic", "sdpa", "compiled", True) in made and (
        "bloom",
        "dynamic",
        "eager",
        "compiled",
        True,
    ) in made
    assert ("llama", "dynamic", "eager", "compiled", False) in made and (
        "llama",
        "static",
        "sdpa",
        "eager",
        False,
    ) in made
    assert ("llama", "static", "sdpa", "compiled", False) in made and (
        "bloom",
        "static",
        "sdpa",
        "eager",
        False,
    ) not in made
    assert len(made) == 9
    assert [s.attention for _, s in plan([one("llama"), one("bloom")], "dynamic", "first")] == ["sdpa", "eager"]


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from mikv_compile import cli

    rows = {r["key"]: r for r in recorded()[:1]}
    results, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mikv", "coverage", *arguments])
        with pytest.raises(SystemExit) as status:
            cli.main()
        return status.value.code

    chosen = ["llama", "--cache", "dynamic", "--attn", "sdpa"]
    assert call(*chosen, "--results", str(results), "--write", str(table)) == 0
    assert "| llama | 2/2 |" in table.read_text() and f"`mikv coverage {' '.join(chosen)}`" in table.read_text()
    capsys.readouterr()
    assert call(*chosen, "--results", str(results), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["rows"]] == ["llama"] and printed["summary"]["own_failures"] == []
    assert call("--list", "llama", "--json") == 0 and json.loads(capsys.readouterr().out)[0]["name"] == "llama"
    assert call("--list", "llama") == 0 and "llama LlamaForCausalLM" in capsys.readouterr().out
    assert call("llamma") == 2 and "llamma" in capsys.readouterr().err
    assert call("--cache", "paged") == 2 and "dynamic, static" in capsys.readouterr().err


def test_the_command_says_what_is_missing(monkeypatch):
    from mikv_compile import cli

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"mikv-compile\[cli\]"):
        cli.main()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_all_architectures(tmp_path):
    rows = run_all(plan(select()), tmp_path / "rows.jsonl", jobs=2, timeout=300)
    total = summary(rows)
    assert total["own_failures"] == total["differing_tokens"] == total["failures_at_4_bits"] == []
