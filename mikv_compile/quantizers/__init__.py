"""Quantizers: how a tier's tokens become codes. One file each, one line here.

``options={"quantizer": name}`` chooses one for keys and values; ``key_quantizer`` and ``value_quantizer`` choose apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mikv_compile.kernels.formats import SideFormat
from mikv_compile.quantizers import clip, flexgen, gptq, hqq, kivi, mikv, nuq, rotate, rtn

Side = Callable[[int, int, bool], SideFormat]
"""``(bits, dim, entry) -> SideFormat`` for 8, 4, 3 or 2 bits and a head dimension. ``entry`` is true for tier 0, where
tokens arrive one at a time: its scales are per token, and numbers are rounded by their range."""


@dataclass(frozen=True)
class Quantizer:
    """How keys and values are stored.

    Attributes:
        key, value: the format of a side.
        rotates: ``"k"``, ``"v"`` or ``"kv"``: these are multiplied by an orthogonal matrix first.
    """

    key: Side
    value: Side
    rotates: str = ""


QUANTIZERS: dict[str, Quantizer] = {
    "clip": Quantizer(clip.key, clip.value),
    "flexgen": Quantizer(flexgen.key, flexgen.value),
    "gptq": Quantizer(gptq.key, gptq.value),
    "hqq": Quantizer(hqq.key, hqq.value),
    "kivi": Quantizer(kivi.key, kivi.value),
    "mikv": Quantizer(mikv.key, mikv.value),
    "nuq": Quantizer(nuq.key, nuq.value, rotates="v"),
    "rotate": Quantizer(rotate.key, rotate.value, rotates="kv"),
    "rtn": Quantizer(rtn.key, rtn.value),
}


def register(name: str, quantizer: Quantizer) -> None:
    """Make a quantizer available to ``options={"quantizer": name}``.

    Raises:
        ValueError: if there is another one of this name.
    """
    if QUANTIZERS.get(name, quantizer) != quantizer:
        raise ValueError(f"there is a quantizer {name!r} already; choose another name")
    QUANTIZERS[name] = quantizer
