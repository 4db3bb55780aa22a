"""What the backend does to every decoder architecture of transformers: tiny random models, runs and tables.

``mikv coverage`` is the command; :func:`select`, :func:`build`, :func:`run`, :func:`run_all` and :func:`render` are its
parts.
"""

from mikv_compile.coverage.models import Architecture, CannotBuildError, TinyModel, attentions, build, names, select
from mikv_compile.coverage.pool import read_rows, run_all
from mikv_compile.coverage.runs import Setting, run
from mikv_compile.coverage.table import render, summarize

__all__ = [
    "Architecture", "CannotBuildError", "Setting", "TinyModel", "attentions", "build", "names", "read_rows", "render",
    "run", "run_all", "select", "summarize",
]  # fmt: skip
