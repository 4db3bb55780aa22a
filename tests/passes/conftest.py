import pytest
import torch


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
