from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2 and its tokenizer, loaded once for all tests that skip themselves without the package."""
    from mikv_compile.eval import models

    tokenizer, model = models.load("smollm2")
    return model, tokenizer
