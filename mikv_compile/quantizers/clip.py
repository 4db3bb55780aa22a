"""KIVI's groups (arXiv 2402.02750) with ranges clipped and lines fitted (:mod:`mikv_compile.kernels.fit`).

Clipping below the range is what SKVQ (arXiv 2405.06219) and OSCAR do at 2 bits; here every group finds its own.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys: least squares."""
    return kivi.key(bits, dim, entry, fit="clip")


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values: their spread is kept."""
    return kivi.value(bits, dim, entry, fit="unbiased")
