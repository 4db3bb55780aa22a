"""What the Triton kernels share: launching, and loading tiles of stored tokens.

Stored buffers are taken as contiguous (the store makes them so). Everything else has strides; only channels must be
neighbours. Slots at or beyond the count of a tier are never loaded: they hold garbage.
"""

from __future__ import annotations

import contextlib
import subprocess
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mikv_compile.kernels.dispatch import BuildError, NotCovered
from mikv_compile.kernels.formats import SideBuffers, SideFormat, TierBuffers

MASK_NONE, MASK_BOOL, MASK_ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = triton.knobs.runtime.interpret
_CPU_PROCESSORS = 16
"""Stands in for a GPU's processor count in the interpreter: enough for several splits per tier."""


def launch(kernel, grid: tuple[int, ...], device: torch.device, options: dict, **args) -> None:
    """Run a kernel with Triton's compile ``options``; one that cannot be compiled raises BuildError."""
    if device.type == "cpu" and not _INTERPRETED:
        raise NotCovered("Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1)")
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current:
        try:
            kernel[grid](**args, **options)
        except (triton.TritonError, subprocess.CalledProcessError) as error:
            raise BuildError(str(error)) from error
        except RuntimeError as error:
            # Triton has no class for this one. It compiles a launcher for each kernel.
            if "Failed to find C" not in str(error):
                raise
            raise BuildError(str(error)) from error


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device: what a launch has to fill."""
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(size: int) -> int:
    """The power of two that a tile needs for ``size`` channels or rows; tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(size))


def need_floats(*tensors: torch.Tensor) -> None:
    """Raise NotCovered unless all tensors are float32, float16 or bfloat16."""
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise NotCovered(f"no kernel for {tensor.dtype}")


def need_even_levels(*sides: SideFormat) -> None:
    """Raise NotCovered for levels that a scale and a zero do not describe."""
    for side in sides:
        if side.fit == "lloyd":
            raise NotCovered("levels that are not evenly spaced")


def need_contiguous(*tensors: torch.Tensor) -> None:
    """Raise NotCovered unless all stored buffers are contiguous."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise NotCovered("a stored buffer is not contiguous")


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its channels are neighbours in memory, otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dot_type(*tensors: torch.Tensor) -> tl.dtype:
    """Type in which dots multiply: half precision if all tensors share it, otherwise float32 (never tf32)."""
    kinds = {t.dtype for t in tensors}
    if kinds == {torch.float16}:
        return tl.float16
    # The interpreter keeps bfloat16 as integers, and its dot multiplies those.
    if kinds == {torch.bfloat16} and not _INTERPRETED:
        return tl.bfloat16
    return tl.float32


def is_amd() -> bool:
    """True when kernels are built for AMD GPUs."""
    return torch.version.hip is not None


def dot_precision() -> str:
    """How float32 is multiplied: exactly on AMD, on NVIDIA as three tf32 products, which err by about 2**-21.

    Plain tf32 (2**-11) would show in a full cache. Exact dots on NVIDIA hold whole rows in registers, and spill them.
    """
    return "ieee" if is_amd() else "tf32x3"


def need_small(tier: TierBuffers) -> None:
    """Raise NotCovered if codes or scales within a head need offsets of more than 31 bits; those of heads take 64."""
    for codes in (tier.key.codes, tier.value.codes):
        # A byte holds up to four codes, and each may have a scale of its own.
        if codes.dtype == torch.uint8 and codes.shape[2] * codes.shape[3] * 4 >= 1 << 31:
            raise NotCovered("a head of a tier takes too many bytes")


def strides(name: str, x: torch.Tensor, axes: str) -> dict[str, int]:
    """The strides of the first axes, as ``{name}_s{axis}``."""
    return {f"{name}_s{axis}": x.stride(i) for i, axis in enumerate(axes)}


def side_args(name: str, side: SideBuffers, fmt: SideFormat, dim: int) -> dict:
    """Kernel arguments that describe one stored side, all with the prefix ``name``."""
    coded = not fmt.is_float
    return {
        f"{name}_codes": side.codes,
        f"{name}_scales": side.scales if coded else None,
        f"{name}_zeros": side.zeros if coded else None,
        f"{name.upper()}_DIM": dim,
        f"{name.upper()}_BITS": fmt.bits,
        f"{name.upper()}_TOKENS": fmt.tokens,
        f"{name.upper()}_CHANNELS": fmt.channels if coded else dim,
    }


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(scores / 2)``, if CAPPED; other factors are part of the scale that scores were given."""
    if CAPPED:
        # From exp, as the interpreter has no tanh; its error is that of a float32 number as large as the softcap.
        scores = softcap - 2.0 * softcap / (1.0 + tl.exp(scores))
    return scores


@triton.jit
def tile_channels(DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Which channels the columns of a tile hold, plane after plane: [BLOCK] int32, and whether they exist.

    Each plane is padded to a power of two by itself, so that plane and byte of a column are a shift and a mask of its
    number whatever DIM is; with ``DIM == BLOCK`` columns are channels.
    """
    PLANES: tl.constexpr = 1 if BITS >= 8 else (8 if BITS == 3 else 8 // BITS)
    column = tl.arange(0, BLOCK)
    plane, byte = column // (BLOCK // PLANES), column % (BLOCK // PLANES)
    return plane * (DIM // PLANES) + byte, byte < DIM // PLANES


@triton.jit
def load_codes(codes, slot, slot_ok, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Unpack the codes of slots [N] of one head into a tile; the layout of the bytes is told in ``packing.py``.

    Returns:
        [N, BLOCK] int32 in the order of ``tile_channels``, 0 where nothing exists.
    """
    PLANES: tl.constexpr = 1 if BITS >= 8 else (8 if BITS == 3 else 8 // BITS)
    WIDTH: tl.constexpr = DIM // PLANES
    column = tl.arange(0, BLOCK)
    plane, byte = column // (BLOCK // PLANES), column % (BLOCK // PLANES)
    ok = slot_ok[:, None] & (byte < WIDTH)[None, :]
    rows = codes + (slot * (DIM * BITS // 8))[:, None]
    if BITS == 3:
        # The planes are those of the high bits; two of them share a plane of the low bits.
        low = tl.load(rows + (plane % 2 * WIDTH + byte)[None, :], mask=ok, other=0).to(tl.int32)
        high = tl.load(rows + (DIM // 4 + byte)[None, :], mask=ok, other=0).to(tl.int32)
        found = ((low >> (plane // 2 * 2)[None, :]) & 3) | (((high >> plane[None, :]) & 1) << 2)
    else:
        found = tl.load(rows + byte[None, :], mask=ok, other=0).to(tl.int32)
        if BITS != 8:
            found = (found >> (plane * BITS)[None, :]) & ((1 << BITS) - 1)
    return found


@triton.jit
def load_params(
    params,
    slot,
    slot_ok,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load the scales or the zeros of N slots of one head, in the smallest shape that broadcasts to [N, BLOCK].

    Args:
        params: *float16, the head's [C / TOKENS, DIM / CHANNELS]. slot: [N].
        ALIGNED: the slots are consecutive and start at a multiple of N, and the first one exists.

    Returns:
        float32 [N, 1] if a scale serves all channels, [1, BLOCK] if it serves all N slots, otherwise [N, BLOCK].
    """
    GROUPS: tl.constexpr = DIM // CHANNELS
    PLANES: tl.constexpr = 1 if BITS >= 8 else (8 if BITS == 3 else 8 // BITS)
    # Groups that are whole in the tile: neighbouring columns, none of them padding.
    WHOLE: tl.constexpr = (CHANNELS & (CHANNELS - 1)) == 0 and (DIM // PLANES % CHANNELS == 0 or DIM == BLOCK)
    channel, channel_ok = tile_channels(DIM, BITS, BLOCK)
    if CHANNELS == DIM:
        found = tl.load(params + slot // TOKENS, mask=slot_ok, other=0.0).to(tl.float32)[:, None]
    elif ALIGNED and TOKENS % N == 0:
        block = tl.min(slot, axis=0) // TOKENS
        where = params + block * GROUPS + channel // CHANNELS
        found = tl.load(where, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    elif WHOLE and CHANNELS > 1:
        RUNS: tl.constexpr = BLOCK // CHANNELS
        run = tl.arange(0, RUNS) * CHANNELS
        byte = run % (BLOCK // PLANES)
        group = (run // (BLOCK // PLANES) * (DIM // PLANES) + byte) // CHANNELS
        ok = slot_ok[:, None] & (byte < DIM // PLANES)[None, :]
        each = tl.load(params + (slot // TOKENS * GROUPS)[:, None] + group[None, :], mask=ok, other=0.0)
        found = tl.broadcast_to(each.to(tl.float32)[:, :, None], [N, RUNS, CHANNELS]).reshape(N, BLOCK)
    else:
        where = (slot // TOKENS * GROUPS)[:, None] + (channel // CHANNELS)[None, :]
        found = tl.load(params + where, mask=slot_ok[:, None] & channel_ok[None, :], other=0.0).to(tl.float32)
    return found
