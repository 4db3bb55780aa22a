"""``save_cache`` and ``load_cache``: what users call."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mikv_compile
from mikv_compile.errors import SavedCacheError
from mikv_compile.plan import LayerPlan
from mikv_compile.saved.container import Opened, opened, write
from mikv_compile.saved.fingerprint import difference, fingerprint
from mikv_compile.saved.new_cache import new_cache
from mikv_compile.saved.stores import plan_from_data, plan_to_data, store_from_data, store_to_data
from mikv_compile.saved.tree import ABSENT, Filler, to_node
from mikv_compile.store import LayerStore

log = logging.getLogger(__name__)

Tokens = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]

_TOKENS = "tokens"


def save_cache(
    past_key_values: Any,
    path: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    tokens: Tokens | None = None,
) -> None:
    """Write a cache to a safetensors file, compressed as it is. :func:`load_cache` reads it.

    The file is replaced in one go: it is complete, or as it was before. It is about as large as what
    ``cache_report(past_key_values).nbytes`` says, less what is spare.

    Args:
        past_key_values: a cache of transformers, or any nest of lists, tuples, dicts and objects of tensors; of an
            ``nn.Module``, its buffers. What is not compressed is saved dense.
        path: of the file. Its folder must exist.
        model: the model that filled the cache. A fingerprint of it is saved, and loading with another one is refused.
            Without it, nothing can tell later whether a cache belongs to a model.
        tokens: the token ids that the cache stands for, [T] or [B, T]; see :func:`cached_tokens`.

    Raises:
        SavedCacheError: if what is given is no cache, something in it cannot be saved, or the file cannot be written.
        UnusableCacheError: if an error has interrupted the step that was writing to the cache.
    """
    path = Path(path)
    _check_model(model)
    if isinstance(past_key_values, dict) and type(past_key_values) is not dict and "past_key_values" in past_key_values:
        raise SavedCacheError(f"a {type(past_key_values).__name__} is no cache; give save_cache its past_key_values")
    leaves = _Gathered()
    node = to_node(past_key_values, leaves)
    if node[0] != "object" and not leaves.has_cache:  # an object may be a cache that nothing has filled yet
        raise SavedCacheError(
            f"the {type(past_key_values).__name__} that was given holds no tensor of a cache; give save_cache the "
            "past_key_values of a model's output, which generate returns with return_dict_in_generate=True"
        )
    state: dict[str, Any] = {"package": mikv_compile.__version__, "cache": node}
    stores, tensors = leaves.data()
    if tokens is not None:
        tensors[_TOKENS] = _token_ids(tokens).clone()
        _check_tokens(past_key_values, tensors[_TOKENS])
    state |= {"plans": [plan_to_data(plan) for plan in leaves.plans], "stores": stores}
    state["model"] = None if model is None else fingerprint(model)
    write(path, state, tensors)


def load_cache(
    path: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    into: Any = None,
    device: torch.device | str | None = None,
    check_model: bool = True,
) -> Any:
    """Read a cache that :func:`save_cache` has written. It goes on as the saved one would have.

    Lists, tuples and dicts of tensors are made anew. Objects are not made from a file: ``DynamicCache``,
    ``StaticCache`` and ``EncoderDecoderCache`` of transformers are made for ``model``, and anything else is given in
    ``into``.

    Args:
        path: of the file.
        model: the model that will go on with the cache. It is compared with the saved fingerprint.
        into: a new and empty cache, made as the saved one was made, which is filled and returned.
        device: where everything goes; by default to the device of the model's first parameter, without a model to the
            CPU.
        check_model: False loads the cache of another model all the same.

    Raises:
        SavedCacheError: if there is no such file, if it is damaged, of a newer format or of another model, if the cache
            needs ``model`` or ``into``, or for a ``model`` or ``device`` that is none.
    """
    path = Path(path)
    _check_model(model)
    target = _device(device, model)
    with torch.inference_mode(False), torch.no_grad(), opened(path) as file:
        file.check()
        state = file.state
        if check_model:
            _compare(state["model"], model, path)
        plans = [plan_from_data(plan) for plan in state["plans"]]
        stores = [
            store_from_data(data, plans, file.tensor, _store_name(i), target) for i, data in enumerate(state["stores"])
        ]
        filler = Filler(stores, _Dense(file, target), target)
        if into is None:
            into = ABSENT if model is None else new_cache(state["cache"], model)
        made = filler.made(state["cache"], into)
        filler.apply()
    return made


def cached_tokens(path: str | os.PathLike[str], prompt: Tokens) -> int:
    """How many of a prompt's first tokens a saved cache stands for; cropped to these, it serves the prompt.

    Args:
        path: of a file that was saved with ``tokens``. Only these are read; :func:`load_cache` checks the whole file.
        prompt: token ids, [T] or [B, T] with the saved number of rows, all of which have to agree.

    Raises:
        SavedCacheError: if there is no such file, no tokens were saved, or the numbers of rows differ.
    """
    asked = _token_ids(prompt)
    with opened(Path(path)) as file:
        if _TOKENS not in file.names:
            raise SavedCacheError("the cache was saved without tokens; give save_cache tokens=...")
        saved = file.tensor(_TOKENS)
        if saved.dim() != 2 or saved.shape[0] != asked.shape[0]:
            raise SavedCacheError(f"the cache is of tokens {tuple(saved.shape)}, the prompt {tuple(asked.shape)}")
        shared = min(saved.shape[1], asked.shape[1])
        differs = (saved[:, :shared] != asked[:, :shared]).any(dim=0).nonzero()
        return int(differs[0]) if differs.numel() else shared


def _store_name(number: int) -> str:
    """What the names of a store's tensors begin with."""
    return f"store{number}."


class _Gathered:
    """The stores, plans and dense tensors of a cache that is being saved."""

    def __init__(self) -> None:
        self.plans: list[LayerPlan] = []
        self._stores: list[LayerStore] = []
        self._dense: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    @property
    def has_cache(self) -> bool:
        """Whether there are stores, or numbers that keys and values could be; token ids are none."""
        return bool(self._stores) or any(x.is_floating_point() for x in self._dense)

    def number_of(self, store: LayerStore) -> int:
        """The number of a store; two handles of one store find the same."""
        if id(store) not in self._numbers:
            store.check_usable()
            store.settle()
            self._numbers[id(store)] = len(self._stores)
            self._stores.append(store)
        return self._numbers[id(store)]

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a dense tensor."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._dense)
            self._dense.append(tensor)
        return f"dense{self._numbers[id(tensor)]}"

    def data(self) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """The stores as plain data, and all tensors."""
        # Always a copy: safetensors refuses tensors that share memory.
        tensors = {
            f"dense{i}": x.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
            for i, x in enumerate(self._dense)
        }
        stores = []
        for i, store in enumerate(self._stores):
            if store.plan not in self.plans:
                self.plans.append(store.plan)
            data, made = store_to_data(store, self.plans.index(store.plan), _store_name(i))
            stores.append(data)
            tensors |= made
        return stores, tensors


class _Dense:
    """Dense tensors of a file on a device; asked for one twice, it is the same."""

    def __init__(self, file: Opened, device: torch.device) -> None:
        self._file, self._device = file, device
        self._made: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            self._made[name] = self._file.tensor(name).to(self._device, copy=True)
        return self._made[name]


def _token_ids(tokens: Tokens) -> torch.Tensor:
    """Token ids [B, T] int64 on the CPU."""
    try:
        given = torch.as_tensor(tokens).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SavedCacheError(
            f"token ids are whole numbers [T] or [B, T], not {str(tokens)[:40]!r}: {error}"
        ) from error
    if given.dim() not in (1, 2):
        raise SavedCacheError(f"token ids have the shape [T] or [B, T]; these have {tuple(given.shape)}")
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool):
        raise SavedCacheError(f"token ids are whole numbers; these are {given.dtype}")
    ids = given.to("cpu", torch.int64)
    return ids.contiguous() if ids.dim() == 2 else ids[None].contiguous()


def _check_tokens(cache: Any, tokens: torch.Tensor) -> None:
    """Where a cache tells how many tokens it stands for, there have to be as many."""
    if callable(getattr(cache, "get_seq_length", None)):
        length = int(cache.get_seq_length())
        if length != tokens.shape[1]:
            raise SavedCacheError(
                f"the cache stands for {length} tokens, and {tokens.shape[1]} are given as tokens; the last token that "
                "generate returns has not been in the model yet: give it sequences[:, :-1]"
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module | None):
        raise SavedCacheError(f"model is a {type(model).__name__}; give the model itself, a torch.nn.Module")


def _device(device: torch.device | str | None, model: torch.nn.Module | None) -> torch.device:
    if device is None:
        first = None if model is None else next(model.parameters(), None)
        return torch.device("cpu") if first is None else first.device
    try:
        return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors there say
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SavedCacheError(f"nothing can be loaded to the device {device!r}: {reason}") from error


def _compare(saved: dict[str, Any] | None, model: torch.nn.Module | None, path: Path) -> None:
    """Refuse another model than the saved one."""
    if saved is None or model is None:
        if saved is not model:
            missing = "load_cache got no model" if model is None else "the cache was saved without a model"
            log.warning("%s: %s, so nothing tells whether the cache belongs to it", path, missing)
        return
    how = difference(saved, fingerprint(model))
    if how is not None:
        raise SavedCacheError(
            f"the cache was saved with another model: {how}. What it holds means nothing to this one; load "
            "it with the model that filled it, or, if you know better, with check_model=False"
        )
