"""All benchmarks one after the other, within a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from benchmarks import harness, report

AFTER_COMPILE = 420
"""Seconds that are kept for decode and memory: compile leaves out its warm runs for them."""

LONG = 24
"""Minutes from which on warm starts are measured as well, and decode and memory at length."""


def run(device: str, quick: bool, minutes: float) -> None:
    """Run everything; a benchmark that fails does not stop the others.

    ``decode`` gets the compiler caches that ``compile`` has filled, so that it need not compile the same graphs again.
    """
    began = time.time()
    end = began + 60 * minutes
    common = ["--device", device, *(["--quick"] if quick else [])]
    failed = []
    long = minutes >= LONG
    with tempfile.TemporaryDirectory(prefix="mikv-bench-") as cache:
        for name, more in (
            ("attention", []),
            ("compile", ["--keep", cache, "--deadline", str(end - AFTER_COMPILE), *([] if long else ["--no-warm"])]),
            ("decode", ["--deadline", str(end), *([] if long else ["--seconds", "20"])]),
            ("memory", ["--deadline", str(end), *([] if long or quick else ["--tokens", "2048"])]),
        ):
            harness.say(f"\n== {name}, {(time.time() - began) / 60:.1f} of {minutes:.0f} minutes have passed")
            command = [sys.executable, "-m", "benchmarks", name, *common, *more]
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache} if name == "decode" else dict(os.environ)
            if subprocess.run(command, cwd=harness.ROOT, env=env).returncode:
                failed.append(name)
    if not quick:
        harness.say("\n" + report.write())
    harness.say(f"{(time.time() - began) / 60:.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if failed:
        sys.exit(1)
