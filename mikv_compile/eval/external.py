"""Questions from files: LongBench, RULER or one's own, as JSON lines. The file is the text that the task is given.

Each line is an object. A prompt is ``context`` and then ``input`` (or ``question``), either may be missing; the right
answers are ``answers``, ``outputs`` or ``answer``, a list or a string.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from mikv_compile.eval import prompts, texts
from mikv_compile.eval.decoding import greedy
from mikv_compile.eval.methods import Session
from mikv_compile.eval.retrieval import Question
from mikv_compile.eval.tasks import Advance, Tensors


@dataclass(frozen=True)
class External:
    """The context is read and its cache compressed; then the question is read, and answered twice.

    Once with the first right answer fed in, which tells tokens that the model would have chosen (``accuracy``, and
    ``exact`` where all are), and once by greedy decoding, which gives LongBench's F1 and the share of right answers
    that were written (``contains``, RULER's).

    Attributes:
        limit: how many lines are read.
        context: tokens of a context; what is longer loses its middle, as in LongBench.
        tokens: generated for an answer, up to a line's end; 0 leaves that out.
    """

    limit: int = 20
    context: int = 3584
    tokens: int = 32
    name: ClassVar[str] = "external"
    needs_reference: ClassVar[bool] = False
    main: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "contains")

    def __post_init__(self) -> None:
        if self.limit < 1 or self.context < 2 or self.tokens < 0:
            raise ValueError(f"limit, context and tokens are numbers of lines and tokens: {self}")

    def prepare(self, tokenizer: Any, text: texts.Text) -> ExternalExercise:
        """The first lines of the file."""
        frame = prompts.Frame.of(tokenizer)
        items: list[Item] = []
        for number, line in enumerate(text.content[text.start :].splitlines(), 1):
            if not line.strip():
                continue
            if len(items) == self.limit:
                break
            context, question, answers = _fields(line, f"text {text.name!r}, line {number}")
            if not context:  # one piece: its last line asks
                context, _, question = question.rpartition("\n")
            ids = prompts.encode(tokenizer, frame.opening + context)
            if len(ids) > self.context:
                half = self.context // 2
                ids = ids[:half] + ids[-(self.context - half) :]
            head = "\n\n" + question.strip() + frame.closing
            items.append(Item(ids or prompts.encode(tokenizer, "\n"), _answered(tokenizer, head, answers[0]), answers))
        if not items:
            raise texts.TextError(f"text {text.name!r} has no lines of JSON")
        return ExternalExercise(self, tokenizer, items)


@dataclass(frozen=True)
class Item:
    """A context's token ids, the question with the first answer, and all right answers."""

    ids: list[int]
    question: Question
    answers: list[str]


@dataclass(frozen=True)
class ExternalExercise:
    """All items."""

    task: External
    tokenizer: Any
    items: list[Item]

    @cached_property
    def digest(self) -> str:
        """Of all contexts, questions and first answers."""
        return texts.digest([i for item in self.items for i in (*item.ids, *item.question.ids, *item.question.answer)])

    @property
    def steps(self) -> int:
        """The items."""
        return len(self.items)

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """None: the right answers are known."""
        return {}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """Answer everything."""
        right, total, exact = 0, 0, 0
        f1, contains, sizes = [], [], []
        for item in self.items:
            cache, _ = session.prefill(torch.tensor([item.ids]))
            sizes.append(session.size(cache))
            asked, answer = item.question.ids, item.question.answer
            logits = session.forward(torch.tensor([asked + answer[:-1]]), session.fork(cache))[-len(answer) :]
            same = [a == b for a, b in zip(logits.argmax(-1).tolist(), answer, strict=True)]
            right, total, exact = right + sum(same), total + len(same), exact + all(same)
            if self.task.tokens:
                first = session.forward(torch.tensor([asked]), cache)[-1]
                written = self.tokenizer.decode(greedy(session, cache, first, self.task.tokens, self._ends))
                written = written.strip().partition("\n")[0]
                f1.append(max(_f1(written, wanted) for wanted in item.answers))
                contains.append(sum(w.lower() in written.lower() for w in item.answers) / len(item.answers))
            advance()
        generated = {"f1": sum(f1) / len(f1), "contains": sum(contains) / len(contains)} if f1 else {}
        return {
            "accuracy": right / total, "exact": exact / len(self.items), **generated, "questions": len(self.items),
            "prefill_tokens": sum(len(item.ids) for item in self.items),
            "cache": max(sizes, key=lambda size: size.tokens).to_json(),
        }  # fmt: skip

    def _ends(self, token: int) -> bool:
        return token == getattr(self.tokenizer, "eos_token_id", None) or "\n" in self.tokenizer.decode([token])


def _fields(line: str, where: str) -> tuple[str, str, list[str]]:
    """Context, question and answers of a line."""
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise texts.TextError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise texts.TextError(f"{where} is not a JSON object")
    answers = raw.get("answers") or raw.get("outputs") or raw.get("answer") or []
    answers = [str(one) for one in (answers if isinstance(answers, list) else [answers])]
    question = str(raw.get("input") or raw.get("question") or "")
    if not answers or not question:
        raise texts.TextError(f"{where} needs 'input' or 'question', and 'answers', 'outputs' or 'answer'")
    return str(raw.get("context") or ""), question, answers


def _answered(tokenizer: Any, head: str, answer: str) -> Question:
    """A question and its answer; where a token spans the two, each is encoded by itself."""
    try:
        return Question(*prompts.encode_before(tokenizer, head, answer))
    except ValueError:
        return Question(prompts.encode(tokenizer, head), prompts.encode(tokenizer, answer))


def _f1(written: str, wanted: str) -> float:
    """F1 of words in common, without articles, case and punctuation."""
    a, b = _words(written), _words(wanted)
    shared = sum((a & b).values())
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def _words(text: str) -> Counter[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", plain).split())
