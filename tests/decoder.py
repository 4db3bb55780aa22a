"""A small decoder written by hand, with a cache that grows by ``torch.cat``; needs no transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GrowingCache:
    """Keys and values per layer, as most decoders keep them."""

    def __init__(self, layers: int) -> None:
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys[layer] is None:
            self.keys[layer] = torch.tensor([], dtype=k.dtype, device=k.device)
            self.values[layer] = torch.tensor([], dtype=v.dtype, device=v.device)
        self.keys[layer] = torch.cat([self.keys[layer], k], dim=-2)
        self.values[layer] = torch.cat([self.values[layer], v], dim=-2)
        return self.keys[layer], self.values[layer]

    @property
    def length(self) -> int:
        return 0 if self.keys[0] is None else self.keys[0].shape[-2]


class Decoder(nn.Module):
    """Attention layers only; ``forward(x, cache, mask)`` with x [B, S, heads * dim] returns the same shape."""

    def __init__(self, layers=2, heads=4, kv_heads=2, dim=16, value_dim=None, dtype=torch.float32, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.dim, self.dropout = heads, kv_heads, dim, dropout
        self.value_dim = value_dim or dim
        width = heads * dim
        self.q = nn.ModuleList(nn.Linear(width, heads * dim, bias=False) for _ in range(layers))
        self.k = nn.ModuleList(nn.Linear(width, kv_heads * dim, bias=False) for _ in range(layers))
        self.v = nn.ModuleList(nn.Linear(width, kv_heads * self.value_dim, bias=False) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(heads * self.value_dim, width, bias=False) for _ in range(layers))
        self.to(dtype).eval()

    def new_cache(self) -> GrowingCache:
        return GrowingCache(len(self.q))

    def forward(self, x: torch.Tensor, cache: GrowingCache, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        past = cache.length
        causal = False
        if mask is None and tokens > 1:
            if past == 0:
                causal = True
            else:
                mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        for i in range(len(self.q)):
            q = self.q[i](x).view(batch, tokens, self.heads, self.dim).transpose(1, 2)
            k = self.k[i](x).view(batch, tokens, self.kv_heads, self.dim).transpose(1, 2)
            v = self.v[i](x).view(batch, tokens, self.kv_heads, self.value_dim).transpose(1, 2)
            k, v = cache.append(i, k, v)
            drop = {"dropout_p": self.dropout} if self.dropout else {}
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True, **drop)
            x = x + self.o[i](out.transpose(1, 2).reshape(batch, tokens, self.heads * self.value_dim))
        return x


def inputs(steps: list[int], batch: int = 1, width: int = 64, dtype=torch.float32, seed: int = 1) -> list[torch.Tensor]:
    """Random inputs of the given numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, s, width, generator=generator).to(dtype) for s in steps]


@torch.no_grad()
def run(model, cache: GrowingCache, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Feed the inputs one after the other and return the outputs."""
    return [model(x, cache) for x in xs]
