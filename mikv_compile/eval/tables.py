"""Markdown tables from results."""

from __future__ import annotations

from collections.abc import Sequence

from mikv_compile.eval import aggregate
from mikv_compile.eval.aggregate import Group
from mikv_compile.eval.results import Result

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "continuation": {
        "kl": ("KL", ".4f"), "top1": ("top-1", ".1%"), "dnll": ("dNLL", "+.4f"), "perplexity": ("perplexity", ".2f"),
    },
    "retrieval": {
        "digits": ("digits, agnostic", ".1%"), "exact": ("exact, agnostic", ".1%"),
        "aware_digits": ("digits, aware", ".1%"), "aware_exact": ("exact, aware", ".1%"),
    },
    "needle": {"digits": ("digits", ".1%"), "exact": ("exact", ".1%")},
    "ruler": {
        "multi_key": ("multi-key", ".1%"), "multi_value": ("multi-value", ".1%"), "tracking": ("tracking", ".1%"),
        "common_words": ("common words", ".1%"), "accuracy": ("mean", ".1%"),
    },
    "drift": {
        "first_divergence": ("first other token", ".0f"), "agreement": ("same token", ".1%"), "kl": ("KL", ".4f"),
    },
    "external": {"accuracy": ("tokens right", ".1%"), "exact": ("exact", ".1%"), "f1": ("F1", ".1%")},
}  # fmt: skip
"""Task -> metric -> heading and format; the first one has a column for each text. A task that is not here shows its
numbers under their own names."""


def rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a group's table: a method each; means over the texts that all methods have read."""
    texts = group.texts
    columns = COLUMNS.get(group.task) or _own_columns(group)
    columns = {m: c for m, c in columns.items() if any(group.mean(name, m) is not None for name in group.methods)
               or m == next(iter(columns))}  # fmt: skip
    first = next(iter(columns), None)
    several = len(texts) > 1 and first is not None
    headings = ["method", "% of 16-bit", "MB as run"]
    if several and first:
        headings += [f"{columns[first][0]}, {text}" for text in texts]
    headings += [heading for heading, _ in columns.values()]
    lines = []
    for name in group.methods:
        line = [name, _text(group.mean(name, "cache.ratio_16bit"), ".1%")]
        nbytes = group.mean(name, "cache.nbytes")
        line.append(_text(None if nbytes is None else nbytes / 1e6, ".2f"))
        if several and first:
            by_text = group.done[name]
            line += [
                _text(aggregate.value(by_text[text], first) if text in by_text else None, columns[first][1])
                for text in texts
            ]
        line += [_text(group.mean(name, metric), how) for metric, (_, how) in columns.items()]
        lines.append(line)
    for name, error in group.failed.items():
        said = error.splitlines()[0][:100] if error else "no reason recorded"
        lines.append([name, f"failed: {said}", *[""] * (len(headings) - 2)])
    return headings, lines


def title(group: Group, others: Sequence[Group]) -> str:
    """What a table shows: the task and model, and settings that tell it from other tables."""
    special = aggregate.differing(group, others)
    return f"{group.task}, {group.model}" + "".join(f", {name} {value}" for name, value in special.items())


def note(group: Group) -> str:
    """The texts, and what means are over."""
    texts, common = group.texts, group.common
    said = f"Texts: {', '.join(texts)}." if texts else "No text was read."
    if len(texts) > 1:
        over = "all of them" if common == texts else ", ".join(common) + ", which every method has read"
        said += f" Means are over {over}." if common else " No text was read by every method, so there are no means."
    return said


def markdown(found: Sequence[Result]) -> str:
    """All tables of some results, a section for each model, task and settings."""
    made = aggregate.groups(found)
    parts = [f"## {title(group, made)}\n\n{note(group)}\n\n{_table(*rows(group))}" for group in made]
    return "\n\n".join(parts) + "\n"


def _table(headings: list[str], lines: list[list[str]]) -> str:
    marks = ["---", *["--:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in (headings, marks, *lines))


def _own_columns(group: Group) -> dict[str, tuple[str, str]]:
    for by_text in group.done.values():
        for result in by_text.values():
            numbers = [name for name, value in result.metrics.items() if isinstance(value, int | float)]
            return {name: (name, ".4g") for name in numbers}
    return {}


def _text(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
