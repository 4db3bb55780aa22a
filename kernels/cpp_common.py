"""What the C++ kernels share: their build, and how a side's buffers are told to them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from mikv_compile._compat import load_cpp_library
from mikv_compile.kernels.dispatch import BuildError, NotCovered
from mikv_compile.kernels.formats import SideBuffers, SideFormat

FLOAT_KINDS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}
"""Name of a floating-point side in the kernels (``Kind``); a coded side goes by its bits."""


_SOURCES = {
    "tokens": ("vector.h", "tokens.cpp"),
    "fit": ("vector.h", "fit.cpp"),
    "attention": (
        "vector.h", "attention_math.h", "attention_common.h", "attention_unpacked.h", "attention_codes.h",
        "attention.cpp",
    ),
}  # fmt: skip
"""The files of each library, joined to one text: the cache of compiled libraries goes by it and sees every change."""


def build(name: str, exact: bool = False) -> ctypes.CDLL:
    """The library ``name``, built on first use. What cannot be built is tried once per process.

    Args:
        name: a key of ``_SOURCES``.
        exact: as for :func:`load_cpp_library`.

    Raises:
        BuildError: it cannot be compiled here.
    """
    folder = Path(__file__).parent
    if name in _failed:
        raise BuildError(_failed[name])
    try:
        source = "\n".join((folder / file).read_text(encoding="utf-8") for file in _SOURCES[name])
        return load_cpp_library(source, name, exact)
    except (OSError, RuntimeError) as error:
        _failed[name] = str(error)
        raise BuildError(str(error)) from error


_failed: dict[str, str] = {}
"""Libraries that could not be built, and why: a compiler that fails takes its time, and each new store would ask."""


def threads() -> int:
    """Threads that a kernel may take: those of torch, and one in a forked process, where OpenMP has lost its own."""
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def side_fields(side: SideBuffers, fmt: SideFormat) -> tuple[int, ...]:
    """``struct Side``: kind, grouping, addresses and strides of the keys or values of a tier.

    Raises:
        NotCovered: a dtype or layout that the kernels do not take.
    """
    codes, scales, zeros = side
    batch_stride, head_stride, slot_stride, channel_stride = codes.stride()
    if channel_stride != 1 or not codes.is_cpu:
        raise NotCovered("channels of a buffer are not contiguous in the CPU's memory")
    if fmt.is_float:
        kind = FLOAT_KINDS.get(codes.dtype)
        if kind is None:
            raise NotCovered(f"buffers of {codes.dtype}")
        return kind, 1, 1, codes.data_ptr(), batch_stride, head_stride, slot_stride, 0, 0, 0, 0, 0
    if fmt.fit == "lloyd":
        raise NotCovered("levels that are not evenly spaced")
    strides = scales.stride()
    if zeros.stride() != strides or strides[3] != 1:
        raise NotCovered("scales and zeros are laid out differently")
    return (
        fmt.bits,
        fmt.tokens,
        fmt.channels,
        codes.data_ptr(),
        batch_stride,
        head_stride,
        slot_stride,
        scales.data_ptr(),
        zeros.data_ptr(),
        *strides[:3],
    )
