"""A process of tests/test_distributed_sweep.py: ``sweep_rank.py SUITE OUT LOG`` runs ``mikv sweep`` on a tiny model.

Each measurement leaves a line in LOG: the rank that made it, and what it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from test_eval import Letters
from tiny_models import build

from mikv_compile.eval import command, models, results


def main(suite: str, out: str, log: str) -> int:
    write = results.write

    def logged(folder: Path, result: results.Result) -> Path:
        with open(log, "a") as file:
            file.write(f"{os.environ.get('RANK', 0)} {result.status} {result.key}\n")
        return write(folder, result)

    def tiny(*args: object) -> tuple[object, object]:
        return Letters(), build("llama")

    # Put back afterwards, as the tests call this in their own process, too.
    with patch.object(results, "write", logged), patch.object(models, "load", tiny):
        return command.sweep(
            suite, model="tiny", out=Path(out), only=None, text_dir=None, lower="eager", dtype="float32", device="cpu",
            fresh=False, as_json=False, report=False,
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
