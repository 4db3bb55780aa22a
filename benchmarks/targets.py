"""What the project wants to reach, and how each figure is read from results. All are ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import attention, compilation, decode
from benchmarks.harness import Quartiles, quartiles

Results = Mapping[tuple[str, str], dict[str, Any]]
"""(benchmark, device type) -> its newest result."""


@dataclass(frozen=True)
class Target:
    """A figure and its goal.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        text: what is measured.
        goal: the bound. ``at_most``: it is an upper one.
        read: the figure, or None where the results do not have it.
        stretch: a second bound, beyond the goal.
        unit: how numbers are written.
    """

    device: str
    text: str
    goal: float
    read: Callable[[Results], Quartiles | None]
    at_most: bool = False
    stretch: float | None = None
    unit: str = "{:.2f}x"

    def row(self, results: Results) -> list[str]:
        """What is measured, the goal, the figure and the verdict."""
        bound = ("<= " if self.at_most else ">= ") + self.unit.format(self.goal)
        if self.stretch is not None:
            bound += f" (stretch {self.unit.format(self.stretch)})"
        found = self.read(results)
        if found is None:
            return [self.text, bound, "-", "not measured"]
        return [self.text, bound, found.text(self.unit), self.verdict(found.median)]

    def verdict(self, value: float) -> str:
        """Whether the goal, and the stretch, are reached."""

        def reaches(bound: float) -> bool:
            return value <= bound if self.at_most else value >= bound

        if self.stretch is not None and reaches(self.stretch):
            return "stretch reached"
        return "reached" if reaches(self.goal) else "**not reached**"


def _attention(name: str, threads: int, against: str | None = None) -> Callable[[Results], Quartiles | None]:
    """Speedup in the headline case on the CPU in float32."""

    def read(results: Results) -> Quartiles | None:
        result = results.get(("attention", "cpu"))
        wanted = {"name": "headline", "threads": threads, "dtype": "float32"}
        case = attention.find_case(result, **wanted) if result else None
        return attention.speedup(case, name, against) if case else None

    return read


def _gpu_attention(name: str, share: bool) -> Callable[[Results], Quartiles | None]:
    """Share of the copy bandwidth, or speedup against the fastest form of torch's flash attention."""

    def read(results: Results) -> Quartiles | None:
        result = results.get(("attention", "cuda"))
        case = attention.find_case(result, name="headline") if result else None
        if result is None or case is None:
            return None
        if share:
            return attention.share_of_bandwidth(result, case, name)
        flash = {n: quartiles(c["samples"]).median for n, c in case["candidates"].items() if n.startswith("flash")}
        return attention.speedup(case, name, min(flash, key=flash.__getitem__)) if flash else None

    return read


def _decode(device: str, context: int, batch: int, name: str = "mikv") -> Callable[[Results], Quartiles | None]:
    """Tokens per second against Inductor's; only of runs that Inductor compiled."""

    def read(results: Results) -> Quartiles | None:
        result = results.get(("decode", device))
        if result is None or result["arguments"]["lower"] != "inductor":
            return None
        case = decode.find_case(result, context, batch)
        return decode.speedup(case, name) if case else None

    return read


def _compile(name: str, absolute: bool = False) -> Callable[[Results], Quartiles | None]:
    """Cold seconds, or their ratio to Inductor's."""

    def read(results: Results) -> Quartiles | None:
        result = results.get(("compile", "cpu"))
        if result is None or result["arguments"]["lower"] != "inductor":
            return None
        case = compilation.find_case(result, name)
        value = compilation.seconds_ratio(result, name) if not absolute else case["seconds"] if case else None
        return None if value is None else Quartiles(value, value, value)

    return read


def _cpu_attention() -> list[Target]:
    made = []
    for threads in (1, 2):
        where = f"attention, B=1 H_kv=8 G=4 D=128 T=16384, {threads} thread{'s' if threads > 1 else ''}"
        fastest = f"{where}: {{}} against the fastest dense float32 form"
        made += [
            Target("cpu", fastest.format("INT4"), 3.0, _attention("int4", threads), stretch=6.0),
            Target(
                "cpu", f"{where}: INT4 against SDPA with enable_gqa", 8.0,
                _attention("int4", threads, "SDPA, enable_gqa"),
            ),
            Target("cpu", fastest.format("INT2"), 3.0, _attention("int2", threads)),
            Target("cpu", fastest.format("20 % 16-bit + 80 % INT2"), 2.5, _attention("mixed", threads)),
        ]  # fmt: skip
    return made


SMOLLM2 = "SmolLM2 decode, tokens/s against Inductor with a DynamicCache"
LLAMA = "8B-shaped decode, 32k tokens, tokens/s against Inductor with a DynamicCache"
COMPILING = "compiling SmolLM2's prompt and decode graphs, seconds"

TARGETS: list[Target] = [
    *_cpu_attention(),
    Target("cpu", f"{SMOLLM2}: 512 tokens, batch 1", 0.97, _decode("cpu", 512, 1)),
    Target("cpu", f"{SMOLLM2}: 4k tokens, batch 1", 1.6, _decode("cpu", 4096, 1)),
    Target("cpu", f"{SMOLLM2}: 8k tokens, batch 4", 2.0, _decode("cpu", 8192, 4), stretch=3.0),
    Target("cpu", f"{SMOLLM2}: budget=1.0, 512 tokens", 1 / 1.05, _decode("cpu", 512, 1, "mikv budget=1.0")),
    Target("cpu", f"{SMOLLM2}: budget=1.0, 4k tokens", 1 / 1.05, _decode("cpu", 4096, 1, "mikv budget=1.0")),
    Target("cpu", f"{COMPILING} over Inductor's", 0.9, _compile("mikv"), at_most=True),
    Target("cpu", f"{COMPILING}, regional=True", 60.0, _compile("mikv regional", True), at_most=True, unit="{:.0f} s"),
    *(
        Target("cuda", f"attention, T=32k, B*H_kv=64: {text}, share of copy bandwidth", goal,
               _gpu_attention(name, True), unit="{:.2f}")
        for name, text, goal in (("int4", "INT4", 0.8), ("int2", "INT2", 0.6), ("mixed", "mixed", 0.7))
    ),
    *(
        Target("cuda", f"attention, T=32k, B*H_kv=64: {text} against SDPA's flash bf16", goal,
               _gpu_attention(name, False))
        for name, text, goal in (("int4", "INT4", 3.2), ("int2", "INT2", 4.5), ("mixed", "mixed", 2.5))
    ),
    Target("cuda", f"{LLAMA}: largest batch that fits each", 3.0, _decode("cuda", 32768, 0)),
    Target("cuda", f"{LLAMA}: batch 8", 1.3, _decode("cuda", 32768, 8)),
]  # fmt: skip
