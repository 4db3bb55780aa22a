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
    """Tensors of dense runs, on disk; the last one that was read is in memory, too.

    A file is found by the weights, the task's settings and the input, so that it never serves for something else.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self._folder = folder / FOLDER
        self._weights = fingerprint(model)
        self._last: tuple[Path, dict[str, torch.Tensor]] | None = None

    def ensure(
        self, task: str, settings: Mapping[str, Any], digest: str, compute: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        """Compute the tensors of a task's input and write them, if they are not here."""
        from safetensors.torch import save_file

        path = self._path(task, settings, digest)
        if path.is_file():
            return
        made = {key: value.contiguous() for key, value in compute().items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / ".gitignore").write_text("*\n")
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(made, partial)
        partial.replace(path)

    def get(self, task: str, settings: Mapping[str, Any], digest: str) -> dict[str, torch.Tensor]:
        """The tensors of a task's input; none if there are none."""
        from safetensors.torch import load_file

        path = self._path(task, settings, digest)
        if self._last is None or self._last[0] != path:
            self._last = None  # before the next one is read: each may be hundreds of megabytes
            self._last = path, load_file(path) if path.is_file() else {}
        return self._last[1]

    def _path(self, task: str, settings: Mapping[str, Any], digest: str) -> Path:
        key = json.dumps([self._weights, task, dict(settings), digest], sort_keys=True)
        return self._folder / f"{task}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def fingerprint(model: Any) -> str:
    """Of a model's weights: a few bytes of each parameter."""
    made = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().reshape(-1)[:32].cpu().contiguous()
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        made.update(few.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
