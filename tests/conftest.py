from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from mikv_compile import report

sys.path.insert(0, str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are shared with the other workers; processes that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    # Only the last reports are kept: a test that counts its own must not find the list full.
    report._graphs.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2 and its tokenizer, loaded once for all tests that skip themselves without the package."""
    from mikv_compile.eval import models

    tokenizer, model = models.load("smollm2")
    return model, tokenizer
