"""Attention of one new token: ours over compressed tiers against the fastest dense forms, and the bytes each must read.

Every candidate reads the next of several copies of its input, which together exceed twice the last-level cache: in a
model, the other layers' weights and caches have passed through the caches since a layer's last step.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mikv_compile.kernels.ops  # noqa: F401, declares the ops that fill stores
from benchmarks import harness
from benchmarks.harness import Quartiles, Result, quartiles, ratios, say
from mikv_compile import Options
from mikv_compile.kernels import dispatch
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, buffer_shapes
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner

BANDWIDTH_BYTES = 2**28
LARGEST_REPEATED = 2 * 2**30
"""Bytes up to which heads are repeated in memory for the dense forms that want it."""

REFERENCE_LENGTH = 2**14
"""Up to this many tokens the result is compared with the reference kernel's, which dequantizes everything."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a case: B, H_kv, query heads per KV head, D, cached tokens; threads on a CPU (0: none are set)."""

    name: str
    batch: int
    kv_heads: int
    group: int
    dim: int
    length: int
    dtype: torch.dtype
    threads: int = 0

    def __str__(self) -> str:
        threads = f" threads={self.threads}" if self.threads else ""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.batch} H_kv={self.kv_heads} G={self.group} D={self.dim} T={self.length}"
        return f"{self.name}: {sizes} {dtype}{threads}"


@dataclass
class Candidate:
    """One way to compute the attention."""

    kind: str
    """``"dense"`` or ``"ours"``."""
    nbytes: int
    """Bytes that have to be read: keys and values, or codes, scales and zeros of the tokens in use."""
    call: Callable[[Any], torch.Tensor]
    copies: list[Any]
    error: float | None = None
    """Relative distance to the reference kernel on the same buffers."""


# What is compared ----------------------------------------------------------------------------------------------------


def formats(shape: Shape) -> dict[str, tuple[LayerFormat, tuple[int, ...]]]:
    """Name -> format and tokens per tier."""
    tokens = shape.length
    low = int(0.8 * tokens) // 64 * 64
    sizes = CacheShape(shape.batch, shape.kv_heads, shape.dim, shape.dim, shape.dtype)
    made = {
        "fp": (LayerFormat.parse("fp,fp"), (tokens,)),
        "int8": (LayerFormat.parse("8:t1c64,8:t1c64"), (tokens,)),
        "int4": (LayerFormat.parse("4:t64c1,4:t1c64"), (tokens,)),
        "int2": (LayerFormat.parse("2:t64c1,2:t1c64"), (tokens,)),
        "mixed": (LayerFormat.parse("bf16,bf16|2:t64c1,2:t1c64"), (tokens - low, low)),
    }
    for name, preset in (("default", "mikv"), ("mikv-paper", "mikv-paper")):
        plan = Planner(Options.parse({"preset": preset})).layer(0, sizes)
        made[name] = (plan.format, plan.fill(tokens).counts)
    return made


def filled(shape: Shape, fmt: LayerFormat, counts: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """Buffers of a store that the op has compressed a random prompt into; random scores spread it over the tiers."""
    lead = (shape.batch, shape.kv_heads)
    capacities = [-(-count // tier.block) * tier.block for count, tier in zip(counts, fmt.tiers, strict=True)]
    shapes = buffer_shapes(fmt, *lead, shape.dim, shape.dim, capacities, shape.dtype)
    buffers = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in shapes]
    k, v = (torch.randn(*lead, shape.length, shape.dim, device=device, dtype=shape.dtype) for _ in range(2))
    orders = Orders(0, 0, shape.length, counts, 0, (0,) * (len(counts) - 1)).encode()
    scores = torch.rand(*lead, shape.length, device=device)
    torch.ops.mikv.compress_v1(k, k, v, scores, buffers, orders, str(fmt))
    return buffers


def bytes_to_read(fmt: LayerFormat, buffers: list[torch.Tensor]) -> int:
    """Codes, scales and zeros; the capacities are the tokens in use. Positions are not read without a mask."""
    typed = StoreBuffers.from_list(buffers)
    return sum(part.nbytes for tier in typed.tiers for side in (tier.key, tier.value) for part in side)


def ours(shape: Shape, device: torch.device, working_set: int) -> Iterator[tuple[str, Candidate]]:
    """Our kernel on each format, through the dispatch that the ops use."""
    heads = (shape.batch, shape.kv_heads * shape.group)
    q = torch.randn(*heads, 1, shape.dim, device=device, dtype=shape.dtype)
    own = [torch.randn(shape.batch, shape.kv_heads, 1, shape.dim, device=device, dtype=shape.dtype) for _ in range(2)]
    for name, (fmt, counts) in formats(shape).items():
        buffers = filled(shape, fmt, counts, device)
        nbytes = bytes_to_read(fmt, buffers)

        def call(stored: StoreBuffers, fmt: LayerFormat = fmt, counts: tuple[int, ...] = counts) -> torch.Tensor:
            rest = (None, shape.dim**-0.5, 0.0, stored, fmt, counts, shape.length)
            return dispatch.run("attend", device, q, *own, *rest)[0]

        others = range(harness.cold_copies(nbytes, working_set) - 1)
        copies = [StoreBuffers.from_list(b) for b in (buffers, *([x.clone() for x in buffers] for _ in others))]
        candidate = Candidate("ours", nbytes, call, copies)
        if shape.length * shape.batch <= REFERENCE_LENGTH:
            got = call(copies[0]).double()
            with dispatch.use("reference"):
                want = call(copies[0]).double()
            candidate.error = float((got - want).norm() / want.norm())
        yield name, candidate


def dense(shape: Shape, device: torch.device, working_set: int) -> Iterator[tuple[str, Candidate]]:
    """The forms of dense attention that might be the fastest.

    The query heads of a group read the same keys, so without a mask they can be the rows of one query: ``rows``.
    ``repeated`` has its heads repeated in memory before the clock starts.
    """
    lead, scale = (shape.batch, shape.kv_heads), shape.dim**-0.5
    k, v = (torch.randn(*lead, shape.length, shape.dim, device=device, dtype=shape.dtype) for _ in range(2))
    rows = torch.randn(*lead, shape.group, shape.dim, device=device, dtype=shape.dtype)
    heads = rows.reshape(shape.batch, -1, 1, shape.dim)
    nbytes = k.nbytes + v.nbytes
    copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(harness.cold_copies(nbytes, working_set) - 1)]

    def add(call: Callable[[Any], torch.Tensor], inputs: Any = copies, size: int = nbytes) -> Candidate:
        return Candidate("dense", size, call, inputs)

    def attention(query: torch.Tensor, gqa: bool = False) -> Callable[[Any], torch.Tensor]:
        return lambda kv: F.scaled_dot_product_attention(query, kv[0], kv[1], enable_gqa=gqa)

    yield "matmul, rows", add(lambda kv: ((rows * scale) @ kv[0].mT).softmax(-1) @ kv[1])
    yield "SDPA, rows", add(attention(rows))
    yield "SDPA, enable_gqa", add(attention(heads, True))
    if shape.group > 1 and nbytes * shape.group <= LARGEST_REPEATED:
        size = nbytes * shape.group
        wanted = harness.cold_copies(size, working_set)
        repeated = [tuple(x.repeat_interleave(shape.group, 1) for x in pair) for pair in copies[:wanted]]
        yield "SDPA, repeated", add(attention(heads), repeated, size)
    if device.type == "cuda" and shape.dtype != torch.float32:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def flash(query: torch.Tensor, gqa: bool) -> Callable[[Any], torch.Tensor]:
            def call(kv: Any) -> torch.Tensor:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return attention(query, gqa)(kv)

            return call

        yield "flash, rows", add(flash(rows, False))
        yield "flash, enable_gqa", add(flash(heads, True))


# Measuring -----------------------------------------------------------------------------------------------------------


class Fallbacks(logging.Handler):
    """Notes when the dispatch runs the reference instead of the device's kernel: then the wrong thing is timed."""

    def __init__(self, failures: harness.Failures) -> None:
        super().__init__()
        self._failures = failures
        self.where = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Note a message once."""
        noted = (f"{self.where}, and maybe after it", f"the reference was timed: {record.getMessage()}")
        if noted[1] not in {found["error"] for found in self._failures.found}:
            self._failures.add(*noted)

    def __enter__(self) -> Fallbacks:
        self._level = dispatch.log.level
        dispatch.log.addHandler(self)
        dispatch.log.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        dispatch.log.setLevel(self._level)
        dispatch.log.removeHandler(self)


def captured(call: Callable[[Any], torch.Tensor], copies: list[Any]) -> Callable[[], object]:
    """A CUDA graph of one call per copy, as launching from Python takes longer than the kernels themselves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in copies[:2]:
            call(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    return graph.replay


def measure(shape: Shape, device: torch.device, seconds: float, rounds: tuple[int, int], result: Result) -> None:
    """Time all candidates of a case in turn and append it to the result."""
    say(f"  {shape}")
    working_set = 0 if result.quick else 2 * harness.cache_bytes(device)
    candidates: dict[str, Candidate] = {}
    with result.failures.catch(f"{shape}: making the inputs"):
        for name, candidate in itertools.chain(dense(shape, device, working_set), ours(shape, device, working_set)):
            candidates[name] = candidate
    functions: dict[str, Callable[[], object]] = {}
    per_call: dict[str, int] = {}
    for name, candidate in candidates.items():
        functions[name], per_call[name] = harness.rotating(candidate.call, candidate.copies), 1
        if device.type == "cuda":
            with result.failures.catch(f"{shape}: {name}, captured as a CUDA graph (timed without one)"):
                functions[name], per_call[name] = captured(candidate.call, candidate.copies), len(candidate.copies)
    failures = harness.Failures()
    with harness.threads(shape.threads or torch.get_num_threads()):
        samples = harness.interleave(functions, device, seconds, rounds, failures)
    for failed in failures.found:
        result.failures.found.append({**failed, "configuration": f"{shape}: {failed['configuration']}"})
    measured = {
        name: {
            "kind": candidates[name].kind,
            "bytes": candidates[name].nbytes,
            "copies": len(candidates[name].copies),
            "error": candidates[name].error,
            "samples": [sample / per_call[name] for sample in found],
        }
        for name, found in samples.items()
    }
    case = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch."), "candidates": measured}
    result.cases.append({**case, "title": str(shape)})


def bandwidth(device: torch.device, rounds: int) -> dict[str, Any]:
    """Samples of bytes per second: of ``copy_`` (read and written bytes) and of a sum, which only reads.

    The sum of bytes as int64 is one pass over the memory with little arithmetic.
    """
    source = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    candidates: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "sum": source.sum}
    found = harness.interleave(candidates, device, 60.0, (rounds, rounds), harness.Failures())
    moved = {"copy": 2 * source.nbytes, "sum": source.nbytes}
    return {name: [moved[name] / seconds for seconds in samples] for name, samples in found.items()}


def shapes(device: torch.device, quick: bool) -> list[Shape]:
    """The cases: the headline, the real model's sizes, lengths and batch sizes."""
    if quick:
        sizes = [Shape("headline", 1, 2, 2, 64, 256, torch.float32, 1)]
        return sizes + [Shape("lengths", 1, 2, 2, 64, length, torch.float32, 1) for length in (128, 256)]
    if device.type == "cuda":
        half = torch.bfloat16
        made = [Shape("headline", 8, 8, 4, 128, 2**15, half)]
        made += [Shape("lengths", 8, 8, 4, 128, 2**i, half) for i in range(10, 18)]
        return made + [Shape("batches", batch, 8, 4, 128, 2**15, half) for batch in (1, 2, 4, 16, 32)]
    cores = min(os.cpu_count() or 1, 2)
    made = []
    for count in sorted({1, cores}):
        for dtype in (torch.float32, torch.bfloat16) if count == cores else (torch.float32,):
            made.append(Shape("headline", 1, 8, 4, 128, 2**14, dtype, count))
            made.append(Shape("SmolLM2", 1, 3, 3, 64, 4096, dtype, count))
    made += [Shape("lengths", 1, 8, 4, 128, 2**i, torch.float32, cores) for i in (9, 11, 13, 15, 16)]
    return made + [Shape("batches", batch, 8, 4, 128, 2048, torch.float32, cores) for batch in (1, 4, 16)]


def run(device: torch.device, quick: bool, folder: Path | None, seconds: float = 4.0) -> Path:
    """Measure all cases. Returns the folder of the results.

    Args:
        device, quick, folder: where it runs, tiny sizes instead of real ones, and where the results go.
        seconds: for the rounds of a headline case; the others get half of it.
    """
    torch.manual_seed(0)
    rounds = (3, 5) if quick else (7, 41)
    result = Result("attention", device, quick, {"seconds": seconds, "rounds": rounds}, folder)
    # First, in one block: the clock of the machine may change while it runs, so it is measured again at the end.
    found: dict[str, dict[str, Any]] = {}
    cases = shapes(device, quick)
    counts = sorted({shape.threads for shape in cases})

    def measure_bandwidth() -> None:
        for count in counts:
            with harness.threads(count or torch.get_num_threads()):
                for name, samples in bandwidth(device, rounds[0]).items():
                    found.setdefault(str(count), {}).setdefault(name, []).extend(samples)

    with torch.no_grad(), Fallbacks(result.failures) as fallbacks:
        measure_bandwidth()
        for shape in cases:
            fallbacks.where = str(shape)
            with result.failures.catch(str(shape)):
                measure(shape, device, seconds if shape.name == "headline" else seconds / 2, rounds, result)
        measure_bandwidth()
    result.extra["bytes_per_second"] = found
    return result.write(tables, plot)


# Reading results -----------------------------------------------------------------------------------------------------


def fastest_dense(case: dict[str, Any]) -> str | None:
    """Name of the dense form with the smallest median."""
    found = {name: quartiles(c["samples"]).median for name, c in case["candidates"].items() if c["kind"] == "dense"}
    return min(found, key=found.__getitem__) if found else None


def speedup(case: dict[str, Any], name: str, against: str | None = None) -> Quartiles | None:
    """How many times faster ``name`` is than another candidate, by default than the fastest dense form."""
    against = fastest_dense(case) if against is None else against
    found = case["candidates"]
    return ratios(found[against]["samples"], found[name]["samples"]) if name in found and against in found else None


def bandwidth_of(result: dict[str, Any], case: dict[str, Any], kind: str = "copy") -> float:
    """Median bytes per second of this run's copies, or sums, with the case's threads."""
    return quartiles(result["bytes_per_second"][str(case["threads"])][kind]).median


def share_of_bandwidth(result: dict[str, Any], case: dict[str, Any], name: str) -> Quartiles | None:
    """Bytes that must be read per second, against the copy bandwidth of the same run."""
    found = case["candidates"].get(name)
    if found is None:
        return None
    peak = bandwidth_of(result, case)
    return quartiles([found["bytes"] / seconds / peak for seconds in found["samples"]])


def find_case(result: dict[str, Any], **wanted: Any) -> dict[str, Any] | None:
    """The first case with these fields."""
    return next((c for c in result["cases"] if all(c[k] == v for k, v in wanted.items())), None)


def tables(result: dict[str, Any], names: tuple[str, ...] = ()) -> str:
    """One table of bandwidths and one per case; with ``names`` only of those cases."""
    header = ["threads", "copy, GB/s (read + written)", "sum, GB/s (read)"]
    rows = [
        [count if count != "0" else "-", *(quartiles(found[k]).text("{:.1f}", 1e-9) for k in ("copy", "sum"))]
        for count, found in result["bytes_per_second"].items()
    ]
    parts = [harness.table(header, rows)]
    for case in result["cases"]:
        if names and case["name"] not in names:
            continue
        best = fastest_dense(case)
        parts.append(f"{case['title']}; fastest dense form: {best}\n\n{case_table(result, case)}")
    return "\n".join(parts)


def case_table(result: dict[str, Any], case: dict[str, Any]) -> str:
    """Time, bytes, roofline and ratios of one case."""
    header = [
        "", "microseconds", "MB to read", "roofline, microseconds", "share of copy bandwidth",
        "x fastest dense", "x enable_gqa", "error",
    ]  # fmt: skip
    rows = []
    for name, found in case["candidates"].items():
        ratio, gqa = speedup(case, name), speedup(case, name, "SDPA, enable_gqa")
        share = share_of_bandwidth(result, case, name)
        rows.append([
            name,
            quartiles(found["samples"]).text("{:.1f}", 1e6),
            f"{found['bytes'] / 1e6:.2f}",
            f"{found['bytes'] / bandwidth_of(result, case) * 1e6:.1f}",
            f"{share.median:.0%}" if share else "-",
            ratio.text() if ratio else "-",
            gqa.text() if gqa else "-",
            "-" if found["error"] is None else f"{found['error']:.0e}",
        ])  # fmt: skip
    return harness.table(header, rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over length, with what reading takes at copy bandwidth as dotted lines, and the speedup over length."""
    cases = [case for case in result["cases"] if case["name"] == "lengths"]
    figure, (left, right) = harness.axes(2)
    names = list(dict.fromkeys(name for case in cases for name in case["candidates"]))
    for i, name in enumerate(names):
        have = [case for case in cases if name in case["candidates"]]
        lengths = [case["length"] for case in have]
        found = [case["candidates"][name] for case in have]
        is_dense = found[0]["kind"] == "dense"
        color = f"C{i % 10}"
        times = [quartiles(c["samples"]).scaled(1e6) for c in found]
        harness.line(left, lengths, times, name, color=color, linestyle="--" if is_dense else "-")
        if is_dense:
            continue
        least = [c["bytes"] / bandwidth_of(result, case) * 1e6 for c, case in zip(found, have, strict=True)]
        left.plot(lengths, least, ":", color=color, linewidth=1)
        gains = [(case["length"], gain) for case in have if (gain := speedup(case, name)) is not None]
        harness.line(right, [length for length, _ in gains], [gain for _, gain in gains], name, color=color)
    right.axhline(1.0, color="black", linewidth=0.8)
    left.set(yscale="log", xlabel="cached tokens", ylabel="microseconds (dotted: bytes to read at copy bandwidth)")
    right.set(xlabel="cached tokens", ylabel="times faster than the fastest dense form")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize=8)
    if cases:
        figure.suptitle(f"{result['environment']['device_name']}: {cases[0]['title'].split(' T=')[0]}, one new token")
    harness.save(figure, path)
