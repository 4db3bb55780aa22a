"""The command ``mikv``. Thin: each subcommand calls a function of the package."""

# No `from __future__ import annotations`: typer reads the annotations, and their names are local to a function here.
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any


def main() -> None:
    """Entry point; says what to install when typer or rich is missing."""
    try:
        app = make_app()
    except ImportError as error:
        sys.exit(f"mikv needs the package {error.name}: pip install 'mikv-compile[cli]'")
    app()


def make_app() -> Any:
    """The typer application with all subcommands."""
    import rich  # noqa: F401  (a clear error now, not in the middle of a run)
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, help="torch.compile backend with a compressed cache.")

    @app.callback()
    def _several() -> None:  # keeps `coverage` a subcommand while it is the only one
        pass

    app.command("coverage")(_coverage_command(typer))
    return app


def _coverage_command(typer: Any) -> Callable[..., None]:
    def coverage(
        names: Annotated[list[str] | None, typer.Argument(help="Architectures; all without names.")] = None,
        kind: Annotated[str | None, typer.Option(help="Only causal, seq2seq or vlm.")] = None,
        cache: Annotated[str | None, typer.Option(help="Only dynamic or static.")] = None,
        attn: Annotated[str | None, typer.Option(help="Only sdpa or eager; first: sdpa where there is sdpa.")] = None,
        lower: Annotated[str, typer.Option(help="eager traces in seconds; inductor compiles for minutes.")] = "eager",
        prefill: Annotated[str, typer.Option(help="Static caches: eager, compiled, or both.")] = "eager",
        bits4: Annotated[
            str, typer.Option(help="4-bit runs: all, first (dynamic with the first form), none.")
        ] = "first",
        jobs: Annotated[int, typer.Option(help="Worker processes, one thread each.")] = 2,
        timeout: Annotated[float, typer.Option(help="CPU seconds for one run.")] = 180.0,
        results: Annotated[Path | None, typer.Option("--json", help="JSON lines; a run goes on from them.")] = None,
        write: Annotated[Path | None, typer.Option(help="Write the table as markdown.")] = None,
        listing: Annotated[bool, typer.Option("--list", help="Only list the architectures.")] = False,
    ) -> None:
        """Run tiny models of every transformers decoder and say what is compressed."""
        from mikv_compile.coverage import command

        status = command.coverage(
            names or [], kind=kind, cache=cache, attention=attn, lower=lower, prefill=prefill, bits4=bits4, jobs=jobs,
            timeout=timeout, results=results, write=write, listing=listing,
        )  # fmt: skip
        raise typer.Exit(status)

    return coverage


if __name__ == "__main__":
    main()
