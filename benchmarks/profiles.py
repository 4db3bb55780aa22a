"""Where the seconds of compiling and of a decode step go, for dense and compressed caches. Shares, not benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, models
from benchmarks.harness import Result, say

CONFIGURATIONS: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}, "mikv": {"backend": "mikv"}}
STEPS = 20
SHOWN = 14
"""Rows of a table; what takes less is not told."""


def in_this_process(configuration: str, name: str, context: int, lower: str) -> dict[str, Any]:
    """Compile and run in this process, which must not have compiled anything before.

    Returns:
        ``phases``: seconds by torch's own name of the compilation phase, which contain each other; ``operators``:
        microseconds of a step by operator, without those it calls.
    """
    from torch._dynamo.utils import compile_times
    from torch.profiler import ProfilerActivity, profile

    model = models.load(name, torch.device("cpu"))
    given = CONFIGURATIONS[configuration]
    if lower == "eager":
        given = {"backend": "eager"} if configuration == "inductor" else {**given, "options": {"lower": "eager"}}
    call = torch.compile(model, **given)
    cache = models.filled_cache(model, 1, context, None if configuration == "inductor" else {})
    token = torch.ones(1, 1, dtype=torch.long)

    def step() -> None:
        call(input_ids=token, past_key_values=cache, use_cache=True)

    with torch.no_grad():
        for _ in range(4):
            step()
        names, seconds = compile_times(repr="csv", aggregate=True)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(STEPS):
                step()
    operators = {event.key: event.self_cpu_time_total / STEPS for event in recorded.key_averages()}
    phases = {key: float(value) for key, value in zip(names, seconds, strict=True)}
    return {"phases": phases, "operators": operators}


def run(quick: bool, folder: Path | None, name: str, context: int) -> Path:
    """Profile both configurations in processes of their own with empty compiler caches. Returns the results' folder."""
    lower = "eager" if quick else "inductor"
    result = Result("profile", torch.device("cpu"), quick, {"model": name, "context": context, "lower": lower}, folder)
    for configuration in CONFIGURATIONS:
        say(f"  {configuration} ...")
        with result.failures.catch(configuration), tempfile.TemporaryDirectory(prefix="mikv-profile-") as cache:
            arguments = {"configuration": configuration, "name": name, "context": context, "lower": lower}
            found = harness.in_child(
                "benchmarks.profiles:in_this_process", arguments, {"TORCHINDUCTOR_CACHE_DIR": cache}
            )
            result.cases.append({"configuration": configuration, **found})
    return result.write(tables, None)


def tables(result: dict[str, Any]) -> str:
    """The largest phases and operators of each configuration."""
    parts = [f"{result['arguments']['model']}, {result['arguments']['context']} cached tokens"]
    for case in result["cases"]:
        kinds = (("phases", "compiling, seconds", "{:.2f}"), ("operators", "a step, microseconds", "{:.0f}"))
        for what, title, unit in kinds:
            rows = sorted(case[what].items(), key=lambda item: -item[1])[:SHOWN]
            text = harness.table([title, ""], [[key, unit.format(value)] for key, value in rows])
            parts.append(f"{case['configuration']}\n\n{text}")
    return "\n\n".join(parts)
