"""Makes ``torch.compile(model, backend="mikv").generate(...)`` run compiled code.

``torch.compile(model)`` returns a wrapper that compiles calls of itself and hands out the original module's methods.
``generate`` is such a method, and the ``self(...)`` in it is the original, uncompiled module: a user would get a dense
cache without a word. For this backend, methods that the wrapper hands out run with the module's calls compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mikv_compile import _compat

_active: contextvars.ContextVar[Mapping[int, Callable[..., Any]]] = contextvars.ContextVar("mikv_active")
"""Compiled calls of the modules whose methods run in this context, by the module's id."""

_lock = threading.Lock()
_running: dict[int, int] = {}
"""Methods under way per module, in all threads."""


def install() -> None:
    """Wrap the attribute access of ``torch.compile``'s module wrapper, once."""
    wrapper = _compat.optimized_module_class()
    original = wrapper.__getattr__
    if getattr(original, "_mikv", False):
        return

    @functools.wraps(original)
    def getattr_compiled(self: Any, name: str) -> Any:
        value = original(self, name)
        if not name.startswith("_") and _is_forwarding_method(self, name, value):
            return _run_compiled(self, value)
        return value

    getattr_compiled._mikv = True  # type: ignore[attr-defined]
    wrapper.__getattr__ = getattr_compiled


def _is_forwarding_method(wrapper: Any, name: str, value: Any) -> bool:
    """A method of the original module that may call the module."""
    if getattr(value, "__self__", None) is not wrapper._orig_mod or hasattr(torch.nn.Module, name):
        return False
    return _compat.backend_name(wrapper) == "mikv"


def _run_compiled(wrapper: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _calls_compiled(wrapper):
            return method(*args, **kwargs)

    return call


@contextlib.contextmanager
def _calls_compiled(wrapper: Any) -> Iterator[None]:
    """In this context, calls of the original module run the wrapper's compiled code; other threads see no change."""
    module = wrapper._orig_mod
    with _lock:
        if module._compiled_call_impl is None:
            module._compiled_call_impl = functools.partial(_choose, module)
        elif not _is_ours(module):
            # The user has compiled this module in place as well (module.compile()), and that stays in force.
            module = None
        if module is not None:
            _running[id(module)] = _running.get(id(module), 0) + 1
    if module is None:
        yield
        return
    token = _active.set({**_active.get({}), id(module): _compiled_call(wrapper)})
    try:
        yield
    finally:
        _active.reset(token)
        with _lock:
            _running[id(module)] -= 1
            if not _running[id(module)]:
                del _running[id(module)]
                module._compiled_call_impl = None


def _is_ours(module: torch.nn.Module) -> bool:
    return getattr(module._compiled_call_impl, "func", None) is _choose


def _choose(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _active.get({}).get(id(module), module._call_impl)(*args, **kwargs)


def _compiled_call(wrapper: Any) -> Callable[..., Any]:
    """What ``module.compile()`` would call, made once per wrapper."""
    if "_mikv_compiled_call" not in wrapper.__dict__:
        wrapper.__dict__["_mikv_compiled_call"] = wrapper.dynamo_ctx(wrapper._orig_mod._call_impl)
    return wrapper.__dict__["_mikv_compiled_call"]
