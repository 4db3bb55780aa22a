"""Decoders of transformers in the form that :func:`mikv_compile.export` takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from mikv_compile.errors import MikvError


class PositionedLayer(StaticLayer):
    """A preallocated cache of all positions, which is told where a call writes instead of counting."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    """[S] int64, of the call's tokens."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the call's keys and values [B, H, S, D] and return all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Position of the call's first token; a tensor."""
        return self.positions[0]


class PositionedDecoder(torch.nn.Module):
    """``forward(tokens [B, S], positions [S])`` gives the logits [B, 1, V] of the last token. Caches are buffers."""

    def __init__(self, model: PreTrainedModel, batch: int, max_length: int) -> None:
        """Allocate the caches.

        Raises:
            MikvError: for a model that keeps something else than keys and values from call to call.
        """
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        for i, layer in enumerate(self.cache.layers):
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
                raise MikvError(
                    f"layer {i} of {type(model).__name__} keeps a {type(layer).__name__} from call to call; only "
                    "decoders whose layers keep nothing but keys and values can be exported"
                )
            # A sliding layer keeps all positions too, and its mask hides the old ones.
            self.cache.layers[i] = PositionedLayer(max_length)
        positions = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
        with torch.no_grad():  # layers allocate when they see their first keys, which tell all sizes
            self(positions.expand(batch, 1), positions)
        made: list[Any] = self.cache.layers
        for i, layer in enumerate(made):
            if not layer.is_initialized:
                raise MikvError(f"layer {i} of {type(model).__name__} has written no keys and values")
            self.register_buffer(f"keys_{i}", layer.keys.zero_(), persistent=False)
            self.register_buffer(f"values_{i}", layer.values.zero_(), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, V] of the last token."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.positions = positions
        return self.model(
            input_ids=tokens, position_ids=positions[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
