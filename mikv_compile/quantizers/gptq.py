"""KIVI's groups, with keys rounded so that the prompt's queries notice least (GPTQ, arXiv 2210.17323, for keys).

Channels are rounded one after the other, and those to come make up for the error in the direction of the queries.
Nothing more is stored than by ``clip``, which rounds the tokens that come after the prompt.
"""

from __future__ import annotations

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import clip, kivi


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    return kivi.key(bits, dim, entry, fit="gptq")


value = clip.value
"""Format of the values."""
