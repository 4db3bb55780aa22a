"""``mikv sweep``."""

from pathlib import Path
from typing import Annotated

import typer

from mikv_compile.commands.common import AsJson, Device, Dtype


def command(
    suite: Annotated[str, typer.Argument(help="A TOML file, or a packaged suite: quick, fidelity, needle, ...")],
    model: Annotated[str, typer.Option(help="As for mikv eval.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of the results; what is there is not measured again.")] = Path(
        "eval-results"
    ),
    only: Annotated[str | None, typer.Option(help="Only methods with this in their name.")] = None,
    text_dir: Annotated[Path | None, typer.Option(help="A folder in which texts are looked for first.")] = None,
    lower: Annotated[str, typer.Option(help="For methods of the suite that do not say it themselves.")] = "eager",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a result.")] = False,
    as_json: AsJson = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing; tables and pictures only.")] = False,
) -> None:
    """Measure all methods of a suite; run the same command again to go on after an interruption."""
    from mikv_compile.eval import command

    status = command.sweep(
        suite, model=model, out=out, only=only, text_dir=text_dir, lower=lower, dtype=dtype, device=device,
        fresh=fresh, as_json=as_json, report=report,
    )  # fmt: skip
    raise typer.Exit(status)
