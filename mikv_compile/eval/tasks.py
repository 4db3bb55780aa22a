"""What a task is: settings, the input they make for a tokenizer and a text, and a measurement of one session."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch

from mikv_compile.eval.methods import Session
from mikv_compile.eval.texts import Text

Tensors = Mapping[str, torch.Tensor]
Advance = Callable[[], None]
"""Called after each of an exercise's steps, for progress bars."""


class Exercise(Protocol):
    """A task's input, tokenized."""

    @property
    def digest(self) -> str:
        """SHA-256 of the input: two results with the same one have read the same tokens."""

    @property
    def steps(self) -> int:
        """How often :meth:`run` calls ``advance``."""

    def reference(self, session: Session) -> Tensors:
        """What the dense model's run gives to compare with; empty if nothing is needed. Kept on disk.

        Not called for tasks without ``needs_reference``."""

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """Measure a session.

        Returns:
            numbers and lists of numbers as JSON; ``cache`` is the :class:`~mikv_compile.eval.methods.CacheSize` of the
            compressed context.
        """


class Task(Protocol):
    """A frozen dataclass whose fields are the settings."""

    name: ClassVar[str]
    main: ClassVar[tuple[str, ...]]
    """The metrics that are shown while a run goes on."""
    needs_reference: ClassVar[bool]
    """Whether the dense model has to be run for :meth:`Exercise.reference` before a method is measured."""

    def prepare(self, tokenizer: Any, text: Text) -> Exercise:
        """The input for a model's tokenizer, the same in every run.

        Raises:
            ValueError or TextError: if it cannot be made from this tokenizer or text.
        """


TASKS = {
    "continuation": "mikv_compile.eval.continuation:Continuation",
    "retrieval": "mikv_compile.eval.retrieval:Retrieval",
    "needle": "mikv_compile.eval.needle:Needle",
    "ruler": "mikv_compile.eval.ruler:Ruler",
    "drift": "mikv_compile.eval.drift:Drift",
    "external": "mikv_compile.eval.external:External",
}
"""Name -> module and class, imported on use."""


class TaskError(ValueError):
    """There is no such task or setting; the message names those there are."""


def task_class(name: str) -> type[Any]:
    """The class of a task.

    Raises:
        TaskError: if there is none of this name.
    """
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}{_nearest(name, list(TASKS))}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """A task with some settings changed.

    Raises:
        TaskError: for an unknown task or setting, or a setting of the wrong type.
    """
    kind = task_class(name)
    known = {f.name: f.default for f in dataclasses.fields(kind)}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (settings or {}).items()}
    for key, value in given.items():
        if key not in known:
            raise TaskError(f"task {name!r} has no setting {key!r}{_nearest(key, list(known))}")
        usual = known[key]
        if isinstance(value, bool) != isinstance(usual, bool) or not isinstance(value, type(usual) | int):
            raise TaskError(f"setting {key!r} of task {name!r} is {value!r}; expected something like {usual!r}")
    return kind(**given)


def settings_of(task: Task) -> dict[str, Any]:
    """The settings of a task, as JSON."""
    plain = dataclasses.asdict(task)  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
