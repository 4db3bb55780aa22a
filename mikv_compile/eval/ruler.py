"""Small tasks in the manner of RULER (arXiv 2404.06654): several keys, several values, variables, common words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from mikv_compile.eval import prompts, texts
from mikv_compile.eval.methods import Session
from mikv_compile.eval.retrieval import ADJECTIVES, NOUNS, Question
from mikv_compile.eval.tasks import Advance, Tensors

KINDS = ("multi_key", "multi_value", "tracking", "common_words")


@dataclass(frozen=True)
class Ruler:
    """Four kinds of questions; a prompt's cache is compressed before it is asked anything.

    * multi_key: one of many numbered lines.
    * multi_value: all numbers of a name that has several, in their order.
    * tracking: the variables that a value was handed on to, in their order.
    * common_words: the words that a list has most often; those that it has seldom are many.

    The right answer is fed in (teacher-forced), and a token counts that is most likely; only tokens with a letter or a
    digit do, as what separates them is easy. A method reads ``4 * contexts * tokens`` tokens (6,144).

    Attributes:
        contexts: prompts of each kind.
        tokens: of a prompt, about.
        questions: of each prompt, where it allows several (multi_key, multi_value, tracking).
        values: of a name, links of a chain of variables, and common words.
        seed: of all names, numbers and words.
    """

    contexts: int = 1
    tokens: int = 1536
    questions: int = 4
    values: int = 4
    seed: int = 0
    name: ClassVar[str] = "ruler"
    needs_reference: ClassVar[bool] = False
    main: ClassVar[tuple[str, ...]] = ("accuracy", *KINDS)

    def __post_init__(self) -> None:
        if min(self.contexts, self.questions) < 1 or self.values < 2 or self.tokens < 64:
            raise ValueError(f"expected contexts, questions, values of 2 and more, and 64 tokens and more: {self}")
        if self.questions > len(ADJECTIVES) // 2 or self.values > 8:
            raise ValueError(f"expected up to {len(ADJECTIVES) // 2} questions and 8 values: {self}")

    def prepare(self, tokenizer: Any, text: texts.Text) -> RulerExercise:
        """Prompts and questions of all kinds."""
        draw = random.Random(self.seed)
        makers: dict[str, Callable[..., tuple[str, list[str], list[tuple[str, str]]]]] = {
            "multi_key": self._multi_key, "multi_value": self._multi_value, "tracking": self._tracking,
            "common_words": self._common_words,
        }  # fmt: skip
        opening = prompts.Frame.of(tokenizer).opening
        made = []
        sentences = text.sentences(longest=130)
        for kind in KINDS:
            for _ in range(self.contexts):
                instruction, lines, asked = makers[kind](draw)
                if kind == "common_words":
                    body = self._list_of(tokenizer, draw, lines)
                else:
                    body = "\n".join(self._hidden(tokenizer, sentences, draw, lines, text.name))
                ids = prompts.encode(tokenizer, opening + instruction + "\n\n" + body)
                questions = [Question(*prompts.encode_before(tokenizer, q, a)) for q, a in asked]
                made.append(RulerPrompt(kind, ids, questions))
        return RulerExercise(self, tokenizer, made)

    def _multi_key(self, draw: random.Random) -> tuple[str, list[str], list[tuple[str, str]]]:
        names = _names(draw, 20)
        values = [_number(draw) for _ in names]
        pairs = list(zip(names, values, strict=True))
        asked = draw.sample(pairs, self.questions)
        return (
            "Below is a text with some numbered lines in it. Remember the number of each line.",
            [f"line {name}: <{value}>" for name, value in pairs],
            [(f"\n\nline {name}: <", value) for name, value in asked],
        )

    def _multi_value(self, draw: random.Random) -> tuple[str, list[str], list[tuple[str, str]]]:
        names = _names(draw, self.questions)
        values = {name: [_number(draw) for _ in range(self.values)] for name in names}
        lines = [f"number of {name}: <{values[name][i]}>" for i in range(self.values) for name in names]
        return (
            "Below is a text with numbers in it; a name has several. Remember all numbers of each name in their order.",
            lines,
            [(f"\n\nall numbers of {name}: <", ">, <".join(values[name])) for name in names],
        )

    def _tracking(self, draw: random.Random) -> tuple[str, list[str], list[tuple[str, str]]]:
        letters = [first + second for first in "BDFGHKLMNPRSTVZ" for second in "AEIOU"]
        words = draw.sample([a + b for a in letters for b in ("X", "Q", "J")], self.questions * self.values)
        chains = [words[i * self.values : (i + 1) * self.values] for i in range(self.questions)]
        values = [_number(draw) for _ in chains]
        lines = []
        for i in range(self.values):
            for chain, value in zip(chains, values, strict=True):
                lines.append(f"VAR {chain[i]} = {value if i == 0 else 'VAR ' + chain[i - 1]}")
        return (
            "Below is a text in which variables get values, some of them from other variables. Remember which "
            "variables have which value.",
            lines,
            [
                (f"\n\nThe variables with the value {value} are: VAR", " " + ", VAR ".join(chain))
                for chain, value in zip(chains, values, strict=True)
            ],
        )

    def _common_words(self, draw: random.Random) -> tuple[str, list[str], list[tuple[str, str]]]:
        words = list(ADJECTIVES + NOUNS)
        draw.shuffle(words)
        common = words[: self.values]
        return (
            "Below is a list of words. Some of them come again and again; remember these.",
            words,
            [("\n\nThe most common words of the list are:", " " + ", ".join(common))],
        )

    def _hidden(
        self, tokenizer: Any, sentences: Iterator[str], draw: random.Random, lines: list[str], name: str
    ) -> list[str]:
        """The lines in their order, at random places among as many sentences as the tokens allow."""
        room = self.tokens - len(prompts.encode(tokenizer, "\n".join(lines))) - 60
        hay = []
        while room > 0:
            sentence = next(sentences, None)
            if sentence is None:
                raise texts.TextError(f"text {name!r} is too short for {4 * self.contexts} prompts")
            hay.append(sentence)
            room -= len(prompts.encode(tokenizer, "\n" + sentence))
        places = sorted(draw.randrange(len(hay) + 1) for _ in lines)
        parts: list[str] = []
        for i in range(len(hay) + 1):
            parts += [line for line, place in zip(lines, places, strict=True) if place == i]
            parts += hay[i : i + 1]
        return parts

    def _list_of(self, tokenizer: Any, draw: random.Random, words: list[str]) -> str:
        """A list in which the first words come most often: in the order of the answer where they come first."""
        common, rare = words[: self.values], words[self.values :]
        each = len(prompts.encode(tokenizer, ", " + ", ".join(words))) / len(words)
        count = max(int((self.tokens - 60) / each), 4 * self.values)
        many = count // (2 * self.values)
        tail = [rare[i % len(rare)] for i in range(count - many * self.values)]
        mixed = common * (many - 1) + tail
        draw.shuffle(mixed)
        return ", ".join(common + mixed)


@dataclass(frozen=True)
class RulerPrompt:
    """Token ids of a prompt, and what is asked of it."""

    kind: str
    ids: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class RulerExercise:
    """All prompts."""

    task: Ruler
    tokenizer: Any
    prompts: list[RulerPrompt]

    @cached_property
    def digest(self) -> str:
        """Of all prompts, questions and answers."""
        return texts.digest(
            [i for p in self.prompts for ids in (p.ids, *(q.ids + q.answer for q in p.questions)) for i in ids]
        )

    @property
    def steps(self) -> int:
        """The prompts."""
        return len(self.prompts)

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """None: the right answers are known."""
        return {}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """The share of right tokens of each kind, and their mean, ``accuracy``."""
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        sizes = []
        for prompt in self.prompts:
            cache, _ = session.prefill(torch.tensor([prompt.ids]))
            sizes.append(session.size(cache))
            for question in prompt.questions:
                logits = session.forward(torch.tensor([question.ids + question.answer[:-1]]), session.fork(cache))
                given = logits[-len(question.answer) :].argmax(-1).tolist()
                for want, got in zip(question.answer, given, strict=True):
                    if any(character.isalnum() for character in self.tokenizer.decode([want])):
                        right[prompt.kind].append(want == got)
            advance()
        shares = {kind: sum(found) / max(len(found), 1) for kind, found in right.items()}
        largest = max(sizes, key=lambda size: size.tokens)
        return {
            **shares, "accuracy": sum(shares.values()) / len(shares),
            "answer_tokens": {kind: len(found) for kind, found in right.items()},
            "prefill_tokens": sum(len(prompt.ids) for prompt in self.prompts), "cache": largest.to_json(),
        }  # fmt: skip


def _names(draw: random.Random, count: int) -> list[str]:
    pairs = zip(draw.sample(ADJECTIVES, count), draw.sample(NOUNS, count), strict=True)
    return ["-".join(pair) for pair in pairs]


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))
