"""Which implementation of a primitive runs: Triton on GPUs, C++ on the CPU where there is one, else plain PyTorch.

A primitive is a function with a reference in :mod:`tokens`, :mod:`fit` or :mod:`attention`, or in :mod:`store_ops`
where it is about a whole store. Another implementation is a function with the same signature, registered
here by one line in ``_IMPLEMENTATIONS``; it may raise :class:`NotCovered` for arguments that it does not take, and the
reference runs instead.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache

import torch

log = logging.getLogger(__name__)

REFERENCE: dict[str, str] = {
    "write_tokens": "mikv_compile.kernels.tokens",
    "read_tokens": "mikv_compile.kernels.tokens",
    "copy_slots": "mikv_compile.kernels.tokens",
    "attend": "mikv_compile.kernels.attention",
    "add_scores": "mikv_compile.kernels.attention",
    "column_sums": "mikv_compile.kernels.attention",
    "select_tokens": "mikv_compile.kernels.store_ops",
    "demote": "mikv_compile.kernels.store_ops",
    "fit_groups": "mikv_compile.kernels.fit",
    "fit_guided": "mikv_compile.kernels.fit",
}
"""The module with the plain PyTorch of each primitive."""

# backend -> (module, primitives it implements); modules are imported on first use.
_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "triton": {
        "write_tokens": "mikv_compile.kernels.triton_tokens",
        "read_tokens": "mikv_compile.kernels.triton_tokens",
        "copy_slots": "mikv_compile.kernels.triton_tokens",
        "attend": "mikv_compile.kernels.triton_attention",
        "add_scores": "mikv_compile.kernels.triton_attention",
        "column_sums": "mikv_compile.kernels.triton_attention",
    },
    "cpp": {
        "write_tokens": "mikv_compile.kernels.cpp_tokens",
        "read_tokens": "mikv_compile.kernels.cpp_tokens",
        "copy_slots": "mikv_compile.kernels.cpp_tokens",
        "select_tokens": "mikv_compile.kernels.cpp_tokens",
        "demote": "mikv_compile.kernels.cpp_tokens",
        "attend": "mikv_compile.kernels.cpp_attention",
        "add_scores": "mikv_compile.kernels.cpp_attention",
        "fit_groups": "mikv_compile.kernels.cpp_fit",
        "fit_guided": "mikv_compile.kernels.cpp_fit",
    },
}

_forced: str | None = os.environ.get("MIKV_KERNELS") or None
_failed: set[tuple[str, str]] = set()


class NotCovered(Exception):
    """An implementation does not take these arguments; the reference does."""


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run all primitives with one backend: ``"reference"``, ``"triton"`` or ``"cpp"``. For tests and comparisons."""
    global _forced
    if backend != "reference" and backend not in _IMPLEMENTATIONS:
        raise ValueError(f"no kernel backend {backend!r}; there are reference, {', '.join(_IMPLEMENTATIONS)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """True when the ``triton`` package can be imported."""
    return importlib.util.find_spec("triton") is not None


def backend_for(device: torch.device) -> str:
    """The backend that serves a device, unless :func:`use` or ``MIKV_KERNELS`` says otherwise."""
    if _forced:
        return _forced
    if device.type == "cpu":
        return "cpp"
    return "triton" if has_triton() else "reference"


def run(primitive: str, device: torch.device, *args):
    """Call a primitive on the best implementation for ``device``.

    A kernel that cannot be built is replaced by the reference for the rest of the process. The first of a backend
    leaves a warning.
    """
    backend = backend_for(device)
    module = _IMPLEMENTATIONS.get(backend, {}).get(primitive)
    if module is not None and (backend, primitive) not in _failed:
        implementation = getattr(importlib.import_module(module), primitive)
        try:
            return implementation(*args)
        except NotCovered as reason:
            log.debug("%s %s: reference instead, %s", backend, primitive, reason)
        except BuildError as error:
            # Where one kernel cannot be built, the others mostly cannot either, for the same reason.
            tell = log.debug if any(name == backend for name, _ in _failed) else log.warning
            _failed.add((backend, primitive))
            tell("%s kernel %s could not be built, plain PyTorch runs instead: %s", backend, primitive, error)
    return getattr(importlib.import_module(REFERENCE[primitive]), primitive)(*args)


class BuildError(RuntimeError):
    """A kernel could not be compiled on this machine."""
