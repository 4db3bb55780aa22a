"""Keeps what the dense model gave, so that it is computed once for all methods and environments."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = ".reference"
"""Below the results folder; may be deleted at any time."""


class References:
    """Tensors of dense runs, in memory and on disk.

    A file is found by the weights, the task's settings and the input, so that it never serves for something else.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._folder = folder / FOLDER
        self._weights = fingerprint(model)
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def get(
        self, task: str, settings: Mapping[str, Any], digest: str, compute: Callable[[], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The tensors of a task's input, computed if they are not here."""
        from safetensors.torch import load_file, save_file

        key = json.dumps([self._weights, task, dict(settings), digest], sort_keys=True)
        name = f"{task}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if name not in self._kept:
            path = self._folder / name
            if path.is_file():
                self._kept[name] = load_file(path)
            else:
                made = {key: value.contiguous() for key, value in compute().items()}
                if made:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    (self._folder / ".gitignore").write_text("*\n")
                    partial = path.with_name(f".{name}.{os.getpid()}")
                    save_file(made, partial)
                    partial.replace(path)
                self._kept[name] = made
        return self._kept[name]


def fingerprint(model: Any) -> str:
    """Of a model's weights: a few bytes of each parameter."""
    made = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().reshape(-1)[:32].cpu().contiguous()
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        made.update(few.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
