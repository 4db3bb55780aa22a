"""How the tokens of a tier are stored: bits, scale groups and buffer shapes, and the text form that ops carry.

A side (keys or values) of a tier has a :class:`SideFormat`; a tier has two; a layer has a list of tiers
(:class:`LayerFormat`). Ops take the format as one short string, which is readable in a printed graph::

    8:t1c64,8:t1c64|4:t64c1,2:t1c32        # high tier 8-bit per token, low tier keys per channel, values per token
    8:t1c64,8:t1c64|4:t64c1~gptq,2:t1c64~unbiased+rotate:v    # other rounding in the low tier, values rotated
    fp,fp                                  # one tier in the model's own dtype: the full cache
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

CODE_BITS = (2, 3, 4, 8)
"""Widths of integer codes. 16 stands for floating point and has no codes."""

FLOAT_NAMES = {"fp": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Floating-point sides: ``fp`` keeps the model's dtype, the others cast."""

BUFFERS_PER_TIER = 7

FITS = ("", "clip", "unbiased", "gptq", "hqq", "lloyd")
"""How numbers become codes: by their range (the first), or see :mod:`fit`; ``lloyd`` has levels that are not evenly
spaced (:mod:`quantize`)."""


class CannotPackError(ValueError):
    """A head dimension that a format cannot pack or group; another format may."""


@dataclass(frozen=True)
class SideFormat:
    """Keys or values of one tier.

    Attributes:
        bits: 16 for floating point, or the width of a code: 8, 4, 3, 2.
        tokens: consecutive slots that share one scale and zero (1: per token; 64: blocks of 64 slots).
        channels: neighbouring channels that share one scale and zero (1: per channel).
        balanced: codes are of ``x * balancer`` (MiKV, arXiv 2402.18096, section 3.2), keys only.
        float_name: with 16 bits, ``"fp"`` (the model's dtype), ``"bf16"`` or ``"fp16"``.
        fit: how numbers are rounded, one of ``FITS``.
    """

    bits: int
    tokens: int = 1
    channels: int = 0
    balanced: bool = False
    float_name: str = "fp"
    fit: str = ""

    def __post_init__(self) -> None:
        if self.bits != 16 and self.bits not in CODE_BITS:
            raise ValueError(f"{self.bits} bits are not offered; choose 16, 8, 4, 3 or 2")
        if self.bits != 16 and (self.tokens < 1 or self.channels < 1):
            raise ValueError("a coded side needs a positive number of tokens and channels per scale")
        if self.fit not in FITS:
            raise ValueError(f"there is no rounding {self.fit!r}; choose one of {', '.join(map(repr, FITS))}")

    @property
    def is_float(self) -> bool:
        """True when the side stores floating-point numbers instead of codes."""
        return self.bits == 16

    def code_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the codes buffer: uint8, or the floating-point dtype of a 16-bit side."""
        return (FLOAT_NAMES[self.float_name] or model_dtype) if self.is_float else torch.uint8

    def code_width(self, head_dim: int) -> int:
        """Elements of the codes buffer per token: packed bytes, or channels for floating point."""
        return head_dim if self.is_float else head_dim * self.bits // 8

    def check(self, head_dim: int) -> None:
        """Raise CannotPackError if tokens of ``head_dim`` channels cannot be packed or grouped this way."""
        if self.is_float:
            return
        planes = {8: 1, 4: 2, 2: 4, 3: 8}[self.bits]
        if head_dim % planes:
            raise CannotPackError(f"{self.bits}-bit codes need a head_dim that {planes} divides; it is {head_dim}")
        if head_dim % self.channels:
            raise CannotPackError(f"scale groups of {self.channels} channels do not divide the head_dim {head_dim}")

    def __str__(self) -> str:
        if self.is_float:
            return self.float_name
        fit = f"~{self.fit}" if self.fit else ""
        return f"{self.bits}:t{self.tokens}c{self.channels}{'b' if self.balanced else ''}{fit}"

    @classmethod
    def parse(cls, text: str) -> SideFormat:
        """Inverse of ``str``."""
        if text in FLOAT_NAMES:
            return cls(bits=16, float_name=text)
        found = re.fullmatch(r"(\d+):t(\d+)c(\d+)(b?)(?:~(\w+))?", text)
        if not found:
            raise ValueError(f"not a side format: {text!r}")
        bits, tokens, channels, balanced, fit = found.groups()
        return cls(int(bits), int(tokens), int(channels), bool(balanced), fit=fit or "")


@dataclass(frozen=True)
class TierFormat:
    """Keys and values of one tier."""

    key: SideFormat
    value: SideFormat

    @property
    def block(self) -> int:
        """Slots are filled in multiples of this many tokens."""
        return max(self.key.tokens, self.value.tokens)

    def __str__(self) -> str:
        return f"{self.key},{self.value}"


@dataclass(frozen=True)
class Watch:
    """How later calls feed the scores.

    Attributes:
        rows: the call's last query rows whose attention counts; 0 means all.
        pool: width of a max-pool over the scores of the call's own tokens.
        least: calls of fewer new tokens are not watched.
        memory: 0 adds up the attention of all calls. Otherwise a score is the mean attention per query head over about
            the last ``memory`` query rows; 1 replaces it in each call.
        joint: all KV heads get the mean (or the maximum) of their scores, so that all keep the same tokens.
        heads: how the query heads of a KV head are put together in a call: ``"sum"`` or ``"max"``.
    """

    rows: int = 0
    pool: int = 1
    least: int = 1
    memory: int = 0
    joint: bool = False
    heads: str = "sum"

    @property
    def is_plain(self) -> bool:
        """Attention is summed over rows, heads and calls, as the primitive ``add_scores`` does it."""
        return not (self.memory or self.joint or self.heads != "sum")

    def __str__(self) -> str:
        more = (f"m{self.memory}" if self.memory else "") + (",joint" if self.joint else "")
        return f"watch:r{self.rows}p{self.pool}n{self.least}{more}" + ("" if self.heads == "sum" else f",{self.heads}")

    @classmethod
    def parse(cls, text: str) -> Watch:
        """Inverse of ``str``."""
        found = re.fullmatch(r"watch:r(\d+)p(\d+)n(\d+)(?:m(\d+))?(,joint)?(?:,(max))?", text)
        if not found:
            raise ValueError(f"not a watch: {text!r}")
        *numbers, joint, heads = found.groups()
        rows, pool, least, memory = (int(number or 0) for number in numbers)
        return cls(rows, pool, least, memory, bool(joint), heads or "sum")


@dataclass(frozen=True)
class Rank:
    """What is made of the scores when tokens have to leave tier 0; the stored scores stay as they are.

    Attributes:
        by_age: scores are divided by the number of queries that could have attended to the token.
        by_value: scores are multiplied by the L2 norm of the token's value.
        floor: added to the scores before values weigh them.
        joint: ranks are averaged over the KV heads, so that all lose the same tokens.
        anew: name of the scorer that scores tier 0's tokens again by their stored keys and values. A stored score of
            -inf then marks a token that nobody may attend to.
    """

    by_age: bool = False
    by_value: bool = False
    floor: float = 0.0
    joint: bool = False
    anew: str = ""

    @property
    def marks_hidden(self) -> bool:
        """Tokens that nobody may attend to need a mark, as no lack of attention ranks them lowest."""
        return bool(self.anew or self.floor)

    def __str__(self) -> str:
        words = [
            "age" if self.by_age else "",
            f"value{self.floor or ''}" if self.by_value else "",
            "joint" if self.joint else "",
            f"anew={self.anew}" if self.anew else "",
        ]
        return "rank:" + ",".join(filter(None, words))

    @classmethod
    def parse(cls, text: str) -> Rank:
        """Inverse of ``str``."""
        found = re.fullmatch(r"rank:(age\b)?,?(?:(value)([\d.e-]*))?,?(joint)?,?(?:anew=([\w-]+))?", text)
        if not found:
            raise ValueError(f"not a rank: {text!r}")
        age, value, floor, joint, anew = found.groups()
        return cls(bool(age), bool(value), float(floor or 0), bool(joint), anew or "")


@dataclass(frozen=True)
class LayerFormat:
    """The tiers of one layer, highest precision first. New tokens enter tier 0; demotion goes to the others.

    ``scored``: tier 0 keeps a score per slot, which only tokens that can still be demoted or evicted need.
    ``watch``: how later calls add the attention that tier 0's tokens received to their scores; None if they do not.
    ``rank``: what else than its score decides whether a token leaves; None if nothing does.
    ``rotated``: ``"k"``, ``"v"`` or ``"kv"``: these are multiplied by an orthogonal matrix (:mod:`rotation`).
    """

    tiers: tuple[TierFormat, ...]
    scored: bool = False
    watch: Watch | None = None
    rank: Rank | None = None
    rotated: str = ""

    @property
    def has_scores(self) -> bool:
        """Tier 0 keeps a score per slot."""
        return self.scored or self.watch is not None or len(self.tiers) > 1

    @property
    def is_balanced(self) -> bool:
        """True when some keys are stored multiplied by the channel balancer."""
        return any(t.key.balanced for t in self.tiers)

    def __str__(self) -> str:
        flags = ("+scored" if self.scored else "") + "".join(f"+{x}" for x in (self.watch, self.rank) if x)
        flags += f"+rotate:{self.rotated}" if self.rotated else ""
        return "|".join(map(str, self.tiers)) + flags

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> LayerFormat:
        """Inverse of ``str``."""
        body, *flags = text.split("+")
        tiers = []
        for tier in body.split("|"):
            key, _, value = tier.partition(",")
            tiers.append(TierFormat(SideFormat.parse(key), SideFormat.parse(value)))
        watch, rank, rotated = None, None, ""
        for flag in flags:
            if flag.startswith("watch:"):
                watch = Watch.parse(flag)
            elif flag.startswith("rank:"):
                rank = Rank.parse(flag)
            elif flag.startswith("rotate:"):
                rotated = flag.removeprefix("rotate:")
            elif flag != "scored":
                raise ValueError(f"not a flag of a layer's format: {flag!r}")
        return cls(tuple(tiers), "scored" in flags, watch, rank, rotated)


class SideBuffers(NamedTuple):
    """Buffers of the keys or the values of one tier, C slots, D channels, g = channels, b = tokens per scale."""

    codes: torch.Tensor
    """[B, H_kv, C, code_width] uint8, or the floating-point numbers themselves."""
    scales: torch.Tensor
    """[B, H_kv, C / b, D / g] float16; no elements for floating point."""
    zeros: torch.Tensor
    """[B, H_kv, C / b, D / g] float16: the group's minimum; no elements for floating point."""


class TierBuffers(NamedTuple):
    """Buffers of one tier."""

    key: SideBuffers
    value: SideBuffers
    positions: torch.Tensor
    """[B, H_kv, C] int32: the token's place in the sequence."""

    @property
    def capacity(self) -> int:
        """Slots per (batch row, KV head)."""
        return self.positions.shape[2]


class StoreBuffers(NamedTuple):
    """All buffers of a layer, the typed form of the flat list that ops take."""

    tiers: tuple[TierBuffers, ...]
    scores: torch.Tensor
    """[B, H_kv, C_0] float32 importance of tier 0's slots; no elements when nothing can be demoted."""
    balancer: torch.Tensor
    """[B, H_kv, D] float32; no elements when no side is balanced."""

    @classmethod
    def from_list(cls, tensors: Sequence[torch.Tensor]) -> StoreBuffers:
        """Group the flat list: seven per tier, then scores and balancer."""
        tiers = []
        for i in range(0, len(tensors) - 2, BUFFERS_PER_TIER):
            t = tensors[i : i + BUFFERS_PER_TIER]
            tiers.append(TierBuffers(SideBuffers(*t[0:3]), SideBuffers(*t[3:6]), t[6]))
        return cls(tuple(tiers), tensors[-2], tensors[-1])

    def to_list(self) -> list[torch.Tensor]:
        """The flat list that ops take."""
        flat: list[torch.Tensor] = []
        for tier in self.tiers:
            flat += [*tier.key, *tier.value, tier.positions]
        return flat + [self.scores, self.balancer]


def buffer_names(num_tiers: int) -> list[str]:
    """Names of the flat list's tensors, in order."""
    side = ("codes", "scales", "zeros")
    names = []
    for i in range(num_tiers):
        names += [f"tier{i}_{s}_{part}" for s in ("key", "value") for part in side] + [f"tier{i}_positions"]
    return names + ["scores", "balancer"]


def _side_shapes(
    fmt: SideFormat, lead: tuple[int, int], capacity: int, dim: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    codes = ((*lead, capacity, fmt.code_width(dim)), fmt.code_dtype(dtype))
    if fmt.is_float:
        params: tuple[int, ...] = (*lead, 0, 0)
    else:
        params = (*lead, capacity // fmt.tokens, dim // fmt.channels)
    return [codes, (params, torch.float16), (params, torch.float16)]


def buffer_shapes(
    fmt: LayerFormat,
    batch: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    capacities: Sequence[int],
    dtype: torch.dtype,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the flat buffer list.

    Args:
        fmt: the layer's tiers.
        batch, kv_heads, key_dim, value_dim: B, H_kv and the channels of keys and values.
        capacities: slots of each tier; multiples of the tier's block.
        dtype: the model's dtype, for sides stored as ``fp``.
    """
    lead = (batch, kv_heads)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    for tier, capacity in zip(fmt.tiers, capacities, strict=True):
        shapes += _side_shapes(tier.key, lead, capacity, key_dim, dtype)
        shapes += _side_shapes(tier.value, lead, capacity, value_dim, dtype)
        shapes.append(((*lead, capacity), torch.int32))
    shapes.append(((*lead, capacities[0] if fmt.has_scores else 0), torch.float32))
    shapes.append(((*lead, key_dim if fmt.is_balanced else 0), torch.float32))
    return shapes


class Orders(NamedTuple):
    """What the host has decided for one call; travels to the ops as one small int64 tensor on the CPU.

    All (batch row, KV head) pairs hold the same number of tokens in a tier, so these are plain numbers that follow
    from the sequence length alone: no step has to wait for the device to know them.
    """

    length: int
    """Tokens seen before this call; the call's own tokens have positions length, length + 1, ..."""
    sinks: int
    """Positions below this one are never demoted."""
    recent_from: int
    """Positions from this one on are never demoted."""
    counts: tuple[int, ...]
    """Slots in use of each tier before the call (compress: tokens that each tier receives)."""
    victims: int
    """Tokens that leave tier 0 at the end of this call."""
    moves: tuple[int, ...]
    """Of those, how many go to tier 1, 2, ...: best scores first. The rest is evicted."""
    first: int = 0
    """Position of the first token that the call sees: column 0 of its mask. Older ones have left a sliding window."""
    fresh: bool = False
    """The store is empty, and the call's own tokens fill it as a prompt does: ``counts`` go to each tier."""
    stale: int = 0
    """Columns behind the call's own tokens that hold older ones, which the store has dropped: nobody may see them."""
    replaced: int = 0
    """Of the last of ``moves``, how many tokens take the place of stored ones, which are evicted."""
    replaced_at: int = 0
    """The first slot of those."""

    @property
    def lower_counts(self) -> tuple[int, ...]:
        """Slots in use of tiers 1, 2, ... after the call."""
        after = [count + move for count, move in zip(self.counts[1:], self.moves, strict=True)]
        return (*after[:-1], after[-1] - self.replaced) if after else ()

    @property
    def destinations(self) -> list[tuple[int, int, int]]:
        """Where the tokens that move down go, best first: number of the tier, first slot, tokens."""
        found = [(i, start, count) for i, (start, count) in enumerate(zip(self.counts[1:], self.moves, strict=True), 1)]
        if self.replaced:
            tier, start, count = found.pop()
            found += [(tier, start, count - self.replaced), (tier, self.replaced_at, self.replaced)]
        return [(tier, start, count) for tier, start, count in found if count]

    def encode(self) -> torch.Tensor:
        """The int64 tensor."""
        head = [self.length, self.sinks, self.recent_from, self.victims, self.first, int(self.fresh), self.stale]
        head += [self.replaced, self.replaced_at]
        return torch.tensor([*head, *self.counts, *self.moves], dtype=torch.int64)

    @classmethod
    def decode(cls, tensor: torch.Tensor, num_tiers: int) -> Orders:
        """Inverse of :meth:`encode`; ``tensor`` is on the CPU."""
        return _decoded(tuple(tensor.tolist()), num_tiers)

    @classmethod
    def encoded_size(cls, num_tiers: int) -> int:
        """Elements of the int64 tensor."""
        return 9 + 2 * num_tiers - 1


@lru_cache(maxsize=8)
def _decoded(numbers: tuple[int, ...], num_tiers: int) -> Orders:
    """The orders; mostly those of the layer before."""
    length, sinks, recent_from, victims, first, fresh, stale, replaced, replaced_at, *rest = numbers
    counts, moves = tuple(rest[:num_tiers]), tuple(rest[num_tiers:])
    seen = (first, bool(fresh), stale)
    return Orders(length, sinks, recent_from, counts, victims, moves, *seen, replaced, replaced_at)
