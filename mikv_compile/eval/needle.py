"""Needles in a haystack: numbered lines at some depth of a text, over lengths and depths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from mikv_compile.eval import prompts, texts
from mikv_compile.eval.methods import Session
from mikv_compile.eval.retrieval import ADJECTIVES, INSTRUCTION, LINE, NOUNS, QUESTION, Question
from mikv_compile.eval.tasks import Advance, Tensors


@dataclass(frozen=True)
class Needle:
    """Each cell of the grid is one prompt, whose cache is compressed before any needle is asked for.

    A method reads ``sum(lengths) * depths`` tokens (33,280 with the usual settings), and 20 for each needle.

    Attributes:
        lengths: tokens of a prompt; it has up to a sentence less.
        depths: how many, evenly from the beginning (0) to the end (1).
        needles: lines at the depth of a cell, a sentence between them; each is asked for.
        digits: of each number.
        seed: of names and numbers.
    """

    lengths: tuple[int, ...] = (1024, 2048, 3584)
    depths: int = 5
    needles: int = 2
    digits: int = 5
    seed: int = 0
    name: ClassVar[str] = "needle"
    needs_reference: ClassVar[bool] = False
    main: ClassVar[tuple[str, ...]] = ("digits", "exact")

    def __post_init__(self) -> None:
        whole = all(isinstance(length, int) and length > 0 for length in self.lengths)
        if not self.lengths or not whole or min(self.depths, self.needles, self.digits) < 1:
            raise ValueError(f"a grid has lengths, depths and needles with digits, at least one of each: {self}")
        if self.needles > len(ADJECTIVES):
            raise ValueError(f"needles is {self.needles}; expected up to {len(ADJECTIVES)}, as no names share a word")

    @property
    def places(self) -> list[float]:
        """The depths, from 0 to 1."""
        return [i / (self.depths - 1) for i in range(self.depths)] if self.depths > 1 else [0.5]

    def prepare(self, tokenizer: Any, text: texts.Text) -> NeedleExercise:
        """A prompt for each cell, all with the same sentences."""
        draw = random.Random(self.seed)
        opening = prompts.Frame.of(tokenizer).opening + INSTRUCTION
        cells = []
        for length in self.lengths:
            for depth in self.places:
                pairs = zip(draw.sample(ADJECTIVES, self.needles), draw.sample(NOUNS, self.needles), strict=True)
                lines = [("-".join(pair), str(draw.randrange(10 ** (self.digits - 1), 10**self.digits)))
                         for pair in pairs]  # fmt: skip
                ids = self._prompt(tokenizer, text, opening, length, depth, lines)
                asked = [
                    Question(*prompts.encode_before(tokenizer, QUESTION.format(name=name), value))
                    for name, value in lines
                ]
                cells.append(Cell(length, depth, ids, asked))
        return NeedleExercise(self, tokenizer, cells)

    def _prompt(
        self, tokenizer: Any, text: texts.Text, opening: str, length: int, depth: float, lines: list[tuple[str, str]]
    ) -> list[int]:
        """Token ids: as many sentences as fit, and the lines at the depth."""
        needles = [LINE.format(name=name, value=value) for name, value in lines]
        room = length - len(prompts.encode(tokenizer, opening + "\n".join(needles)))
        hay: list[str] = []
        for sentence in text.sentences(longest=130):
            room -= len(prompts.encode(tokenizer, "\n" + sentence))
            if room < 0:
                break
            hay.append(sentence)
        else:
            raise texts.TextError(f"text {text.name!r} is too short for a haystack of {length} tokens")
        while len(hay) >= self.needles:
            at = round(depth * (len(hay) - (self.needles - 1)))
            between = hay[at : at + self.needles - 1]
            mixed = [part for pair in zip(needles, [*between, ""], strict=True) for part in pair][:-1]
            parts = [*hay[:at], *mixed, *hay[at + self.needles - 1 :]]
            ids = prompts.encode(tokenizer, opening + "\n".join(parts))
            if len(ids) <= length:
                return ids
            hay.pop()  # tokens of a whole can be more than those of its parts
        raise ValueError(f"{length} tokens are too few for {self.needles} needles and sentences between them")


@dataclass(frozen=True)
class Cell:
    """A prompt's token ids, and a question for each needle in it."""

    length: int
    depth: float
    ids: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class NeedleExercise:
    """The cells, lengths before depths."""

    task: Needle
    tokenizer: Any
    cells: list[Cell]

    @cached_property
    def digest(self) -> str:
        """Of all prompts, questions and answers."""
        return texts.digest(
            [i for cell in self.cells for ids in (cell.ids, *(q.ids + q.answer for q in cell.questions)) for i in ids]
        )

    @property
    def steps(self) -> int:
        """The prompts."""
        return len(self.cells)

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """None: the numbers themselves are what answers are compared with."""
        return {}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """``grid`` [length][depth] has the share of digits that the model found most likely (teacher-forced)."""
        total = prompts.DigitScore()
        shares, sizes = [], []
        for cell in self.cells:
            cache, _ = session.prefill(torch.tensor([cell.ids]))
            sizes.append(session.size(cache))
            score = prompts.DigitScore()
            for question in cell.questions:
                logits = session.forward(torch.tensor([question.ids + question.answer[:-1]]), session.fork(cache))
                given = logits[-len(question.answer) :].argmax(-1).tolist()
                for one in (score, total):
                    one.add(self.tokenizer, question.answer, given)
            shares.append(score.right / max(score.digits, 1))
            advance()
        depths = self.task.places
        largest = max(sizes, key=lambda size: size.tokens)
        return {
            **total.to_json(""), "lengths": list(self.task.lengths), "depths": depths,
            "grid": [shares[i : i + len(depths)] for i in range(0, len(shares), len(depths))],
            "prefill_tokens": sum(len(cell.ids) for cell in self.cells), "cache": largest.to_json(),
        }  # fmt: skip
