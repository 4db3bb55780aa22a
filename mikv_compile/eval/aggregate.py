"""Puts results side by side: a group is what may be compared, and a mean covers the same texts for every method."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mikv_compile.eval.results import DONE, Key, Result


@dataclass
class Group:
    """Results of one model and one task with the same settings."""

    model: str
    task: str
    settings: dict[str, Any]
    done: dict[str, dict[str, Result]] = field(default_factory=dict)
    """Method -> text -> result."""
    failed: dict[str, str] = field(default_factory=dict)
    """Methods without any result, and their error."""
    keys: dict[str, Key] = field(default_factory=dict)
    """Method -> one of its keys."""

    @property
    def methods(self) -> list[str]:
        """Those with a result: the dense model, and the others by family and name, numbers in order."""
        return sorted(
            self.done, key=lambda name: (self.family(name) != "dense", self.family(name) != "mikv", self.family(name))
        )

    @property
    def texts(self) -> list[str]:
        """All that were read."""
        return sorted({text for by_text in self.done.values() for text in by_text})

    @property
    def common(self) -> list[str]:
        """Texts that every method has read: what means are over."""
        return [text for text in self.texts if all(text in by_text for by_text in self.done.values())]

    def family(self, method: str) -> str:
        """A method's family."""
        return self.keys[method].family

    def mean(self, method: str, metric: str) -> float | None:
        """A number's mean over the common texts; None if there are none, or a text lacks the number.

        ``cache.nbytes`` reaches into a table.
        """
        found = [value(self.done[method][text], metric) for text in self.common]
        known = [number for number in found if number is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None


def groups(found: Iterable[Result]) -> list[Group]:
    """Results by model, task and settings."""
    made: dict[str, Group] = {}
    for result in found:
        key = result.key
        same = json.dumps([key.model, key.task, dict(key.task_settings)], sort_keys=True)
        group = made.setdefault(same, Group(key.model, key.task, dict(key.task_settings)))
        group.keys.setdefault(key.method, key)
        if result.status == DONE:
            group.done.setdefault(key.method, {})[key.text] = result
            group.failed.pop(key.method, None)
        elif key.method not in group.done:
            group.failed[key.method] = result.error
    return sorted(made.values(), key=lambda g: (g.model, g.task, json.dumps(g.settings, sort_keys=True)))


def differing(group: Group, others: Iterable[Group]) -> dict[str, Any]:
    """The settings that tell a group from others of its model and task."""
    same = [other for other in others if (other.model, other.task) == (group.model, group.task)]
    return {k: v for k, v in group.settings.items() if any(other.settings.get(k) != v for other in same)}


def value(result: Result, metric: str) -> float | None:
    """A number of a result."""
    found: Any = result.metrics
    for part in metric.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else None
