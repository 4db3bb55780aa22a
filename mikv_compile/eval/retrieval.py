"""Line retrieval: numbers hidden in prose, asked for after the cache was compressed, or with the question known."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from mikv_compile.eval import prompts, texts
from mikv_compile.eval.methods import Session
from mikv_compile.eval.tasks import Advance, Tensors

INSTRUCTION = "Below is a text with some numbered lines in it. Remember the number of each line.\n\n"
LINE = "line {name}: <{value}>"
QUESTION = "\n\nline {name}: <"
"""The line's beginning again. Asked in a sentence, SmolLM2-135M finds a quarter of the lines in kjv; so, half."""


@dataclass(frozen=True)
class Retrieval:
    """Lines such as ``line brave-lantern: <24169>``, with sentences of the text between them.

    Attributes:
        contexts: how many texts with lines of their own are read.
        questions: how many lines of each are asked for after its cache was compressed (agnostic: what is compressed
            does not tell which line will matter).
        aware: how many questions are asked, over all contexts, where the question is a part of what is compressed; 0
            leaves them out. Each costs a context, where an agnostic one costs 20 tokens.
        lines: in a context.
        sentences: before each line.
        digits: of each number.
        seed: of the names, the numbers and the choice of lines.
    """

    contexts: int = 3
    questions: int = 12
    aware: int = 6
    lines: int = 20
    sentences: int = 3
    digits: int = 5
    seed: int = 0
    name: ClassVar[str] = "retrieval"
    needs_reference: ClassVar[bool] = False
    main: ClassVar[tuple[str, ...]] = ("digits", "exact", "aware_digits")

    def __post_init__(self) -> None:
        if not 1 <= self.lines <= len(ADJECTIVES):
            raise ValueError(f"lines is {self.lines}; expected 1 to {len(ADJECTIVES)}, as no two names share a word")
        if not 0 <= self.questions <= self.lines or self.aware > self.contexts * self.lines:
            raise ValueError("there cannot be more questions than lines")
        if min(self.contexts, self.digits, self.sentences + 1, self.aware + 1) < 1:
            raise ValueError(f"numbers are not negative, and there is a context with digits to read: {self}")

    def prepare(self, tokenizer: Any, text: texts.Text) -> RetrievalExercise:
        """Contexts and questions as tokens."""
        draw = random.Random(self.seed)
        sentences = text.sentences(longest=130)
        frame = prompts.Frame.of(tokenizer)
        contexts = []
        for _ in range(self.contexts):
            adjectives, nouns = draw.sample(ADJECTIVES, self.lines), draw.sample(NOUNS, self.lines)
            names = [f"{adjective}-{noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
            values = [str(draw.randrange(10 ** (self.digits - 1), 10**self.digits)) for _ in names]
            parts = []
            for name, value in zip(names, values, strict=True):
                parts += [next(sentences, "") for _ in range(self.sentences)]
                parts.append(LINE.format(name=name, value=value))
            if "" in parts:
                raise texts.TextError(f"text {text.name!r} is too short for {self.contexts} contexts")
            ids = prompts.encode(tokenizer, frame.opening + INSTRUCTION + "\n".join(parts))
            asked = [
                Question(*prompts.encode_before(tokenizer, QUESTION.format(name=name), value))
                for name, value in zip(names, values, strict=True)
            ]  # fmt: skip
            contexts.append((ids, [asked[i] for i in draw.sample(range(self.lines), self.lines)]))
        return RetrievalExercise(self, tokenizer, contexts)


@dataclass(frozen=True)
class Question:
    """Token ids of a question with the answer's first words, and of the number."""

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class RetrievalExercise:
    """Each context's token ids, and the questions about all its lines in a random order."""

    task: Retrieval
    tokenizer: Any
    contexts: list[tuple[list[int], list[Question]]]

    @cached_property
    def digest(self) -> str:
        """Of all contexts, questions and answers."""
        asked = [[*q.ids, *q.answer] for _, questions in self.contexts for q in questions]
        return texts.digest([i for ids in (*(ids for ids, _ in self.contexts), *asked) for i in ids])

    @property
    def steps(self) -> int:
        """Every context that is read, and every question that is asked of a compressed one."""
        return len(self.contexts) * (1 + self.task.questions) + self.task.aware

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """None: the numbers themselves are what answers are compared with."""
        return {}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """Ask, with the right digits fed in (teacher-forced), and count those that the model would have chosen."""
        agnostic, aware = prompts.DigitScore(), prompts.DigitScore()
        sizes = []
        for ids, questions in self.contexts:
            cache, _ = session.prefill(torch.tensor([ids]))
            sizes.append(session.size(cache))
            advance()
            for question in questions[: self.task.questions]:
                logits = session.forward(torch.tensor([question.ids + question.answer[:-1]]), session.fork(cache))
                self._score(agnostic, question, logits)
                advance()
            del cache
        # In turn from each context, the last questions first: those that were asked above come again at the end only.
        order = [questions[-1 - i] for i in range(self.task.lines) for _, questions in self.contexts]
        contexts = [ids for _ in range(self.task.lines) for ids, _ in self.contexts]
        for ids, question in list(zip(contexts, order, strict=True))[: self.task.aware]:
            cache, _ = session.prefill(torch.tensor([ids + question.ids[:-1]]))
            logits = session.forward(torch.tensor([question.ids[-1:] + question.answer[:-1]]), cache)
            self._score(aware, question, logits)
            advance()
        largest = max(sizes, key=lambda size: size.nbytes)
        return {
            **agnostic.to_json(""), **(aware.to_json("aware_") if self.task.aware else {}),
            "context_tokens": [len(ids) for ids, _ in self.contexts], "cache": largest.to_json(),
        }  # fmt: skip

    def _score(self, score: prompts.DigitScore, question: Question, logits: torch.Tensor) -> None:
        score.add(self.tokenizer, question.answer, logits[-len(question.answer) :].argmax(-1).tolist())


# No two share a word, so a name is found by either of its halves.
ADJECTIVES = (
    "brave", "quiet", "yellow", "wooden", "gentle", "rusty", "clever", "frozen", "purple", "lucky", "silent", "clumsy",
    "golden", "humble", "narrow", "bitter", "mellow", "noisy", "hollow", "ancient", "crimson", "nimble", "velvet",
    "jagged", "lavish", "plucky", "quaint", "amber", "brisk", "torpid", "hasty", "dusty", "lonely", "polite", "sturdy",
    "tidy", "vivid", "wicked", "zesty", "mighty",
)  # fmt: skip
NOUNS = (
    "kid", "lantern", "walnut", "pigeon", "doctor", "harbor", "violin", "mountain", "meadow", "pepper", "saddle",
    "garden", "window", "anchor", "basket", "candle", "dragon", "feather", "bottle", "hammer", "island", "jacket",
    "kettle", "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "ribbon", "shovel", "tunnel", "umbrella",
    "valley", "wagon", "cobbler", "goblet", "thistle", "turnip", "zebra",
)  # fmt: skip
