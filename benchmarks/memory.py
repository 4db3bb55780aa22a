"""Peak and resident memory: a long prompt, the same in chunks, and single tokens while the tiers grow.

Each configuration runs in a process of its own. On a CPU the figures are the process's resident set (``VmRSS``) and its
peak (``VmHWM``), over what the loaded model takes after short calls. Freed memory is given back at once
(``MALLOC_*`` below), so that the peak is about the largest sum of live tensors. On a GPU they are what torch's
allocator has handed out. Graphs are traced and rewritten but not compiled: the compiler's own memory would hide the
caches.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, models
from benchmarks.harness import Deadline, Quartiles, Result, say

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Memory from 64 KiB on comes from the system and goes back when it is freed."""

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {"dense": None, "mikv": {}}
MODES = ("prompt", "chunks", "single tokens")
SECONDS = {"dense": 45, "mikv": 80}
"""About what each takes with SmolLM2 on two cores, for the time limit."""


class Meter:
    """Bytes in use, and the most since :meth:`reset`."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def reset(self) -> int:
        """Give back what is free, begin a new peak; returns the bytes in use."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most since the last reset."""
        return torch.cuda.max_memory_allocated() if self._gpu else self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found.group(1)) * 1024


def in_this_process(configuration: str, name: str, device: str, tokens: int, chunk: int, steps: int) -> dict[str, Any]:
    """Measure one configuration in all modes in this process."""
    options = CONFIGURATIONS[configuration]
    model = models.load(name, torch.device(device))
    call = model
    if options is not None:
        call = torch.compile(model, backend="mikv", options={**options, "lower": "eager"})
    meter = Meter(torch.device(device))

    def read(cache: Any, count: int) -> None:
        ids = torch.randint(1, model.config.vocab_size, (1, count), device=device)
        if count > 1:
            # The first graph takes any length, so that nothing is traced while a peak is taken.
            torch._dynamo.maybe_mark_dynamic(ids, 1)
        call(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    with torch.no_grad():
        return {
            "prompt": _prompt(read, model, [tokens], meter),
            "chunks": _prompt(read, model, [chunk] * (tokens // chunk), meter),
            "single tokens": _single_tokens(read, model, options, tokens, steps, meter),
        }


def _prompt(read: Callable[[Any, int], None], model: Any, sizes: list[int], meter: Meter) -> dict[str, Any]:
    """A prompt in one call or several."""
    cache = models.DynamicCache(config=model.config)
    for _ in sizes[:2]:
        read(cache, 16)
    cache = models.DynamicCache(config=model.config)
    gc.collect()
    before = meter.reset()
    for size in sizes:
        read(cache, size)
    peak = meter.peak()
    return {"peak": peak - before, "resident": meter.reset() - before, "cache": models.nbytes(cache)}


def _single_tokens(
    read: Callable[[Any, int], None], model: Any, options: dict[str, Any] | None, tokens: int, steps: int, meter: Meter
) -> dict[str, Any]:
    """Each step's peak over what was in use before it; a dense cache is copied in each step."""
    cache = models.filled_cache(model, 1, tokens, options)
    for _ in range(3):
        read(cache, 1)
    gc.collect()
    found = []
    for _ in range(steps):
        capacities = [store.capacities for store in models.stores(cache)]
        before = meter.reset()
        read(cache, 1)
        grew = options is None or [store.capacities for store in models.stores(cache)] != capacities
        found.append({"peak": meter.peak() - before, "grew": grew, "cache": models.nbytes(cache)})
    return {"steps": found, "cache": models.nbytes(cache)}


def run(
    device: torch.device,
    quick: bool,
    folder: Path | None,
    name: str,
    tokens: int,
    chunk: int,
    steps: int,
    deadline: Deadline,
) -> Path:
    """Measure all configurations, one process after the other.

    Args:
        device, quick, folder, name, deadline: as for ``decode``.
        tokens: length of the prompt, and of the cache that single tokens are appended to.
        chunk: tokens per call where the prompt comes in chunks.
        steps: single tokens.
    """
    arguments = {"tokens": tokens, "chunk": chunk, "steps": steps}
    result = Result("memory", device, quick, {"model": name, **arguments}, folder)
    found: dict[str, dict[str, Any]] = {}
    for configuration, seconds in SECONDS.items():
        if not quick and not deadline.allows(seconds):
            result.failures.add(configuration, f"not run: it takes about {seconds} s, and the time limit is near")
            continue
        say(f"  {configuration} ...")
        with result.failures.catch(configuration):
            given = {"configuration": configuration, "name": name, "device": str(device), **arguments}
            found[configuration] = harness.in_child("benchmarks.memory:in_this_process", given, MALLOC)
    for mode in MODES:
        for configuration, modes in found.items():
            result.cases.append({"configuration": configuration, "mode": mode, **modes[mode]})
    return result.write(tables, plot)


# Reading results -----------------------------------------------------------------------------------------------------


def find_case(result: dict[str, Any], mode: str, configuration: str) -> dict[str, Any] | None:
    """The case of a mode and a configuration."""
    return next((c for c in result["cases"] if (c["mode"], c["configuration"]) == (mode, configuration)), None)


def of_dense(result: dict[str, Any], case: dict[str, Any], what: str) -> float | None:
    """Bytes of a case against those of the dense cache in the same mode."""
    dense = find_case(result, case["mode"], "dense")
    return case[what] / dense[what] if dense is not None and dense[what] > 0 else None


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def tables(result: dict[str, Any]) -> str:
    """A table of prompts and one of single tokens."""
    made = result["arguments"]
    header = ["", "configuration", "cache MB", "of dense", "peak MB over the model", "of dense", "left MB", "of dense"]
    rows = []
    for case in result["cases"]:
        if "peak" in case:
            rows.append([case["mode"], case["configuration"]])
            for what in ("cache", "peak", "resident"):
                rows[-1] += [f"{case[what] / 1e6:.1f}", _ratio(of_dense(result, case, what))]
    parts = [
        f"{made['model']}, {made['tokens']:,} tokens, in one call and in chunks of {made['chunk']}\n\n"
        + harness.table(header, rows, left=2)
    ]
    header = ["configuration", "cache MB", "of dense", "peak over resident, MB: steps that grow", "other steps", "grew"]
    rows = []
    for case in result["cases"]:
        if "steps" not in case:
            continue
        grown, other = ([s["peak"] for s in case["steps"] if s["grew"] is grew] for grew in (True, False))
        cells = [f"{max(peaks) / 1e6:.1f}" if peaks else "-" for peaks in (grown, other)]
        size = [f"{case['cache'] / 1e6:.1f}", _ratio(of_dense(result, case, "cache"))]
        rows.append([case["configuration"], *size, *cells, f"{len(grown)} of {len(case['steps'])}"])
    if rows:
        title = f"Single tokens from {made['tokens']:,} tokens on; the largest peak of one step"
        parts.append(f"{title}\n\n{harness.table(header, rows)}")
    return "\n".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Peaks of prompts, beside the bytes of the cache that they leave."""
    figure, (left, right) = harness.axes(2)
    cases = [case for case in result["cases"] if "peak" in case]
    labels = [f"{case['mode']}, {case['configuration']}" for case in cases]
    for axes, what, title in ((left, "peak", "peak over the model"), (right, "cache", "cache")):
        if labels:
            harness.bars(axes, labels, [Quartiles(*[case[what] / 1e6] * 3) for case in cases])
        axes.set(xlabel="MB", title=title)
    harness.save(figure, path)
