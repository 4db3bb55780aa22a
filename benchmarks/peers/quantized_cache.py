"""transformers' ``QuantizedCache`` (quanto, HQQ, fp8) as methods of the evaluation.

quanto and HQQ keep the newest tokens in the model's dtype and quantize the whole cache anew when ``residual`` (128) of
them have come together, so chunks of 64 tokens are read over up to 64 tokens of full precision; the prompt is quantized
whole. fp8 (e4m3) has one scale for a layer's keys and one for its values, taken from the prompt, and no residual.
Axis 0, transformers' default, groups 64 neighbouring numbers of a token's vector with each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from mikv_compile.eval import Session, UnavailableError

PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq", "fp8": "transformers"}
"""Backend of QuantizedCache -> module that it needs."""


class QuantizedSession(Session):
    """Calls that keep their cache in a ``QuantizedCache``."""

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        super().__init__(model)
        self._arguments = arguments

    def new_cache(self) -> Any:
        """An empty cache of the backend."""
        from transformers import QuantizedCache

        return QuantizedCache(config=self.model.config, **self._arguments)

    def fork(self, cache: Any) -> Any:
        """A copy that shares tensors: layers replace theirs and never write into them."""
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        return branch


@dataclass(frozen=True)
class Quantized:
    """A backend of ``QuantizedCache``.

    Attributes:
        backend: ``quanto``, ``hqq`` or ``fp8``.
        bits: of keys and values; fp8 has 8 only.
        axis: for keys and values; None is transformers' default, 0. quanto's -1 (per channel) needs a number of tokens
            times heads that its groups of 64 divide, at every length at which it quantizes.
        residual: newest tokens in the model's dtype, up to so many; None is transformers' default, 128.
    """

    backend: str = "quanto"
    bits: int = 4
    axis: int | None = None
    residual: int | None = None
    name: str = ""
    family: str = "quantized"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(
                self, "name", self.backend if self.backend == "fp8" else f"{self.backend} int{self.bits}"
            )
        object.__setattr__(self, "settings", {"backend": self.backend, **self.arguments})

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``QuantizedCache`` is made with."""
        if self.backend == "fp8":
            return {"backend": "fp8"}
        made: dict[str, Any] = {"backend": self.backend, "nbits": self.bits}
        if self.axis is not None:
            made |= {"axis_key": self.axis, "axis_value": self.axis}
        elif self.backend == "hqq":
            made |= {"axis_key": 1, "axis_value": 1}  # with its default, 0, HQQ is far worse
        if self.residual is not None:
            made["residual_length"] = self.residual
        return made

    @contextmanager
    def open(self, model: Any) -> Iterator[Session]:
        """The model as it is; only the cache is another.

        Raises:
            UnavailableError: if the backend's package is missing, or this transformers has no fp8.
        """
        package = PACKAGES[self.backend]
        if find_spec(package.partition(".")[0]) is None or find_spec(package) is None:
            raise UnavailableError(f"{self.backend} needs the package {package}; make peers installs it")
        if self.backend == "fp8":
            from transformers import cache_utils

            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                raise UnavailableError("this version of transformers has no fp8 cache")
        yield QuantizedSession(model, self.arguments)
