"""KIVI's groups with HQQ's zero points (mobiusml.github.io/hqq_blog): half-quadratic splitting, robust to outliers."""

from __future__ import annotations

from dataclasses import replace

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    plain = kivi.key(bits, dim, entry)
    return plain if entry or bits == 8 else replace(plain, fit="hqq")


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values."""
    plain = kivi.value(bits, dim, entry)
    return plain if entry or bits == 8 else replace(plain, fit="hqq")
