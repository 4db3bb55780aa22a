"""Small decoders as people write them by hand, without transformers: one class per way to keep and read a KV cache.

Every model is played through a `Session`, which does what the caller of such a model does: it passes positions, start
offsets or the tuples of the last call, and resets what the idiom resets. Sizes are tiny; two layers everywhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, CAPACITY, WINDOW = 50, 64, 128, 64


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, Hk, T, D] -> [B, Hk * groups, T, D], interleaved."""
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, S, H, D] by rows of cos and sin [S, D / 2, 2], as gpt-fast writes it."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)


class Layer(nn.Module):
    """Projections of one attention layer; subclasses cache and attend."""

    heads, kv_heads, dim, value_dim = 4, 2, 16, 16

    def __init__(self, batch: int, capacity: int) -> None:
        super().__init__()
        self.groups, self.scale = self.heads // self.kv_heads, 1 / math.sqrt(self.dim)
        self.q = nn.Linear(WIDTH, self.heads * self.dim, bias=False)
        self.k = nn.Linear(WIDTH, self.kv_heads * self.dim, bias=False)
        self.v = nn.Linear(WIDTH, self.kv_heads * self.value_dim, bias=False)
        self.o = nn.Linear(self.heads * self.value_dim, WIDTH, bias=False)
        self.setup(batch, capacity)

    def setup(self, batch: int, capacity: int) -> None:
        """Caches and other buffers."""

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as [B, S, H, D]."""
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.dim)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.dim)
        return q, k, self.v(x).view(batch, tokens, self.kv_heads, self.value_dim)

    def cached(self) -> tuple[torch.Tensor, ...]:
        """The layer's key and value caches, for layers that own them."""
        return self.k_cache, self.v_cache

    def reset(self) -> None:
        """What the idiom does between two conversations; most masks hide what is left."""


class Decoder(nn.Module):
    """Embedding, attention layers with residuals, and a head."""

    chunks = True
    """Whether the idiom may read several tokens in a later call."""
    layers_count = 2

    def __init__(self, layer: type[Layer], batch: int = 2, capacity: int = CAPACITY, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(capacity, WIDTH)
        self.layers = nn.ModuleList(layer(batch, capacity) for _ in range(self.layers_count))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=1.3 / math.sqrt(linear.in_features))
        angles = torch.outer(torch.arange(capacity), 100.0 ** -torch.linspace(0, 1, layer.dim // 2))
        self.register_buffer("freqs", torch.stack([angles.cos(), angles.sin()], -1))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("causal_mask", torch.ones(capacity, capacity, dtype=torch.bool).tril())
        self.eval()

    def cached(self, session: Session) -> list[tuple[torch.Tensor, ...]]:
        """What is cached now: keys and values of each layer that has a cache."""
        return [layer.cached() for layer in self.layers]

    def untouched(self, session: Session) -> list[torch.Tensor]:
        """Tensors that look like a cache and must stay plain."""
        return []

    def reset(self, session: Session) -> None:
        for layer in self.layers:
            layer.reset()


class Session:
    """Conversations with a model; `call` is the model or what `torch.compile` made of it."""

    def __init__(self, model: Decoder, call=None) -> None:
        self.model, self.call = model, model if call is None else call
        self.extras: list[torch.Tensor] = []
        self.start()

    def start(self) -> None:
        """Begin a new conversation."""
        self.length, self.past = 0, None
        self.model.reset(self)

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, VOCAB] of the next tokens."""
        logits = self.model.drive(self.call, self, ids)
        self.length += ids.shape[1]
        return logits

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.length, self.length + ids.shape[1])

    def cached(self) -> list[tuple[torch.Tensor, ...]]:
        return self.model.cached(self)


class PositionDecoder(Decoder):
    """`model(ids, input_pos)`, caches in the layers: gpt-fast, torchtune."""

    def forward(self, ids: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        mask = self.causal_mask[None, None, input_pos]
        freqs = self.freqs[input_pos]
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (WIDTH,)), freqs, mask, input_pos)
        return self.head(x)

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        return call(ids, session.positions(ids))


class SingleTokenDecoder(PositionDecoder):
    """The same for write idioms that take one token at a time: the prompt is fed token by token."""

    chunks = False

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        places = session.positions(ids)
        return torch.cat([call(ids[:, i : i + 1], places[i : i + 1]) for i in range(ids.shape[1])], 1)


class StartDecoder(Decoder):
    """`model(ids, start_pos)` with an int, as Meta's reference code."""

    def forward(self, ids: torch.Tensor, start_pos: int) -> torch.Tensor:
        seqlen = ids.shape[1]
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        x = self.embed(ids)
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf"), device=ids.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos), device=ids.device), mask]).type_as(x)
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (WIDTH,)), start_pos, freqs_cis, mask)
        return self.head(x)

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        return call(ids, session.length)


class TupleDecoder(Decoder):
    """`model(ids, past, input_pos)` returns logits and new tuples, as GPT-2 and its many descendants."""

    token_dim = 2

    def forward(self, ids: torch.Tensor, past, input_pos: torch.Tensor):
        before = 0 if past is None else past[0][0].shape[self.token_dim]
        tokens = ids.shape[1]
        keep = torch.ones(tokens, before + tokens, dtype=torch.bool, device=ids.device).tril(before)
        x = self.embed(ids) + self.wpe(input_pos)
        presents = ()
        for i, layer in enumerate(self.layers):
            y, present = layer(F.rms_norm(x, (WIDTH,)), None if past is None else past[i], keep)
            x = x + y
            presents += (present,)
        return self.head(x), presents

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        logits, session.past = call(ids, session.past, session.positions(ids))
        return logits

    def cached(self, session: Session) -> list[tuple[torch.Tensor, ...]]:
        return list(session.past)


class CarriedDecoder(Decoder):
    """Preallocated caches that are passed in and returned, as functional code does."""

    def forward(self, ids: torch.Tensor, input_pos: torch.Tensor, start: int, caches):
        mask, freqs = self.causal_mask[None, None, input_pos], self.freqs[input_pos]
        x = self.embed(ids)
        made = []
        for layer, cache in zip(self.layers, caches, strict=True):
            y, cache = layer(F.rms_norm(x, (WIDTH,)), freqs, mask, input_pos, start, cache)
            x = x + y
            made.append(cache)
        return self.head(x), made

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        if session.past is None:
            layer, capacity = self.layers[0], self.causal_mask.shape[0]
            shape = (ids.shape[0], layer.kv_heads, capacity, layer.dim)
            session.past = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]
        logits, session.past = call(ids, session.positions(ids), session.length, session.past)
        return logits

    def cached(self, session: Session) -> list[tuple[torch.Tensor, ...]]:
        return list(session.past)


# 1. nanoGPT with a cache


class NanoGPTLayer(Layer):
    kv_heads = 4

    def setup(self, batch: int, capacity: int) -> None:
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, x, layer_past):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        if layer_past is not None:
            past_k, past_v = layer_past
            k = torch.cat((past_k, k), dim=2)
            v = torch.cat((past_v, v), dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=layer_past is None)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.o(y), (k, v)


class NanoGPT(TupleDecoder):
    chunks = False  # without a mask, rows of a later chunk would see each other

    def forward(self, idx, past=None):
        t = idx.size(1)
        past_length = 0 if past is None else past[0][0].size(2)
        pos = torch.arange(past_length, past_length + t, dtype=torch.long, device=idx.device)
        x = self.embed(idx) + self.wpe(pos)
        presents = []
        for i, layer in enumerate(self.layers):
            y, present = layer(F.rms_norm(x, (WIDTH,)), past[i] if past is not None else None)
            x = x + y
            presents.append(present)
        return self.head(x), tuple(presents)

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        logits, session.past = call(ids, session.past)
        return logits


# 2. gpt-fast


class GPTFastCache(nn.Module):
    def __init__(self, batch, capacity, heads, dim):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, heads, capacity, dim))
        self.register_buffer("v_cache", torch.zeros(batch, heads, capacity, dim))

    def update(self, input_pos, k_val, v_val):
        assert input_pos.shape[0] == k_val.shape[2]
        k_out = self.k_cache
        v_out = self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class GPTFastLayer(Layer):
    cache_class: type[nn.Module] = GPTFastCache

    def setup(self, batch: int, capacity: int) -> None:
        self.kv_cache = self.cache_class(batch, capacity, self.kv_heads, self.dim)

    def forward(self, x, freqs, mask, input_pos):
        bsz, seqlen, _ = x.shape
        q, k, v = self.project(x)
        q, k = rotate(q, freqs), rotate(k, freqs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.o(y.transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    def cached(self):
        return self.kv_cache.k_cache, self.kv_cache.v_cache


# 3. Meta's reference code


class MetaLayer(Layer):
    def setup(self, batch: int, capacity: int) -> None:
        # Plain attributes with room for more rows than are used.
        self.cache_k = torch.zeros((batch + 1, capacity, self.kv_heads, self.dim))
        self.cache_v = torch.zeros((batch + 1, capacity, self.kv_heads, self.dim))

    @staticmethod
    def turn(x, freqs_cis):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)

    @staticmethod
    def repeat_kv(x, n_rep):
        bs, slen, n_kv_heads, head_dim = x.shape
        if n_rep == 1:
            return x
        return (
            x[:, :, :, None, :]
            .expand(bs, slen, n_kv_heads, n_rep, head_dim)
            .reshape(bs, slen, n_kv_heads * n_rep, head_dim)
        )

    def forward(self, x, start_pos, freqs_cis, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.project(x)
        xq, xk = self.turn(xq, freqs_cis), self.turn(xk, freqs_cis)
        self.cache_k = self.cache_k.to(xq)
        self.cache_v = self.cache_v.to(xq)
        self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
        self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
        keys = self.cache_k[:bsz, : start_pos + seqlen]
        values = self.cache_v[:bsz, : start_pos + seqlen]
        keys = self.repeat_kv(keys, self.groups)
        values = self.repeat_kv(values, self.groups)
        xq = xq.transpose(1, 2)
        keys = keys.transpose(1, 2)
        values = values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.dim)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        return self.o(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    def cached(self):
        return self.cache_k, self.cache_v


# 4. torchtune


class TorchtuneCache(nn.Module):
    def __init__(self, batch, capacity, heads, dim):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, heads, capacity, dim), persistent=False)
        self.register_buffer("v_cache", torch.zeros(batch, heads, capacity, dim), persistent=False)
        self.register_buffer("cache_pos", torch.arange(0, capacity), persistent=False)

    def reset(self):
        self.k_cache.zero_()
        self.v_cache.zero_()
        self.cache_pos -= self.cache_pos[0].item()

    def update(self, k_val, v_val):
        bsz, _, seq_len, _ = k_val.shape
        if bsz > self.k_cache.shape[0]:
            raise ValueError("batch too large")
        assert (self.cache_pos[0] + seq_len) <= self.k_cache.shape[2]
        k_out = self.k_cache
        v_out = self.v_cache
        self.write(k_out, v_out, k_val, v_val)
        self.cache_pos.add_(seq_len)
        return k_out, v_out

    def write(self, k_out, v_out, k_val, v_val):
        seq_len = k_val.shape[2]
        k_out[:, :, self.cache_pos[:seq_len]] = k_val
        v_out[:, :, self.cache_pos[:seq_len]] = v_val


class TorchtuneIndexCopyCache(TorchtuneCache):
    def write(self, k_out, v_out, k_val, v_val):
        seq_len = k_val.shape[2]
        k_out.index_copy_(2, self.cache_pos[:seq_len], k_val)
        v_out.index_copy_(2, self.cache_pos[:seq_len], v_val)


class TorchtuneLayer(GPTFastLayer):
    cache_class = TorchtuneCache

    def forward(self, x, freqs, mask, input_pos):
        b, s, _ = x.shape
        q, k, v = self.project(x)
        q, k = rotate(q, freqs), rotate(k, freqs)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = self.kv_cache.update(k, v)
        shape = (-1, -1, self.heads // self.kv_heads, -1, -1)
        k = k.unsqueeze(2).expand(shape).flatten(1, 2)
        v = v.unsqueeze(2).expand(shape).flatten(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return self.o(y.transpose(1, 2).contiguous().view(b, s, -1))

    def reset(self):
        self.kv_cache.reset()


class TorchtuneIndexCopyLayer(TorchtuneLayer):
    cache_class = TorchtuneIndexCopyCache


# 5. einsum


class EinsumLayer(Layer):
    kv_heads = 4

    def attend(self, q, k, v, keep):
        att = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        att = att.masked_fill(~keep, float("-inf"))
        y = torch.einsum("bhqk,bkhd->bqhd", att.softmax(dim=-1), v)
        return self.o(y.flatten(2))

    def forward(self, x, past, keep):
        q, k, v = self.project(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        return self.attend(q, k, v, keep), (k, v)


class EinsumDecoder(TupleDecoder):
    token_dim = 1


class EinsumStaticLayer(EinsumLayer):
    def setup(self, batch: int, capacity: int) -> None:
        self.register_buffer("k_cache", torch.zeros(batch, capacity, self.kv_heads, self.dim))
        self.register_buffer("v_cache", torch.zeros(batch, capacity, self.kv_heads, self.dim))

    def forward(self, x, freqs, mask, input_pos):
        q, k, v = self.project(x)
        q, k = rotate(q, freqs), rotate(k, freqs)
        self.k_cache.index_copy_(1, input_pos, k)
        self.v_cache.index_copy_(1, input_pos, v)
        return self.attend(q, self.k_cache, self.v_cache, mask)


# Odd ways to write into a preallocated cache


class StaticLayer(Layer):
    """Buffers [B, H, T, D], SDPA with a bool mask over all of them; subclasses write."""

    def setup(self, batch: int, capacity: int) -> None:
        self.register_buffer("k_cache", torch.zeros(batch, self.kv_heads, capacity, self.dim))
        self.register_buffer("v_cache", torch.zeros(batch, self.kv_heads, capacity, self.value_dim))

    def merge(self, y):
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x, freqs, mask, input_pos):
        q, k, v = self.project(x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, freqs), rotate(k, freqs), v))
        k, v = self.write(self.k_cache, k, input_pos), self.write(self.v_cache, v, input_pos)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


class IndexPutLayer(StaticLayer):
    """One position per row, as code for ragged batches writes."""

    def write(self, cache, new, input_pos):
        rows = torch.arange(new.shape[0])
        cache[rows, :, input_pos.expand(new.shape[0])] = new[:, :, 0]
        return cache


class WhereLayer(StaticLayer):
    """A one-hot choice between old and new, as code for accelerators without scatter writes."""

    def write(self, cache, new, input_pos):
        here = F.one_hot(input_pos[0], cache.shape[2]).bool()
        cache.copy_(torch.where(here[:, None], new, cache))
        return cache


class OffsetLayer(StaticLayer):
    """The same read as Meta's code, with int offsets: the filled part, additive mask."""

    def forward(self, x, start_pos, freqs_cis, mask):
        q, k, v = self.project(x)
        end = start_pos + x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (MetaLayer.turn(q, freqs_cis), MetaLayer.turn(k, freqs_cis), v))
        k, v = self.write(self.k_cache, k, start_pos), self.write(self.v_cache, v, start_pos)
        k, v = k[:, :, :end], v[:, :, :end]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


class NarrowCopyLayer(OffsetLayer):
    def write(self, cache, new, start):
        cache.narrow(2, start, new.shape[2]).copy_(new)
        return cache


class SliceCopyLayer(OffsetLayer):
    def write(self, cache, new, start):
        cache[:, :, start : start + new.shape[2]].copy_(new)
        return cache


class CarriedLayer(Layer):
    """Caches come in and go out."""

    def forward(self, x, freqs, mask, input_pos, start, cache):
        q, k, v = self.project(x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, freqs), rotate(k, freqs), v))
        k, v = (self.write(c, new, input_pos, start) for c, new in zip(cache, (k, v), strict=True))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


class SliceScatterLayer(CarriedLayer):
    def write(self, cache, new, input_pos, start):
        return torch.slice_scatter(cache, new, dim=2, start=start, end=start + new.shape[2])


class ScatterLayer(CarriedLayer):
    def write(self, cache, new, input_pos, start):
        return torch.scatter(cache, 2, input_pos[None, None, :, None].expand(new.shape), new)


class RingLayer(StaticLayer):
    """A ring buffer of the last WINDOW tokens, kept in order by rolling it."""

    def setup(self, batch: int, capacity: int) -> None:
        super().setup(batch, WINDOW)

    def forward(self, x, start_pos, freqs_cis, mask):
        q, k, v = self.project(x)
        tokens = x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (MetaLayer.turn(q, freqs_cis), MetaLayer.turn(k, freqs_cis), v))
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            if tokens >= WINDOW:
                cache.copy_(new[:, :, -WINDOW:])
            else:
                rolled = cache.roll(-tokens, dims=2)
                rolled[:, :, -tokens:] = new
                cache.copy_(rolled)
        if start_pos == 0:
            keep = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - WINDOW)
        else:
            k, v = self.k_cache, self.v_cache
            keep = torch.arange(WINDOW)[None] > WINDOW - 2 - start_pos
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True))


class RingDecoder(StartDecoder):
    chunks = False  # rolling in several tokens drops what the first of them may still see


# Odd ways to read


class PreRopeLayer(StaticLayer):
    """Keys are cached before rotary embedding, which is applied to the whole cache after reading."""

    def forward(self, x, freqs, mask, input_pos):
        q, k, v = self.project(x)
        self.k_cache.index_copy_(2, input_pos, k.transpose(1, 2))
        self.v_cache.index_copy_(2, input_pos, v.transpose(1, 2))
        keys = rotate(self.k_cache.transpose(1, 2), self.all_freqs).transpose(1, 2)
        q = rotate(q, freqs).transpose(1, 2)
        return self.merge(F.scaled_dot_product_attention(q, keys, self.v_cache, attn_mask=mask, enable_gqa=True))


class PreRopeDecoder(PositionDecoder):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            layer.register_buffer("all_freqs", self.freqs)


class GrowingLayer(Layer):
    """`torch.cat` along the tokens; subclasses attend in other ways. `keep` is a bool mask [S, T]."""

    def forward(self, x, past, keep):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return self.merge(self.attend(q, k, v, keep)), (k, v)

    def merge(self, y):
        return self.o(y.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, keep):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)

    def scores(self, q, k):
        return torch.matmul(q, repeat_kv(k, self.groups).transpose(2, 3)) * self.scale

    def output(self, scores, v, keep):
        scores = scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, -1e9)
        return torch.matmul(scores.softmax(-1), repeat_kv(v, self.groups))


class SoftcapLayer(GrowingLayer):
    def attend(self, q, k, v, keep):
        return self.output(torch.tanh(self.scores(q, k) / 2.0) * 2.0, v, keep)


class SinkLayer(GrowingLayer):
    """A learned logit per head takes part in the softmax and has no value."""

    def setup(self, batch: int, capacity: int) -> None:
        self.sinks = nn.Parameter(torch.randn(self.heads))

    def attend(self, q, k, v, keep):
        scores = self.scores(q, k) + torch.zeros(keep.shape).masked_fill(~keep, -1e9)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        probabilities = F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)
        return torch.matmul(probabilities[..., :-1], repeat_kv(v, self.groups))


class AlibiLayer(GrowingLayer):
    def setup(self, batch: int, capacity: int) -> None:
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, self.heads + 1))

    def attend(self, q, k, v, keep):
        tokens, total = keep.shape
        distance = torch.arange(total)[None] - torch.arange(total - tokens, total)[:, None]
        return self.output(self.scores(q, k) + self.slopes[:, None, None] * distance, v, keep)


class RelativeBiasLayer(GrowingLayer):
    """A learned bias by distance, as in T5."""

    def setup(self, batch: int, capacity: int) -> None:
        self.relative = nn.Embedding(32, self.heads)

    def attend(self, q, k, v, keep):
        tokens, total = keep.shape
        distance = torch.arange(total - tokens, total)[:, None] - torch.arange(total)[None]
        bias = self.relative(distance.clamp(0, 31)).permute(2, 0, 1)[None]
        bias = bias + torch.zeros(keep.shape).masked_fill(~keep, -1e9)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


class GroupedLayer(GrowingLayer):
    """The query is split into groups; keys broadcast instead of being repeated."""

    def attend(self, q, k, v, keep):
        batch, heads, tokens, dim = q.shape
        q = q.view(batch, self.kv_heads, self.groups, tokens, dim)
        scores = torch.matmul(q, k.unsqueeze(2).transpose(-1, -2)) * self.scale
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        y = torch.matmul(scores.softmax(-1), v.unsqueeze(2))
        return y.reshape(batch, heads, tokens, -1)


class FlatHeadsLayer(GrowingLayer):
    """Batch and heads merged for `torch.bmm`."""

    kv_heads = 4

    def attend(self, q, k, v, keep):
        batch, heads, tokens, dim = q.shape
        q = q.reshape(batch * heads, tokens, dim) * self.scale
        k, v = k.reshape(batch * heads, -1, dim), v.reshape(batch * heads, -1, dim)
        scores = torch.bmm(q, k.transpose(1, 2))
        scores = scores.view(batch, heads, tokens, -1) + torch.zeros(keep.shape).masked_fill(~keep, -1e9)
        probabilities = F.softmax(scores.view(batch * heads, tokens, -1), dim=-1)
        return torch.bmm(probabilities, v).view(batch, heads, tokens, dim)


class ValueDimLayer(GrowingLayer):
    value_dim = 32


class WideLayer(GrowingLayer):
    heads, kv_heads, dim, value_dim = 2, 1, 256, 256


class MultiQueryLayer(GrowingLayer):
    """One key and value head, cached as [B, T, D]."""

    kv_heads = 1

    def forward(self, x, past, keep):
        q, k, v = self.project(x)
        q, k, v = q.transpose(1, 2), k.squeeze(2), v.squeeze(2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        scores = torch.matmul(q, k.unsqueeze(1).transpose(-1, -2)) * self.scale
        scores = scores.masked_fill(~keep, -1e9)
        return self.merge(torch.matmul(scores.softmax(-1), v.unsqueeze(1))), (k, v)


class WindowLayer(GrowingLayer):
    """Attends to all of `cat(past, new)` within the window and keeps its end."""

    def forward(self, x, past, keep):
        q, k, v = (t.transpose(1, 2) for t in self.project(x))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        keep = keep.triu(k.shape[2] - x.shape[1] + 1 - WINDOW)
        y = self.merge(self.attend(q, k, v, keep))
        return y, (k[:, :, 1 - WINDOW :], v[:, :, 1 - WINDOW :])


class CrossLayer(GrowingLayer):
    """Self attention with a growing cache, then attention to a memory that no call writes."""

    def setup(self, batch: int, capacity: int) -> None:
        self.cross_q = nn.Linear(WIDTH, self.heads * self.dim, bias=False)
        self.cross_o = nn.Linear(self.heads * self.dim, WIDTH, bias=False)

    def forward(self, x, past, keep, memory):
        y, present = super().forward(x, past, keep)
        q = self.cross_q(x + y).view(*x.shape[:2], self.heads, self.dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, *memory, enable_gqa=True)
        return y + self.cross_o(out.transpose(1, 2).flatten(2)), present


class CrossDecoder(TupleDecoder):
    def reset(self, session: Session) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (2, self.layers[0].kv_heads, 23, self.layers[0].dim)
        session.memory = [
            (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in self.layers
        ]

    def forward(self, ids, past, input_pos, memory):
        before = 0 if past is None else past[0][0].shape[2]
        keep = torch.ones(ids.shape[1], before + ids.shape[1], dtype=torch.bool).tril(before)
        x = self.embed(ids) + self.wpe(input_pos)
        presents = ()
        for i, layer in enumerate(self.layers):
            y, present = layer(F.rms_norm(x, (WIDTH,)), None if past is None else past[i], keep, memory[i])
            x, presents = x + y, (*presents, present)
        return self.head(x), presents

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        logits, session.past = call(ids, session.past, session.positions(ids), session.memory)
        return logits

    def untouched(self, session: Session) -> list[torch.Tensor]:
        return [t for pair in session.memory for t in pair]


class SharedDecoder(TupleDecoder):
    """The second layer has no cache of its own: it reads the first layer's."""

    def forward(self, ids, past, input_pos):
        before = 0 if past is None else past[0][0].shape[2]
        keep = torch.ones(ids.shape[1], before + ids.shape[1], dtype=torch.bool).tril(before)
        x = self.embed(ids) + self.wpe(input_pos)
        first, second = self.layers
        y, (k, v) = first(F.rms_norm(x, (WIDTH,)), None if past is None else past[0], keep)
        x = x + y
        q = second.project(F.rms_norm(x, (WIDTH,)))[0].transpose(1, 2)
        x = x + second.merge(second.attend(q, k, v, keep))
        return self.head(x), ((k, v),)


class ProbedDecoder(TupleDecoder):
    """Cached keys are also used for something else, and the cache is returned twice."""

    def forward(self, ids, past, input_pos):
        logits, presents = super().forward(ids, past, input_pos)
        return logits, presents, presents[-1][0].mean(dim=2), presents[0][1]

    def drive(self, call, session: Session, ids: torch.Tensor) -> torch.Tensor:
        logits, session.past, mean, values = call(ids, session.past, session.positions(ids))
        session.extras += [mean, values[:, :, -1].clone()]
        return logits


# Caches that are not tensors of keys and values


class OwnInt8Layer(StaticLayer):
    """The user quantizes to int8 with a scale per token."""

    def setup(self, batch: int, capacity: int) -> None:
        for name in ("k", "v"):
            shape = (batch, self.kv_heads, capacity)
            self.register_buffer(f"{name}_codes", torch.zeros(*shape, self.dim, dtype=torch.int8))
            self.register_buffer(f"{name}_scales", torch.zeros(*shape, 1))

    def store(self, codes, scales, new, input_pos):
        scale = new.abs().amax(-1, keepdim=True) / 127
        codes[:, :, input_pos] = (new / scale).round().to(torch.int8)
        scales[:, :, input_pos] = scale
        return codes * scales

    def forward(self, x, freqs, mask, input_pos):
        q, k, v = self.project(x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, freqs), rotate(k, freqs), v))
        k = self.store(self.k_codes, self.k_scales, k, input_pos)
        v = self.store(self.v_codes, self.v_scales, v, input_pos)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))

    def cached(self):
        return self.k_codes, self.k_scales, self.v_codes, self.v_scales


class PagedLayer(StaticLayer):
    """Pages of 8 tokens in one pool, found through a block table."""

    def setup(self, batch: int, capacity: int) -> None:
        pages = batch * capacity // 8
        self.register_buffer("k_cache", torch.zeros(pages, 8, self.kv_heads, self.dim))
        self.register_buffer("v_cache", torch.zeros(pages, 8, self.kv_heads, self.dim))
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(5)).view(batch, capacity // 8)
        self.register_buffer("table", table)

    def store(self, pool, new, input_pos):
        slots = self.table[:, input_pos // 8] * 8 + input_pos % 8
        pool.view(-1, *pool.shape[2:])[slots] = new
        return pool[self.table].flatten(1, 2).transpose(1, 2)

    def forward(self, x, freqs, mask, input_pos):
        q, k, v = self.project(x)
        k = self.store(self.k_cache, rotate(k, freqs), input_pos)
        v = self.store(self.v_cache, v, input_pos)
        q = rotate(q, freqs).transpose(1, 2)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


IDIOMS: dict[str, tuple[type[Decoder], type[Layer]]] = {
    "nanogpt": (NanoGPT, NanoGPTLayer),
    "gptfast": (PositionDecoder, GPTFastLayer),
    "meta": (StartDecoder, MetaLayer),
    "torchtune": (PositionDecoder, TorchtuneLayer),
    "torchtune_index_copy": (PositionDecoder, TorchtuneIndexCopyLayer),
    "einsum_cat": (EinsumDecoder, EinsumLayer),
    "einsum_index_copy": (PositionDecoder, EinsumStaticLayer),
    "cat": (TupleDecoder, GrowingLayer),
    "narrow_copy": (StartDecoder, NarrowCopyLayer),
    "slice_copy": (StartDecoder, SliceCopyLayer),
    "slice_scatter": (CarriedDecoder, SliceScatterLayer),
    "scatter": (CarriedDecoder, ScatterLayer),
    "where_one_hot": (SingleTokenDecoder, WhereLayer),
    "rolled_ring": (RingDecoder, RingLayer),
    "pre_rope_keys": (PreRopeDecoder, PreRopeLayer),
    "sink_column": (TupleDecoder, SinkLayer),
    "softcap": (TupleDecoder, SoftcapLayer),
    "alibi": (TupleDecoder, AlibiLayer),
    "relative_bias": (TupleDecoder, RelativeBiasLayer),
    "grouped_5d": (TupleDecoder, GroupedLayer),
    "flat_heads_bmm": (TupleDecoder, FlatHeadsLayer),
    "value_dim": (TupleDecoder, ValueDimLayer),
    "head_dim_256": (TupleDecoder, WideLayer),
    "multi_query_3d": (EinsumDecoder, MultiQueryLayer),
    "window_cat_slice": (TupleDecoder, WindowLayer),
    "cross_attention": (CrossDecoder, CrossLayer),
    "shared_by_two_layers": (SharedDecoder, GrowingLayer),
    "also_used_elsewhere": (ProbedDecoder, GrowingLayer),
    "row_positions": (SingleTokenDecoder, IndexPutLayer),
    "own_int8": (PositionDecoder, OwnInt8Layer),
    "paged": (PositionDecoder, PagedLayer),
}
"""Name -> decoder and layer classes."""

FIVE = ("nanogpt", "gptfast", "meta", "torchtune", "einsum_cat")
"""The most common ones."""


def make(name: str) -> Decoder:
    decoder, layer = IDIOMS[name]
    return decoder(layer)


def conversation(dense: Session, others: list[Session], prompt: int, steps: int) -> list[list[torch.Tensor]]:
    """One conversation: a prompt, two steps, a chunk of three tokens where the idiom allows it, then single steps.

    All sessions read the tokens that the dense one chooses. Returns the logits of the dense session and of each other.
    """
    sessions = [dense, *others]
    for session in sessions:
        session.start()
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(VOCAB, (2, prompt), generator=generator)
    logits: list[list[torch.Tensor]] = [[] for _ in sessions]
    for step in range(steps + 1):
        if step == 2 and dense.model.chunks:
            ids = torch.cat([ids, torch.randint(VOCAB, (2, 2), generator=generator)], 1)
        for session, seen in zip(sessions, logits, strict=True):
            seen.append(session.feed(ids))
        ids = logits[0][-1][:, -1:].argmax(-1)
    return logits
