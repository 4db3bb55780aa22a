"""What the tests of saved caches share: options, small stores, and files that were tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mikv_compile.config import Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.saved import container, stores
from mikv_compile.store import LayerStore

pytest.importorskip("safetensors.torch")

DEFAULT = {"lower": "eager"}
EVICTING = {"tiers": "int8:0.1,k4v2:0.3", "window": 8, "flush_every": 64, "lower": "eager"}
H2O = {"policy": "h2o", "window": 8, "lower": "eager"}
DENSE = torch.ones(2)
PAPER = {"preset": "mikv-paper", "window": 4, "lower": "eager"}


def slow(*names):
    """More of what others test already."""
    return [pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow) for name in names]


def compiled(model, options):
    return torch.compile(model, backend="mikv", options=options)


def state_of(store: LayerStore) -> tuple:
    """All that decides how a store goes on, with the bytes of its slots in use."""
    data, tensors = stores.store_to_data(store, 0, "")
    return data, {name: x.reshape(-1).view(torch.uint8).tolist() for name, x in tensors.items()}, store.plan


def rewritten(path: Path, change) -> None:
    """Change a file's state and tensors, with a checksum that fits: it is no signature."""
    with container.opened(path) as file:
        state, tensors = file.state, {name: file.tensor(name).clone() for name in file.names}
    change(state, tensors)
    container.write(path, state, tensors)


def empty_store(options) -> LayerStore:
    shape = CacheShape(2, 2, 16, 16, torch.float32)
    return LayerStore(Planner(Options.parse(options)).layer(0, shape), shape, torch.device("cpu"))
