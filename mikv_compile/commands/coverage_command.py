"""``mikv coverage``."""

from pathlib import Path
from typing import Annotated

import typer

from mikv_compile.commands.common import AsJson


def command(
    names: Annotated[list[str] | None, typer.Argument(help="Architectures; all without names.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only causal, seq2seq or vlm.")] = None,
    cache: Annotated[str | None, typer.Option(help="Only dynamic or static.")] = None,
    attn: Annotated[str | None, typer.Option(help="Only sdpa or eager; first: sdpa where there is sdpa.")] = None,
    lower: Annotated[str, typer.Option(help="eager traces in seconds; inductor compiles for minutes.")] = "eager",
    prefill: Annotated[str, typer.Option(help="Static caches: eager, compiled, or both.")] = "eager",
    bits4: Annotated[str, typer.Option(help="4-bit runs: all, first (dynamic with the first form), none.")] = "first",
    jobs: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
    timeout: Annotated[float, typer.Option(help="CPU seconds for one run.")] = 180.0,
    results: Annotated[
        Path | None, typer.Option(help="A file of JSON lines: rows are added to it, and a run goes on from them.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the table as markdown.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only list the architectures.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run tiny models of every transformers decoder and say what is compressed."""
    from mikv_compile.coverage import command

    status = command.coverage(
        names or [], kind=kind, cache=cache, attention=attn, lower=lower, prefill=prefill, bits4=bits4, jobs=jobs,
        timeout=timeout, results=results, write=write, listing=listing, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(status)
