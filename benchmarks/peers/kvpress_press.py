"""kvpress' presses as methods of the evaluation, alone and with quanto's int4 for what they keep.

A press drops its part of the prompt's tokens, in every layer and head; what is read afterwards is kept, all of it, in
the model's dtype. So bytes are those of the prompt's cache. A press that needs attention weights reads the prompt with
transformers' eager attention. With quanto, the cache is quantized, scored as dequantized, pruned and quantized again,
which is what kvpress itself does with a ``QuantizedCache``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mikv_compile.eval import CacheSize, Session, UnavailableError
from mikv_compile.eval.methods import dense_nbytes

PRESSES = {
    "snapkv": "SnapKVPress",
    "expected": "ExpectedAttentionPress",
    "streaming": "StreamingLLMPress",
    "h2o": "ObservedAttentionPress",
    "pyramidkv": "PyramidKVPress",
    "keydiff": "KeyDiffPress",
    "tova": "TOVAPress",
}
"""Short names of kvpress' classes, which come with the settings of their authors."""
EAGER = ("h2o",)
"""Presses that read attention weights."""


class PressSession(Session):
    """Prompts are read under a press; later tokens keep their positions in the text."""

    def __init__(self, model: Any, press: Any, bits: int | None, eager: bool) -> None:
        super().__init__(model)
        self._press, self._bits, self._eager = press, bits, eager

    def new_cache(self) -> Any:
        """Dense, or quanto's."""
        if self._bits is None:
            return super().new_cache()
        from transformers import QuantizedCache

        return QuantizedCache("quanto", self.model.config, nbits=self._bits)

    def prefill(self, input_ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Read and prune a prompt."""
        usual = self.model.config._attn_implementation
        if self._eager:
            self.model.set_attn_implementation("eager")
        try:
            with self._press(self.model):
                cache, logits = super().prefill(input_ids)
        finally:
            self.model.set_attn_implementation(usual)
        cache.tokens_read = input_ids.shape[1]
        return cache, logits

    def forward(self, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Read on. A token at a time where layers keep different numbers of tokens, as a mask fits only one of them."""
        lengths = {layer.get_seq_length() for layer in cache.layers}
        step = input_ids.shape[1] if len(lengths) == 1 else 1
        logits = []
        for part in self._put(input_ids).split(step, dim=1):
            positions = torch.arange(cache.tokens_read, cache.tokens_read + part.shape[1], device=part.device)[None]
            out = self.model(input_ids=part, past_key_values=cache, use_cache=True, position_ids=positions)
            cache.tokens_read += part.shape[1]
            logits.append(out.logits[0])
        return torch.cat(logits)

    def fork(self, cache: Any) -> Any:
        """A copy that shares tensors: layers replace theirs and never write into them."""
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        return branch

    def size(self, cache: Any) -> CacheSize:
        """As it lies in memory, beside a dense cache of all tokens that were read."""
        pruned = super().size(cache)
        read = cache.tokens_read
        return CacheSize(read, pruned.nbytes, pruned.nbytes_16bit, dense_nbytes(self.model, read))


@dataclass(frozen=True)
class Press:
    """A press, and what keeps its tokens.

    Attributes:
        press: a name of ``PRESSES``.
        drop: part of the prompt's tokens that goes (kvpress calls it compression_ratio).
        bits: None keeps the model's dtype; 4 and 2 are quanto's.
    """

    press: str = "snapkv"
    drop: float = 0.5
    bits: int | None = None
    name: str = ""
    family: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            end = f" + quanto int{self.bits}" if self.bits else ""
            object.__setattr__(self, "name", f"kvpress {self.press} -{self.drop:.1%}{end}".replace(".0%", "%"))
        if not self.family:
            object.__setattr__(self, "family", "eviction + bits" if self.bits else "eviction")
        object.__setattr__(self, "settings", {"press": self.press, "drop": self.drop, "bits": self.bits})

    @contextmanager
    def open(self, model: Any) -> Iterator[Session]:
        """The model as it is; hooks come and go with each prompt.

        Raises:
            UnavailableError: if kvpress (or quanto) is missing, or does not know this transformers.
        """
        try:
            import kvpress

            if self.bits:
                import optimum.quanto  # noqa: F401
        except ImportError as error:
            raise UnavailableError(f"{error}; make peers makes an environment with kvpress") from error
        had = [hasattr(layer.self_attn, "rotary_emb") for layer in model.model.layers]
        press = getattr(kvpress, PRESSES[self.press])(compression_ratio=self.drop)
        try:
            yield PressSession(model, press, self.bits, self.press in EAGER)
        finally:
            for layer, kept in zip(model.model.layers, had, strict=True):
                if not kept and hasattr(layer.self_attn, "rotary_emb"):
                    del layer.self_attn.rotary_emb
