"""MiKV's groups without its balancer: per token, D/2 channels, by the range. For comparisons."""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import mikv


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys, which is that of values."""
    return mikv.value(bits, dim, entry)


value = mikv.value
"""Format of the values."""
