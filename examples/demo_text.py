"""The text of the demo: documentation from Python's standard library, with facts planted between its paragraphs."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A sentence that is planted in the text, the question about it, and the word that a right answer contains."""

    sentence: str
    question: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """True when ``text`` contains the answer as a word."""
        return re.search(rf"\b{re.escape(self.answer)}\b", text, re.IGNORECASE) is not None


def _fact(subject: str, answer: str) -> Fact:
    return Fact(f"The {subject} is {answer}.", f"What is the {subject}?", answer)


FACTS = (
    _fact("access code of the gate", "4821"),
    _fact("capital city of Zorland", "Belmora"),
    _fact("name of the baker's dog", "Pepper"),
    _fact("phone number of the library", "7390"),
    _fact("room number of the night guard", "638"),
    _fact("name of the gardener's horse", "Thunder"),
    _fact("home town of the violinist", "Lisbon"),
    _fact("favourite drink of the pilot", "cocoa"),
)

PROSE_TOKENS = 3000
"""Tokens of documentation; facts and instructions come on top."""

_START, _LENGTH = 120_000, 60_000
"""Where in the documentation the text is taken from."""

_OPENING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nRead this text and answer the question below.\n\n"
)
_CLOSING = " Answer in a few words.<|im_end|>\n<|im_start|>assistant\n"

_KNOWN_TEXT = "d239690d2f01046d8146b805ecaa539fe5bd54cd0f819b4ace8b6f84a590ce61"
"""SHA-256 of the text with Python 3.11.7; other releases word the documentation a little differently."""


def _paragraphs() -> list[str]:
    """Paragraphs of the documentation, one line each, without ruling lines and headings."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[_START : _START + _LENGTH]
    text = re.sub(r"[*=\-\"~^]{3,}", " ", text)
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text)]
    return [re.sub(r"\s+", " ", p) for p in paragraphs if len(p) > 80]


def _fitting(tokenizer: Any, tokens: int) -> int:
    """How many paragraphs fit."""
    used = 0
    for i, paragraph in enumerate(_paragraphs()):
        used += len(tokenizer(paragraph).input_ids) + 1
        if used > tokens:
            return i
    return len(_paragraphs())


def continuation_text(tokenizer: Any, tokens: int = PROSE_TOKENS) -> str:
    """The paragraphs that follow the document in its source."""
    return "\n\n".join(_paragraphs()[_fitting(tokenizer, tokens) :])


def document_text(tokenizer: Any, tokens: int = PROSE_TOKENS) -> str:
    """The text: as many paragraphs as fit into ``tokens``, the facts spread evenly between them."""
    chosen = _paragraphs()[: _fitting(tokenizer, tokens)]
    gap = len(chosen) / (len(FACTS) + 1)
    for i in reversed(range(len(FACTS))):
        chosen.insert(round(gap * (i + 1)), FACTS[i].sentence)
    return _OPENING + "\n\n".join(chosen) + "\n\n"


def is_known_text(text: str) -> bool:
    """True when the text is exactly the one that the demo was written with."""
    return hashlib.sha256(text.encode()).hexdigest() == _KNOWN_TEXT


def question_text(fact: Fact) -> str:
    """What follows the text: the question, and the opening of the answer."""
    return fact.question + _CLOSING
