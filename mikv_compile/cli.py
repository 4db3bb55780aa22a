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

    app.command("coverage")(_coverage_command(typer))
    app.command("calibrate")(_calibrate_command(typer))
    app.command("eval")(_eval_command(typer))
    app.command("sweep")(_sweep_command(typer))
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


def _calibrate_command(typer: Any) -> Callable[..., None]:
    def calibrate(
        model: Annotated[str, typer.Argument(help="smollm2 (packaged), a folder, a GGUF file, or a name on the hub.")],
        out: Annotated[Path, typer.Option(help="The plan file to write.")] = Path("plan.json"),
        budget: Annotated[
            float, typer.Option(help="Part of a 16-bit cache that the plan takes where the options name no budget.")
        ] = 0.25,
        options: Annotated[
            list[str] | None, typer.Option("--options", "-o", help="KEY=VALUE of the backend; may be repeated.")
        ] = None,
        context: Annotated[int, typer.Option(help="Tokens of each text that are compressed.")] = 2048,
        check: Annotated[
            list[float] | None,
            typer.Option(help="A budget, as part of the model's own cache, to run in the end; may be repeated."),
        ] = None,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    ) -> None:
        """Measure what fewer bits and tokens cost each layer, and write a file for the option plan."""
        from mikv_compile import calibration_command

        status = calibration_command.run(
            model, out=out, budget=budget, options=options or [], context=context, check=check or [], dtype=dtype,
            device=device,
        )  # fmt: skip
        raise typer.Exit(status)

    return calibrate


def _eval_command(typer: Any) -> Callable[..., None]:
    def evaluate(
        model: Annotated[str, typer.Argument(help="smollm2 (packaged), a folder, a GGUF file, or a name on the hub.")],
        options: Annotated[
            list[str] | None, typer.Option("--options", "-o", help="KEY=VALUE of the backend; may be repeated.")
        ] = None,
        preset: Annotated[str | None, typer.Option(help="Short for -o preset=...")] = None,
        budget: Annotated[str | None, typer.Option(help="Short for -o budget=...")] = None,
        tasks: Annotated[str, typer.Option(help="Names, with commas.")] = "continuation,retrieval",
        settings: Annotated[
            list[str] | None, typer.Option("--set", help="TASK.NAME=VALUE, a setting of a task; may be repeated.")
        ] = None,
        names: Annotated[str, typer.Option("--texts", help="pydoc, jargon, kjv or files, with commas.")] = "pydoc",
        text_dir: Annotated[Path | None, typer.Option(help="A folder in which texts are looked for first.")] = None,
        out: Annotated[Path, typer.Option(help="Folder of the results; what is there is not measured again.")] = Path(
            "eval-results"
        ),
        lower: Annotated[str, typer.Option(help="eager traces in seconds; inductor compiles.")] = "eager",
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
        fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a result.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
    ) -> None:
        """Measure what the compressed cache costs a model: KL, perplexity, retrieval, true bytes."""
        from mikv_compile.eval import command

        status = command.evaluate(
            model, options=options or [], preset=preset, budget=budget, tasks=tasks, settings=settings or [],
            names=names, text_dir=text_dir, out=out, lower=lower, dtype=dtype, device=device, fresh=fresh,
            as_json=as_json,
        )  # fmt: skip
        raise typer.Exit(status)

    return evaluate


def _sweep_command(typer: Any) -> Callable[..., None]:
    def sweep(
        suite: Annotated[str, typer.Argument(help="A TOML file, or a packaged suite: quick, fidelity, needle, ...")],
        model: Annotated[str, typer.Option(help="As for mikv eval.")] = "smollm2",
        out: Annotated[Path, typer.Option(help="Folder of the results; what is there is not measured again.")] = Path(
            "eval-results"
        ),
        only: Annotated[str | None, typer.Option(help="Only methods with this in their name.")] = None,
        text_dir: Annotated[Path | None, typer.Option(help="A folder in which texts are looked for first.")] = None,
        lower: Annotated[str, typer.Option(help="For methods of the suite that do not say it themselves.")] = "eager",
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
        fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a result.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
        report: Annotated[bool, typer.Option("--report", help="Measure nothing; tables and pictures only.")] = False,
    ) -> None:
        """Measure all methods of a suite; run the same command again to go on after an interruption."""
        from mikv_compile.eval import command

        status = command.sweep(
            suite, model=model, out=out, only=only, text_dir=text_dir, lower=lower, dtype=dtype, device=device,
            fresh=fresh, as_json=as_json, report=report,
        )  # fmt: skip
        raise typer.Exit(status)

    return sweep


if __name__ == "__main__":
    main()
