"""Writes docs/performance.md from the newest results, the targets, and the notes in docs/performance_notes.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks import attention, compilation, decode, harness, memory
from benchmarks.targets import TARGETS, Results

PAGE = harness.ROOT / "docs" / "performance.md"
NOTES = harness.ROOT / "docs" / "performance_notes.md"

TABLES = {
    "attention": lambda result: attention.tables(result, ("headline", "SmolLM2")),
    "decode": decode.tables,
    "compile": compilation.tables,
    "memory": memory.tables,
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def newest(folder: Path = harness.RESULTS) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest result of each benchmark on each kind of device; quick runs do not count."""
    found = [result for result in harness.load_results(folder) if not result["quick"]]
    return {(result["benchmark"], result["environment"]["device"]): result for result in found}


def page(results: Results, notes: str) -> str:
    """The whole page."""
    parts = ["<!-- Made by `python -m benchmarks report`; the prose is in performance_notes.md. -->", notes.strip()]
    parts.append("## Targets\n\nRatios within one run: median [first - third quartile].")
    for device, title in DEVICES.items():
        rows = [target.row(results) for target in TARGETS if target.device == device]
        parts.append(f"{title}:\n\n{harness.table(['', 'goal', 'measured', ''], rows)}")
    for device, title in DEVICES.items():
        for name, tables in TABLES.items():
            result = results.get((name, device))
            if result is not None:
                parts.append(f"## {title}: {name}\n\n{section(result, tables(result))}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def section(result: dict[str, Any], tables: str) -> str:
    """Where a result comes from, its tables, what failed, the plot, and where all of it lies."""
    where = os.path.relpath(result["folder"], PAGE.parent)
    name = result["benchmark"]
    parts = [harness.describe(result), tables, harness.failure_text(result)]
    if (result["folder"] / f"{name}.png").exists():
        parts.append(f"![{name}]({where}/{name}.png)")
    parts.append(f"All tables: [{name}.md]({where}/{name}.md); every sample: [{name}.json]({where}/{name}.json).")
    return "\n\n".join(part.strip() for part in parts if part.strip())


def write() -> str:
    """Write the page; returns the table of targets for printing."""
    results = newest()
    PAGE.write_text(page(results, NOTES.read_text(encoding="utf-8")), encoding="utf-8")
    rows = [[DEVICES[target.device], *target.row(results)] for target in TARGETS]
    return harness.table(["", "", "goal", "measured", ""], rows, left=2)
