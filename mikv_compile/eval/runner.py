"""Measures methods on tasks: what has a result is skipped, what fails is recorded, and the rest goes on.

Several processes may share a run. Each takes every n-th measurement, and they meet in the results folder alone.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mikv_compile.eval import models, results
from mikv_compile.eval.methods import DenseMethod, Method, Session, UnavailableError
from mikv_compile.eval.processes import Processes
from mikv_compile.eval.progress import Progress
from mikv_compile.eval.references import References
from mikv_compile.eval.results import DONE, FAILED, Key, Result
from mikv_compile.eval.tasks import Exercise, Task, settings_of
from mikv_compile.eval.texts import Text


@dataclass(frozen=True)
class Plan:
    """What is to be measured: every method on every task with every text.

    Attributes:
        model: a name for :func:`mikv_compile.eval.models.load`.
        texts_of: task -> the names of the texts that it reads; a task that is not there reads all.
        dtype: of the weights, as in ``torch``.
        fresh: measure again what has a result.
    """

    model: str
    methods: tuple[Method, ...]
    tasks: tuple[Task, ...]
    texts: tuple[Text, ...]
    out: Path
    dtype: str = "float32"
    device: str = "cpu"
    fresh: bool = False
    texts_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def keys(self, method: Method) -> list[tuple[Key, Task, Text]]:
        """A method's measurements."""
        model = f"{models.short_name(self.model)} {self.dtype}"
        return [
            (
                Key(model, task.name, settings_of(task), text.name, method.name, method.family, dict(method.settings)),
                task,
                text,
            )
            for task in self.tasks
            for text in self.texts
            if task.name not in self.texts_of or text.name in self.texts_of[task.name]
        ]

    def shares(self, processes: Processes) -> list[tuple[Method, list[tuple[Key, Task, Text]]]]:
        """The measurements of one process, by method; between them, processes have each measurement once."""
        keys = [(method, self.keys(method)) for method in self.methods]
        first = itertools.accumulate((len(found) for _, found in keys), initial=0)
        return [
            (method, [key for number, key in enumerate(found, start) if processes.has(number)])
            for (method, found), start in zip(keys, first, strict=False)
        ]


@dataclass
class Summary:
    """What became of a plan."""

    results: list[Result] = field(default_factory=list)
    """Of this run and of earlier ones, in the plan's order."""
    measured: int = 0
    skipped: int = 0
    failed: list[Result] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Methods that cannot run here, and why."""
    interrupted: bool = False
    read_only: bool = False
    """Nothing was to be measured: the results are those of a folder."""

    @property
    def status(self) -> int:
        """Exit status: 130 after Ctrl-C, 1 if something failed or could not run."""
        return 130 if self.interrupted else int(bool(self.failed or self.unavailable))

    def __str__(self) -> str:
        if self.read_only:
            return f"{len(self.results)} results"
        parts = [f"{self.measured} measured", f"{self.skipped} skipped (they have a result)"]
        parts += [f"{len(self.failed)} failed"] * bool(self.failed)
        parts += [f"{len(self.unavailable)} methods not available here"] * bool(self.unavailable)
        parts += ["interrupted; run the same command to go on"] * self.interrupted
        return ", ".join(parts)

    @classmethod
    def merged(cls, parts: Sequence[Summary], plan: Plan) -> Summary:
        """The summary of all processes of a run, in the plan's order."""
        order = {key.path: i for i, key in enumerate(key for m in plan.methods for key, *_ in plan.keys(m))}

        def place(result: Result) -> int:
            return order[result.key.path]

        return cls(
            results=sorted((result for part in parts for result in part.results), key=place),
            measured=sum(part.measured for part in parts),
            skipped=sum(part.skipped for part in parts),
            failed=sorted((result for part in parts for result in part.failed), key=place),
            unavailable={name: why for part in parts for name, why in part.unavailable.items()},
            interrupted=any(part.interrupted for part in parts),
        )


Load = Callable[[], tuple[Any, Any]]
"""Gives the tokenizer and the model."""

ALONE = Processes()


def run(plan: Plan, load: Load | None = None, quiet: bool = False, processes: Processes = ALONE) -> Summary:
    """Measure what has no result yet.

    Args:
        plan: what.
        load: how to get tokenizer and model, if not by the plan's name. Called only if something has to be measured.
        quiet: show no progress.
        processes: those that share the run; the first one alone shows progress, of its own share.

    Returns:
        What became of the whole plan, once all processes are done. After an interruption, this process's part.
    """
    summary = Summary()
    shares = plan.shares(processes)
    plan = replace(plan, device=processes.device(plan.device))
    with Progress(sum(len(keys) for _, keys in shares), quiet or not processes.is_first) as progress:
        runner = _Runner(plan, load or (lambda: _load(plan)), summary, progress)
        try:
            for method, keys in shares:
                runner.measure(method, keys)
        except KeyboardInterrupt:
            summary.interrupted = True
            return summary
    return Summary.merged(processes.gathered(summary), plan)


def _load(plan: Plan) -> tuple[Any, Any]:
    return models.load(plan.model, getattr(torch, plan.dtype), plan.device)


class _Runner:
    def __init__(self, plan: Plan, load: Load, summary: Summary, progress: Progress) -> None:
        self.plan, self.summary, self.progress = plan, summary, progress
        self._load = load
        self._loaded: tuple[Any, Any, References] | None = None
        self._exercises: dict[tuple[Task, str], Exercise] = {}

    def measure(self, method: Method, keys: Sequence[tuple[Key, Task, Text]]) -> None:
        """Those of a method's measurements that have no result."""
        pending = []
        for key, task, text in keys:
            earlier = None if self.plan.fresh else results.find(self.plan.out, key)
            if earlier is not None and earlier.status == DONE:
                self.summary.results.append(earlier)
                self.summary.skipped += 1
                self.progress.done()
            else:
                pending.append((key, task, text))
        if not pending:
            return
        # Before the method changes the model: the references are the plain model's.
        ready = [(key, made) for key, task, text in pending if (made := self._prepared(key, task, text)) is not None]
        if not ready:
            return
        _, model, references = self._model()
        started = time.perf_counter()
        at = 0
        try:
            with torch.no_grad(), method.open(model) as session:
                for at, (key, exercise) in enumerate(ready):  # noqa: B007  (needed when something raises)
                    reference = references.get(key.task, key.task_settings, exercise.digest)
                    self._one(key, exercise, session, reference, started)
                    started = time.perf_counter()
                at = len(ready)
        except UnavailableError as error:
            self.summary.unavailable[method.name] = str(error)
            self.progress.line(f"not available here: {method.name}: {error}")
            self.progress.done(len(ready) - at)
        except Exception as error:
            for key, _ in ready[at:]:
                self._record_failure(key, error, time.perf_counter() - started)

    def _model(self) -> tuple[Any, Any, References]:
        if self._loaded is None:
            self.progress.line(f"loading {self.plan.model}")
            tokenizer, model = self._load()
            self._loaded = tokenizer, model, References(self.plan.out, model)
        return self._loaded

    def _prepared(self, key: Key, task: Task, text: Text) -> Exercise | None:
        """The input, with the dense run's reference on disk; None if there cannot be one."""
        tokenizer, model, references = self._model()
        try:
            if (task, text.name) not in self._exercises:
                self._exercises[task, text.name] = task.prepare(tokenizer, text)
            exercise = self._exercises[task, text.name]

            def dense() -> Any:
                self.progress.line(f"dense reference: {task.name} on {text.name}")
                with torch.no_grad(), DenseMethod().open(model) as session:
                    return exercise.reference(session)

            if task.needs_reference:
                references.ensure(task.name, settings_of(task), exercise.digest, dense)
        except Exception as error:
            self._record_failure(key, error, 0.0)
            return None
        return exercise

    def _one(self, key: Key, exercise: Exercise, session: Session, reference: Any, started: float) -> None:
        try:
            with self.progress.steps(str(key), exercise.steps) as advance:
                metrics = exercise.run(session, reference, advance)
        except UnavailableError:
            raise
        except Exception as error:
            self._record_failure(key, error, time.perf_counter() - started)
            return
        result = Result(
            key, DONE, metrics, exercise.digest, facts=session.facts(), seconds=time.perf_counter() - started,
            versions=results.versions(),
        )  # fmt: skip
        results.write(self.plan.out, result)
        self.summary.results.append(result)
        self.summary.measured += 1
        self.progress.line(f"{key}: {self._main(key, metrics)} ({result.seconds:.0f} s)")
        self.progress.done()

    def _main(self, key: Key, metrics: dict[str, Any]) -> str:
        names = next(task.main for task in self.plan.tasks if task.name == key.task)
        return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)

    def _record_failure(self, key: Key, error: Exception, seconds: float) -> None:
        text = "".join(traceback.format_exception_only(error)).strip()
        # Names of files without their folders: results are shared, and whose machine it was tells nobody anything.
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
        result = Result(key, FAILED, error=text, facts={"traceback": "\n".join(where[-20:])}, seconds=seconds,
                        versions=results.versions())  # fmt: skip
        earlier = results.find(self.plan.out, key)
        if earlier is None or earlier.status != DONE:  # a failure does not replace a measurement
            results.write(self.plan.out, result)
        self.summary.failed.append(result)
        self.summary.results.append(result)
        self.progress.line(f"failed: {key}: {text}")
        self.progress.done()
