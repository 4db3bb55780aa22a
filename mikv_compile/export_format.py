"""What an exported package says of itself: sizes, and the plan of each layer, as JSON. Imports no passes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from mikv_compile.errors import MikvError
from mikv_compile.kernels.formats import LayerFormat
from mikv_compile.plan import CacheShape, LayerPlan, Tier
from mikv_compile.versions import release

DESCRIPTION = "mikv.json"
"""Name of the description in the package."""

PROGRAMS = {"step": 1, "chunk": 64}
"""The programs of a package, and how many tokens they are traced with: one, and any larger number."""

SCHEMA = 2
"""Grows when a package of before cannot be run any more."""


@dataclass(frozen=True)
class Layer:
    """One compressed cache."""

    plan: LayerPlan
    shape: CacheShape
    device: str
    """As torch names it."""


@dataclass(frozen=True)
class Package:
    """A package's description.

    Attributes:
        batch: rows of each call.
        max_length: tokens that a sequence may have.
        vocabulary: token ids are below this.
        layers: in the order of their inputs.
    """

    batch: int
    max_length: int
    vocabulary: int
    layers: tuple[Layer, ...]

    def to_json(self) -> str:
        """The description as text."""
        layers = [
            {
                "plan": {**dataclasses.asdict(layer.plan), "format": str(layer.plan.format)},
                "shape": {**dataclasses.asdict(layer.shape), "dtype": str(layer.shape.dtype).removeprefix("torch.")},
                "device": layer.device,
            }
            for layer in self.layers
        ]
        about = {"schema": SCHEMA, "torch": torch.__version__}
        sizes = {"batch": self.batch, "max_length": self.max_length, "vocabulary": self.vocabulary}
        return json.dumps({**about, **sizes, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Package:
        """Inverse of :meth:`to_json`.

        Raises:
            MikvError: for a description of another schema, or a package of another release of torch.
        """
        raw = json.loads(text)
        if raw["schema"] != SCHEMA:
            raise MikvError(
                f"the package has schema {raw['schema']}, and this version of mikv_compile reads {SCHEMA}; export the "
                "model again"
            )
        if release(raw["torch"]) != release(torch.__version__):
            raise MikvError(
                f"the package was exported with torch {raw['torch']}, and this is torch {torch.__version__}, which "
                "cannot be relied on to run its code; export the model again, or install that torch"
            )
        return cls(raw["batch"], raw["max_length"], raw["vocabulary"], tuple(map(_layer, raw["layers"])))


def _layer(raw: dict[str, Any]) -> Layer:
    plan, shape = raw["plan"], raw["shape"]
    plan |= {
        "tiers": tuple(Tier(**tier) for tier in plan["tiers"]),
        "format": LayerFormat.parse(plan["format"]),
        "slot_bytes": tuple(plan["slot_bytes"]),
    }
    return Layer(LayerPlan(**plan), CacheShape(**{**shape, "dtype": getattr(torch, shape["dtype"])}), raw["device"])
