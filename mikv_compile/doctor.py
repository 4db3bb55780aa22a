"""Looks at what the backend needs on this machine: compiler, kernels, devices, entry point, and a model that runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The package itself is imported by the checks: where torch cannot write its cache, even that fails.

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: ``OK``; ``NOTE`` for what is missing or slow, but not needed; ``BROKEN``.
        said: what was found.
        advice: what to do, if anything.
    """

    name: str
    status: str
    said: str
    advice: str = ""


def examine(progress: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Look at everything; ``progress`` is told what comes next. Without a cache folder, the rest cannot be tried."""
    found: list[Finding] = []
    for name, check in _CHECKS.items():
        progress(name)
        try:
            found += check()
        except Exception as error:  # a check that fails is a finding, and the others go on
            found.append(Finding(name, BROKEN, f"{type(error).__name__}: {error}", "please report this"))
        if found[-1].name == "cache folder" and found[-1].status == BROKEN:
            break
    return found


_INSTALL = "pip install -c constraints.txt '.[all]' in a checkout"


def _versions() -> Iterator[Finding]:
    from mikv_compile.versions import OLDEST, release, untested

    yield Finding("python", OK, f"{platform.python_version()} at {sys.executable}")
    yield _version("mikv-compile", "0", "it runs from its source, so torch finds it only where that can be imported")
    if release(torch.__version__) < OLDEST:
        yield Finding("torch", BROKEN, torch.__version__, "install torch {}.{} or later".format(*OLDEST))
    else:
        advice = untested(torch.__version__) or ""
        yield Finding("torch", NOTE if advice else OK, torch.__version__, advice)
    yield _version("transformers", "5.17", f"commands that take a MODEL need it: {_INSTALL}")
    yield _version("triton", "3.6", "kernels for GPUs need it: pip install triton")


def _version(package: str, least: str, advice: str) -> Finding:
    from mikv_compile.versions import release

    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, NOTE, "not installed", advice)
    older = release(version) < release(least)
    return Finding(package, NOTE if older else OK, version, f"{least} is the oldest that is tested" if older else "")


def _entry_point() -> Iterator[Finding]:
    if "mikv" in torch.compiler.list_backends():
        yield Finding("entry point", OK, 'torch.compile(model, backend="mikv") finds this backend')
        return
    yield Finding(
        "entry point", BROKEN, "torch knows no backend 'mikv'",
        f"install the package into this environment: {_INSTALL}",
    )  # fmt: skip


def _cpu() -> Iterator[Finding]:
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("vector instructions", OK if level != "DEFAULT" else NOTE, f"{level} on {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    more = threads > usable
    yield Finding(
        "threads", NOTE if more else OK, f"{threads} for {usable} CPUs",
        f"more threads than CPUs slow each other down: set OMP_NUM_THREADS={usable}" if more else "",
    )  # fmt: skip


def _cache_folder() -> Iterator[Finding]:
    try:
        from mikv_compile import _compat

        folder = Path(_compat.cache_folder())
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "let TORCHINDUCTOR_CACHE_DIR name a folder that can be written"
        yield Finding("cache folder", BROKEN, f"torch's folder for compiled code cannot be written: {error}", advice)
    else:
        yield Finding("cache folder", OK, str(folder))


def _cpp_kernels() -> Iterator[Finding]:
    from mikv_compile import _compat
    from mikv_compile.kernels import cpp_common, dispatch

    advice = "install g++ or clang, or let CXX name the compiler; until then plain PyTorch runs, much slower"
    try:
        yield Finding("C++ compiler", OK, _compat.cpp_compiler())
    except RuntimeError as error:
        yield Finding("C++ compiler", BROKEN, str(error).splitlines()[0], advice)
        return
    for name, exact in (("tokens", True), ("fit", True), ("attention", False)):
        started = time.time()
        try:
            library = Path(cpp_common.build(name, exact)._name)
        except dispatch.BuildError as error:
            yield Finding(f"C++ kernels: {name}", BROKEN, str(error).splitlines()[0][:200], advice)
            continue
        how = "built now" if library.stat().st_mtime > started - 1 else "built before"
        yield Finding(f"C++ kernels: {name}", OK, f"{how}: {library}")


def _devices() -> Iterator[Finding]:
    from mikv_compile.kernels import dispatch

    forced = os.environ.get("MIKV_KERNELS")
    known = ("reference", "cpp", "triton")
    if forced and forced not in known:
        yield Finding(
            "MIKV_KERNELS", BROKEN, f"{forced!r} is no set of kernels", f"unset it, or choose {', '.join(known)}"
        )
    why = f"as MIKV_KERNELS={forced} says" if forced else "the default for CPUs"
    yield Finding("kernels on cpu", OK, f"{_served('cpu')}, {why}")
    if not torch.cuda.is_available():
        yield Finding("GPU", NOTE, "none that torch can use")
        return
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        yield Finding(f"GPU {number}", OK, f"{torch.cuda.get_device_name(number)}, capability {major}.{minor}")
    if not dispatch.has_triton():
        advice = "pip install triton; without it caches on the GPU stay dense"
        yield Finding("kernels on cuda", BROKEN, "the package triton is missing", advice)
        return
    why = f"as MIKV_KERNELS={forced} says" if forced else "the default for GPUs with triton"
    yield Finding("kernels on cuda", OK, f"{_served('cuda')}, {why}")


def _served(device: str) -> str:
    """Which kernels serve a device, in words; where one is missing, plain PyTorch does."""
    from mikv_compile.kernels import dispatch

    return {"cpp": "C++", "triton": "Triton"}.get(dispatch.backend_for(torch.device(device)), "plain PyTorch")


class _TinyDecoder(torch.nn.Module):
    """One attention layer over a cache that grows."""

    heads, dim = 2, 64

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.dim
        self.qkv = torch.nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """x [B, S, heads * dim] and the past keys and values to the attention's output and the new cache."""
        q, k, v = (part.unflatten(2, (self.heads, self.dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        # The last function is for Inductor, which has to compile something of its own.
        return torch.nn.functional.gelu(out.transpose(1, 2).flatten(2)), (k, v)


def _self_test() -> Iterator[Finding]:
    from mikv_compile.kernels import dispatch

    devices = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and dispatch.has_triton())
    for device in devices:
        yield from _run(device)


_WITHOUT_INDUCTOR = (
    'options={"lower": "eager"} works meanwhile; Inductor needs a C++ compiler (install g++ or clang, or let CXX name '
    "one) and Python's headers (the package python3-dev or python3-devel)"
)


def _run(device: str) -> Iterator[Finding]:
    """A prompt and some steps: exact with ``budget=1.0``, and close with the default options, compiled as well."""
    from mikv_compile.report import cache_report

    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(1, n, 128, generator=generator).to(device) for n in (300, 1, 1, 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _TinyDecoder().to(device).eval()
    want, _ = _outputs(model, calls, device)
    advice = 'see whether TORCH_LOGS="+mikv_compile" says why, and report it with the output of mikv doctor --json'
    all_good = True
    settings: tuple[tuple[str, dict[str, Any], float], ...] = (
        ("budget=1.0", {"budget": 1.0, "lower": "eager"}, 1e-4), ("default options", {"lower": "eager"}, 0.5),
        ("compiled by Inductor", {}, 0.5),
    )  # fmt: skip
    for name, options, tolerance in settings:
        if not options and all_good:
            advice = _WITHOUT_INDUCTOR
        torch.compiler.reset()  # what was traced before would answer, or make sizes symbolic
        compiled = torch.compile(model, backend="mikv", options=options)
        try:
            got, cache = _outputs(compiled, calls, device)
        except Exception as error:
            good, said = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            report = cache_report(cache)
            error_norm = float((got - want).norm() / want.norm())
            compressed = bool(report.layers) and all(layer.plan is not None for layer in report.layers)
            good = compressed and error_norm <= tolerance
            said = f"differs from dense by {error_norm:.1e}, cache {report.ratio:.0%} of dense"
            if not compressed:
                said = "the cache stayed dense"
        all_good &= good
        yield Finding(f"self-test on {device}, {name}", OK if good else BROKEN, said, "" if good else advice)


def _outputs(model: Callable[..., Any], calls: list[torch.Tensor], device: str) -> tuple[torch.Tensor, Any]:
    empty = torch.zeros(1, _TinyDecoder.heads, 0, _TinyDecoder.dim, device=device)
    cache: Any = (empty, empty.clone())
    outputs = []
    with torch.no_grad():
        for x in calls:
            out, cache = model(x, cache)
            outputs.append(out)
    return torch.cat(outputs, 1), cache


_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": _versions,
    "CPU": _cpu,
    "cache folder": _cache_folder,
    "entry point": _entry_point,
    "C++ kernels": _cpp_kernels,
    "devices": _devices,
    "self-test": _self_test,
}
