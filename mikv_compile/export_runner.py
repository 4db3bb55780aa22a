"""Runs what :func:`mikv_compile.export` has written. Imports torch, the ops and the stores; no passes, no models."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import mikv_compile.kernels.ops  # noqa: F401  (declares torch.ops.mikv)
from mikv_compile import _compat
from mikv_compile.errors import MikvError
from mikv_compile.export_format import DESCRIPTION, Package
from mikv_compile.store import INTERRUPTED, LayerStore


class ExportedCache:
    """The compressed KV caches of one sequence, or of one batch of sequences of the same length.

    Attributes:
        stores: one for each layer.
    """

    def __init__(self, stores: list[LayerStore]) -> None:
        self.stores = stores

    @property
    def length(self) -> int:
        """Tokens seen, per row."""
        return self.stores[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(store.nbytes for store in self.stores)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that dense keys and values of the same length would take in the model's dtype."""
        return sum(store.dense_nbytes for store in self.stores)

    def crop(self, length: int) -> None:
        """Forget the tokens behind the first ``length``."""
        if not 0 <= length <= self.length:
            raise MikvError(f"the cache holds {self.length} tokens; it cannot be cropped to {length}")
        for store in self.stores:
            store.crop(length)

    def copy(self) -> ExportedCache:
        """An independent copy, to go on from one prompt in several ways."""
        return ExportedCache([store.copy() for store in self.stores])


class ExportedDecoder:
    """A decoder from a package: call it with tokens and a cache.

    Attributes:
        batch: rows of each call.
        max_length: tokens that a sequence may have.
        device: of tokens, logits and caches.
    """

    def __init__(self, programs: Mapping[str, Callable[..., Any]], package: Package) -> None:
        """Wrap loaded programs; :func:`load_exported` is how to get them."""
        self._programs, self._package = programs, package
        self.batch, self.max_length = package.batch, package.max_length
        self.device = torch.device(package.layers[0].device)

    def new_cache(self) -> ExportedCache:
        """An empty cache."""
        return ExportedCache([LayerStore(x.plan, x.shape, torch.device(x.device)) for x in self._package.layers])

    def __call__(self, tokens: torch.Tensor, cache: ExportedCache) -> torch.Tensor:
        """Append tokens to a sequence.

        Args:
            tokens: int64 ``[batch, S]``, a prompt, the next token, or anything between.
            cache: of the tokens before; it holds these as well afterwards.

        Returns:
            What the exported model returns: logits ``[batch, S or 1, V]``.

        Raises:
            MikvError: for tokens of another shape or dtype, ids beyond the vocabulary, more tokens than ``max_length``,
                or a cache that is not one of :meth:`new_cache`.
            UnusableCacheError: if an earlier call was interrupted while it wrote to the cache.
        """
        new, first = self._checked(tokens, cache), cache.length
        positions = torch.arange(first, first + new, device=self.device)
        inputs = [tokens, positions]
        orders = [store.prepare(new, fresh=True) for store in cache.stores]
        for store, told in zip(cache.stores, orders, strict=True):
            inputs += [*store.buffers, told.encode()]
        try:
            with torch.no_grad():
                (logits,) = self._programs["step" if new == 1 else "chunk"](*inputs)
        except BaseException:
            for store, told in zip(cache.stores, orders, strict=True):
                if told.victims:  # they may have been moved; tokens that were only appended do not exist yet
                    store.spoil(INTERRUPTED)
            raise
        for store, told in zip(cache.stores, orders, strict=True):
            store.commit(told, new)
        return logits

    def generate(
        self,
        prompt: torch.Tensor,
        max_new_tokens: int,
        *,
        eos_token_id: int | None = None,
        cache: ExportedCache | None = None,
    ) -> torch.Tensor:
        """Continue a prompt by the most likely tokens.

        Args:
            prompt: int64 ``[batch, S]``.
            max_new_tokens: at most so many are added.
            eos_token_id: where all rows have had it, generation ends. Rows that end earlier repeat it.
            cache: of tokens before the prompt; it is appended to. None: the prompt is all there is.

        Returns:
            int64 ``[batch, S + new]``: the prompt and what follows.

        Raises:
            MikvError: as for a call, and for ``max_new_tokens`` that is no whole number, at least 0.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise MikvError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, at least 0")
        cache = self.new_cache() if cache is None else cache
        tokens, all_tokens = prompt, [prompt]
        ended = torch.zeros(self.batch, 1, dtype=torch.bool, device=self.device)
        for _ in range(max_new_tokens):
            tokens = self(tokens, cache)[:, -1].argmax(-1, keepdim=True)
            if eos_token_id is not None:
                tokens = tokens.masked_fill(ended, eos_token_id)
                ended |= tokens == eos_token_id
            all_tokens.append(tokens)
            if eos_token_id is not None and bool(ended.all()):
                break
        return torch.cat(all_tokens, 1)

    def _checked(self, tokens: torch.Tensor, cache: ExportedCache) -> int:
        """The number of new tokens, once it is sure that the programs take them: compiled code checks nothing."""
        if not isinstance(tokens, torch.Tensor):
            raise MikvError(
                f"tokens are a {type(tokens).__name__}; the package takes an int64 tensor [{self.batch}, S]"
            )
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or not tokens.shape[1]:
            raise MikvError(f"tokens are {tuple(tokens.shape)}; the package takes [{self.batch}, S], S at least 1")
        if tokens.dtype != torch.int64 or tokens.device.type != self.device.type:
            raise MikvError(f"tokens are {tokens.dtype} on {tokens.device}; the package takes int64 on {self.device}")
        vocabulary = self._package.vocabulary
        if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
            raise MikvError(
                f"tokens are from {int(tokens.min())} to {int(tokens.max())}; the model knows 0 to {vocabulary - 1}"
            )
        self._check_cache(cache)
        new = tokens.shape[1]
        if cache.length + new > self.max_length:
            raise MikvError(
                f"{new} tokens after {cache.length} are more than the {self.max_length} that the package was exported "
                "for; export it with a larger max_length"
            )
        return new

    def _check_cache(self, cache: ExportedCache) -> None:
        """Refuse a cache of another package: the programs would read and write beyond its buffers."""
        advice = "use decoder.new_cache() of this package"
        if not isinstance(cache, ExportedCache):
            raise MikvError(f"the cache is a {type(cache).__name__}; {advice}")
        layers = self._package.layers
        if len(cache.stores) != len(layers):
            raise MikvError(f"the cache has {len(cache.stores)} layers, and the package {len(layers)}; {advice}")
        for i, (store, layer) in enumerate(zip(cache.stores, layers, strict=True)):
            for what, found, wanted in (
                ("device", store.device, torch.device(layer.device)), ("shape", store.site, layer.shape),
                ("plan", store.plan, layer.plan), ("number of tokens", store.length, cache.length),
            ):  # fmt: skip
                if found != wanted:
                    raise MikvError(f"layer {i} of the cache has another {what}, {found}, than {wanted}; {advice}")


def load_exported(path: str | os.PathLike[str]) -> ExportedDecoder:
    """Load a package of :func:`mikv_compile.export`.

    Args:
        path: of the ``.pt2`` file. It holds machine code: load only what you trust, on the kind of CPU or GPU that it
            was compiled on, with the same version of torch.

    Raises:
        MikvError: if there is no such file, it is no such package, or another release of torch has compiled it.
    """
    if not Path(path).is_file():
        raise MikvError(f"there is no file {os.fspath(path)}")
    try:
        # Before any code is loaded, which may not be possible with another torch.
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(name) for name in archive.namelist() if name.endswith(f"/extra/{DESCRIPTION}")]
    except (zipfile.BadZipFile, OSError) as error:
        raise MikvError(f"{os.fspath(path)} cannot be loaded as an AOTInductor package: {error}") from error
    if not texts:
        raise MikvError(f"{os.fspath(path)} was not written by mikv_compile.export")
    try:
        package = Package.from_json(texts[0].decode())
        programs = _compat.read_package(os.fspath(path))
    except MikvError as error:
        raise MikvError(f"{os.fspath(path)}: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise MikvError(f"{os.fspath(path)} cannot be loaded as an AOTInductor package: {error}") from error
    return ExportedDecoder(programs, package)
