"""The static report of the Triton kernels: its arithmetic, and one variant against the committed table."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

FILE = Path(__file__).parents[2] / "benchmarks" / "triton_static.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("triton_static", FILE)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "triton_static", module)
        spec.loader.exec_module(module)
        yield module


def test_main_loop(report):
    code = [
        (0x00, "LDG.E.128", "R0, [R2]"),
        (0x10, "HMMA.16816.F32", "R4, R0, R2, RZ"),
        (0x20, "LDG.E.U16", "R0, [R2]"),
        (0x30, "BRA", "0x20"),
        (0x40, "LDGSTS.E.BYPASS.128", "[R9], [R2]"),
        (0x50, "HMMA.16816.F32", "R4, R0, R2, RZ"),
        (0x60, "BRA", "0x40"),
        (0x70, "BRA", "0x0"),
        (0x80, "EXIT", ""),
    ]
    loop = report.main_loop(code, False)
    assert not loop.whole and sum(loop.counts.values()) == 3
    assert loop.number("HMMA") == 1
    whole = report.main_loop(code, True)
    assert whole.whole and sum(whole.counts.values()) == 9


def test_occupancy(report):
    """The numbers of NVIDIA's occupancy calculator."""
    assert report.occupancy(report.CHIPS[80], 128, 0, 4) == 16
    assert report.occupancy(report.CHIPS[80], 32, 0, 4) == 64
    assert report.occupancy(report.CHIPS[80], 255, 0, 4) == 8
    assert report.occupancy(report.CHIPS[80], 32, 48 * 1024, 4) == 12
    assert report.occupancy(report.CHIPS[90], 32, 48 * 1024, 4) == 16
    assert report.occupancy(report.CHIPS[90], 32, 0, 1) == 32


def test_worse(report):
    row = {"variant": "a", "kernel": "decode", "arch": "sm_80", "per_element": 3.0, "registers": 100, "spills": 0,
           "shared": 1024}  # fmt: skip
    assert report.worse([row], [row]) == []
    assert report.worse([row | {"registers": 105}], [row]) == []
    assert report.worse([row | {"spills": 8}], [row]) == ["a / decode / sm_80: spilled bytes 0 -> 8"]
    assert len(report.worse([row | {"per_element": 3.2, "shared": 2048}], [row])) == 2
    assert "not in the committed table" in report.worse([row | {"arch": "sm_90"}], [row])[0]


def test_committed_table(report):
    committed = json.loads(report.RESULTS.read_text())
    assert not any(row["spills"] for row in committed["rows"] if row["kernel"] == "decode")
    if committed["triton"] != triton.__version__:
        pytest.skip("the table is of another version of Triton")
    assert report.worse(report.measure_all("int4 D=64"), committed["rows"]) == []
