"""Reads a suite: a TOML file that lists methods, tasks and texts.

```toml
texts = ["pydoc", "jargon@400000"]

[tasks.continuation]          # settings that differ from the usual ones; may be empty
context = 2048

[[methods]]
kind = "dense"

[[methods]]                   # kind = "mikv" unless told
name = "quarter"              # made from the options unless told
options = { budget = 0.125 }

[[methods]]
family = "eviction"
options = { policy = "snapkv" }
grid = { tiers = ["fp16:0.5", "fp16:0.25"] }   # one method for each combination
tags = { policy = "snapkv" }  # for pictures: policy, tokens, bits; see mikv_compile.eval.plots.tags_of

[tasks.retrieval]
texts = ["jargon@400000"]     # only these, of the suite's or others

[[methods]]                   # anything that is a mikv_compile.eval.methods.Method; looked for beside the suite, too
factory = "my_package.peers:Quanto"
arguments = { bits = 4 }
grid = { axis = [0, 1] }
```
"""

from __future__ import annotations

import difflib
import itertools
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from mikv_compile.eval.methods import DenseMethod, Method
from mikv_compile.eval.mikv_method import MikvMethod
from mikv_compile.eval.tasks import Task, make

_TOP = ("about", "texts", "tasks", "methods")
_METHOD = ("kind", "name", "family", "options", "arguments", "factory", "grid", "regional", "tags")
_KINDS = ("mikv", "dense")


class SuiteError(Exception):
    """A suite cannot be read; the message names the file and the entry."""


@dataclass(frozen=True)
class Suite:
    """What to measure."""

    methods: tuple[Method, ...]
    tasks: tuple[Task, ...]
    texts: tuple[str, ...]
    """All that some task reads."""
    texts_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Task -> the texts that it reads, where it does not read them all."""
    about: str = ""


def packaged() -> list[str]:
    """Names of the suites that come with the package."""
    folder = resources.files("mikv_compile.eval") / "suites"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load(name: str, extra: Mapping[str, Any] | None = None) -> Suite:
    """A suite from a file, or a packaged one by its name.

    Args:
        name: of either.
        extra: options for all methods of kind ``mikv`` that do not set them, ``{"lower": "eager"}`` say.

    Raises:
        SuiteError: if there is none, or it says something that cannot be.
    """
    folder = None
    if Path(name).is_file():
        content = Path(name).read_text(encoding="utf-8")
        folder = Path(name).resolve().parent
    elif name in packaged():
        content = (resources.files("mikv_compile.eval") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise SuiteError(f"no suite {name!r}: it is neither a file nor one of {', '.join(packaged())}")
    try:
        return parse(tomllib.loads(content), extra, folder)
    except (tomllib.TOMLDecodeError, SuiteError) as error:
        raise SuiteError(f"suite {name}: {error}") from error


def parse(raw: Mapping[str, Any], extra: Mapping[str, Any] | None = None, folder: Path | None = None) -> Suite:
    """A suite from what a TOML file holds.

    Args:
        raw: that.
        extra: as for :func:`load`.
        folder: where modules of factories are looked for first.

    Raises:
        SuiteError: for unknown or impossible entries.
    """
    _known(raw, _TOP, "the suite")
    for part, kind in (("texts", list), ("tasks", dict), ("methods", list)):
        if not isinstance(raw.get(part, kind()), kind):
            raise SuiteError(f"{part!r} must be a {'table' if kind is dict else 'list'}")
    texts = _texts(raw.get("texts", ["pydoc"]), "texts")
    tasks, texts_of = [], {}
    for name, settings in raw.get("tasks", {"continuation": {}}).items():
        if not isinstance(settings, Mapping):
            raise SuiteError(f"[tasks.{name}] must be a table of settings")
        if "texts" in settings:
            texts_of[name] = _texts(settings["texts"], f"[tasks.{name}] texts")
        try:
            tasks.append(make(name, {key: value for key, value in settings.items() if key != "texts"}))
        except ValueError as error:
            raise SuiteError(f"[tasks.{name}]: {error}") from error
    if not tasks:
        raise SuiteError(
            "[tasks] names no task; leave it out for continuation, or give a table such as [tasks.retrieval]"
        )
    methods = [
        method
        for i, entry in enumerate(raw.get("methods", []), 1)
        for method in _methods(entry, i, extra or {}, folder)
    ]
    if not methods:
        raise SuiteError("it has no [[methods]]")
    seen: set[str] = set()
    for method in methods:
        if method.name in seen:
            raise SuiteError(f"two methods are called {method.name!r}; give one of them another name")
        seen.add(method.name)
    some = [texts_of.get(task.name, texts) for task in tasks]
    return Suite(
        tuple(methods), tuple(tasks), tuple(dict.fromkeys(name for names in some for name in names)),
        {task.name: texts_of.get(task.name, texts) for task in tasks} if texts_of else {}, raw.get("about", ""),
    )  # fmt: skip


def _texts(names: Any, where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SuiteError(f"{where} must be a list of names, at least one")
    return tuple(names)


def _methods(entry: Any, number: int, extra: Mapping[str, Any], folder: Path | None) -> list[Method]:
    """The methods of one entry."""
    where = f"method {number}"
    if not isinstance(entry, Mapping):
        raise SuiteError(f"{where} must be a table")
    _known(entry, _METHOD, where)
    grid = entry.get("grid", {})
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise SuiteError(f"{where}: grid must be a table of lists")
    made = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = entry.get("name", "")
        if name and grid:
            name = " ".join([name, *map(str, values)])
        try:
            made.append(_method(entry, point, name, extra, folder))
        except Exception as error:  # whatever a factory raises
            raise SuiteError(f"{where}{f' ({name})' if name else ''}: {error}") from error
    return made


def _method(
    entry: Mapping[str, Any], point: dict[str, Any], name: str, extra: Mapping[str, Any], folder: Path | None
) -> Method:
    given = {key: entry[key] for key in ("family",) if key in entry} | ({"name": name} if name else {})
    if "factory" in entry:
        if misplaced := {"kind", "options", "regional", "tags"} & set(entry):
            raise SuiteError(f"{sorted(misplaced)} do not go with factory; give arguments")
        module, _, attribute = entry["factory"].partition(":")
        # Not before the method is opened: what it needs may be missing here, where its results are only read.
        return LateMethod(
            name or " ".join([attribute, *(f"{k}={v}" for k, v in {**entry.get("arguments", {}), **point}.items())]),
            entry.get("family", "peer"),
            {"factory": entry["factory"], "arguments": {**entry.get("arguments", {}), **point}},
            folder,
        )
    if "arguments" in entry:
        raise SuiteError("arguments go with factory; options are for the backend")
    kind = entry.get("kind", "mikv")
    if kind not in _KINDS:
        raise SuiteError(f"kind is {kind!r}; it can be {', '.join(_KINDS)}")
    if kind == "dense":
        return DenseMethod(**given)
    options = {**extra, **entry.get("options", {}), **point}
    check_options(options)
    return MikvMethod(options, regional=entry.get("regional"), tags=entry.get("tags", {}), **given)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that the backend would refuse, before anything is measured.

    Raises:
        mikv_compile.OptionError: for those.
    """
    from mikv_compile import Options
    from mikv_compile.planner import Planner

    Planner(Options.parse(options))


def check_plan_files(methods: Iterable[Method]) -> None:
    """Refuse plan files that cannot be read, before a model is loaded. Where results are only read, none is needed.

    Raises:
        mikv_compile.OptionError: for a file that is missing or damaged.
    """
    from mikv_compile import sensitivity

    for method in methods:
        if isinstance(method, MikvMethod) and method.options.get("plan") is not None:
            sensitivity.load(method.options["plan"])


@dataclass(frozen=True)
class LateMethod:
    """A method of another module, which is imported when it is opened."""

    name: str
    family: str
    settings: Mapping[str, Any]
    folder: Path | None = None
    """Where its module is looked for first."""

    def open(self, model: Any) -> Any:
        """What the method itself opens; raises :class:`UnavailableError` if it cannot be imported."""
        from mikv_compile.eval.methods import UnavailableError

        module, _, attribute = self.settings["factory"].partition(":")
        try:
            with _importable(self.folder):
                found = partial(getattr(import_module(module), attribute), **self.settings["arguments"])
        except ImportError as error:
            raise UnavailableError(str(error)) from error
        return found().open(model)


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Modules in a folder can be imported."""
    added = [str(folder)] if folder else []
    sys.path[:0] = added
    try:
        yield
    finally:
        for name in added:
            sys.path.remove(name)


def _known(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise SuiteError(f"{where} has an unknown entry {key!r}; {hint}")
