"""``mikv bench``: decode steps of a model with the dense and the compressed cache, side by side."""

import copy
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv_compile.commands import common
from mikv_compile.commands.common import AsJson, Budget, Device, Dtype, Lower, Model, Preset, Settings

if TYPE_CHECKING:
    from mikv_compile.eval.methods import Session

_WARM = 3
"""Steps before the clock runs: the first ones are traced."""


def command(
    model: Model,
    context: Annotated[str, typer.Option(help="Tokens in the cache before the first step: 2048, 8k.")] = "2048",
    steps: Annotated[int, typer.Option(min=2, help="Steps of each that are timed.")] = 32,
    options: Settings = None,
    preset: Preset = None,
    budget: Budget = None,
    lower: Lower = "eager",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time decode steps with the dense and the compressed cache in turns, on this machine.

    With --lower inductor, the dense model is compiled by Inductor too; with eager, it runs as it is.
    """
    with common.mistakes():
        import torch

        from mikv_compile.eval import models, texts
        from mikv_compile.eval.methods import Session
        from mikv_compile.eval.mikv_method import MikvMethod

        tokens = common.count(context, "--context")
        chosen = common.backend_options(options, preset, budget, lower=lower)
        tokenizer, loaded = models.load(model, common.torch_dtype(dtype), device)
        ids = torch.tensor([texts.load("pydoc").tokens(tokenizer, tokens + _WARM + steps)])
        # The compiled one has layers of its own and shares the weights: compiling changes layers in place.
        shared = {id(tensor): tensor for tensor in (*loaded.parameters(), *loaded.buffers())}
        with MikvMethod(chosen, partly=True).open(copy.deepcopy(loaded, shared)) as session:
            dense = Session(loaded, torch.compile(loaded) if chosen["lower"] == "inductor" else None)
            content = _content(_measure({"dense": dense, "compressed": session}, ids, tokens, steps, as_json))
    content = {
        "model": models.short_name(model), "options": chosen, "dtype": dtype, "device": device,
        "threads": torch.get_num_threads(), "context": tokens, "steps": steps, **content,
    }  # fmt: skip
    common.print_json(content) if as_json else _show(content)


def _measure(
    sessions: dict[str, "Session"], ids: Any, context: int, steps: int, quiet: bool
) -> dict[str, tuple[list[float], Any]]:
    """Seconds of each step, and the cache that is left, by session. The sessions take turns at every step."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    def wait() -> None:
        if next(iter(sessions.values())).model.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), Progress(console=Console(stderr=True, quiet=quiet), transient=True) as progress:
        bar = progress.add_task("reading the prompt", total=len(sessions) + _WARM + steps)
        caches: dict[str, Any] = {}
        for name, session in sessions.items():
            caches[name] = session.prefill(ids[:, :context])[0]
            progress.advance(bar)
        progress.update(bar, description="steps")
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for step in range(_WARM + steps):
            token = ids[:, context + step : context + step + 1]
            for name in sorted(sessions, reverse=bool(step % 2)):  # neither is always the first
                wait()
                started = time.perf_counter()
                sessions[name].forward(token, caches[name])
                wait()
                seconds[name].append(time.perf_counter() - started)
            progress.advance(bar)
    return {name: (seconds[name][_WARM:], caches[name]) for name in sessions}


def _content(measured: dict[str, tuple[list[float], Any]]) -> dict[str, Any]:
    from mikv_compile.report import cache_report

    content: dict[str, Any] = {}
    for name, (seconds, cache) in measured.items():
        middle = statistics.median(seconds)
        content[name] = {
            "tokens_per_second": 1 / middle, "step_ms": {
                "median": 1e3 * middle, "least": 1e3 * min(seconds), "most": 1e3 * max(seconds),
            },
            "cache": common.cache_json(cache_report(cache)),
        }  # fmt: skip
    pairs = zip(measured["dense"][0], measured["compressed"][0], strict=True)
    content["speedup"] = statistics.median(dense / compressed for dense, compressed in pairs)
    return content


def _show(content: dict[str, Any]) -> None:
    from rich.table import Table

    console = common.console()
    title = f"{content['model']}, {content['context']:,} tokens, {content['dtype']}, {content['threads']} threads"
    table = Table(title=title)
    for i, heading in enumerate(("cache", "tokens/s", "ms a step (least to most)", "cache bytes", "% of 16-bit")):
        table.add_column(heading, justify="right" if i else "left")
    for name in ("dense", "compressed"):
        found, ms = content[name], content[name]["step_ms"]
        table.add_row(
            name, f"{found['tokens_per_second']:.1f}", f"{ms['median']:.1f} ({ms['least']:.1f} to {ms['most']:.1f})",
            f"{found['cache']['nbytes']:,}", f"{found['cache']['ratio_16bit']:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"compressed is {content['speedup']:.2f} times as fast: median of {content['steps']} pairs of steps")
    cache = content["compressed"]["cache"]
    if cache["layers"] != cache["compressed_layers"]:
        console.print(f"{cache['layers'] - cache['compressed_layers']} of {cache['layers']} layers stayed dense")
