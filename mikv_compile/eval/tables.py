"""Markdown tables from results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from mikv_compile.eval.results import DONE, Result

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "continuation": {
        "kl": ("KL", ".4f"), "top1": ("top-1", ".1%"), "dnll": ("dNLL", "+.4f"), "perplexity": ("perplexity", ".2f"),
    },
    "retrieval": {
        "digits": ("digits, agnostic", ".1%"), "exact": ("exact, agnostic", ".1%"),
        "aware_digits": ("digits, aware", ".1%"), "aware_exact": ("exact, aware", ".1%"),
    },
}  # fmt: skip
"""Task -> metric -> heading and format. A task that is not here shows its numbers under their own names."""


def rows(found: Iterable[Result], task: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a task's table: a method each, numbers averaged over texts where there are several."""
    done: dict[str, list[Result]] = defaultdict(list)
    failed: dict[str, str] = {}
    for result in found:
        if result.key.task == task:
            if result.status == DONE:
                done[result.key.method].append(result)
            else:
                failed[result.key.method] = result.error
    columns = COLUMNS.get(task) or _own_columns(done)
    texts = {len(results) for results in done.values()} | {1}
    several = len(texts) > 1 or max(texts) > 1
    headings = [
        "method",
        *(["texts"] if several else []),
        "% of 16-bit",
        "MB as run",
        *(h for h, _ in columns.values()),
    ]
    lines = []
    for method, results in done.items():
        sizes = [result.metrics.get("cache", {}) for result in results]
        line = [method, *([str(len(results))] if several else [])]
        line.append(_mean([size.get("ratio_16bit") for size in sizes], ".1%"))
        line.append(_mean([size["nbytes"] / 1e6 if "nbytes" in size else None for size in sizes], ".2f"))
        line += [_mean([result.metrics.get(name) for result in results], how) for name, (_, how) in columns.items()]
        lines.append(line)
    for method, error in failed.items():
        if method not in done:
            lines.append([method, *([""] if several else []), "failed: " + error.splitlines()[0][:100], ""]
                         + [""] * len(columns))  # fmt: skip
    return headings, lines


def markdown(found: Sequence[Result]) -> str:
    """All tables of some results, a section for each model and task."""
    parts = []
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in found:
        groups[result.key.model, result.key.task].append(result)
    for (model, task), members in sorted(groups.items()):
        headings, lines = rows(members, task)
        used = sorted({result.key.text for result in members})
        parts.append(f"## {task}, {model}\n\nTexts: {', '.join(used)}.\n\n{_table(headings, lines)}")
    return "\n\n".join(parts) + "\n"


def _table(headings: list[str], lines: list[list[str]]) -> str:
    marks = ["---", *["--:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in (headings, marks, *lines))


def _own_columns(done: dict[str, list[Result]]) -> dict[str, tuple[str, str]]:
    first: dict[str, Any] = next(iter(done.values()))[0].metrics if done else {}
    return {name: (name, ".4g") for name, value in first.items() if isinstance(value, int | float)}


def _mean(values: Sequence[float | None], how: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), how) if known else "-"
