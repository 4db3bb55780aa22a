"""What the Triton kernels cost, read from their machine code; needs no GPU.

Compiles the launches of representative formats for sm_80 and sm_90, disassembles them, and counts the instructions of
the main loop. Writes ``benchmarks/results/triton_static.json`` and ``.md``::

    python benchmarks/triton_static.py            # measure and write both files
    python benchmarks/triton_static.py --check    # compare with the committed file; exit 1 if something got worse
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
from triton_launches import (  # noqa: E402
    SM80,
    SM90,
    Launch,
    build,
    record,
    run_add_scores,
    run_attend,
    run_column_sums,
    run_tokens,
    usage,
)

RESULTS = ROOT / "benchmarks" / "results" / "triton_static.json"
TOLERANCE = 1.05
"""How much worse than the committed number a new one may be."""
COMPARED = {"per_element": "instructions per element", "registers": "registers", "spills": "spilled bytes",
            "shared": "bytes of shared memory"}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor and the whole chip's rates, from NVIDIA's documentation."""

    name: str
    shared: int
    """Bytes of shared memory that programs can have; each takes 1 KiB more."""
    processors: int
    clock: float
    """Hz, boost."""
    bandwidth: float
    """Bytes per second of device memory."""
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    schedulers: int = 4
    """Each issues one warp's instruction per cycle."""


CHIPS = {
    80: Chip("A100 SXM 80 GB", 164 * 1024, 108, 1.410e9, 2.039e12),
    90: Chip("H100 SXM", 228 * 1024, 132, 1.830e9, 3.35e12),
}


@dataclass(frozen=True)
class Loop:
    """The instructions of the main loop of a kernel, or of all of it if nothing is repeated."""

    counts: Counter
    whole: bool

    def number(self, pattern: str) -> int:
        """Instructions whose name begins with ``pattern``."""
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))


def disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction; branches name the address they go to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-c", file], check=True, capture_output=True, text=True).stdout
    labels, pending, found = {}, [], []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            pending.append(label.group(1))
        code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line)
        if code:
            address = int(code.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            if code.group(2) != "NOP":
                found.append((address, code.group(2), code.group(3)))
    return [
        (address, name, re.sub(r"`\((\.L_\w+)\)", lambda m: hex(labels.get(m.group(1), 1 << 30)), rest))
        for address, name, rest in found
    ]


def main_loop(code: list[tuple[int, str, str]], several: bool) -> Loop:
    """The innermost loop with the most matrix instructions; the whole kernel if none has any or ``several`` count."""
    if several:
        return Loop(Counter(name for _, name, _ in code), True)
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if name.startswith("BRA") and target and int(target.group(1), 16) < address:
            begin = int(target.group(1), 16)
            loops.append((begin, address, Counter(n for a, n, _ in code if begin <= a <= address)))
    with_mma = [loop for loop in loops if Loop(loop[2], False).number(r"[HI]MMA|HGMMA")]
    inner = [
        loop
        for loop in with_mma
        if not any(other is not loop and loop[0] <= other[0] and other[1] <= loop[1] for other in with_mma)
    ]
    if not inner:
        return Loop(Counter(name for _, name, _ in code), True)
    return Loop(max((counts for _, _, counts in inner), key=lambda c: Loop(c, False).number(r"[HI]MMA|HGMMA")), False)


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Warps that a multiprocessor holds at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = chip.registers // per_warp // warps
    by_shared = chip.shared // (shared + 1024)
    return min(by_registers, by_shared, chip.warps // warps, chip.programs) * warps


def elements(launch: Launch) -> int:
    """Keys' and values' numbers that the main loop of a program reads each time, or the program if it has none."""
    args = launch.args
    if launch.kernel.__name__ == "decode_kernel":
        return args["N"] * (args["KEY_DIM"] + args["VALUE_DIM"]) * max(args["TIERS"], 1)
    if "KEY_DIM" in args and "VALUE_DIM" in args:
        return args.get("N", args.get("TILE")) * (args["KEY_DIM"] + args["VALUE_DIM"])
    if "SPLITS" in args:
        return args["SPLITS"] * args["VALUE_DIM"]
    if "KEY_WIDTH" in args:
        return args["TILE"] * (args["KEY_WIDTH"] + args["VALUE_WIDTH"])
    return args["N"] * args["KEY_DIM" if "KEY_DIM" in args else "DIM"]


def bytes_per_element(args: dict) -> float:
    """Codes, scales and zeros of the first tier, per number of keys and values."""
    total = 0.0
    for side in ("KEY", "VALUE"):
        bits, shared = args[f"{side}_BITS0"], args[f"{side}_TOKENS0"] * args[f"{side}_CHANNELS0"]
        total += args[f"{side}_DIM"] * (bits / 8 + (4 / shared if bits != 16 else 0))
    return total / (args["KEY_DIM"] + args["VALUE_DIM"])


def estimate(chip: Chip, per_element: float, size: float) -> dict:
    """Roofline of a main loop that does nothing but issue instructions and read, each at the chip's full rate."""
    issued = chip.processors * chip.schedulers * chip.clock * 32 / per_element
    read = chip.bandwidth / size
    return {
        "bytes": round(size, 3),
        "issue_slots": round(read / issued, 2),
        "over_bf16": round(min(issued, read) / (chip.bandwidth / 2), 2),
    }


def measure(name: str, launch: Launch, target) -> dict:
    """One row of the table."""
    built = build(launch, target)
    taken = usage(built, target)
    decode = launch.kernel.__name__ == "decode_kernel"
    single = decode and launch.args["TIERS"] == 1 and not launch.args["OWN"]
    loop = main_loop(disassemble(built.asm["cubin"]), decode and not single)
    warps = launch.options.get("num_warps", 4)
    total, per_program = sum(loop.counts.values()), elements(launch)
    row = {
        "variant": name,
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "arch": f"sm_{target.arch}",
        "warps": warps,
        "registers": taken.registers,
        "spills": taken.spills,
        "shared": taken.shared,
        "occupancy": occupancy(CHIPS[target.arch], taken.registers, taken.shared, warps),
        "whole": loop.whole,
        "instructions": total,
        "elements": per_program,
        "per_element": round(total * warps * 32 / per_program, 2),
        "loads": {width: n for width in ("128", "64", "32", "16", "8") if (n := _loads(loop, width))},
        "mma": loop.number(r"[HI]MMA|HGMMA"),
        "conversions": loop.number(r"I2F|F2I|I2FP|F2F"),
        "barriers": loop.number(r"BAR"),
    }
    if single:
        row |= estimate(CHIPS[target.arch], row["per_element"], bytes_per_element(launch.args))
    return row


def _loads(loop: Loop, width: str) -> int:
    """Loads from device memory of so many bits, to registers or straight to shared memory."""
    found = 0
    for name, n in loop.counts.items():
        if re.match(r"LDG(?!STS)|LDGSTS", name):
            bits = next(
                (part.lstrip("US") for part in name.split(".") if part.lstrip("US") in ("128", "64", "16", "8")), "32"
            )
            found += n * (bits == width)
    return found


def variants() -> dict[str, Callable[[], None]]:
    """What is measured: names and calls. Attention is measured tier by tier, and then all tiers in one call."""
    bf16 = torch.bfloat16
    found: dict[str, Callable[[], None]] = {}
    for dim in (128, 64):
        half = dim // 2
        formats = {
            "default": f"8:t1c{dim},8:t1c{dim}|4:t64c1,2:t1c64",
            "int4": "4:t64c1,4:t1c64",
            "int2": "2:t64c1,2:t1c64",
            "mikv-paper": f"fp,fp|2:t1c{half}b,2:t1c{half}",
        }
        for name, text in formats.items():
            tiers = text.split("|")
            for i, tier in enumerate(tiers):
                counts = tuple(256 * (i == j) for j in range(len(tiers)))
                found[f"{name} D={dim}: {tier}"] = partial(run_attend, text, dim, dim, bf16, counts=counts, own=0)
            if len(tiers) > 1:
                found[f"{name} D={dim}: one call"] = partial(run_attend, text, dim, dim, bf16)
    found["scores D=128: 8:t1c128"] = partial(run_add_scores, "8:t1c128,8:t1c128|4:t64c1,2:t1c64", 128, bf16)
    found["prompt scores D=128"] = partial(run_column_sums, 128, bf16, 32)
    found["tokens D=128: 8:t1c128,8:t1c128"] = partial(run_tokens, "8:t1c128,8:t1c128", 128, 128, bf16, True)
    found["tokens D=128: 4:t64c1,2:t1c64"] = partial(run_tokens, "4:t64c1,2:t1c64", 128, 128, bf16, True)
    return found


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| variant | kernel | arch | registers | spills | shared | warps per SM "
        "| instructions | per element | loads | MMA | conversions | barriers |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        loads = " ".join(f"{n}x{width}" for width, n in row["loads"].items())
        lines.append(
            f"| {row['variant'].replace('|', ' / ')} | {row['kernel']} | {row['arch']} | {row['registers']} "
            f"| {row['spills']} | {row['shared']} | {row['occupancy']} | {row['instructions']}{'*' * row['whole']} "
            f"| {row['per_element']:.2f} | {loads} | {row['mma']} | {row['conversions']} | {row['barriers']} |"
        )
    lines += [
        "",
        "`*`: all instructions of the kernel, not of a loop. Loads: how many of so many bits.",
        "",
        "Estimates from these numbers and the chips' data sheets ("
        + ", ".join(chip.name for chip in CHIPS.values())
        + "),",
        "for the main loop alone, with every issue slot used. Nothing here was timed.",
        "",
        "| variant | arch | bytes per element | issue slots at full bandwidth | speed over bf16, at most | bound by |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in rows:
        if "bytes" in row:
            bound = "memory" if row["issue_slots"] <= 1 else "instructions"
            lines.append(
                f"| {row['variant']} | {row['arch']} | {row['bytes']:.3f} | {row['issue_slots']:.0%} "
                f"| {row['over_bf16']:.1f}x | {bound} |"
            )
    return "\n".join(lines)


def worse(rows: list[dict], committed: list[dict]) -> list[str]:
    """What got worse by more than the tolerance, as messages."""
    old = {(row["variant"], row["kernel"], row["arch"]): row for row in committed}
    found = []
    for row in rows:
        key = (row["variant"], row["kernel"], row["arch"])
        if key not in old:
            found.append(f"{' / '.join(key)}: not in the committed table; write it again")
            continue
        for field, name in COMPARED.items():
            if row[field] > old[key][field] * TOLERANCE:
                found.append(f"{' / '.join(key)}: {name} {old[key][field]} -> {row[field]}")
    return found


def measure_all(only: str) -> list[dict]:
    """Rows of all variants whose names contain ``only``; launches that repeat within a variant count once."""
    rows = []
    for name, run in variants().items():
        if only not in name:
            continue
        for target in (SM80, SM90):
            seen: set[str] = set()
            for launch in record(target, run):
                if launch.kernel.__name__ == "merge_kernel" and not name.endswith("one call"):
                    continue
                row = measure(name, launch, target)
                label, n = row["kernel"], 2
                while row["kernel"] in seen:
                    row["kernel"], n = f"{label} {n}", n + 1
                seen.add(row["kernel"])
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file instead of writing it")
    parser.add_argument("--only", default="", help="variants whose names contain this; nothing is written")
    given = parser.parse_args()
    rows = measure_all(given.only)
    if not rows:
        parser.error(f"no variant has {given.only!r} in its name")
    text = table(rows)
    print(text)
    if given.check:
        found = worse(rows, json.loads(RESULTS.read_text())["rows"])
        print("\n".join(found) or "nothing got worse")
        return 1 if found else 0
    if not given.only:
        RESULTS.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        RESULTS.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
        RESULTS.with_suffix(".md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
