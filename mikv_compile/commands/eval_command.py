"""``mikv eval``."""

from pathlib import Path
from typing import Annotated

import typer

from mikv_compile.commands.common import AsJson, Budget, Device, Dtype, Lower, Model, Preset, Settings


def command(
    model: Model,
    options: Settings = None,
    preset: Preset = None,
    budget: Budget = None,
    tasks: Annotated[str, typer.Option(help="Names, with commas.")] = "continuation,retrieval",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="TASK.NAME=VALUE, a setting of a task; may be repeated.")
    ] = None,
    names: Annotated[str, typer.Option("--texts", help="pydoc, jargon, kjv or files, with commas.")] = "pydoc",
    text_dir: Annotated[Path | None, typer.Option(help="A folder in which texts are looked for first.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; what is there is not measured again.")] = Path(
        "eval-results"
    ),
    lower: Lower = "eager",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the compressed cache costs a model: KL, perplexity, retrieval, true bytes."""
    from mikv_compile.eval import command

    status = command.evaluate(
        model, options=options or [], preset=preset, budget=budget, tasks=tasks, settings=settings or [],
        names=names, text_dir=text_dir, out=out, lower=lower, dtype=dtype, device=device, fresh=fresh,
        as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(status)
