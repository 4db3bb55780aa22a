"""Results: one JSON file for each model, task, text and method. Imports neither torch nor the backend.

The files are how runs in different Python environments meet: what was measured once is skipped by the next run, and
tables and plots read nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Grows when the meaning of a field changes; files of another schema are not read."""

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Key:
    """What a result is the result of: everything that has to be equal for two runs to be the same one."""

    model: str
    """As it was given, with its dtype: ``smollm2 float32``."""
    task: str
    task_settings: Mapping[str, Any]
    text: str
    """With its start: ``kjv@2500000``."""
    method: str
    family: str
    method_settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Where the result lies below the results folder, readable and unique."""
        same = json.dumps([SCHEMA, {**asdict(self), "family": None}], sort_keys=True, default=str)
        digest = hashlib.sha256(same.encode()).hexdigest()[:8]
        parts = [_readable(self.text), _readable(self.method), digest]
        return Path(_readable(self.model), self.task, "--".join(parts) + ".json")

    def __str__(self) -> str:
        return f"{self.method}: {self.task} on {self.text}"


@dataclass(frozen=True)
class Result:
    """A measurement, or the error that prevented it."""

    key: Key
    status: str
    """``done`` or ``failed``."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """As the task returned them; ``cache`` has the bytes."""
    input_sha256: str = ""
    """Of the token ids of the input."""
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the session: graphs, sites, ..."""
    seconds: float = 0.0
    """Wall time with tracing and compiling; says nothing about speed."""
    versions: dict[str, str] = field(default_factory=dict)


def write(folder: Path, result: Result) -> Path:
    """Write a result, all of it or nothing; returns its file."""
    path = folder / result.key.path
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = {"schema": SCHEMA, **asdict(result)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(raw, indent=1, default=str, allow_nan=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(path: Path) -> Result | None:
    """The result in a file; None if it is none of this schema, or not there."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("schema") != SCHEMA:
            return None
        return Result(key=Key(**raw.pop("key")), **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find(folder: Path, key: Key) -> Result | None:
    """An earlier result."""
    return read(folder / key.path)


def read_all(folder: Path) -> Iterator[Result]:
    """All results below a folder, in the order of their names."""
    for path in sorted(folder.glob("*/*/*.json")):
        result = read(path)
        if result is not None:
            yield result


def versions() -> dict[str, str]:
    """Versions of everything that could change a number, and the commit when run from a git checkout."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "transformers", "mikv-compile", "optimum-quanto", "hqq", "kvpress"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in ("torch", "transformers", "mikv-compile"):
                found[name] = "not installed"
    commit = _commit()
    if commit:
        found["commit"] = commit
    return found


def _commit() -> str:
    """Of the checkout that this file belongs to, with ``+`` where files differ from it; else nothing."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=here, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 and tracked.returncode == 0 else ""


def _readable(name: str) -> str:
    """A part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+=@_-]+", "-", name).strip("-.")[:80] or "unnamed"
