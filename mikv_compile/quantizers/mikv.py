"""MiKV's quantizer (arXiv 2402.18096, section 3.2): per token, groups of D/2 channels, balanced keys.

A group never mixes the two halves that rotary embedding rotates against each other. Keys are multiplied by the
outlier-aware channel balancer before rounding; queries are divided by it. Every tier has scales per token.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return SideFormat(bits, 1, max(dim // 2, 1), balanced=True)


def value(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the values."""
    return SideFormat(bits, 1, max(dim // 2, 1))
