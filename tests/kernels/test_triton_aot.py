"""Every Triton kernel compiles for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942 without spills; no GPU is needed.

The variants are those that the host code asks for: its launches on CPU tensors are recorded instead of run.
``python tests/kernels/test_triton_aot.py`` prints the table of registers and shared memory.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton")
from triton_launches import (
    GFX942,
    SM80,
    SM90,
    SM100,
    build,
    record,
    run_add_scores,
    run_attend,
    run_column_sums,
    run_tokens,
    usage,
)

SHARED_BUDGET = {"cuda": 100 * 1024, "hip": 64 * 1024}
"""Bytes of shared memory per program: what the smallest Ampere or Ada chip has, and a compute unit's LDS."""

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "attend-default": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c32", 128, 128, BF16)),
    "attend-3bit": (run_attend, ("3:t1c80b,3:t64c1", 80, 80, FP16, 3, 2, True)),
    "attend-packed": (run_attend, ("3:t1c128,3:t1c32|4:t64c1,2:t1c64|fp,8:t1c64", 128, 128, FP16, 8)),
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
    "attend-fp32-64": (run_attend, ("fp,fp|4:t64c1,2:t1c32", 64, 64, FP32, 4, 1, True)),
    "attend-rows-64": (run_attend, ("8:t1c64,8:t1c64|4:t64c1,2:t1c32", 64, 64, BF16, 4, 4, True, 50.0)),
    "attend-rows": (run_attend, ("8:t1c128,8:t1c128|4:t64c1,2:t1c64", 128, 128, BF16, 4, 4, True, 50.0)),
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


def check(case, target, spill_budget=0):
    run, args = case
    launches = record(target, lambda: run(*args))
    assert launches
    for launch in launches:
        taken = usage(build(launch, target), target)
        name = launch.kernel.__name__
        assert taken.spills <= spill_budget, f"{name} spills: {taken}"
        assert taken.shared <= SHARED_BUDGET[target.backend], f"{name}: {taken}"


def _name(target):
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@pytest.mark.parametrize("target", [SM80, GFX942], ids=_name)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, target):
    check(CASES[case], target)


@pytest.mark.parametrize("target", [SM90, SM100], ids=_name)
def test_newer_architectures(target):
    check(CASES["attend-3bit"], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM80, SM90, SM100, GFX942], ids=_name)
@pytest.mark.parametrize("case", SLOW)
def test_wider_variants(case, target):
    check(SLOW[case], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM80, SM90, SM100, GFX942], ids=_name)
@pytest.mark.parametrize("case", WIDE_FP32)
def test_wide_float32(case, target):
    """Every thread of an NVIDIA tensor core dot holds whole rows: 256 exact channels leave no register free."""
    check(WIDE_FP32[case], target, spill_budget=1024 if target.backend == "cuda" else 0)


if __name__ == "__main__":
    for name, (run, args) in {**CASES, **SLOW, **WIDE_FP32}.items():
        for target in (SM80, SM90, SM100, GFX942):
            for launch in record(target, lambda run=run, args=args: run(*args)):
                taken = usage(build(launch, target), target)
                print(f"{name:22} {launch.kernel.__name__:18} {_name(target):7} {taken}", flush=True)
