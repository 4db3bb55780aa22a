"""Runs one architecture in one setting: dense and uncompiled, then compiled at full budget, then at 4 bits."""

from __future__ import annotations

import collections
import contextlib
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mikv_compile
from mikv_compile.coverage.models import Architecture, CannotBuildError, TinyModel, build

STEPS = 3
EQUAL = 1e-3
"""Logits that differ by more, relative to their scale, are not the same model's; float32 noise is near 1e-6."""

FULL = {"budget": 1.0}
INT4 = {"tiers": "fp:0.0,int4", "quantizer": "mikv", "window": 0, "sinks": 0, "flush_every": 1}
"""New tokens enter the empty high tier and are demoted to 4 bits by the call that appends them."""


@dataclass(frozen=True)
class Setting:
    """How an architecture is run."""

    cache: str = "dynamic"
    attention: str = "sdpa"
    lower: str = "eager"
    prefill: str = ""
    """"compiled" or "eager"; by default eager for static caches, as transformers' ``generate`` does it."""
    bits4: bool = True

    def __post_init__(self) -> None:
        if not self.prefill:
            object.__setattr__(self, "prefill", "eager" if self.cache == "static" else "compiled")

    def key(self, architecture: str) -> str:
        """Names a run in a results file; whether 4 bits were measured as well does not count."""
        return " ".join((architecture, self.cache, self.attention, self.lower, self.prefill))


@dataclass
class _Run:
    """What one pass over prompt and steps gave."""

    logits: list[torch.Tensor]
    cache: Any
    grown: dict[str, int]
    handles: dict[str, int]
    side: int
    graphs_per_call: list[int]
    reports: list[Any]
    breaks: dict[str, int]

    @property
    def tokens(self) -> list[int]:
        return [int(x.argmax()) for x in self.logits]


def run(architecture: Architecture, setting: Setting) -> dict[str, Any]:
    """Everything that the table shows of one architecture in one setting, as plain data.

    ``status`` is ``ok``, or what went wrong: ``not built``, ``no cache``, ``not compiled`` (plain ``torch.compile``
    fails or differs as well), ``differs`` or ``crash``. The last two are this backend's own failures.
    """
    started = time.process_time()
    row: dict[str, Any] = {
        "key": setting.key(architecture.name), "name": architecture.name, "kind": architecture.kind,
        "class": architecture.class_name, **asdict(setting), "status": "ok",
    }  # fmt: skip
    try:
        _measure(architecture, setting, row)
    except CannotBuildError as error:
        row.update(status="not built", error=str(error))
    row["seconds"] = round(time.process_time() - started, 2)
    return row


def _measure(architecture: Architecture, setting: Setting, row: dict[str, Any]) -> None:
    try:
        tiny = build(architecture, setting.attention)
        dense = _drive(tiny, setting, None)
    except CannotBuildError:
        raise
    except Exception as error:  # transformers says why
        row.update(status="not built", error=_describe(error))
        return
    row.update(grown=dense.grown["self"], cross=dense.grown["cross"], side=dense.side)
    scale = _scale(dense)
    if not all(bool(torch.isfinite(x).all()) for x in dense.logits):
        row.update(status="not built", error="the uncompiled tiny model has logits that are not finite")
        return
    if dense.cache is None:
        row.update(status="no cache", error="the model returns no cache")
        return
    shapes = _shapes(dense.cache)

    def compiled(backend: str, options: dict[str, Any] | None) -> _Run:
        torch._dynamo.reset()
        again = build(architecture, setting.attention)
        return _drive(again, setting, _compile(again, backend, options), dense.tokens, shapes)

    try:
        full = compiled("mikv", {**FULL, "lower": setting.lower})
    except Exception as error:
        row.update(status="crash", error=_describe(error), where=_where(error), trace=_trace(error))
        _blame(row, lambda: compiled("eager", None), dense, scale)
        return
    row.update(_sites(full))
    row.update(
        compressed=full.handles["self"], compressed_cross=full.handles["cross"], graphs=full.graphs_per_call,
        breaks=full.breaks, same_tokens=full.tokens == dense.tokens, difference=_difference(full, dense, scale),
        dense_at_runtime=_fallbacks(full.cache),
    )  # fmt: skip
    if not row["same_tokens"] or not row["difference"] <= EQUAL:
        row["status"] = "differs"
        row["difference_per_call"] = _per_call(full, dense, scale)
        _blame(row, lambda: compiled("eager", None), dense, scale)
    if setting.bits4 and row["status"] == "ok" and full.handles["self"] + full.handles["cross"]:
        try:
            coded = compiled("mikv", {**INT4, "lower": setting.lower})
            difference = _difference(coded, dense, scale)
            row["int4"] = {
                "difference": difference, "finite": all(bool(torch.isfinite(x).all()) for x in coded.logits),
                "low": _low_share(coded.cache),
            }  # fmt: skip
        except Exception as error:
            row["int4"] = {"error": _describe(error), "where": _where(error), "trace": _trace(error)}


def _blame(row: dict[str, Any], plain: Callable[[], _Run], dense: _Run, scale: float) -> None:
    """Whether Dynamo alone, without this backend, does the same to the model."""
    try:
        eager = plain()
    except Exception as error:
        row.update(status="not compiled", plain_error=_describe(error))
        return
    difference = _difference(eager, dense, scale)
    row["plain"] = {"difference": difference, "graphs": eager.graphs_per_call, "breaks": eager.breaks}
    if difference > EQUAL:
        row.update(status="not compiled", plain_error=f"logits of backend='eager' differ by {difference:.1e}")


def _compile(tiny: TinyModel, backend: str, options: dict[str, Any] | None) -> Callable[..., Any]:
    return torch.compile(tiny.model, backend=backend, options=options) if options else _plain(tiny.model, backend)


def _plain(model: Any, backend: str) -> Callable[..., Any]:
    return torch.compile(model, backend=backend)


@torch.no_grad()
def _drive(
    tiny: TinyModel,
    setting: Setting,
    compiled: Callable[..., Any] | None,
    tokens: list[int] | None = None,
    shapes: list[tuple[int, ...]] | None = None,
) -> _Run:
    """The prompt and three single tokens: greedy ones, or those given, which keeps runs comparable."""
    early = compiled is not None and setting.cache == "static" and setting.prefill == "compiled"
    cache = tiny.new_cache(setting.cache, shapes if early else None)
    counters = torch._dynamo.utils.counters
    counters.clear()
    reports: list[Any] = []
    graphs: list[int] = []
    logits: list[torch.Tensor] = []
    arguments = tiny.first(cache)
    before: list[tuple[str, Any, dict[str, torch.Tensor]]] = []
    for i in range(1 + STEPS):
        eagerly = compiled is None or (i == 0 and setting.prefill == "eager")
        with _new_reports() as new:
            output = tiny.model(**arguments) if eagerly else compiled(**arguments)  # type: ignore[misc]
        reports += new
        graphs.append(len(new) or counters["stats"]["unique_graphs"] - sum(graphs))
        scores = getattr(output, "logits", None)
        logits.append((output[0] if scores is None else scores)[:1, -1].reshape(-1).float().clone())
        cache = tiny.cache_of(output, cache)
        if compiled is None and i == 0:
            before = _snapshot(cache)
        if i < STEPS:
            token = int(logits[-1].argmax()) if tokens is None else tokens[i]
            arguments = tiny.step(torch.tensor([[token]]), cache)
    grown, side = _growth(before, cache) if compiled is None else ({}, 0)
    breaks = {str(k).split("\n", 1)[0][:160]: int(n) for k, n in counters["graph_break"].items()}
    return _Run(logits, cache, grown, _handles(cache), side, graphs, reports, breaks)


@contextlib.contextmanager
def _new_reports() -> Iterator[list[Any]]:
    """Collects the reports of graphs that are compiled in this context."""
    known = mikv_compile.graph_reports()
    ids = {id(r) for r in known}
    new: list[Any] = []
    yield new
    new += [r for r in mikv_compile.graph_reports() if id(r) not in ids]


def _layers(cache: Any) -> Iterator[tuple[str, Any]]:
    """Layers of a transformers cache, with ``"self"`` or ``"cross"``."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", None) or ():
        yield "self", layer
    for layer in getattr(getattr(cache, "cross_attention_cache", None), "layers", None) or ():
        yield "cross", layer


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vars(layer).items() if isinstance(v, torch.Tensor)}


def _is_kv(tensors: dict[str, torch.Tensor]) -> bool:
    return all(name in tensors and tensors[name].dim() == 4 for name in ("keys", "values"))


def _snapshot(cache: Any) -> list[tuple[str, Any, dict[str, torch.Tensor]]]:
    return [(group, layer, {k: v.clone() for k, v in _tensors(layer).items()}) for group, layer in _layers(cache)]


def _changed(old: torch.Tensor | None, new: torch.Tensor) -> bool:
    return old is None or old.shape != new.shape or not torch.equal(old, new)


def _growth(before: list[tuple[str, Any, dict[str, torch.Tensor]]], cache: Any) -> tuple[dict[str, int], int]:
    """Attention layers whose keys and values were written by the steps (or that hold a cross-attention's), and how many
    other tensors grew with the tokens."""
    grown, side = {"self": 0, "cross": 0}, 0
    for (group, _, old), (_, layer) in zip(before, _layers(cache), strict=False):
        new = _tensors(layer)
        if _is_kv(new):
            written = _changed(old.get("keys"), new["keys"]) or _changed(old.get("values"), new["values"])
            grown[group] += written or group == "cross"
        for name, tensor in new.items():
            if name not in ("keys", "values") and name in old and old[name].dim() == tensor.dim() > 1:
                side += tensor.numel() > old[name].numel()
    return grown, side


def _handles(cache: Any) -> dict[str, int]:
    """Layers of which both tensors are handles."""
    count = {"self": 0, "cross": 0}
    for group, layer in _layers(cache):
        pair = [getattr(layer, name, None) for name in ("keys", "values")]
        count[group] += all(getattr(t, "store", None) is not None for t in pair)
    return count


def _shapes(cache: Any) -> list[tuple[int, ...]] | None:
    """Of the keys of every layer, if all have some and keys and values agree."""
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for _, layer in _layers(cache)]
    shapes = [tuple(k.shape) for k, v in pairs if k is not None and v is not None and k.shape == v.shape]
    return shapes if shapes and len(shapes) == len(pairs) and all(len(s) == 4 for s in shapes) else None


def _scale(dense: _Run) -> float:
    """The largest logit, at least 1; logits that stand for minus infinity do not count."""
    return max([1.0, *(float(x.abs()[x.abs() < 1e9].max()) for x in dense.logits)])


def _difference(run: _Run, dense: _Run, scale: float) -> float:
    return max(_per_call(run, dense, scale))


def _per_call(run: _Run, dense: _Run, scale: float) -> list[float]:
    found = []
    for a, b in zip(run.logits, dense.logits, strict=True):
        gap = float(torch.where(a == b, 0.0, (a - b).abs()).max()) / scale
        found.append(gap if gap == gap else float("inf"))
    return found


def _fallbacks(cache: Any) -> dict[str, int]:
    with contextlib.suppress(Exception):
        return mikv_compile.cache_report(cache).fallbacks
    return {}


def _low_share(cache: Any) -> float | None:
    """Part of the compressed tokens that sits in the last tier."""
    with contextlib.suppress(Exception):
        layers = [x.tokens for x in mikv_compile.cache_report(cache).layers if x.tokens]
        return round(sum(t[-1] for t in layers) / max(sum(map(sum, layers)), 1), 3)
    return None


def _sites(run: _Run) -> dict[str, Any]:
    """What the graphs' reports say, added up."""
    phases: collections.Counter[str] = collections.Counter()
    reading: collections.Counter[str] = collections.Counter()
    declined: collections.Counter[str] = collections.Counter()
    attentions = 0
    for report in run.reports:
        attentions += report.attentions
        for site in report.rewritten:
            phases[site.phase] += 1
            if getattr(site, "reads", None) == "dense":
                reading[_general(getattr(site, "reason", None) or "reads densely")] += 1
        for d in report.declined:
            declined[f"{d.stage}: {_general(d.reason)}"] += 1
    return {"attentions": attentions, "sites": dict(phases), "dense_reads": dict(reading), "declined": dict(declined)}


def _general(reason: str) -> str:
    """A reason without the numbers that make the same reason differ between layers."""
    return re.sub(r"_\d+(?=_|\b)", "", reason)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split("\n\nSet TORCHDYNAMO")[0].split())
    return f"{type(error).__name__}: {text}"[:600]


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None:
        frames += traceback.extract_tb(current.__traceback__)  # the cause is further in
        current = current.__cause__
    return frames


def _where(error: BaseException) -> str | None:
    """The innermost line of this package that the error came through."""
    here = Path(mikv_compile.__file__).parent
    roots = (
        str(here / "kernels"),
        str(here / "passes"),
        str(here),
        str(here.parent / "passes"),
        str(here.parent / "kernels"),
    )
    for frame in reversed(_frames(error)):
        if frame.filename.startswith(roots) and "coverage" not in frame.filename:
            return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return None


def _trace(error: BaseException) -> list[str]:
    """The last frames, for whoever looks into it."""
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in _frames(error)[-6:]]
