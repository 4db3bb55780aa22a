"""Launches of the Triton kernels on CPU tensors, recorded instead of run, and what they compile to; needs no GPU.

Shared by ``test_triton_aot.py`` and ``benchmarks/triton_static.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mikv_compile.kernels import triton_attention, triton_common, triton_decode, triton_tokens
from mikv_compile.kernels.formats import LayerFormat, StoreBuffers, buffer_shapes
from mikv_compile.kernels.scoring import AttentionArgs

SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
TYPES = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: object
    grid: tuple[int, ...]
    options: dict
    args: dict

    def source(self):
        """What the JIT would compile for these arguments."""
        fn = self.kernel
        signature, constants, attrs = {}, {}, {}
        for param in fn.params:
            value, place = self.args[param.name], (param.num,)
            if param.is_constexpr or value is None or (_specialized(param, value) and value == 1):
                signature[param.name], constants[place] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[param.name], divisible = TYPES[value.dtype], True
            elif isinstance(value, float):
                signature[param.name], divisible = "fp32", False
            else:
                signature[param.name], divisible = "i32", _specialized(param, value) and value % 16 == 0
            if divisible:
                attrs[place] = [["tt.divisibility", 16]]
        return ASTSource(fn, signature, constants, attrs)


def _specialized(param, value):
    return type(value) is int and not param.do_not_specialize


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; spills in bytes."""

    registers: int
    spills: int
    shared: int


def _ptxas_usage(ptx, target):
    """Registers and spilled bytes, from the assembler's own report."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
        report = subprocess.run(
            [get_ptxas(target.arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", source, "-o", os.devnull],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return int(re.search(r"Used (\d+) registers", report).group(1)), spills


def build(launch: Launch, target: GPUTarget):
    """Compile a launch; what Triton's compiler returns."""
    return triton.compile(launch.source(), target=target, options=launch.options)


def usage(built, target: GPUTarget) -> Usage:
    """The resources that a compiled kernel takes."""
    if target.backend == "cuda":
        registers, spills = _ptxas_usage(built.asm["ptx"], target)
    else:
        counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", built.asm["amdgcn"]))
        registers = int(counts["vgpr_count"])
        # Scratch memory. Scalar registers may also be kept in spare lanes of vector registers, which costs little.
        spills = int(counts["private_segment_fixed_size"])
    return Usage(registers, spills, built.metadata.shared)


def record(target: GPUTarget, run: Callable[[], None]) -> list[Launch]:
    """The launches that ``run`` makes for a target."""
    launches = []

    def note(kernel, grid, device, options, **args):
        unknown = set(args) - set(kernel.arg_names)
        assert not unknown, f"{kernel.__name__} has no {unknown}"
        launches.append(Launch(kernel, grid, options, args))

    with ExitStack() as patches:
        for module in (triton_attention, triton_decode, triton_tokens):
            patches.enter_context(patch.object(module, "launch", note))
        for module in (triton_attention, triton_common, triton_decode):
            patches.enter_context(patch.object(module, "is_amd", lambda: target.backend == "hip"))
        for module in (triton_attention, triton_decode):
            patches.enter_context(patch.object(module, "processors", lambda device: 132))
        run()
    return launches


def _store(text, key_dim, value_dim, dtype, capacity=256):
    fmt = LayerFormat.parse(text)
    shapes = buffer_shapes(fmt, 1, 8, key_dim, value_dim, [capacity] * len(fmt.tiers), dtype)
    return fmt, StoreBuffers.from_list([torch.zeros(shape, dtype=kind) for shape, kind in shapes])


def run_attend(text, key_dim, value_dim, dtype, group=4, rows=1, mask=False, softcap=0.0, counts=None, own=None):
    """Decode attention. ``counts``: slots of each tier, 250 if not given; ``own``: the call's tokens, else ``rows``."""
    fmt, store = _store(text, key_dim, value_dim, dtype)
    q = torch.zeros(1, 8 * group, rows, key_dim, dtype=dtype)
    own = rows if own is None else own
    k, v = (torch.zeros(1, 8, own, dim, dtype=dtype) for dim in (key_dim, value_dim))
    counts = counts or (250,) * len(fmt.tiers)
    length = sum(counts)
    given = torch.ones(1, 1, rows, length + own, dtype=torch.bool) if mask else None
    triton_attention.attend(q, k, v, given, 0.1, softcap, store, fmt, counts, length)


def run_add_scores(text, dim, dtype, group=4, rows=1, softcap=0.0):
    """The scores of tier 0 and of the call's own tokens, with an additive mask."""
    fmt, store = _store(text, dim, dim, dtype)
    q, k = torch.zeros(1, 8 * group, rows, dim, dtype=dtype), torch.zeros(1, 8, rows, dim, dtype=dtype)
    mask = torch.zeros(1, 1, rows, 250 + rows, dtype=dtype)
    triton_attention.add_scores(q, k, torch.zeros(1, 8 * group, rows), mask, 0.1, softcap, store, fmt, 250, 250)


def run_column_sums(dim, dtype, last, mask=False, softcap=0.0):
    """Attention that the keys of a prompt receive from the last rows."""
    q, k = torch.zeros(1, 8, 512, dim, dtype=dtype), torch.zeros(1, 2, 512, dim, dtype=dtype)
    given = torch.ones(1, 1, 512, 512, dtype=torch.bool) if mask else None
    triton_attention.column_sums(q, k, AttentionArgs(given, 0.1, not mask, softcap), last)


def run_tokens(text, key_dim, value_dim, dtype, indexed):
    """Write and read tokens of tier 0 and, where slots can be moved, copy them."""
    fmt, store = _store(text, key_dim, value_dim, dtype)
    k, v = (torch.zeros(1, 8, 128, dim, dtype=dtype) for dim in (key_dim, value_dim))
    index = torch.zeros(1, 8, 128, dtype=torch.int64)
    balancer = store.balancer if fmt.is_balanced else None
    tier = store.tiers[0]
    triton_tokens.write_tokens(tier, fmt.tiers[0], 0, k, v, index if indexed else None, 0, None, balancer)
    triton_tokens.read_tokens(tier, fmt.tiers[0], index, key_dim, value_dim, balancer)
    if fmt.tiers[0].block == 1:
        triton_tokens.copy_slots(tier, fmt.tiers[0], store.scores, index, index)
