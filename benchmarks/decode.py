"""Tokens per second of a whole model, one token at a time, on a cache that is full already.

The compiled models alternate in blocks of a few steps. One step in ``flush_every`` demotes tokens: ratios are therefore
taken over cycles of several blocks that together have one such step, and what counts is all the seconds of a cycle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mikv_compile
from benchmarks import harness, models
from benchmarks.harness import Deadline, Quartiles, Result, quartiles, ratios, say

BLOCK = 16
"""Steps of one configuration before the next one's turn."""

CYCLE = 64
"""Steps that together hold one demotion: the default of the option ``flush_every``."""

BASELINE = "inductor"
SPARE_BYTES = 2 * 2**30
"""GPU memory that the largest batch leaves for activations and the compiler's workspace, beside one layer's cache."""


@dataclass(frozen=True)
class Scenario:
    """Cached tokens and batch size; batch 0 stands for the largest that fits, per configuration."""

    context: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """``4096x1``, or ``32768xmax``."""
        context, _, batch = text.partition("x")
        return cls(int(context), 0 if batch == "max" else int(batch))

    def __str__(self) -> str:
        return f"{self.context}x{self.batch or 'max'}"


@dataclass(frozen=True)
class Configuration:
    """How the model is compiled, and the options of a compressed cache (None: dense)."""

    name: str
    compile: Callable[[Any], Callable[..., Any]]
    options: dict[str, Any] | None = None


def configurations(lower: str) -> list[Configuration]:
    """The compiled configurations; with ``lower="eager"`` graphs are only traced."""

    def dense(model: Any) -> Any:
        return torch.compile(model, backend=lower)

    def compressed(options: dict[str, Any]) -> Configuration:
        name = "mikv" + "".join(f" {k}={v}" for k, v in options.items())
        given = {**options, "lower": lower}
        return Configuration(name, lambda model: torch.compile(model, backend="mikv", options=given), options)

    return [Configuration(BASELINE, dense), compressed({}), compressed({"budget": 1.0})]


UNCOMPILED = Configuration("uncompiled", lambda model: model)


class Runner:
    """A configuration on a filled cache."""

    def __init__(self, configuration: Configuration, model: Any, scenario: Scenario) -> None:
        self.configuration = configuration
        self._call = configuration.compile(model)
        self._device = model.device
        self._token = torch.ones(scenario.batch, 1, dtype=torch.long, device=model.device)
        self.cache = models.filled_cache(model, scenario.batch, scenario.context, configuration.options)
        earlier, before = mikv_compile.graph_reports(), _graphs()
        self.first_call = self.step()
        for _ in range(3):
            self.step()
        self.graphs = _graphs() - before
        # Told apart by identity: the list keeps the last ones only, so it need not have grown.
        self.reports = [r for r in mikv_compile.graph_reports() if not any(r is e for e in earlier)]
        self.steps: list[float] = []

    def step(self) -> float:
        """One token per row; returns the seconds."""
        began = time.perf_counter()
        self._call(input_ids=self._token, past_key_values=self.cache, use_cache=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def block(self, steps: int) -> None:
        """Some timed steps."""
        self.steps += [self.step() for _ in range(steps)]

    def as_json(self) -> dict[str, Any]:
        """What was measured."""
        return {
            "steps": self.steps,
            "batch": self._token.shape[0],
            "first_call_seconds": self.first_call,
            "cache_bytes": models.nbytes(self.cache),
            "graphs": self.graphs,
            "rewritten": sum(len(report.rewritten) for report in self.reports),
            "declined": [str(declined) for report in self.reports for declined in report.declined],
        }


def _graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def alternate(runners: list[Runner], seconds: float, cycles: tuple[int, int]) -> None:
    """Blocks of steps in turn, each round beginning with another configuration.

    Args:
        runners: what alternates.
        seconds: what all together may take, within ``cycles``.
        cycles: least and greatest number of cycles per configuration.
    """
    order = {runner.configuration.name: runner for runner in runners}
    one = sum(min(runner.step() for _ in range(2)) for runner in runners) * CYCLE
    count = max(cycles[0], min(cycles[1], int(seconds / one))) if runners else 0
    for i in range(count * CYCLE // BLOCK):
        for name in harness.rotated(list(order), i):
            order[name].block(BLOCK)


def measure(
    scenario: Scenario, model: Any, chosen: list[Configuration], seconds: float, cycles: tuple[int, int], result: Result
) -> None:
    """Measure a scenario with all configurations side by side, and append it to the result."""
    runners: list[Runner] = []
    for configuration in chosen:
        say(f"  {scenario} {configuration.name}: compiling, first call ...")
        with result.failures.catch(f"{scenario} {configuration.name}"):
            runners.append(Runner(configuration, model, scenario))
            say(f"  {scenario} {configuration.name}: first call {runners[-1].first_call:.1f} s")
    before = _graphs()
    with result.failures.catch(f"{scenario}: alternating"):
        alternate(runners, seconds, cycles)
    if _graphs() != before:
        result.failures.add(str(scenario), f"{_graphs() - before} graphs were compiled again while the clock ran")
    found = {runner.configuration.name: runner.as_json() for runner in runners}
    runners.clear()  # their caches leave room for another one
    with result.failures.catch(f"{scenario} {UNCOMPILED.name}"):
        plain = Runner(UNCOMPILED, model, scenario)
        plain.block(BLOCK // 2)
        found[UNCOMPILED.name] = plain.as_json()
    result.cases.append({"title": str(scenario), "context": scenario.context, "batch": scenario.batch,
                         "threads": torch.get_num_threads(), "configurations": found})  # fmt: skip


def measure_largest(
    context: int, model: Any, chosen: list[Configuration], seconds: float, cycles: tuple[int, int], result: Result
) -> None:
    """Each configuration alone with the largest batch that fits on the GPU; nothing can alternate there."""
    found: dict[str, Any] = {}
    for configuration in chosen:
        name = f"{context}xmax {configuration.name}"
        with result.failures.catch(name):
            batch = estimated_batch(context, model, configuration)
            while batch and configuration.name not in found:
                say(f"  {name}: trying batch {batch}")
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                try:
                    found[configuration.name] = _alone(configuration, model, Scenario(context, batch), seconds, cycles)
                except torch.OutOfMemoryError:
                    batch = batch * 7 // 8
            if not batch:
                raise RuntimeError("not even one row fits")
    result.cases.append({"title": f"{context}xmax", "context": context, "batch": 0,
                         "threads": torch.get_num_threads(), "configurations": found})  # fmt: skip


def _alone(
    configuration: Configuration, model: Any, scenario: Scenario, seconds: float, cycles: tuple[int, int]
) -> dict[str, Any]:
    runner = Runner(configuration, model, scenario)
    alternate([runner], seconds, cycles)
    return runner.as_json()


def estimated_batch(context: int, model: Any, configuration: Configuration) -> int:
    """Rows whose caches fill the GPU: all layers' bytes, and of one layer once more the dense bytes while it grows."""
    free, _ = torch.cuda.mem_get_info()
    shape = models.cache_shape(model.config, 1, model.dtype)
    one_layer = shape.dense_nbytes(context + CYCLE)
    if configuration.options is None:
        row = one_layer * (shape.layers + 2)
    else:
        sample = models.filled_cache(model, 1, context, configuration.options)
        row = models.nbytes(sample) + one_layer * 2
    return max(int((free - SPARE_BYTES) / row), 1)


def run(
    device: torch.device,
    quick: bool,
    folder: Path | None,
    name: str,
    scenarios: list[Scenario],
    seconds: float,
    lower: str,
    deadline: Deadline,
) -> Path:
    """Measure all scenarios. Returns the folder of the results.

    Args:
        device, quick, folder: where it runs, few steps instead of enough, and where the results go.
        name: a model of :mod:`benchmarks.models`.
        scenarios: cached tokens and batch sizes.
        seconds: for the timed steps of a scenario.
        lower: ``"inductor"``, or ``"eager"``: graphs are traced and rewritten, but not compiled.
        deadline: scenarios that would not end in time are left out.
    """
    cycles = (1, 1) if quick else (2, 8)
    arguments = {"model": name, "scenarios": [str(s) for s in scenarios], "seconds": seconds, "lower": lower,
                 "cycles": cycles, "block": BLOCK, "cycle": CYCLE}  # fmt: skip
    result = Result("decode", device, quick, arguments, folder)
    model = models.load(name, device)
    batch = None
    with torch.no_grad():
        # By batch size: lengths are symbols in the graphs, batch sizes are not.
        for scenario in sorted(scenarios, key=lambda s: (s.batch == 0, s.batch, s.context)):
            chosen = configurations(lower)
            if scenario.batch > 1:
                chosen = [c for c in chosen if c.options is None or not c.options.get("budget")]
            estimate = 60 if scenario.batch == batch else 240
            if not deadline.allows(estimate):
                result.failures.add(str(scenario), f"not run: it takes about {estimate} s, and the time limit is near")
                continue
            if scenario.batch != batch:
                torch._dynamo.reset()
                batch = scenario.batch
            if scenario.batch == 0:
                measure_largest(scenario.context, model, chosen, seconds, cycles, result)
            else:
                measure(scenario, model, chosen, seconds, cycles, result)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return result.write(tables, plot)


# Reading results -----------------------------------------------------------------------------------------------------


def cycle_seconds(found: dict[str, Any]) -> list[float]:
    """Seconds of the cycle that begins with each block; of all steps together where there are fewer."""
    steps = found["steps"]
    return [sum(steps[i : i + CYCLE]) for i in range(0, max(len(steps) - CYCLE, 0) + 1, BLOCK)]


def tokens_per_second(found: dict[str, Any]) -> Quartiles:
    """All rows' tokens, over cycles; demotions are in it."""
    steps = min(CYCLE, len(found["steps"]))
    return quartiles([found["batch"] * steps / seconds for seconds in cycle_seconds(found)])


def speedup(case: dict[str, Any], name: str, against: str = BASELINE) -> Quartiles | None:
    """Tokens per second against another configuration's, over cycles; None where one is missing.

    At the largest batch the two have different batch sizes and did not alternate.
    """
    mine, theirs = (case["configurations"].get(n) for n in (name, against))
    if mine is None or theirs is None:
        return None
    pairs = [cycle_seconds(found) for found in (theirs, mine)]
    if len(pairs[0]) != len(pairs[1]) or len(theirs["steps"]) != len(mine["steps"]):
        return None
    return ratios(*pairs).scaled(mine["batch"] / theirs["batch"])


def find_case(result: dict[str, Any], context: int, batch: int) -> dict[str, Any] | None:
    """The case of a scenario."""
    return next((c for c in result["cases"] if (c["context"], c["batch"]) == (context, batch)), None)


def tables(result: dict[str, Any]) -> str:
    """One row per scenario and configuration."""
    header = [
        "context x batch", "configuration", "step, ms", "slowest step, ms", "tokens/s", "x inductor", "cache MB",
        "first call, s",
    ]  # fmt: skip
    rows = []
    for case in result["cases"]:
        for name, found in case["configurations"].items():
            ratio = speedup(case, name)
            rows.append([
                f"{case['context']:,} x {found['batch']}",
                name,
                quartiles(found["steps"]).text("{:.1f}", 1e3),
                f"{max(found['steps']) * 1e3:.1f}",
                tokens_per_second(found).text("{:.1f}"),
                ratio.text() if ratio else "-",
                f"{found['cache_bytes'] / 1e6:.1f}",
                f"{found['first_call_seconds']:.1f}",
            ])  # fmt: skip
    title = f"{result['arguments']['model']}, lowered with {result['arguments']['lower']}"
    if result["cases"] and result["environment"]["device"] == "cpu":
        title += f", {result['cases'][0]['threads']} threads"
    return f"{title}\n\n{harness.table(header, rows, left=2)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second of each scenario and configuration."""
    figure, (axes,) = harness.axes(1)
    labels, values = [], []
    for case in result["cases"]:
        for name, found in case["configurations"].items():
            labels.append(f"{case['context']:,} x {found['batch']}, {name}")
            values.append(tokens_per_second(found))
    if labels:
        harness.bars(axes, labels, values)
    axes.set(xlabel="tokens/s", title=f"{result['arguments']['model']}, {result['environment']['device_name']}")
    harness.save(figure, path)
