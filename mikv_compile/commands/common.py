"""What the subcommands share: arguments that several of them take, mistakes that are no bugs, and JSON."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mikv_compile.report import CacheReport

Model = Annotated[str, typer.Argument(help="smollm2 (packaged), a folder, a GGUF file, or a name on the hub.")]
Settings = Annotated[
    list[str] | None, typer.Option("--options", "-o", help="KEY=VALUE of the backend; may be repeated.")
]
Preset = Annotated[str | None, typer.Option(help="Short for -o preset=...")]
Budget = Annotated[str | None, typer.Option(help="Short for -o budget=...: 25%, 0.25, or a size such as 2GiB.")]
Lower = Annotated[str, typer.Option(help="eager traces in seconds; inductor compiles.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")]


class UsageError(Exception):
    """An argument makes no sense; the message says what would."""


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns errors whose message tells the user what to do into that message and exit status 2."""
    from mikv_compile.errors import MikvError
    from mikv_compile.eval.models import ModelError
    from mikv_compile.eval.texts import TextError

    try:
        yield
    except Exception as error:
        # An error in a compiled model's first call arrives inside of one of torch's.
        said = getattr(error, "inner_exception", error)
        if not isinstance(said, MikvError | ModelError | TextError | UsageError):
            raise
        print(said, file=sys.stderr)
        raise typer.Exit(2) from error


def backend_options(
    settings: Sequence[str] | None, preset: str | None, budget: str | None, **more: Any
) -> dict[str, Any]:
    """Options of the backend, checked; arguments as for :func:`mikv_compile.eval.command.backend_options`.

    Raises:
        UsageError: for a setting of another form.
        OptionError: for options that are unknown or impossible.
    """
    from mikv_compile.errors import OptionError
    from mikv_compile.eval import command

    try:
        return command.backend_options(settings or (), preset, budget, **more)
    except OptionError:
        raise
    except ValueError as error:
        raise UsageError(f"-o {error}") from error


def torch_dtype(name: str) -> Any:
    """The dtype of torch with this name."""
    import torch

    from mikv_compile.eval.command import DTYPES

    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; it can be {', '.join(DTYPES)}")
    return getattr(torch, name)


def count(text: str, option: str) -> int:
    """A number of tokens: ``4096``, ``32k`` (32,768), ``1M``."""
    units = {"k": 2**10, "m": 2**20}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        tokens = int(float(number) * unit)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UsageError(f"{option} is {text!r}; expected a number of tokens such as 4096 or 32k")
    return tokens


def console() -> "Console":
    """A console for tables; wide where nobody watches, so that files and pipes get whole lines."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def print_json(content: Any) -> None:
    """The one thing that a command with ``--json`` prints."""
    print(json.dumps(content, indent=1))


def cache_json(report: "CacheReport") -> dict[str, Any]:
    """A live cache in numbers."""
    return {
        "nbytes": report.nbytes, "dense_nbytes": report.dense_nbytes, "ratio": report.ratio,
        "ratio_16bit": report.ratio_16bit, "layers": len(report.layers),
        "compressed_layers": sum(layer.plan is not None for layer in report.layers),
    }  # fmt: skip


def size(nbytes: int) -> str:
    """Bytes for people."""
    number, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
