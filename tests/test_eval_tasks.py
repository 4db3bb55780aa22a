"""Needles, RULER-like questions, drift, questions from files: what they ask, and what scores count."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from test_eval import INT4, PROSE, Letters, Saying, measured, metrics  # noqa: E402
from tiny_models import build  # noqa: E402

from mikv_compile.eval import DenseMethod, MikvMethod, make, suites, texts  # noqa: E402
from mikv_compile.eval.drift import Drift, DriftExercise  # noqa: E402
from mikv_compile.eval.external import External, _f1  # noqa: E402
from mikv_compile.eval.methods import CacheSize, Session  # noqa: E402
from mikv_compile.eval.tasks import settings_of  # noqa: E402

HAY = texts.Text(
    "hay@0", "The first. " + "".join(f"Sentence {i:04d} is one of many in this hay. " for i in range(900)), 0
)


class Reading(Session):
    """Remembers what it read, and predicts the token that comes next in what it was told to know, else ``~``."""

    def __init__(self, known):
        super().__init__(build("llama", num_hidden_layers=1))
        self.known, self.prompts, self.asked = known, [], []

    def prefill(self, input_ids):
        self.prompts.append(Letters().decode(input_ids[0].tolist()))
        return [], torch.zeros(128)

    def fork(self, cache):
        return list(cache)

    def forward(self, input_ids, cache):
        text = Letters().decode(input_ids[0].tolist())
        assert not cache or not text.startswith("\n\nline ")  # a needle is asked for behind the prompt alone
        cache.append(text)
        self.asked.append(text)
        logits = torch.zeros(len(text), 128)
        sofar = "".join(cache[:-1])
        for i in range(len(text)):
            logits[i, ord(self.known(self.prompts[-1], sofar + text[: i + 1]))] = 1
        return logits

    def size(self, cache):
        return CacheSize(len(self.prompts[-1]), 100, 100, 400)


def run_with(task, known, text=HAY):
    session = Reading(known)
    exercise = task.prepare(Letters(), text)
    return exercise.run(session, {}, lambda: None), session, exercise


# Needles


def test_needles_lie_at_their_depth():
    task = make("needle", {"lengths": [1500, 3000], "depths": 3})
    got, session, exercise = run_with(task, lambda prompt, text: "~")
    assert got["digits"] == 0 and got["grid"] == [[0, 0, 0], [0, 0, 0]]
    assert got["prefill_tokens"] == sum(map(len, session.prompts)) and exercise.steps == 6
    for prompt, (length, depth) in zip(
        session.prompts, [(n, d) for n in (1500, 3000) for d in (0, 0.5, 1)], strict=True
    ):
        assert length - 120 < len(prompt) <= length
        hay = prompt.partition("\n\n")[2]
        lines = [i for i, line in enumerate(hay.split("\n")) if line.startswith("line ")]
        assert len(lines) == 2 and lines[1] == lines[0] + 2  # a sentence between them
        assert lines[0] / (hay.count("\n") - 2) == pytest.approx(depth, abs=0.05)


def test_needles_count_where_they_are_found():
    def knows_late(prompt, text):
        """Reads the number from the prompt if the needle is in its second half."""
        name = text.strip().removeprefix("line ").partition(":")[0]
        at = prompt.find(f"line {name}: <")
        done = len(text.partition("<")[2])
        return prompt[at + len(f"line {name}: <") + done] if at > len(prompt) / 2 and "<" in text else "~"

    got, _, _ = run_with(make("needle", {"lengths": [2000], "depths": 3, "needles": 1}), knows_late)
    assert got["grid"][0][0] == 0 and got["grid"][0][2] == 1
    assert got["digits"] == pytest.approx(sum(got["grid"][0]) / 3)


def test_grids_that_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        make("needle", {"lengths": []})
    with pytest.raises(ValueError, match="too few"):
        make("needle", {"lengths": [200]}).prepare(Letters(), HAY)
    with pytest.raises(texts.TextError, match="too short for a haystack"):
        make("needle", {"lengths": [90_000]}).prepare(Letters(), HAY)
    assert settings_of(make("needle", {"lengths": [300, 400]}))["lengths"] == [300, 400]


# RULER-like


def test_ruler_asks_what_its_prompts_hold():
    task = make("ruler", {"tokens": 2000, "questions": 3, "values": 3})
    exercise = task.prepare(Letters(), HAY)
    assert [p.kind for p in exercise.prompts] == ["multi_key", "multi_value", "tracking", "common_words"]
    for prompt in exercise.prompts:
        text = Letters().decode(prompt.ids)
        assert 1500 < len(text) < 2300
        for question in prompt.questions:
            asked, answer = Letters().decode(question.ids), Letters().decode(question.answer)
            if prompt.kind == "multi_key":
                assert asked.strip() + answer + ">" in text
            elif prompt.kind == "multi_value":
                name = asked.split(" of ")[1].split(":")[0]
                found = [
                    line.partition("<")[2][:-1] for line in text.split("\n") if line.startswith(f"number of {name}")
                ]
                assert ">, <".join(found) == answer and len(found) == 3
            elif prompt.kind == "tracking":
                value, chain = asked.split("value ")[1].split(" ")[0], answer.strip().split(", VAR ")
                assert f"VAR {chain[0]} = {value}" in text and f"VAR {chain[2]} = VAR {chain[1]}" in text
                assert text.index(f"VAR {chain[1]} =") < text.index(f"VAR {chain[2]} =")
            else:
                words = text.rpartition("\n")[2].split(", ")
                counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
                assert {word for _, word in counts[:3]} == set(answer.strip().split(", "))
                assert counts[2][0] > 2 * counts[3][0]


def test_ruler_counts_tokens_with_letters_or_digits():
    answers = {}

    def half(prompt, text):
        """Right for digits, wrong for all else."""
        want = next((a[len(text) - len(q) :] for q, a in answers.items() if text.startswith(q)), "~")
        return want[0] if want[:1].isdigit() else "~"

    task = make("ruler", {"tokens": 1500, "questions": 2})
    for prompt in task.prepare(Letters(), HAY).prompts:
        for q in prompt.questions:
            answers[Letters().decode(q.ids)] = Letters().decode(q.answer)
    got, _, _ = run_with(task, half)
    assert (got["multi_key"], got["multi_value"], got["tracking"], got["common_words"]) == (1, 1, 0, 0)
    assert got["accuracy"] == 0.5 and got["answer_tokens"]["multi_value"] == 2 * 4 * 5


# Drift


def test_drift_is_none_without_compression_and_starts_where_runs_differ(tmp_path):
    model = build("llama", max_position_embeddings=512)
    task = make("drift", {"context": 60, "tokens": 20, "chunk": 8})
    full = MikvMethod({"preset": "full", "lower": "eager"})
    got = metrics(measured(model, tmp_path, DenseMethod(), full, MikvMethod(INT4, "int4"), tasks=(task,), text=PROSE))
    for name in ("dense", "full"):
        assert got[name]["first_divergence"] == 20 and got[name]["agreement"] == 1 and abs(got[name]["kl"]) < 1e-6
    assert got["int4"]["kl"] > 1e-5 and [len(got["int4"][k]) for k in ("kl_by_chunk", "agreement_by_chunk")] == [3, 3]

    exercise = task.prepare(Letters(), PROSE)
    with torch.no_grad():
        reference = exercise.reference(Session(model))
        changed = {**reference, "tokens": reference["tokens"].clone()}
        changed["tokens"][8] = (changed["tokens"][8] + 1) % 128
        found = exercise.run(Session(model), changed, lambda: None)
    assert found["first_divergence"] == 8 and found["agreement"] == 19 / 20
    assert found["agreement_by_chunk"] == [1, 7 / 8, 1]
    assert found["kl_by_chunk"][0] < 1e-6 < found["kl_by_chunk"][1]  # another token than the log-probs are behind


def test_drift_measures_what_the_method_makes_of_the_dense_models_predictions():
    torch.manual_seed(0)
    want, got = torch.randn(2, 4, 6).log_softmax(-1)
    exercise = DriftExercise(Drift(context=4, tokens=5, chunk=2), [1, 2, 3, 4])
    found = exercise.run(Saying(got), {"tokens": torch.arange(5), "log_probs": want}, lambda: None)
    kl = F.kl_div(got, want, log_target=True, reduction="none").sum(-1)
    other_way = F.kl_div(want, got, log_target=True, reduction="none").sum(-1)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-5) != pytest.approx(other_way.mean().item(), rel=1e-2)
    assert found["kl_by_chunk"] == pytest.approx([part.mean().item() for part in kl.split(2)], rel=1e-5)


# Files


def jsonl(*items):
    return texts.Text("q@0", "\n".join(map(json.dumps, items)), 0)


def test_questions_from_files_of_three_kinds():
    found = jsonl(
        {"context": "a" * 50, "input": "What?", "answers": ["one", "uno"], "length": 9},
        {"input": "b" * 10 + "\nWho?", "outputs": ["two", "three"], "index": 0},
        {"context": "c", "question": "Where?", "answer": "here"},
    )
    exercise = External(context=20).prepare(Letters(), found)
    assert [Letters().decode(item.ids) for item in exercise.items] == ["a" * 20, "b" * 10, "c"]
    assert Letters().decode(exercise.items[1].question.ids) == "\n\nWho?\n"
    assert [item.answers for item in exercise.items] == [["one", "uno"], ["two", "three"], ["here"]]
    assert len(External(limit=1).prepare(Letters(), found).items) == 1
    for item in ({"context": "a"}, {"input": "a"}, [1]):
        with pytest.raises(texts.TextError, match="line 1"):
            External().prepare(Letters(), jsonl(item))
    with pytest.raises(texts.TextError, match="not JSON"):
        External().prepare(Letters(), texts.Text("q@0", "x", 0))


def test_answers_are_scored_fed_in_and_generated():
    def writes(prompt, text):
        """``two or more`` and a new line, whatever is asked."""
        return ("two or more\n" + "~" * 40)[len(text.partition("?\n")[2])]

    found = jsonl({"context": "c", "input": "Who?", "outputs": ["two", "three"]})
    got, session, _ = run_with(External(tokens=30), writes, found)
    assert got["accuracy"] == 1 and got["exact"] == 1 and got["contains"] == 0.5
    assert got["f1"] == pytest.approx(2 * 1 / (3 + 1))
    assert len(session.asked) == 2 + 11  # the new line ends it
    assert "f1" not in run_with(External(tokens=0), writes, found)[0]
    assert _f1("The Two!", "two") == 1 and _f1("none", "two") == 0


def test_a_folder_of_files_is_many_texts(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text('{"input": "x", "answer": "y"}\n')
    assert [t.name for t in texts.load_all(str(tmp_path))] == ["a.jsonl@0", "b.jsonl@0"]
    (tmp_path / "none").mkdir()
    with pytest.raises(texts.TextError, match=r"no files \*\.jsonl"):
        texts.load_all(str(tmp_path / "none"))


# Suites


def test_tasks_may_read_texts_of_their_own(tmp_path):
    suite = suites.parse({
        "texts": ["pydoc"], "methods": [{"kind": "dense"}],
        "tasks": {"continuation": {}, "retrieval": {"aware": 0, "texts": ["jargon", "kjv"]}},
    })  # fmt: skip
    assert suite.texts == ("pydoc", "jargon", "kjv")
    assert suite.texts_of == {"continuation": ("pydoc",), "retrieval": ("jargon", "kjv")}
    with pytest.raises(suites.SuiteError, match=r"\[tasks.drift\] texts must be a list"):
        suites.parse({"methods": [{}], "tasks": {"drift": {"texts": "kjv"}}})


def test_factories_are_found_beside_their_suite(tmp_path):
    (tmp_path / "beside_it.py").write_text(
        "from mikv_compile.eval import DenseMethod\n\ndef make():\n    return DenseMethod()\n"
    )
    (tmp_path / "s.toml").write_text('[[methods]]\nname = "x"\nfactory = "beside_it:make"\n')
    (method,) = suites.load(str(tmp_path / "s.toml")).methods
    assert "folder" not in method.settings
    with method.open(build("llama", num_hidden_layers=1)) as session:
        assert isinstance(session, Session)


def test_tags_are_a_part_of_settings_only_where_they_are_given():
    tagged, plain = suites.parse(
        {"methods": [{"name": "a", "tags": {"tokens": 0.5, "bits": 4}}, {"name": "b"}]}
    ).methods
    assert tagged.settings["tags"] == {"tokens": 0.5, "bits": 4} and "tags" not in plain.settings
