"""What ``mikv coverage`` does: choose the runs, show their progress, write the table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mikv_compile.coverage.models import KINDS, Architecture, CannotBuildError, attentions, select
from mikv_compile.coverage.pool import Task, quiet, run_all
from mikv_compile.coverage.runs import Setting
from mikv_compile.coverage.table import OWN_FAILURES, render, setting_of, summarize

CHOICES = {
    "kind": KINDS, "cache": ("dynamic", "static"), "attention": ("sdpa", "eager", "first"),
    "lower": ("eager", "inductor"), "prefill": ("eager", "compiled", "both"), "bits4": ("all", "first", "none"),
}  # fmt: skip


def plan(
    architectures: Sequence[Architecture],
    cache: str | None = None,
    attention: str | None = None,
    lower: str = "eager",
    prefill: str = "eager",
    bits4: str = "first",
) -> list[Task]:
    """The runs, one setting after the other. ``attention="first"`` means sdpa where there is sdpa.

    ``prefill`` is for static caches; a dynamic one starts compiled."""
    ways = {"dynamic": ["compiled"], "static": ["eager", "compiled"] if prefill == "both" else [prefill]}
    settings = [
        (c, a, way) for c in ways if cache in (None, c) for a in ("sdpa", "eager") if attention in (None, "first", a)
        for way in ways[c]
    ]  # fmt: skip
    tasks: list[Task] = []
    for c, a, way in settings:
        for architecture in architectures:
            try:
                forms = attentions(architecture)
            except CannotBuildError:
                forms = ["sdpa"]  # one row that says why
            if a not in (forms[:1] if attention == "first" else forms):
                continue
            first = c == "dynamic" and a == forms[0]
            setting = Setting(c, a, lower, way, bits4 == "all" or (bits4 == "first" and first))
            tasks.append((architecture, setting))
    return tasks


def coverage(
    names: Sequence[str],
    *,
    kind: str | None,
    cache: str | None,
    attention: str | None,
    lower: str,
    prefill: str,
    bits4: str,
    jobs: int,
    timeout: float,
    results: Path | None,
    write: Path | None,
    listing: bool,
    as_json: bool = False,
) -> int:
    """Run the command; the exit status is 1 if this backend failed anywhere, 2 for arguments that make no sense."""
    given = {
        "kind": kind, "cache": cache, "attention": attention, "lower": lower, "prefill": prefill, "bits4": bits4,
    }  # fmt: skip
    for option, value in given.items():
        if value is not None and value not in CHOICES[option]:
            print(f"{option} is {value!r}; it can be {', '.join(CHOICES[option])}", file=sys.stderr)
            return 2
    quiet()
    try:
        architectures = select(names, kind)
    except CannotBuildError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"transformers has no architecture {error}; `mikv coverage --list` shows all", file=sys.stderr)
        return 2
    if listing and as_json:
        print(json.dumps([asdict(a) for a in architectures], indent=1))
        return 0
    if listing:
        for a in architectures:
            print(a.name, a.class_name, *(f"= {alias}" for alias in a.aliases))
        return 0
    tasks = plan(architectures, cache, attention, lower, prefill, bits4)
    rows = _run(tasks, results, jobs, timeout)
    total = summarize(rows)
    if as_json:
        print(json.dumps({"rows": rows, "summary": total}, indent=1))
    else:
        _show(rows, total)
    if write:
        write.write_text(render(rows, _command(names, given)))
        if not as_json:
            print(f"wrote {write}")
    return int(bool(total["own_failures"] or total["differing_tokens"] or total["failures_at_4_bits"]))


def _command(names: Sequence[str], given: dict[str, str | None]) -> str:
    """The command line without what changes nothing in the table."""
    default = {"lower": "eager", "prefill": "eager", "bits4": "first"}
    options = [f"--{'attn' if k == 'attention' else k} {v}" for k, v in given.items() if v and default.get(k) != v]
    return " ".join(["mikv coverage", *map(shlex.quote, names), *options])


def _run(tasks: list[Task], results: Path | None, jobs: int, timeout: float) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<34.34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("coverage", total=len(tasks))

        def advance(row: dict[str, Any]) -> None:
            if row["status"] in OWN_FAILURES:
                progress.print(f"{row['status']}: {row['key']}: {row.get('error', '')}", markup=False)
            progress.update(bar, advance=1, description=row["name"])

        rows = run_all(tasks, results, jobs=jobs, timeout=timeout, progress=advance)
        progress.update(bar, completed=len(tasks))
    return rows


def _show(rows: list[dict[str, Any]], total: dict[str, Any]) -> None:
    """A short table for a few runs, counts for many."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(rows) <= 24:
        table = Table("architecture", "setting", "status", "compressed", "cross", "tokens", "difference", "4 bits")
        for r in rows:
            ran = "compressed" in r
            table.add_row(
                r["name"], setting_of(r), r["status"], f"{r['compressed']}/{r['grown']}" if ran else "",
                f"{r['compressed_cross']}/{r['cross']}" if ran and r["cross"] else "",
                ("same" if r["same_tokens"] else "OTHER") if ran else "", f"{r['difference']:.0e}" if ran else "",
                f"{r['int4']['difference']:.2g}" if "difference" in r.get("int4", {}) else "",
            )  # fmt: skip
        console.print(table)
    for name, c in total["settings"].items():
        shares = c["caches"]
        grows = shares["all"] + shares["some"] + shares["none"]
        console.print(
            f"{name}: {c['run']} of {c['tried']} run; caches compressed: all in {shares['all']} of {grows}, some in "
            f"{shares['some']}; same tokens {c['same_tokens']}/{c['run']}; failures {sum(c[s] for s in OWN_FAILURES)}",
            highlight=False,
        )
