"""Keep any traced decoder's KV cache in mixed precision: ``torch.compile(model, backend="mikv")``.

The names below are imported on first use: importing this package costs nothing, and ``TORCH_LOGS="+mikv_compile"``
imports it while torch itself is still being imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Calibration": "sensitivity",
    "EvictedTokensError": "errors",
    "KVTensor": "handle",
    "MikvError": "errors",
    "OptionError": "errors",
    "Options": "config",
    "PRESETS": "config",
    "SavedCacheError": "errors",
    "UnusableCacheError": "errors",
    "cache_report": "report",
    "cached_tokens": "saved",
    "calibrate": "calibration",
    "compile": "regional",
    "explain": "report",
    "export": "export_program",
    "graph_reports": "report",
    "load_cache": "saved",
    "load_exported": "export_runner",
    "save_cache": "saved",
    "transform": "graph_transform",
    "uncompile": "regional",
}

if TYPE_CHECKING:
    from mikv_compile.calibration import calibrate
    from mikv_compile.config import PRESETS, Options
    from mikv_compile.errors import EvictedTokensError, MikvError, OptionError, SavedCacheError, UnusableCacheError
    from mikv_compile.export_program import export
    from mikv_compile.export_runner import load_exported
    from mikv_compile.graph_transform import transform
    from mikv_compile.handle import KVTensor
    from mikv_compile.regional import compile, uncompile
    from mikv_compile.report import cache_report, explain, graph_reports
    from mikv_compile.saved import cached_tokens, load_cache, save_cache
    from mikv_compile.sensitivity import Calibration

__all__ = [
    "PRESETS",
    "Calibration",
    "EvictedTokensError",
    "KVTensor",
    "MikvError",
    "OptionError",
    "Options",
    "SavedCacheError",
    "UnusableCacheError",
    "cache_report",
    "cached_tokens",
    "calibrate",
    "compile",
    "explain",
    "export",
    "graph_reports",
    "load_cache",
    "load_exported",
    "save_cache",
    "transform",
    "uncompile",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"mikv_compile.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
