"""Rotated keys and values, per token (QuaRot, arXiv 2404.00456), with ranges clipped and lines fitted.

A rotation spreads outliers over all channels of a token. Values profit at 2 bits; keys rather want scales per channel
(KVLinC, arXiv 2510.05373), which ``key_quantizer`` gives them.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return SideFormat(bits, 1, dim, fit="" if entry or bits == 8 else "clip")


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values."""
    return kivi.value(bits, dim, entry, fit="unbiased")
