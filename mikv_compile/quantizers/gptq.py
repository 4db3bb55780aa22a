"""KIVI's groups, with keys rounded so that the prompt's queries notice least (GPTQ, arXiv 2210.17323, for keys).

Channels are rounded one after the other, and those to come make up for the error in the direction of the queries.
Nothing more is stored than by ``clip``, which rounds the tokens that come after the prompt.
"""

from __future__ import annotations

from dataclasses import replace

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import clip


def key(bits: int, dim: int, entry: bool) -> SideFormat:
    """Format of the keys."""
    plain = clip.key(bits, dim, entry)
    return replace(plain, fit="gptq") if plain.fit else plain


value = clip.value
"""Format of the values."""
