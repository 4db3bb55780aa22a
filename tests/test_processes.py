"""Forked processes, processes one after the other, and runs one after the other: the same bits, and nothing hangs."""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from decoder import Decoder, inputs, run

ROOT = Path(__file__).parent.parent

COMMON = """
import hashlib, os, sys, torch
sys.path.insert(0, "tests")
from decoder import Decoder, inputs, run

model = Decoder(layers=1)
fast = torch.compile(model, backend="mikv", options={"lower": "eager", "preset": "mikv-paper"})

def digest(cache, outputs):
    found = hashlib.sha256()
    for tensor in (*outputs, *cache.keys[0].store.buffers):
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()
"""


def python(code, threads=2, timeout=240):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code)], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_with_the_model_and_its_cache():
    """The parent has used its threads, which a child does not have; the work is large enough for several of them."""
    code = """
    prompt, *later = inputs([3000, 64, 1, 1, 700, 1])
    cache = model.new_cache()
    run(fast, cache, [prompt])
    assert torch.get_num_threads() == 2
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)  # torch's own operators hang otherwise, with any model
        code = 1
        try:
            os.write(write, digest(cache, run(fast, cache, later)).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    print(os.read(read, 100).decode(), digest(cache, run(fast, cache, later)))
    """
    child, parent = python(code)
    assert child == parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kernels_do_not_hang_in_a_forked_child():
    """Even if nobody told the child to use one thread."""
    code = """
    from mikv_compile.kernels.dispatch import run as primitive
    from mikv_compile.kernels.formats import LayerFormat, StoreBuffers, buffer_shapes
    from mikv_compile.kernels import cpp_fit
    from mikv_compile.kernels.formats import SideFormat

    fmt = LayerFormat.parse("8:t1c64,8:t1c64")
    shapes = buffer_shapes(fmt, 1, 8, 64, 64, [4096], torch.float32)
    store = StoreBuffers.from_list([torch.zeros(shape, dtype=dtype) for shape, dtype in shapes])
    k, q = torch.randn(1, 8, 4096, 64), torch.randn(1, 8, 1, 64)
    x = torch.randn(1, 8, 512, 64)

    def work():
        primitive("write_tokens", k.device, store.tiers[0], fmt.tiers[0], 0, k, k, None, 0, None, None)
        primitive("fit_groups", k.device, x, SideFormat(4, 64, 1, fit="clip"))
        return primitive("attend", k.device, q, q, q, None, 0.1, 0.0, store, fmt, (4096,), 4096)[0]

    work()
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    import time
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        print("hangs")
    print("parent", bool(work().isfinite().all()))
    """
    assert python(code) == ["parent", "True"]


def test_two_processes_give_the_same_bits():
    code = """
    for _ in range(2):
        cache = model.new_cache()
        print(digest(cache, run(fast, cache, inputs([300, *[1] * 20]))))
    """
    assert len({*python(code), *python(code)}) == 1


@pytest.mark.parametrize("options", [{}, {"tiers": "int8:0.1,k4v2:0.3", "policy": "h2o"}], ids=["default", "evicting"])
def test_two_runs_give_the_same_bits(options):
    fast = torch.compile(Decoder(layers=1), backend="mikv", options={"lower": "eager", **options})
    seen = set()
    for _ in range(2):
        cache = Decoder(layers=1).new_cache()
        outputs = run(fast, cache, inputs([400, *[1] * 80]))
        found = hashlib.sha256()
        for tensor in (*outputs, *cache.keys[0].store.buffers):
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        seen.add(found.hexdigest())
    assert len(seen) == 1
