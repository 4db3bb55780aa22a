"""KIVI's groups with HQQ's zero points (mobiusml.github.io/hqq_blog): half-quadratic splitting, robust to outliers."""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return kivi.key(bits, dim, entry, fit="hqq")


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values."""
    return kivi.value(bits, dim, entry, fit="hqq")
