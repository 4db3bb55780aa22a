"""FlexGen's quantizer (arXiv 2303.06865): per token, groups of 64 channels, by the range, for keys and values alike."""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat

GROUP = 64
"""Channels of a token that share a scale; the whole head where 64 does not divide it."""


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return SideFormat(bits, 1, GROUP if dim % GROUP == 0 else dim)


value = key
"""Format of the values."""
