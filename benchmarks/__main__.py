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
    model: Annotated[str, typer.Option(help="smollm2, tiny or 8b; by default 8b on a GPU")] = "",
    scenarios: Annotated[str, typer.Option(help="CONTEXTxBATCH, comma-separated; batch max: what fits on a GPU")] = "",
    cycles: Annotated[int, typer.Option(help="64 steps each, per configuration")] = 3,
    lower: Annotated[str, typer.Option(help="inductor, or eager: traced only")] = "inductor",
    deadline: Until = None,
) -> None:
    """Tokens per second of a model on a full cache against torch.compile with a DynamicCache."""
    from benchmarks import decode as benchmark
    from benchmarks.harness import Deadline

    if quick:
        model, scenarios, cycles, lower = model or "tiny", scenarios or "96x1,96x2", 1, "eager"
    on_gpu = device.startswith("cuda")
    model = model or ("8b" if on_gpu else "smollm2")
    scenarios = scenarios or ("32768x1,32768x8,131072x1,32768xmax" if on_gpu else "512x1,4096x1,8192x4")
    chosen = [benchmark.Scenario.parse(text) for text in scenarios.split(",")]
    benchmark.run(torch.device(device), quick, folder, model, chosen, cycles, lower, Deadline(deadline))


if __name__ == "__main__":
    app()
