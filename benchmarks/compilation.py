"""What compiling costs: a prompt and a few single tokens in a fresh process, first with an empty compiler cache.

``seconds`` is all that a user waits for in these calls. The prompt is short, so that nearly all of it is compiling.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Deadline, Quartiles, Result, say

STEPS = 4
"""Single tokens after the prompt: the first ones compile, the last ones show that nothing is compiled any more."""

CONFIGURATIONS = {"inductor": 215, "mikv": 150, "mikv regional": 60}
"""Name -> about how many seconds it takes cold with SmolLM2 on two cores, for the time limit."""

WARM_SECONDS = 60


def _compiled(configuration: str, model: Any, lower: str) -> Any:
    if configuration == "inductor":
        return torch.compile(model, backend=lower)
    if configuration == "mikv":
        return torch.compile(model, backend="mikv", options={"lower": lower})
    import mikv_compile

    return mikv_compile.compile(model, regional=True, lower=lower)


def in_this_process(configuration: str, name: str, device: str, tokens: int, lower: str) -> dict[str, Any]:
    """Compile in this process, which must not have compiled anything before."""
    from torch._dynamo.utils import counters, get_compilation_metrics
    from transformers import DynamicCache

    from benchmarks import models

    model = models.load(name, torch.device(device))
    ids = torch.arange(1, tokens + 1, device=device)[None]
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    calls, graphs = [], []
    with torch.no_grad():
        began = time.perf_counter()
        call = _compiled(configuration, model, lower)
        wrapping = time.perf_counter() - began
        for given in (ids, *[token] * STEPS):
            began = time.perf_counter()
            call(input_ids=given, past_key_values=cache, use_cache=True)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            calls.append(time.perf_counter() - began)
            graphs.append(int(counters["stats"]["unique_graphs"]))
    metrics = get_compilation_metrics()[-graphs[-1] :]
    return {
        "seconds": wrapping + sum(calls),
        "calls": calls,
        "graphs_after_call": graphs,
        "graphs": graphs[-1],
        "recompiles": [m.recompile_reason.splitlines()[0] for m in metrics if m.recompile_reason],
        "guards": [m.guard_count for m in metrics if m.guard_count is not None],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cache_hits": int(counters["inductor"]["fxgraph_cache_hit"]),
        "cache_misses": int(counters["inductor"]["fxgraph_cache_miss"]),
        "cache_bypasses": int(counters["inductor"]["fxgraph_cache_bypass"]),
    }


def run(
    device: torch.device,
    quick: bool,
    folder: Path | None,
    name: str,
    tokens: int,
    lower: str,
    warm: bool,
    keep: Path | None,
    deadline: Deadline,
) -> Path:
    """Measure each configuration cold, and then warm, one process after the other.

    Args:
        device, quick, folder, name, lower, deadline: as for ``decode``.
        tokens: length of the prompt.
        warm: also measure with the compiler cache that the cold run has filled.
        keep: where to put all compiler caches together afterwards, for runs that should not compile again.
    """
    arguments = {"model": name, "tokens": tokens, "steps": STEPS, "lower": lower, "warm": warm}
    result = Result("compile", device, quick, arguments, folder)
    call = {"name": name, "device": str(device), "tokens": tokens, "lower": lower}
    filled: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mikv-bench-") as caches:
        for phase in ("cold", "warm") if warm else ("cold",):
            # A configuration of its own cache each: they share kernels, and the second one would find some.
            for configuration, seconds in CONFIGURATIONS.items():
                label = f"{configuration}, {phase}"
                if phase == "warm" and configuration not in filled:
                    continue
                estimate = 0 if quick else seconds if phase == "cold" else WARM_SECONDS
                if not deadline.allows(estimate):
                    result.failures.add(label, f"not run: it takes about {estimate} s, and the time limit is near")
                    continue
                say(f"  {label} ...")
                cache = Path(caches) / configuration.replace(" ", "-")
                with result.failures.catch(label):
                    arguments = {"configuration": configuration, **call}
                    found = harness.in_child(
                        "benchmarks.compilation:in_this_process", arguments, {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
                    )
                    say(f"  {label}: {found['seconds']:.1f} s, {found['graphs']} graphs")
                    filled.append(configuration)
                    result.cases.append({"configuration": configuration, "phase": phase, **found})
        if keep is not None:
            for cache in sorted(Path(caches).iterdir()):
                # Entries are named by what they hold.
                shutil.copytree(cache, keep, dirs_exist_ok=True)
    return result.write(tables, plot)


# Reading results -----------------------------------------------------------------------------------------------------


def find_case(result: dict[str, Any], configuration: str, phase: str = "cold") -> dict[str, Any] | None:
    """The case of a configuration."""
    wanted = (configuration, phase)
    return next((c for c in result["cases"] if (c["configuration"], c["phase"]) == wanted), None)


def seconds_ratio(result: dict[str, Any], configuration: str, phase: str = "cold") -> float | None:
    """A configuration's seconds over Inductor's."""
    mine, theirs = find_case(result, configuration, phase), find_case(result, "inductor", phase)
    return mine["seconds"] / theirs["seconds"] if mine and theirs else None


def tables(result: dict[str, Any]) -> str:
    """One row per configuration and phase."""
    header = [
        "configuration", "compiler cache", "seconds", "x inductor's", "prompt, s", "first token, s", "last token, s",
        "graphs", "recompiles", "guards", "graph breaks", "kernels found / made",
    ]  # fmt: skip
    rows = []
    for case in result["cases"]:
        ratio = seconds_ratio(result, case["configuration"], case["phase"])
        rows.append([
            case["configuration"],
            "empty" if case["phase"] == "cold" else "filled",
            f"{case['seconds']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
            *(f"{case['calls'][i]:.2f}" for i in (0, 1, -1)),
            str(case["graphs"]),
            str(len(case["recompiles"])),
            " + ".join(map(str, case["guards"])) if len(case["guards"]) < 5 else str(sum(case["guards"])),
            str(case["graph_breaks"]),
            f"{case['cache_hits']} / {case['cache_misses']}",
        ])  # fmt: skip
    made = result["arguments"]
    title = f"{made['model']}, a prompt of {made['tokens']} tokens and {made['steps']} single ones, {made['lower']}"
    return f"{title}\n\n{harness.table(header, rows, left=2)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds of each configuration."""
    figure, (axes,) = harness.axes(1)
    labels = [f"{case['configuration']}, {case['phase']}" for case in result["cases"]]
    if labels:
        harness.bars(axes, labels, [Quartiles(*[case["seconds"]] * 3) for case in result["cases"]])
    axes.set(xlabel="seconds", title=f"{result['arguments']['model']}: prompt and first tokens")
    harness.save(figure, path)
