"""Quantizers: how a tier's tokens become codes. One file each, one line here."""

from __future__ import annotations

from collections.abc import Callable

from mikv_compile.kernels.formats import TierFormat
from mikv_compile.quantizers import kivi, mikv

Quantizer = Callable[[int, int, int, int, bool], TierFormat]
"""``(key_bits, value_bits, key_dim, value_dim, entry) -> TierFormat`` for bits of 8, 4, 3 or 2, or 16 for a side that
stays floating point. ``entry`` is true for tier 0, where tokens arrive one at a time: its scales are per token."""

QUANTIZERS: dict[str, Quantizer] = {"kivi": kivi.tier_format, "mikv": mikv.tier_format}
