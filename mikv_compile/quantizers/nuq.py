"""Levels that are not evenly spaced: keys per channel as in KVQuant (arXiv 2401.18079), values rotated as in TurboQuant
(arXiv 2504.19874), both with the Lloyd-Max levels of the normal distribution.

Runs on the reference kernels: in a rotated group they are no better than evenly spaced levels with a fitted line.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return kivi.key(bits, dim, entry, fit="lloyd")


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values."""
    return kivi.value(bits, dim, entry, fit="lloyd")
