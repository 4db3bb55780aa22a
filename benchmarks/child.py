"""Runs one function in a process of its own; see :func:`benchmarks.harness.in_child`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """``python -m benchmarks.child MODULE:FUNCTION ARGUMENTS_AS_JSON OUT``."""
    module, _, function = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
