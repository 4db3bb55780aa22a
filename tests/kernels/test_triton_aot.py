"""Every Triton kernel compiles for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942 without spills; no GPU is needed.

The variants are those that the host code asks for: its launches on CPU tensors are recorded instead of run.
``python tests/kernels/test_triton_aot.py`` prints the table of registers and shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mikv_compile.kernels import triton_attention, triton_common, triton_tokens
from mikv_compile.kernels.formats import LayerFormat, StoreBuffers, buffer_shapes
from mikv_compile.kernels.scoring import AttentionArgs

SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
SHARED_BUDGET = {"cuda": 100 * 1024, "hip": 64 * 1024}
"""Bytes of shared memory per program: what the smallest Ampere or Ada chip has, and a compute unit's LDS."""

TYPES = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: object
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


def measure(launch, target):
    """Compile a launch and read its resources."""
    built = triton.compile(launch.source(), target=target, options=launch.options)
    if target.backend == "cuda":
        registers, spills = _ptxas_usage(built.asm["ptx"], target)
    else:
        counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", built.asm["amdgcn"]))
        registers = int(counts["vgpr_count"])
        # Scratch memory. Scalar registers may also be kept in spare lanes of vector registers, which costs little.
        spills = int(counts["private_segment_fixed_size"])
    return Usage(registers, spills, built.metadata.shared)


def record(monkeypatch, target, run):
    """The launches that ``run`` makes for a target."""
    launches = []

    def note(kernel, grid, device, options, **args):
        unknown = set(args) - set(kernel.arg_names)
        assert not unknown, f"{kernel.__name__} has no {unknown}"
        launches.append(Launch(kernel, options, args))

    for module in (triton_attention, triton_tokens):
        monkeypatch.setattr(module, "launch", note)
    for module in (triton_attention, triton_common):
        monkeypatch.setattr(module, "is_amd", lambda: target.backend == "hip")
    monkeypatch.setattr(triton_attention, "processors", lambda device: 132)
    run()
    return launches


def _store(text, key_dim, value_dim, dtype, capacity=256):
    fmt = LayerFormat.parse(text)
    shapes = buffer_shapes(fmt, 1, 8, key_dim, value_dim, [capacity] * len(fmt.tiers), dtype)
    return fmt, StoreBuffers.from_list([torch.zeros(shape, dtype=kind) for shape, kind in shapes])


def run_attend(text, key_dim, value_dim, dtype, group=4, rows=1, mask=False, softcap=0.0):
    fmt, store = _store(text, key_dim, value_dim, dtype)
    q = torch.zeros(1, 8 * group, rows, key_dim, dtype=dtype)
    k, v = (torch.zeros(1, 8, rows, dim, dtype=dtype) for dim in (key_dim, value_dim))
    counts = (250,) * len(fmt.tiers)
    length = sum(counts)
    given = torch.ones(1, 1, rows, length + rows, dtype=torch.bool) if mask else None
    triton_attention.attend(q, k, v, given, 0.1, softcap, store, fmt, counts, length)


def run_add_scores(text, dim, dtype, group=4, rows=1, softcap=0.0):
    fmt, store = _store(text, dim, dim, dtype)
    q, k = torch.zeros(1, 8 * group, rows, dim, dtype=dtype), torch.zeros(1, 8, rows, dim, dtype=dtype)
    mask = torch.zeros(1, 1, rows, 250 + rows, dtype=dtype)
    triton_attention.add_scores(q, k, torch.zeros(1, 8 * group, rows), mask, 0.1, softcap, store, fmt, 250, 250)


def run_column_sums(dim, dtype, last, mask=False, softcap=0.0):
    q, k = torch.zeros(1, 8, 512, dim, dtype=dtype), torch.zeros(1, 2, 512, dim, dtype=dtype)
    given = torch.ones(1, 1, 512, 512, dtype=torch.bool) if mask else None
    triton_attention.column_sums(q, k, AttentionArgs(given, 0.1, not mask, softcap), last)


def run_tokens(text, key_dim, value_dim, dtype, indexed):
    fmt, store = _store(text, key_dim, value_dim, dtype)
    k, v = (torch.zeros(1, 8, 128, dim, dtype=dtype) for dim in (key_dim, value_dim))
    index = torch.zeros(1, 8, 128, dtype=torch.int64)
    balancer = store.balancer if fmt.is_balanced else None
    tier = store.tiers[0]
    triton_tokens.write_tokens(tier, fmt.tiers[0], 0, k, v, index if indexed else None, 0, None, balancer)
    triton_tokens.read_tokens(tier, fmt.tiers[0], index, key_dim, value_dim, balancer)
    if fmt.tiers[0].block == 1:
        triton_tokens.copy_slots(tier, fmt.tiers[0], store.scores, index, index)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "attend-default": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, BF16)),
    "attend-3bit": (run_attend, ("3:t1c80b,3:t64c1", 80, 80, FP16, 3, 2, True)),
    "write-read-copy": (run_tokens, ("8:t1c128b,3:t1c32|fp,fp", 128, 128, BF16, True)),
    "add-scores": (run_add_scores, ("8:t1c128,8:t1c128|fp,fp+scored", 128, BF16)),
    "column-sums": (run_column_sums, (128, BF16, 64)),
    "attend-capped": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, BF16, 4, 1, True, 50.0)),
    "column-sums-capped": (run_column_sums, (128, BF16, 64, False, 50.0)),
}
SLOW = {
    "add-scores-chunk": (run_add_scores, ("4:t64c1b,fp|fp,fp+scored", 256, FP16, 2, 64)),
    "add-scores-fp32-128": (run_add_scores, ("4:t64c1b,fp|fp,fp+scored", 128, FP32, 8)),
    "attend-capped-256": (run_attend, ("8:t1c256,8:t1c256|4:t64c1,2:t1c32", 256, 256, BF16, 2, 1, False, 50.0)),
    "attend-capped-chunk": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, BF16, 4, 64, True, 50.0)),
    "attend-capped-fp32": (run_attend, ("fp,fp|4:t64c1,2:t1c32", 128, 128, FP32, 4, 1, True, 50.0)),
    "add-scores-capped": (run_add_scores, ("8:t1c128,8:t1c128|fp,fp+scored", 128, BF16, 4, 64, 50.0)),
    "column-sums-capped-256": (run_column_sums, (256, BF16, 0, True, 50.0)),
    "column-sums-masked": (run_column_sums, (128, BF16, 0, True)),
    "column-sums-fp32-128": (run_column_sums, (128, FP32, 0)),
    "attend-fp32": (run_attend, ("fp,fp|4:t64c1,2:t1c32", 128, 128, FP32, 1, 1, True)),
    "attend-fp16": (run_attend, ("8:t1c64,8:t1c64|4:t64c1,2:t1c32", 64, 64, FP16, 8)),
    "attend-256": (run_attend, ("8:t1c256,8:t1c256|4:t64c1,2:t1c32", 256, 256, BF16, 2)),
    "attend-chunk": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, BF16, 4, 64, True)),
    "attend-chunk-fp32": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, FP32, 4, 64, True)),
    "attend-small-groups": (run_attend, ("4:t16c16,2:t16c16|2:t64c1b,4:t1c80", 80, 80, BF16, 1)),
    "write-blocks": (run_tokens, ("4:t64c1,2:t64c32", 128, 128, BF16, False)),
    "write-256": (run_tokens, ("3:t64c1b,8:t16c256", 256, 256, FP16, True)),
    "write-fp32": (run_tokens, ("2:t1c80,fp|fp,fp", 80, 80, FP32, False)),
}
WIDE_FP32 = {
    "attend-256-fp32": (run_attend, ("fp,fp|4:t64c1,2:t1c32", 256, 256, FP32, 2)),
    "attend-chunk-256-fp32": (run_attend, ("8:t1c256,fp|4:t16c1,2:t1c32", 256, 256, FP32, 4, 64, True)),
    "add-scores-fp32": (run_add_scores, ("4:t64c1b,fp|fp,fp+scored", 256, FP32, 8)),
    "column-sums-fp32": (run_column_sums, (256, FP32, 0)),
}


def check(monkeypatch, case, target, spill_budget=0):
    run, args = case
    with monkeypatch.context() as patch:
        launches = record(patch, target, lambda: run(*args))
    assert launches
    for launch in launches:
        usage = measure(launch, target)
        name = launch.kernel.__name__
        assert usage.spills <= spill_budget, f"{name} spills: {usage}"
        assert usage.shared <= SHARED_BUDGET[target.backend], f"{name}: {usage}"


def _name(target):
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@pytest.mark.parametrize("target", [SM80, GFX942], ids=_name)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(monkeypatch, case, target):
    check(monkeypatch, CASES[case], target)


@pytest.mark.parametrize("target", [SM90, SM100], ids=_name)
def test_newer_architectures(monkeypatch, target):
    check(monkeypatch, CASES["attend-3bit"], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM80, SM90, SM100, GFX942], ids=_name)
@pytest.mark.parametrize("case", SLOW)
def test_wider_variants(monkeypatch, case, target):
    check(monkeypatch, SLOW[case], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM80, SM90, SM100, GFX942], ids=_name)
@pytest.mark.parametrize("case", WIDE_FP32)
def test_wide_float32(monkeypatch, case, target):
    """Every thread of an NVIDIA tensor core dot holds whole rows: 256 exact channels leave no register free."""
    check(monkeypatch, WIDE_FP32[case], target, spill_budget=1024 if target.backend == "cuda" else 0)


if __name__ == "__main__":
    for name, (run, args) in {**CASES, **SLOW, **WIDE_FP32}.items():
        for target in (SM80, SM90, SM100, GFX942):
            with pytest.MonkeyPatch.context() as patch:
                launches = record(patch, target, lambda run=run, args=args: run(*args))
            for launch in launches:
                usage = measure(launch, target)
                print(f"{name:22} {launch.kernel.__name__:18} {_name(target):7} {usage}", flush=True)
