"""Puts a text and a question into a model's chat template, and scores digits that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Frame:
    """What stands around a user's message: the model's chat template, or nothing for a model without one."""

    opening: str
    closing: str

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """The frame of a tokenizer's chat template."""
        if not getattr(tokenizer, "chat_template", None):
            return cls("", "\n")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
        )
        opening, _, closing = rendered.partition(_PLACE)
        return cls(opening, closing)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of a prompt, without special tokens added: a chat template has written them out."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_before(tokenizer: Any, head: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of ``head`` and of the ``answer`` that goes on from it, split where the head ends.

    Raises:
        ValueError: if a token spans the two.
    """
    before, both = encode(tokenizer, head), encode(tokenizer, head + answer)
    if both[: len(before)] != before:
        raise ValueError(f"the tokenizer has a token that spans {head[-12:]!r} and {answer[:12]!r}")
    return before, both[len(before) :]


@dataclass
class DigitScore:
    """Counts right digits of numbers whose right beginnings were fed in (teacher-forced)."""

    right: int = 0
    digits: int = 0
    exact: int = 0
    numbers: int = 0

    def add(self, tokenizer: Any, wanted: list[int], given: list[int]) -> None:
        """Count a number: the token ids that were wanted, and those that the model found most likely.

        A token may hold several digits, and each counts: ``412`` for ``417`` is two of three. A number is exact when
        all its tokens are right, which is when greedy decoding would have given it.
        """
        for want, got in zip(wanted, given, strict=True):
            expected, found = tokenizer.decode([want]).strip(), tokenizer.decode([got]).strip()
            for i, character in enumerate(expected):
                self.digits += 1
                self.right += want == got or found[i : i + 1] == character
        self.exact += wanted == given
        self.numbers += 1

    def to_json(self, prefix: str) -> dict[str, Any]:
        """Share of digits and of whole numbers, and how many numbers were asked for."""
        return {
            f"{prefix}digits": self.right / max(self.digits, 1), f"{prefix}exact": self.exact / max(self.numbers, 1),
            f"{prefix}questions": self.numbers,
        }  # fmt: skip
