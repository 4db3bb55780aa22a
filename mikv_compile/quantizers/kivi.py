"""KIVI's quantizer (arXiv 2402.02750): keys per channel in blocks of tokens, values per token.

Key outliers sit in fixed channels, so a scale per channel costs one channel its precision instead of all. Tokens of a
block need not be neighbours: after rotary embedding attention does not care about order, so blocks are filled in
demotion order. Tier 0 takes tokens one at a time and therefore has scales per token. So do 8-bit keys: with 256 levels
an outlier does no harm.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat

BLOCK = 64
"""Tokens that share a key scale."""

GROUP = 64
"""Channels of a token that share a value scale; the whole head where 64 does not divide it."""


def key(bits: int, dim: int, entry: bool, fit: str = "") -> SideFormat:
    """Format of the keys; ``fit`` is how those of fewer than 8 bits are rounded that do not come one at a time."""
    return SideFormat(bits, 1, dim) if entry or bits == 8 else SideFormat(bits, BLOCK, 1, fit=fit)


def value(bits: int, dim: int, entry: bool, fit: str = "") -> SideFormat:
    """Format of the values; ``fit`` as for keys."""
    return SideFormat(bits, 1, GROUP if dim % GROUP == 0 else dim, fit="" if entry or bits == 8 else fit)
