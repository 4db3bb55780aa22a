"""What ``mikv eval`` and ``mikv sweep`` do: read what was asked for, run it, show tables."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mikv_compile.errors import MikvError
from mikv_compile.eval import aggregate, models, plots, processes, results, runner, suites, tables, texts
from mikv_compile.eval.methods import DenseMethod
from mikv_compile.eval.mikv_method import MikvMethod
from mikv_compile.eval.runner import Plan, Summary
from mikv_compile.eval.tasks import TASKS, Task, TaskError, make

DTYPES = ("float32", "bfloat16", "float16")

MISTAKES = (models.ModelError, texts.TextError, suites.SuiteError, TaskError, MikvError, ValueError)
"""Errors whose message alone tells the user what to do."""


def evaluate(
    model: str,
    *,
    options: Sequence[str],
    preset: str | None,
    budget: str | None,
    tasks: str,
    settings: Sequence[str],
    names: str,
    text_dir: Path | None,
    out: Path,
    lower: str,
    dtype: str,
    device: str,
    fresh: bool,
    as_json: bool,
) -> int:
    """``mikv eval``: one setting of the backend beside the dense model. Returns the exit status."""
    try:
        chosen = backend_options(options, preset, budget, lower=lower)
        measured = make_tasks(tasks, settings)
        read = make_texts(names, text_dir)
        plan = make_plan(model, (DenseMethod(), MikvMethod(chosen)), measured, read, out, dtype, device, fresh)
        together = processes.current()
        summary = runner.run(plan, quiet=as_json, processes=together)
    except MISTAKES as error:
        print(error, file=sys.stderr)
        return 2
    if together.is_first:
        show(summary, as_json)
    return _ended(summary, together)


def sweep(
    suite: str,
    *,
    model: str,
    out: Path,
    only: str | None,
    text_dir: Path | None,
    lower: str,
    dtype: str,
    device: str,
    fresh: bool,
    as_json: bool,
    report: bool,
) -> int:
    """``mikv sweep``: all that a suite lists, and tables in the results folder. Returns the exit status."""
    try:
        together = processes.current()
        asked = suites.load(suite, {"lower": lower})
        methods = tuple(m for m in asked.methods if only is None or only in m.name)
        if not methods:
            names = ", ".join(m.name for m in asked.methods)
            raise suites.SuiteError(f"no method of suite {suite} has {only!r} in its name; there are {names}")
        if report:
            summary = Summary(results=list(results.read_all(out)), read_only=True)
            if not summary.results:
                raise suites.SuiteError(f"there are no results below {out}")
        else:
            by_name = {name: texts.load_all(name, text_dir) for name in asked.texts}
            read = tuple(text for several in by_name.values() for text in several)
            plan = replace(
                make_plan(model, methods, asked.tasks, read, out, dtype, device, fresh),
                texts_of={
                    task: tuple(text.name for name in few for text in by_name[name])
                    for task, few in asked.texts_of.items()
                },
            )
            summary = runner.run(plan, quiet=as_json, processes=together)
    except MISTAKES as error:
        print(error, file=sys.stderr)
        return 2
    if together.is_first:
        written = write_report(out)
        show(summary, as_json)
        if not as_json:
            print("wrote " + ", ".join(map(str, written)))
    return _ended(summary, together)


def _ended(summary: Summary, together: processes.Processes) -> int:
    """The exit status. A launcher ends all processes as soon as one has failed, so they wait for the first one."""
    if not summary.interrupted:
        together.wait()
    return summary.status


def write_report(out: Path) -> list[Path]:
    """Tables and pictures of all results below a folder; returns the files."""
    found = list(results.read_all(out))
    if not found:
        return []
    path = out / "results.md"
    path.write_text(tables.markdown(found), encoding="utf-8")
    return [path, *plots.draw_all(found, out)]


def make_plan(
    model: str, methods: tuple[Any, ...], tasks: tuple[Task, ...], read: tuple[texts.Text, ...], out: Path,
    dtype: str, device: str, fresh: bool,
) -> Plan:  # fmt: skip
    """A plan; what would fail only once the model is loaded, or later, is refused here.

    Raises:
        ValueError: for a dtype that is none, a device that is not here, or a results folder that is a
            file, or cannot be written.
        mikv_compile.OptionError: for a plan file of a method that is missing or damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    check_device(device)
    file = next((place for place in (out, *out.parents) if place.exists() and not place.is_dir()), None)
    if file is not None:
        raise ValueError(f"--out is {str(out)!r}, but {str(file)!r} is a file; give a folder for the results")
    suites.check_plan_files(methods)
    try:  # before hours of measuring, not after the first of them
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out is {str(out)!r}, where nothing can be written: {error.strerror}") from error
    return Plan(model, methods, tasks, read, out, dtype, device, fresh)


def check_device(name: str) -> None:
    """Refuse a device on which no model can run here.

    Raises:
        ValueError: for a name that torch does not know, or a device that this machine or build of torch lacks.
    """
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return
        module = torch.get_device_module(device)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected one such as cpu, cuda or cuda:0") from error
    count = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(
            f"device is {name!r}, but torch finds {count} {device.type} devices here; give another, or cpu"
        )


def make_texts(names: str, folder: Path | None) -> tuple[texts.Text, ...]:
    """Texts from ``pydoc,jargon``."""
    chosen = split(names)
    if not chosen:
        raise texts.TextError(f"--texts is {names!r}, which names no text; give pydoc, jargon, kjv or files")
    return tuple(text for name in chosen for text in texts.load_all(name, folder))


def make_tasks(names: str, settings: Sequence[str]) -> tuple[Task, ...]:
    """Tasks from ``continuation,retrieval`` and settings such as ``continuation.context=512``."""
    chosen: dict[str, dict[str, Any]] = {name: {} for name in split(names)}
    if not chosen:
        raise TaskError(f"--tasks is {names!r}, which names no task; there are {', '.join(TASKS)}")
    for setting in settings:
        key, value = parse_option(setting)
        if isinstance(value, str) and "," in value:
            value = tuple(number_or_text(part) for part in split(value))
        task, _, field = key.partition(".")
        if task not in chosen or not field:
            raise TaskError(f"--set {setting}: expected TASK.NAME=VALUE with a task of {', '.join(chosen)}")
        chosen[task][field] = value
    return tuple(make(name, changed) for name, changed in chosen.items())


def backend_options(settings: Sequence[str], preset: str | None, budget: str | None, **more: Any) -> dict[str, Any]:
    """Options of the backend from a command line, checked.

    Args:
        settings: ``NAME=VALUE`` each; they win over ``more``.
        preset, budget: the options with these names; they win over ``settings``.
        more: other options.

    Raises:
        ValueError: for a setting of another form.
        mikv_compile.OptionError: for options that are unknown or impossible.
    """
    chosen: dict[str, Any] = {**more, **dict(map(parse_option, settings))}
    chosen |= {} if preset is None else {"preset": preset}
    chosen |= {} if budget is None else {"budget": number_or_text(budget)}
    suites.check_options(chosen)
    return chosen


def parse_option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; a value that is a number becomes one, and ``true`` and ``false`` become what they say."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    value = value.strip()
    return name.strip(), {"true": True, "false": False}.get(value.lower(), number_or_text(value))


def number_or_text(text: str) -> int | float | str:
    """A number, if it is written as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def split(names: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def show(summary: Summary, as_json: bool) -> None:
    """Tables on the terminal, or everything as JSON."""
    if as_json:
        print(json.dumps([asdict(result) for result in summary.results], indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    made = aggregate.groups(summary.results)
    for group in made:
        headings, lines = tables.rows(group)
        table = Table(title=tables.title(group, made))
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(str(summary), markup=False)
