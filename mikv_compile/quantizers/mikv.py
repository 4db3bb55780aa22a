"""MiKV's quantizer (arXiv 2402.18096, section 3.2): per token, groups of D/2 channels, balanced keys.

A group never mixes the two halves that rotary embedding rotates against each other. Keys are multiplied by the
outlier-aware channel balancer before rounding; queries are divided by it.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat, TierFormat


def tier_format(key_bits: int, value_bits: int, key_dim: int, value_dim: int, entry: bool) -> TierFormat:
    """Format of a tier; ``entry`` makes no difference, as every tier has per-token scales."""
    return TierFormat(
        key=SideFormat(key_bits, 1, max(key_dim // 2, 1), balanced=key_bits != 16),
        value=SideFormat(value_bits, 1, max(value_dim // 2, 1)),
    )
