"""What the benchmarks share: timing side by side, the environment, results on disk, tables and plots.

Configurations that are compared run alternately in one process, so that whatever else the machine does hits all of
them. ``torch.utils.benchmark`` and ``triton.testing`` time one thing after the other; that is why neither is used here.
A ratio is the median of the ratios of neighbouring samples, with quartiles.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "benchmarks-quick"
"""Results of ``--quick``: they say that the commands work and nothing about speed, so the report never reads them."""

SHORTEST_SAMPLE = 1e-3
"""Seconds: calls that are shorter are timed several at a time."""

DEFAULT_CACHE_BYTES = 32 * 2**20


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


# Statistics ----------------------------------------------------------------------------------------------------------


class Quartiles(NamedTuple):
    """First quartile, median, third quartile."""

    low: float
    median: float
    high: float

    def text(self, pattern: str = "{:.2f}", factor: float = 1.0) -> str:
        """``median [low - high]``."""
        low, median, high = (pattern.format(x * factor) for x in self)
        return f"{median} [{low} - {high}]"

    def scaled(self, factor: float) -> Quartiles:
        """In another unit."""
        return Quartiles(*(x * factor for x in self))


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Quartiles of at least one sample."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Quartiles(low, median, high)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Quartiles:
    """How many times faster ``fast`` is: quartiles of the ratios of samples that were taken next to each other."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])


# Timing --------------------------------------------------------------------------------------------------------------


def seconds_per_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of ``calls`` calls in a row; on a GPU between two events of its stream."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    failures: Failures,
) -> dict[str, list[float]]:
    """Time candidates in turn, each once per round, each round beginning with another one.

    Args:
        candidates: what to time. One that raises is left out and reported.
        device: where they run.
        seconds: what all rounds together may take, within ``rounds``.
        rounds: least and greatest number of rounds.
        failures: where a candidate that raises is noted.

    Returns:
        per candidate, seconds per call of each round.
    """
    calls: dict[str, int] = {}
    total = 0.0
    for name, function in candidates.items():
        with failures.catch(name):
            function()
            estimate = seconds_per_call(function, 1, device)
            calls[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(estimate, 1e-7)))
            total += estimate * calls[name]
    count = max(rounds[0], min(rounds[1], int(seconds / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(count):
        for name in rotated(names, i):
            samples[name].append(seconds_per_call(candidates[name], calls[name], device))
    return samples


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning with another one."""
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]


def rotating(function: Callable[[Any], object], copies: Sequence[Any]) -> Callable[[], object]:
    """A call of ``function`` on the next copy of its input each time, so that no call finds its input in a cache."""
    following = itertools.cycle(copies)
    return lambda: function(next(following))


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=DEFAULT_CACHE_BYTES)


def cold_copies(nbytes: int, working_set: int) -> int:
    """Copies of an input of ``nbytes`` that together exceed ``working_set`` bytes."""
    return working_set // max(nbytes, 1) + 1


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Deadline:
    """Lets optional parts of a long run be left out, visibly, when its time is up."""

    def __init__(self, at: float | None = None) -> None:
        """``at``: seconds since the epoch; None is never."""
        self.at = at

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about ``seconds`` still ends in time."""
        return self.at is None or time.time() + seconds <= self.at


# Failures ------------------------------------------------------------------------------------------------------------


@dataclass
class Failures:
    """What did not work, or was not run, and why. Tables show it beside the numbers."""

    found: list[dict[str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def catch(self, configuration: str) -> Iterator[None]:
        """Note an exception instead of raising it."""
        try:
            yield
        except Exception as error:
            short = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self.add(configuration, short, traceback.format_exc())

    def add(self, configuration: str, error: str, details: str = "") -> None:
        """Note that ``configuration`` has no result."""
        say(f"  FAILED {configuration}: {error}")
        # Without the folders of this machine.
        details = details.replace(sys.prefix + os.sep, "").replace(str(ROOT) + os.sep, "")
        self.found.append({"configuration": configuration, "error": error, "details": details})


# Environment ---------------------------------------------------------------------------------------------------------


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return None


def cpu_model() -> str:
    """Name of the CPU, with family and model number where the name alone says little."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def device_name(device: torch.device) -> str:
    """What the results are of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {os.cpu_count()} cores"


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "mikv-compile", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": pages,
        "last_level_cache_bytes": cache_bytes(device),
        "system": platform.platform(),
        "compiler": (_output(os.environ.get("CXX", "g++"), "--version") or "none").splitlines()[0],
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MIKV_", "KMP_"))},
    }


# Results -------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One run of a benchmark; :meth:`write` puts it on disk."""

    benchmark: str
    device: torch.device
    quick: bool
    arguments: dict[str, Any]
    folder: Path | None = None
    cases: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        self.environment = environment(self.device)
        self._began = time.time()
        say(f"{self.benchmark} on {self.environment['device_name']}, load {self.environment['load_at_start']:.1f}")

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "benchmark": self.benchmark,
            "quick": self.quick,
            "started": datetime.datetime.fromtimestamp(self._began, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._began, 1),
            "arguments": self.arguments,
            "environment": {**self.environment, "load_at_end": os.getloadavg()[0]},
            **self.extra,
            "cases": self.cases,
            "failures": self.failures.found,
        }

    def write(
        self, tables: Callable[[dict[str, Any]], str], plot: Callable[[dict[str, Any], Path], None] | None
    ) -> Path:
        """Write ``NAME.json``, ``NAME.md`` and ``NAME.png``; print the tables.

        Returns:
            the folder that they are in.
        """
        made = self.as_json()
        day = datetime.date.today().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", self.environment["device_name"].lower()).strip("-")
        folder = self.folder or (QUICK_RESULTS if self.quick else RESULTS) / f"{day}-{slug}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.benchmark}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        text = f"{tables(made)}{failure_text(made)}"
        (folder / f"{self.benchmark}.md").write_text(f"{describe(made)}\n\n{text}", encoding="utf-8")
        if plot is not None:
            with self.failures.catch("plot"):
                plot(made, folder / f"{self.benchmark}.png")
        say(f"\n{text}\n{made['seconds']:.0f} s; results in {folder}")
        return folder


def describe(result: dict[str, Any]) -> str:
    """Where a result comes from, in a few lines of Markdown."""
    env = result["environment"]
    changed = " with uncommitted changes" if env["uncommitted_changes"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    quick = " **Quick run: says nothing about speed.**" if result["quick"] else ""
    return (
        f"{env['device_name']}, {env['vectors']}, last-level cache {env['last_level_cache_bytes'] / 2**20:.0f} MiB; "
        f"{versions}; commit {(env['commit'] or 'unknown')[:12]}{changed}; {result['started']}, "
        f"{result['seconds']:.0f} s; load {env['load_at_start']:.1f} before, {env['load_at_end']:.1f} after.{quick}"
    )


def failure_text(result: dict[str, Any]) -> str:
    """What has no number, and why; empty if there is nothing to say."""
    lines = [f"* {f['configuration']}: {f['error']}" for f in result["failures"]]
    return "\nWithout a result:\n\n" + "\n".join(lines) + "\n" if lines else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; columns from the ``left``-th on are aligned to the right."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def load_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results in the folders below ``folder``, oldest first; each knows its ``folder``."""
    found = []
    for path in folder.glob("*/*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and "cases" in result and "quick" in result:  # other files may lie there too
            found.append({**result, "folder": path.parent})
    return sorted(found, key=lambda result: result["started"])


# Plots ---------------------------------------------------------------------------------------------------------------


def axes(count: int) -> tuple[Any, Any]:
    """A figure with ``count`` plots side by side, and the array of them."""
    import matplotlib

    matplotlib.use("Agg")  # files only, also where there is a display
    from matplotlib import pyplot

    figure, made = pyplot.subplots(1, count, figsize=(6.5 * count, 5), squeeze=False)
    return figure, made[0]


def line(where: Any, x: Sequence[float], y: Sequence[Quartiles], label: str, **style: Any) -> None:
    """Medians as a line, quartiles as a band."""
    (drawn,) = where.plot(x, [q.median for q in y], marker=".", label=label, **style)
    where.fill_between(x, [q.low for q in y], [q.high for q in y], color=drawn.get_color(), alpha=0.15)


def bars(where: Any, labels: Sequence[str], values: Sequence[Quartiles], **style: Any) -> None:
    """Medians as bars, quartiles as whiskers."""
    spread = [[q.median - q.low for q in values], [q.high - q.median for q in values]]
    where.barh(labels, [q.median for q in values], xerr=spread, **style)
    where.invert_yaxis()
    where.grid(axis="x", alpha=0.3)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Child processes -----------------------------------------------------------------------------------------------------


def in_child(
    function: str, arguments: dict[str, Any], variables: Mapping[str, str], timeout: float | None = None
) -> dict[str, Any]:
    """What ``module:function(**arguments)`` returns in a fresh Python process with more environment variables.

    Raises:
        RuntimeError: if the process fails, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "benchmarks.child", function, json.dumps(arguments), str(out)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **variables, "PYTHONPATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
        if done.returncode or not out.exists():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError("\n".join([lines[-1], *lines[-30:]]))
        return json.loads(out.read_text())
