"""Raises an error in the middle of this package's code: at any line, as a signal does, or at any call of a kernel."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mikv_compile
from mikv_compile.kernels import cpp_attention, cpp_tokens, dispatch

_ROOT = Path(mikv_compile.__file__).resolve().parent.parent
_FOLDERS = tuple(f"{_ROOT / name}/" for name in ("mikv_compile", "kernels", "passes"))


class Lines:
    """Counts the lines of this package that run in its context, and raises ``error`` before number ``at``."""

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error = at, error
        self.count = 0
        self.where: str | None = None
        """The line at which it was raised."""

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(_FOLDERS):
            return None
        if event == "line":
            if self.count == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                self.count += 1
                raise self.error(f"injected at {self.where}")
            self.count += 1
        return self._trace


class Kernels:
    """Counts moments before and after the kernels that this thread calls, and raises ``error`` at number ``at``."""

    def __init__(self, at: int | None, error: type[BaseException]) -> None:
        self.at, self.error = at, error
        self.count = 0

    def __enter__(self) -> Kernels:
        self._undo = contextlib.ExitStack()
        run = dispatch.run
        for module in [m for name, m in list(sys.modules.items()) if name.startswith("mikv_compile.")]:
            if vars(module).get("run") is run:
                self._replace(module, "run")
        self._replace(cpp_attention.PreparedCall, "__call__")
        self._replace(cpp_attention.PreparedCall, "add_scores")
        self._replace(cpp_tokens.AppendPlan, "__call__")
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _replace(self, owner: Any, name: str) -> None:
        function, thread = getattr(owner, name), threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            self._moment(f"before {name}")
            result = function(*args, **kwargs)
            self._moment(f"after {name}")
            return result

        self._undo.callback(setattr, owner, name, function)
        setattr(owner, name, call)

    def _moment(self, what: str) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            raise self.error(f"injected {what}")
