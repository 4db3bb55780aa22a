"""What tells a model from others: its configuration, its parameters' names and shapes, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from mikv_compile.errors import SavedCacheError

_SAMPLE = 32
"""Numbers that are looked at of each parameter, evenly spaced."""

_UNRELATED = frozenset(("architectures", "dtype", "id2label", "label2id", "return_dict", "torch_dtype",
                        "transformers_version", "use_cache"))  # fmt: skip
"""Keys of a configuration that change no number of a cache, or that the parameters tell as well."""

_UNRELATED_ENDS = ("_implementation", "_token_id")
_UNRELATED_STARTS = ("_", "output_")


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """The fingerprint of a model, as plain data: equal in each process and on each device.

    Raises:
        SavedCacheError: if a parameter's values are not in memory.
    """
    names, weights = hashlib.sha256(), hashlib.sha256()
    with torch.no_grad():
        for name, parameter in sorted((_plain(n), p) for n, p in model.named_parameters()):
            if parameter.is_meta:
                raise SavedCacheError(
                    f"parameter {name!r} of the model is on the device 'meta', so nothing can be compared with its "
                    "values; load the weights first, or save and load the cache without a model"
                )
            names.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            weights.update(_sample(parameter))
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    return {
        "class": type(getattr(model, "_orig_mod", model)).__name__,
        "config": {str(key): _hash(_related(value)) for key, value in to_dict().items() if _is_related(str(key))},
        "parameters": names.hexdigest(),
        "weights": weights.hexdigest(),
    }


def difference(saved: dict[str, Any], model: dict[str, Any]) -> str | None:
    """In what a model differs from the saved one; None if it does not."""
    if saved["class"] != model["class"]:
        return f"another architecture: the cache is of a {saved['class']}, the model is a {model['class']}"
    ours, theirs = model["config"], saved["config"]
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if keys:
        return f"another architecture: the configurations differ in {', '.join(keys[:8])}"
    if saved["parameters"] != model["parameters"]:
        return "another architecture: the parameters have other names, shapes or dtypes"
    if saved["weights"] != model["weights"]:
        return "other weights"
    return None


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _sample(parameter: torch.Tensor) -> bytes:
    count = min(parameter.numel(), _SAMPLE)
    if not count:
        return b""
    # Whole numbers: torch.linspace rounds differently on different devices.
    places = torch.tensor([i * (parameter.numel() - 1) // max(count - 1, 1) for i in range(count)])
    index = torch.unravel_index(places.to(parameter.device), parameter.shape)
    chosen = parameter[index] if parameter.dim() else parameter[None]
    return bytes(chosen.detach().cpu().contiguous().view(torch.uint8).tolist())


def _is_related(key: str) -> bool:
    return not (key in _UNRELATED or key.endswith(_UNRELATED_ENDS) or key.startswith(_UNRELATED_STARTS))


def _related(value: Any) -> Any:
    """A configuration without what :func:`_is_related` leaves out, at any depth."""
    if isinstance(value, dict):
        return {str(k): _related(v) for k, v in value.items() if _is_related(str(k))}
    return [_related(v) for v in value] if isinstance(value, list | tuple) else value


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
