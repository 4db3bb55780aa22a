"""What ``mikv calibrate`` does: loads a model, measures its layers, writes the plan file, prints the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mikv_compile.calibration import calibrate, default_inputs
from mikv_compile.config import parse_budget
from mikv_compile.errors import MikvError, OptionError
from mikv_compile.eval import models, texts
from mikv_compile.eval.command import DTYPES, parse_option
from mikv_compile.sensitivity import Calibration


def run(
    model: str,
    *,
    out: Path,
    budget: str,
    options: Sequence[str],
    context: int,
    check: Sequence[str],
    dtype: str,
    device: str,
    as_json: bool = False,
) -> int:
    """Calibrate a model with :func:`~mikv_compile.calibration.default_inputs`. Returns the exit status.

    Budgets are fractions, as :func:`~mikv_compile.config.parse_budget` reads them.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
        settings = dict(map(parse_option, options))
        part, *checks = map(_fraction, (budget, *check))
        tokenizer, loaded = models.load(model, getattr(torch, dtype), device)
        samples = default_inputs(tokenizer, context)
        with Progress(*bars, console=Console(stderr=True, quiet=as_json)) as progress:
            task = progress.add_task(f"layers of {models.short_name(model)}", total=None)
            found = calibrate(
                loaded, samples, budget=part, check=checks, path=out,
                progress=lambda done, total: progress.update(task, completed=done, total=total), **settings,
            )  # fmt: skip
    except (MikvError, models.ModelError, texts.TextError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps({**asdict(found), "tiers": found.tiers(), "file": str(out)}, indent=1))
    else:
        show(found)
        print(f"wrote {out}")
    return 0


def _fraction(budget: str) -> float:
    """A budget that is a part of a cache's bytes; a plan takes no others."""
    part = parse_budget(budget)
    if isinstance(part, str):
        raise OptionError(f"budget is {budget!r}; a calibration takes a part of the bytes, such as 25% or 0.25")
    return part


def show(found: Calibration) -> None:
    """The damage of each layer and what the stored budget gives it, as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title="damage in nats per 1,000 tokens", caption=f"tiers for {found.budget:.0%} of a 16-bit cache")
    for heading in ("layer", *found.candidates):
        table.add_column(heading, justify="right")
    table.add_column("tiers")
    for (layer, row), tiers in zip(found.rows(), found.tiers(), strict=True):
        table.add_row(str(layer), *(f"{1000 * kl:.3f}" for kl in row.values()), tiers)
    console.print(table)
    for check in found.checks:
        for part, kl in check.measured.items():
            console.print(
                f"budget {check.budget:g}, {part}: measured KL {kl:.5f}, predicted {check.predicted[part]:.5f}; the "
                f"measured cache took {check.nbytes_fraction:.1%}"
            )
