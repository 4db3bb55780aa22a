"""The command ``mikv``. Thin: each subcommand is a file of :mod:`mikv_compile.commands`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

COMMANDS = ("explain", "plan", "run", "bench", "calibrate", "eval", "sweep", "coverage", "doctor")
"""Names of the subcommands, as help lists them. Each is a function ``command`` in the module with its name."""


def main() -> None:
    """Entry point; says what to install when typer or rich is missing."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # loading a model shows bars of its own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    for name in COMMANDS:
        module = import_module(f"mikv_compile.commands.{name}_command")
        app.command(name)(module.command)
    return app


if __name__ == "__main__":
    main()
