"""Many runs in worker processes: a crash or a hang costs one row, and an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mikv_compile.coverage.models import Architecture
from mikv_compile.coverage.runs import Setting

PATIENCE = 10

RUNS_PER_WORKER = 60
"""Dynamo and the model classes leave something behind in every run, so workers are replaced now and then."""

Task = tuple[Architecture, Setting]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a results file by key; the last one of a key counts, and half a line at the end is left out."""
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows[row["key"]] = row
    return rows


def run_all(
    tasks: Iterable[Task],
    path: Path | None = None,
    *,
    jobs: int = 1,
    timeout: float = 180.0,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Run every task that has no row in the file yet, and return the rows of all, in the order of the tasks.

    Args:
        tasks: architectures with settings.
        path: JSON lines; each row is appended as soon as it is there.
        jobs: worker processes, each with one thread.
        timeout: seconds of CPU time that one run may take, so that a busy machine changes no result. A run that
            does not use the CPU is given up after a minute and `PATIENCE` times as many seconds.
        progress: called with each new row.
    """
    wanted = list(tasks)
    rows = read_rows(path) if path else {}
    queue = deque(t for t in wanted if not _has(rows.get(t[1].key(t[0].name)), t[1]))
    workers = [_Worker(timeout) for _ in range(min(jobs, len(queue)))]
    try:
        while queue or any(w.task for w in workers):
            for worker in workers:
                if worker.task is None and queue:
                    worker.give(queue.popleft())
            for row in _finished(workers):
                rows[row["key"]] = row
                if path:
                    _append(path, row)
                progress(row)
    finally:
        for worker in workers:
            worker.stop()
    return [rows[s.key(a.name)] for a, s in wanted]


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")  # an interrupted run has left half a line
        file.write(json.dumps(row).encode() + b"\n")


def _has(row: dict[str, Any] | None, setting: Setting) -> bool:
    return row is not None and (row["bits4"] or not setting.bits4)


def _finished(workers: list[_Worker]) -> list[dict[str, Any]]:
    """Rows of the workers that have answered, died or taken too long; waits a moment for the first."""
    busy = [w for w in workers if w.task]
    ready = wait([w.connection for w in busy if w.connection], timeout=1.0)
    rows = []
    for worker in busy:
        if worker.connection in ready:
            rows.append(worker.answer())
        elif (waited := time.monotonic() - worker.since) > PATIENCE * worker.timeout + 60:
            rows.append(worker.failed("timeout", f"no result after {waited:.0f} s"))
    return rows


@dataclass
class _Worker:
    """A process that runs one task at a time; started when first needed and again after it failed."""

    timeout: float = 180.0
    process: Any = None
    connection: Connection | None = None
    task: Task | None = None
    since: float = 0.0
    done: int = 0
    log: str = ""

    def give(self, task: Task) -> None:
        if self.process is None:
            self._start()
        assert self.connection is not None
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        descriptor, self.log = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        self.process = context.Process(target=_work, args=(theirs, self.log, self.timeout), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def answer(self) -> dict[str, Any]:
        """The row that has arrived, or one that says how the process died."""
        assert self.connection is not None
        try:
            row = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            if self.process.exitcode == -getattr(signal, "SIGXCPU", 0):
                return self.failed("timeout", f"no result after {self.timeout:.0f} s of CPU time")
            tail = " | ".join(Path(self.log).read_text(errors="replace").strip().splitlines()[-3:])
            return self.failed("crash", f"the process died with exit code {self.process.exitcode}: {tail[-400:]}")
        self.task = None
        self.done += 1
        if self.done >= RUNS_PER_WORKER:
            self.stop()
        return row

    def failed(self, status: str, error: str) -> dict[str, Any]:
        """The row of a task that gave none; the process ends."""
        assert self.task is not None
        architecture, setting = self.task
        row = {
            "key": setting.key(architecture.name), "name": architecture.name, "kind": architecture.kind,
            "class": architecture.class_name, **setting.__dict__, "status": status, "error": error,
            "seconds": round(time.monotonic() - self.since, 2),
        }  # fmt: skip
        self.stop()
        return row

    def stop(self) -> None:
        """End the process; the next task starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            assert self.connection is not None
            self.connection.close()
            Path(self.log).unlink(missing_ok=True)
        self.process = self.connection = self.task = None


def _work(connection: Connection, log: str, timeout: float) -> None:
    """What a worker process does."""
    quiet(log)
    import torch

    from mikv_compile.coverage.runs import run

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import transformers.models.auto.modeling_auto  # noqa: F401  (its seconds are not the first run's)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        _limit_cpu(timeout)
        row = run(*task)
        torch._dynamo.reset()
        connection.send(row)


def _limit_cpu(seconds: float) -> None:
    """From now on this process may use so much CPU time; then the system ends it. No limit where there is no such."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def quiet(log: str | None = None) -> None:
    """Silence what transformers and torch print about tiny models; output goes to the file if one is given."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    if log:
        target = os.open(log, os.O_WRONLY | os.O_TRUNC)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(target, stream.fileno())
        os.close(target)
