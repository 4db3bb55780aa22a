"""``mikv calibrate``."""

from pathlib import Path
from typing import Annotated

import typer

from mikv_compile.commands.common import AsJson, Device, Dtype, Model, Settings


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The plan file to write.")] = Path("plan.json"),
    budget: Annotated[
        str, typer.Option(help="Part of a 16-bit cache, 25% or 0.25, that the plan takes where options name no budget.")
    ] = "25%",
    options: Settings = None,
    context: Annotated[int, typer.Option(help="Tokens of each text that are compressed.")] = 2048,
    check: Annotated[
        list[str] | None,
        typer.Option(help="A budget, as part of the model's own cache, to run in the end; may be repeated."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure what fewer bits and tokens cost each layer, and write a file for the option plan."""
    from mikv_compile import calibration_command

    status = calibration_command.run(
        model, out=out, budget=budget, options=options or [], context=context, check=check or [], dtype=dtype,
        device=device, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(status)
