"""Rounding that looks at what is lost, on the CPU: hands addresses to ``fit.cpp``."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch

from mikv_compile.kernels.cpp_common import build, threads
from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.fit import Guide
from mikv_compile.kernels.formats import SideFormat


@lru_cache(maxsize=1)
def kernel() -> Callable[[int], int]:
    """The compiled entry point; built on first use."""
    function = build("fit", exact=True).mikv_fit
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def _fit(
    x: torch.Tensor, fmt: SideFormat, order: torch.Tensor | None, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if fmt.fit == "hqq" or (fmt.tokens != 1 and fmt.channels != 1):
        raise NotCovered(f"rounding as {fmt}")
    if not x.is_cpu or x.dtype is not torch.float32:
        raise NotCovered(f"numbers of {x.dtype} on {x.device}")
    b, h, t, d = x.shape
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales, zeros = (torch.empty((b, h, t // fmt.tokens, d // fmt.channels), dtype=torch.float16) for _ in range(2))
    if x.numel():
        fields = array("q", (
            x.data_ptr(), codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
            0 if order is None else order.data_ptr(), 0 if factor is None else factor.data_ptr(),
            b * h, t, d, fmt.tokens, fmt.channels, fmt.bits, int(fmt.fit == "unbiased"), threads(),
        ))  # fmt: skip
        if kernel()(fields.buffer_info()[0]):
            raise MemoryError("the kernel could not allocate its scratch space")
    return codes, scales, zeros


def fit_groups(x: torch.Tensor, fmt: SideFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`mikv_compile.kernels.fit.fit_groups`.

    Raises:
        NotCovered: groups of several tokens and channels, half-quadratic splitting, or another device.
        BuildError: the kernel cannot be compiled here.
    """
    return _fit(x, fmt, None, None)


def fit_guided(x: torch.Tensor, fmt: SideFormat, guide: Guide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`mikv_compile.kernels.fit.fit_guided`.

    Raises:
        NotCovered: another device.
        BuildError: the kernel cannot be compiled here.
    """
    return _fit(x, fmt, guide.order.contiguous(), guide.factor.contiguous())
