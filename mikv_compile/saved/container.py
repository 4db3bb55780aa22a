"""The file: tensors and one JSON document in a safetensors file, with a checksum over both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mikv_compile.errors import MikvError, SavedCacheError

FORMAT = "mikv-cache"
VERSION = 1
"""Of the file's format. It grows when older versions of this package would misread a file."""

_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError, TypeError,
    ValueError, MikvError,
)  # fmt: skip
"""What reading nonsense can end in."""


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise SavedCacheError(
            "saved caches are safetensors files, and the package safetensors is not installed: "
            'pip install "mikv-compile[save]"'
        ) from error
    return safetensors


def write(path: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a file in one go: until it is complete, ``path`` is as it was.

    Args:
        path: an existing file is replaced.
        state: plain data, as JSON can hold it.
        tensors: contiguous, on the CPU.

    Raises:
        SavedCacheError: if the file cannot be written, with the reason.
    """
    safetensors = _safetensors()
    if path.is_dir():
        raise SavedCacheError(f"{path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise SavedCacheError(f"{path}: there is no folder {path.parent}; make it first")
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(state, separators=(",", ":"))}
    metadata["sha256"] = _checksum(metadata, tensors)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine could leave the new name with old blocks
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise SavedCacheError(f"{path}: the cache cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def damaged(why: str) -> SavedCacheError:
    """The error for a file that is not as it was written; :func:`opened` adds the file's name."""
    return SavedCacheError(f"the saved cache is damaged: {why}; save it again")


class Opened:
    """A file that is open for reading."""

    def __init__(self, file: Any) -> None:
        """Take over what safetensors has opened.

        Raises:
            SavedCacheError: if it is no saved cache, or one that a newer version of this package has written.
        """
        self._file = file
        self._metadata = dict(file.metadata() or {})
        if self._metadata.get("format") != FORMAT:
            raise SavedCacheError("this safetensors file was not written by mikv_compile.save_cache")
        version = self._metadata.get("version", "")
        if not version.isdecimal() or len(version) > 9:
            raise damaged(f"its format version is {version[:40]!r}")
        if int(version) > VERSION:
            raise SavedCacheError(
                f"the file has format version {version}, and this mikv-compile reads versions up to {VERSION}; "
                "install a newer mikv-compile (pip install -U mikv-compile), or save the cache again with this one"
            )
        self.names = frozenset(file.keys())
        """Of the tensors."""

    def check(self) -> None:
        """Compare the checksum, for which the whole file is read.

        Raises:
            SavedCacheError: if it differs.
        """
        if _checksum(self._metadata, {name: self.tensor(name) for name in self.names}) != self._metadata.get("sha256"):
            raise damaged("its contents do not match their checksum")

    @property
    def state(self) -> Any:
        """The JSON document."""
        return json.loads(self._metadata["state"])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU that may lie in the file: copy it before the file is closed, and before it is trusted."""
        if name not in self.names:
            raise damaged(f"it has no tensor {name!r}")
        return self._file.get_tensor(name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a saved cache.

    Errors from the body get the file's name. What reading nonsense ends in becomes a SavedCacheError.

    Raises:
        SavedCacheError: if there is none, or none that can be read.
    """
    safetensors = _safetensors()
    if path.is_dir():
        raise SavedCacheError(f"{path} is a folder; give the name of a file in it")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield Opened(file)
    except torch.OutOfMemoryError:
        raise
    except SavedCacheError as error:
        raise SavedCacheError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError as error:
        raise SavedCacheError(f"{path}: there is no such file") from error
    except OSError as error:
        raise SavedCacheError(f"{path}: the file cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        raise SavedCacheError(
            f"{path}: this is no complete safetensors file ({error}); if it was a saved cache, save it again"
        ) from error
    except _DAMAGE as error:
        raise SavedCacheError(
            f"{path}: the saved cache cannot be read ({type(error).__name__}: {str(error)[:300]}); if the file is "
            "damaged, save it again"
        ) from error


def _checksum(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the metadata without the checksum itself, and over the tensors' names, dtypes, shapes and bytes."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    told = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([told, described], sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
