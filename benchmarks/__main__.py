"""``python -m benchmarks NAME``: see :mod:`benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Benchmarks.")

Device = Annotated[str, typer.Option(help="cpu or cuda")]
Quick = Annotated[bool, typer.Option("--quick", help="tiny sizes, seconds; says nothing about speed")]
Folder = Annotated[Path | None, typer.Option(help="where the results go; by default a folder of date and device")]
Until = Annotated[float | None, typer.Option(help="leave out parts that would end later; seconds since the epoch")]
Model = Annotated[str, typer.Option(help="smollm2, tiny or 8b (random); by default what fits the device")]
Lower = Annotated[str, typer.Option(help="inductor, or eager: traced only")]


@app.command()
def attention(device: Device = "cpu", quick: Quick = False, folder: Folder = None, seconds: float = 4.0) -> None:
    """Attention of one new token over each format against the fastest dense forms; SECONDS for a headline case."""
    from benchmarks import attention as benchmark

    benchmark.run(torch.device(device), quick, folder, 0.05 if quick else seconds)


@app.command()
def decode(
    device: Device = "cpu",
    quick: Quick = False,
    folder: Folder = None,
    model: Model = "",
    scenarios: Annotated[str, typer.Option(help="CONTEXTxBATCH, comma-separated; batch max: what fits on a GPU")] = "",
    seconds: Annotated[float, typer.Option(help="for the timed steps of a scenario")] = 40.0,
    lower: Lower = "inductor",
    deadline: Until = None,
) -> None:
    """Tokens per second of a model on a full cache against torch.compile with a DynamicCache."""
    from benchmarks import decode as benchmark
    from benchmarks.harness import Deadline

    if quick:
        model, scenarios, lower = model or "tiny", scenarios or "96x1,96x2", "eager"
    on_gpu = device.startswith("cuda")
    model = model or ("8b" if on_gpu else "smollm2")
    scenarios = scenarios or ("32768x1,32768x8,131072x1,32768xmax" if on_gpu else "64x1,512x1,4096x1,8192x4")
    chosen = [benchmark.Scenario.parse(text) for text in scenarios.split(",")]
    benchmark.run(torch.device(device), quick, folder, model, chosen, seconds, lower, Deadline(deadline))


@app.command("compile")
def compilation(
    device: Device = "cpu",
    quick: Quick = False,
    folder: Folder = None,
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="length of the prompt")] = 64,
    lower: Lower = "inductor",
    warm: Annotated[bool, typer.Option(help="once more with the compiler caches that the first runs filled")] = True,
    keep: Annotated[Path | None, typer.Option(help="put the filled compiler caches together here")] = None,
    deadline: Until = None,
) -> None:
    """Seconds, graphs, recompiles and guards of a prompt and the first tokens, in fresh processes."""
    from benchmarks import compilation as benchmark
    from benchmarks.harness import Deadline

    if quick:
        model, lower, warm = model or "tiny", "eager", False
    chosen = torch.device(device)
    benchmark.run(chosen, quick, folder, model or "smollm2", tokens, lower, warm, keep, Deadline(deadline))


@app.command()
def profile(quick: Quick = False, folder: Folder = None, model: Model = "", context: int = 4096) -> None:
    """Where the seconds go: phases of compiling, and operators of a decode step at CONTEXT tokens. On the CPU."""
    from benchmarks import profiles as benchmark

    benchmark.run(quick, folder, model or ("tiny" if quick else "smollm2-6-layers"), 96 if quick else context)


@app.command()
def memory(
    device: Device = "cpu",
    quick: Quick = False,
    folder: Folder = None,
    model: Model = "",
    tokens: Annotated[int, typer.Option(help="length of the prompt")] = 4096,
    chunk: Annotated[int, typer.Option(help="tokens per call where the prompt comes in chunks")] = 512,
    steps: Annotated[int, typer.Option(help="single tokens")] = 192,
    deadline: Until = None,
) -> None:
    """Peak and resident bytes of a long prompt, of one in chunks, and of single tokens while the cache grows."""
    from benchmarks import memory as benchmark
    from benchmarks.harness import Deadline

    if quick:
        model, tokens, chunk, steps = model or "tiny", 256, 64, 8
    chosen = torch.device(device)
    name = model or ("8b" if chosen.type == "cuda" else "smollm2")
    benchmark.run(chosen, quick, folder, name, tokens, chunk, steps, Deadline(deadline))


@app.command()
def report() -> None:
    """Write docs/performance.md from the newest results and print what became of the targets."""
    from benchmarks import report as page

    print(page.write())


@app.command("all")
def everything(
    device: Device = "cpu",
    quick: Quick = False,
    minutes: Annotated[float, typer.Option(help="parts that would end later are left out and named")] = 15.0,
) -> None:
    """All benchmarks one after the other, each in its own process, then the report."""
    from benchmarks import suite

    suite.run(device, quick, minutes)


if __name__ == "__main__":
    app()
