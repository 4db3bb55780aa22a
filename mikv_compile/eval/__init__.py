"""How good a compressed cache is: tasks, methods to compare, results as JSON.

``mikv eval`` and ``mikv sweep`` are the commands. Tasks, texts and results do not import the backend, so that other
environments (other versions of torch or transformers) can measure other methods with the same inputs:

```python
from mikv_compile.eval import Plan, make, run, texts

run(Plan("smollm2", (MyMethod(),), (make("continuation"),), (texts.load("pydoc"),), out=Path("results")))
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CacheSize": "methods",
    "DenseMethod": "methods",
    "Method": "methods",
    "MikvMethod": "mikv_method",
    "Plan": "runner",
    "Session": "methods",
    "UnavailableError": "methods",
    "make": "tasks",
    "run": "runner",
}

if TYPE_CHECKING:
    from mikv_compile.eval.methods import CacheSize, DenseMethod, Method, Session, UnavailableError
    from mikv_compile.eval.mikv_method import MikvMethod
    from mikv_compile.eval.runner import Plan, run
    from mikv_compile.eval.tasks import make

__all__ = [
    "CacheSize", "DenseMethod", "Method", "MikvMethod", "Plan", "Session", "UnavailableError", "make", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"mikv_compile.eval.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
