"""Plans: the tiers of a layer, and how many tokens each of them holds at a given sequence length.

A plan answers in plain numbers that follow from the length alone, so the host knows every tier's fill without asking
the device. Which tokens those are differs per (batch row, KV head) and only the device knows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from mikv_compile.config import MOST_TOKENS, Options
from mikv_compile.errors import OptionError
from mikv_compile.kernels.formats import LayerFormat, Orders, Rank, SideFormat, TierFormat, buffer_shapes
from mikv_compile.policies import POLICIES
from mikv_compile.quantizers import QUANTIZERS

_UNIFORM_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_FLOATS = ("fp", "bf16", "fp16")

MOST_LAYERS = 100_000
"""A layer's number in the option ``layers`` lies below."""

GROWTH = 32
"""A tier that is full grows by 1/32, or by one step, so little of a long cache is spare."""

PYRAMID_BETA = 20
"""In a pyramid the highest layer gets 1/20 of the mean (arXiv 2406.02069)."""

SLOT_STEP = 32
"""A tier grows to a multiple of this many slots, or of its block."""

FIRST_STEP = 8
"""The same for the slots that are allocated first, when the number of tokens is known."""


@dataclass(frozen=True)
class Tier:
    """One entry of a tier list such as ``int8:0.05``.

    Attributes:
        key_bits, value_bits: 16 for floating point, or 8, 4, 3, 2.
        float_name: what 16 bits stand for: ``fp`` (the model's dtype), ``bf16``, ``fp16``.
        share: part of all tokens (0 to 1), or a number of tokens (int), or None: all that no other tier takes.
        less: tokens that are taken off the share. A budget pays with them for what is of one size at any length.
    """

    key_bits: int
    value_bits: int
    float_name: str
    share: float | int | None
    less: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether it takes a part of the tokens only."""
        return self.share is not None and not (isinstance(self.share, float) and self.share >= 1.0)

    def quota(self, length: int) -> int:
        """Tokens of the share at a sequence length; the whole length without one."""
        if self.share is None:
            return length
        tokens = min(self.share, length) if isinstance(self.share, int) else int(self.share * length + 1e-9)
        return max(tokens - self.less, 0)


def _is_count(text: str) -> bool:
    """Whether a text is a number of tokens or layers: decimal digits, few enough for positions to count so far."""
    return text.isdecimal() and len(text) <= 10 and int(text) < MOST_TOKENS


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """Parse a tier list: ``FORMAT[:SHARE]``, comma-separated, highest precision first.

    FORMAT is ``fp``, ``bf16``, ``fp16``, ``int8``, ``int4``, ``int3``, ``int2``, or keys and values apart, as in
    ``k4v2`` and ``k16v8``. SHARE is a fraction of all tokens (``0.2``) or a number of tokens (``512``). Without one,
    the last tier takes all tokens that are left; when every tier has a share, tokens beyond all shares are evicted.

    Raises:
        OptionError: if the text does not parse, with what is wrong.
    """
    tiers = []
    entries = [e.strip() for e in text.split(",")]
    for i, entry in enumerate(entries):
        name, colon, share_text = (p.strip() for p in entry.partition(":"))
        apart = re.fullmatch(r"k(\d+)v(\d+)", name)
        if name in _FLOATS:
            bits: tuple[int, int] = (16, 16)
        elif name in _UNIFORM_BITS:
            bits = (_UNIFORM_BITS[name],) * 2
        elif apart and all(int(b) in (16, 8, 4, 3, 2) for b in apart.groups()):
            bits = (int(apart.group(1)), int(apart.group(2)))
        else:
            raise OptionError(
                f"tier {entry!r}: unknown format {name!r}; formats are fp, bf16, fp16, int8, int4, int3, int2, or bits "
                "of 16, 8, 4, 3, 2 for keys and values apart, such as k4v2"
            )
        share: float | int | None = None
        part, minus, less_text = (p.strip() for p in share_text.partition("-"))
        if colon:
            try:
                number = float(part)
            except ValueError:
                number = -1.0
            if "." in part and 0 <= number <= 1:
                share = number
            elif _is_count(part) and int(part) > 1 and not minus:
                share = int(part)
            elif number in (0.0, 1.0):
                share = number
            if share is None or (minus and not _is_count(less_text)):
                raise OptionError(
                    f"tier {entry!r}: share {share_text!r} is neither from 0 to 1, nor such a part less some tokens "
                    "(0.5-85), nor a number of tokens"
                )
        elif i < len(entries) - 1:
            raise OptionError(f"tier {entry!r} needs a share, such as {name}:0.2; only the last tier may take the rest")
        tiers.append(Tier(*bits, name if name in _FLOATS else "fp", share, int(less_text or 0)))
    total = sum(t.share for t in tiers if isinstance(t.share, float))
    if total > 1 + 1e-9:
        raise OptionError(f"tiers {text!r}: the shares add up to more than 1")
    if total > 1 - 1e-9:
        # Nothing is beyond the shares, so nothing may be evicted.
        tiers[-1] = replace(tiers[-1], share=None, less=0)
    return tuple(tiers)


def check_tiers(options: Options) -> None:
    """Raise OptionError if the options name tiers that do not exist, or a pyramid of tiers without shares."""
    tiers = parse_tiers(options.resolved("tiers", "fp"))
    parse_layers(options.layers)
    if options.layer_budget == "pyramid" and options.budget is None and all(t.share is None for t in tiers):
        raise OptionError(
            "option 'layer_budget' is 'pyramid', but no tier has a share that layers could get more or less of; give "
            "tiers such as 'int8:0.02,k4v2' or 'int4:0.25', or a budget"
        )


def parse_layers(text: str | None) -> dict[int, tuple[Tier, ...]]:
    """Tiers by the number of the layer, from the option ``layers``.

    Raises:
        OptionError: if the text does not parse, with what is wrong.
    """
    chosen: dict[int, tuple[Tier, ...]] = {}
    for entry in (text or "").split(";"):
        if not entry.strip():
            continue
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*=(.*)", entry)
        numbers = found.group(1, 2) if found else ()
        if any(number and not (_is_count(number) and int(number) < MOST_LAYERS) for number in numbers):
            raise OptionError(f"option 'layers': {entry.strip()[:60]!r} names layers beyond {MOST_LAYERS}")
        first, last = (int(number or numbers[0]) for number in numbers) if found else (1, 0)
        if not found or last < first:
            raise OptionError(f"option 'layers': {entry.strip()!r} is not of the form '0-1=fp' or '5=int8:0.1,int4'")
        for i in range(first, last + 1):
            if i in chosen:
                raise OptionError(f"option 'layers' names layer {i} twice")
            chosen[i] = parse_tiers(found.group(3))
    return chosen


def check_named_layers(options: Options, layers: int, of: str) -> None:
    """Refuse an option ``layers`` that names layers beyond the ``layers`` that there are.

    Args:
        of: what has that many layers, for the message.

    Raises:
        OptionError: if it does.
    """
    beyond = max(parse_layers(options.layers), default=-1)
    if beyond >= layers:
        raise OptionError(
            f"option 'layers' names layer {beyond}, but {of} has {layers} layers with a KV cache, numbered from 0 to "
            f"{layers - 1}"
        )


def check_counts_no_layers(options: Options, reason: str) -> None:
    """Refuse the options that count the layers of the whole model, for a model compiled layer by layer.

    Raises:
        OptionError: if there is one.
    """
    pyramid = options.resolved("layer_budget", "uniform") == "pyramid"
    in_bytes = isinstance(options.budget, str)
    for name, counts in (
        ("layers", options.layers is not None), ("plan", options.plan is not None), ("budget", in_bytes),
        ("layer_budget", pyramid),
    ):  # fmt: skip
        if counts:
            raise OptionError(
                f"option {name!r} counts the layers of the whole model, but {reason}; compile it with regional=False, "
                "or choose tiers or a fractional budget, which are the same for each layer"
            )


def pyramid(tiers: tuple[Tier, ...], layer: int, layers: int) -> tuple[Tier, ...]:
    """The tiers of one layer of a pyramid (PyramidKV, arXiv 2406.02069): lower layers keep more tokens than others.

    Shares fall in a line from ``2 - 1/20`` times the given ones in the first layer to ``1/20`` of them in the last,
    less steeply where the first layer would get more than all tokens. Their mean over the layers is what was given,
    exactly so for numbers of tokens.
    """
    total = sum(tier.share for tier in tiers if isinstance(tier.share, float))
    steep = min(1 - 1 / PYRAMID_BETA, (1 - total) / total if total else 1.0)
    steep = max(steep, 0.0) * (layers > 1)
    # Layers in equal distance from the middle are paired, so that roundings cancel out.
    fall = steep * abs(2 * layer - (layers - 1)) / max(layers - 1, 1)
    sign = 1 if 2 * layer < layers - 1 else -1

    def scaled(tier: Tier) -> Tier:
        if tier.share is None:
            return tier
        more = tier.share * fall
        share = tier.share + sign * (int(more + 1e-9) if isinstance(tier.share, int) else more)
        return replace(tier, share=share, less=tier.less + sign * int(tier.less * fall))

    return tuple(map(scaled, tiers))


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps. Hashable; two layers with equal plans may share compiled code.

    Attributes:
        tiers: highest precision first; new tokens enter the first.
        format: the same tiers as buffers; see :mod:`mikv_compile.kernels.formats`.
        policy: what scores tokens, as the ops take it: a policy's name, maybe with ``+max``.
        window, sinks, recent_share, flush_every: as in :class:`~mikv_compile.config.Options`.
    """

    tiers: tuple[Tier, ...]
    format: LayerFormat
    policy: str
    window: int
    sinks: int
    recent_share: float
    flush_every: int
    slot_bytes: tuple[float, ...] = ()
    """Bytes of a token in each tier, per KV head."""

    def __deepcopy__(self, memo: object) -> LayerPlan:
        # Dynamo copies a handle's metadata into its guards; sharing keeps their comparison an identity check.
        return self

    @property
    def evicts(self) -> bool:
        """True when tokens beyond all shares are dropped."""
        return self.tiers[-1].is_bounded

    @property
    def is_fifo(self) -> bool:
        """True when tier 0 holds the newest tokens and the last tier the oldest, the same ones in every (row, head).

        Only such a store can drop tokens from its front. It needs at most two tiers: a middle tier that is full stays
        as it is, and newer tokens pass it by.
        """
        if self.evicts or len(self.tiers) > 2:
            return False
        return len(self.tiers) == 1 or (self.policy == "recent" and self.sinks == 0 and self.format.watch is None)

    def high_target(self, length: int) -> int:
        """Tokens that tier 0 should hold at a sequence length: its share, the window and the sinks."""
        if len(self.tiers) == 1 and not self.evicts:
            return length
        return min(length, self.tiers[0].quota(length) + self.window + self.sinks)

    def recent_from(self, length: int) -> int:
        """Positions from here on may not leave tier 0."""
        return max(length - self.window - int(self.recent_share * self.tiers[0].quota(length)), 0)

    def fill(self, length: int, tokens: int | None = None) -> Orders:
        """Where a prompt's tokens go; ``tokens`` are there of the ``length`` (all by default)."""
        tokens = length if tokens is None else tokens
        left = tokens - min(self.high_target(length), tokens)
        # What tier 0 holds beyond the tokens that may not leave it.
        room = tokens - left - min(self.sinks + length - self.recent_from(length), tokens)
        counts, spare = [tokens - left], 0.0
        for i, (tier, fmt) in enumerate(zip(self.tiers[1:], self.format.tiers[1:], strict=True), 1):
            due = min(tier.quota(length), left)
            take = due // fmt.block * fmt.block
            if tier.share is None and self.tiers[0].less and take + fmt.block <= due + room:
                take = -(-due // fmt.block) * fmt.block  # a budget leaves no rest in tier 0 that has a place below
            counts.append(take)
            left -= take
            spare += max(due - take, 0) * self.slot_bytes[i] / self.slot_bytes[0]
        if not self.evicts:
            counts[0] += left  # what does not fill a block waits in tier 0, or what fills one comes from it
        elif spare:
            # Tokens that do not fill a block leave their bytes to tier 0, in whole steps of its capacity.
            held = counts[0] + min(int(spare), left)
            counts[0] = max(counts[0], held // FIRST_STEP * FIRST_STEP)
        moves = (0,) * (len(counts) - 1)
        return Orders(0, self.sinks, self.recent_from(length), tuple(counts), 0, moves)

    def step(self, length: int, counts: tuple[int, ...], new: int, recycled: tuple[int, int] | None = None) -> Orders:
        """What happens when ``new`` tokens are appended to ``length`` earlier ones.

        Tokens leave tier 0 once at least ``flush_every`` of them can go. Tokens that a lower tier is due, but that do
        not fill one of its blocks yet, wait in tier 0. In a plan that evicts, tokens that leave tier 0 go to the last
        tier, and where that is full they take the place of a prompt's less important half, the least important first,
        and then of each other, the oldest first; a plan of one tier evicts them.

        Args:
            recycled: slots of the last tier that stay as they are, and the slot below which the next tokens are
                overwritten; see :meth:`recycling`. None: nothing may be.
        """
        after = length + new
        excess = max(counts[0] + new - self.high_target(after), 0)
        left, moves = excess, []
        for tier, fmt, count in zip(self.tiers[1:], self.format.tiers[1:], counts[1:], strict=True):
            due = left if tier.share is None else min(max(tier.quota(after) - count, 0), left)
            moves.append(due // fmt.block * fmt.block)
            left -= due
        evicted = replaced = at = 0
        if self.evicts:
            block = self.format.tiers[-1].block
            evicted = left // block * block
            if moves and recycled is not None:
                at, replaced = _recycle(counts[-1] // block * block, recycled, evicted)
                moves[-1] += replaced
                evicted -= replaced
        victims = sum(moves) + evicted
        if victims < self.flush_every:
            victims, replaced, at, moves = 0, 0, 0, [0] * len(moves)
        orders = Orders(length, self.sinks, self.recent_from(after), counts, victims, tuple(moves))
        return orders._replace(replaced=replaced, replaced_at=at) if replaced else orders

    def recycling(self, count: int) -> tuple[int, int]:
        """What :meth:`step` may overwrite of a last tier whose ``count`` tokens lie in order of importance."""
        if not count or not self.evicts or len(self.tiers) < 2:
            return -1, 0  # tokens will come one after the other: a ring, upwards from the oldest
        block = self.format.tiers[-1].block
        return count // 2 // block * block, count // block * block

    def recycled(self, before: tuple[int, int], orders: Orders) -> tuple[int, int]:
        """The same after a call: the cursor goes down, and from where nothing is left below it back to the end."""
        kept, cursor = before
        if kept < 0:
            return kept, orders.replaced_at + orders.replaced if orders.replaced else cursor
        cursor = orders.replaced_at if orders.replaced else cursor
        end = orders.lower_counts[-1] if orders.moves else 0
        return kept, end // self.format.tiers[-1].block * self.format.tiers[-1].block if cursor <= kept else cursor

    def capacities(self, counts: tuple[int, ...], old: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Slots to allocate for ``counts`` tokens in each tier.

        ``old`` are the present capacities, which are kept while they suffice; otherwise they grow in chunks.
        """
        slots = []
        for i, (fmt, count) in enumerate(zip(self.format.tiers, counts, strict=True)):
            have = 0 if old is None else old[i]
            if count <= have:
                slots.append(have)
                continue
            step = max(fmt.block, FIRST_STEP if old is None else SLOT_STEP)
            room = count if old is None else max(count, have + have // GROWTH)
            slots.append(-(-room // step) * step)
        return tuple(slots)

    def nbytes(self, length: int, batch: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of all buffers after a prompt of ``length`` tokens, spare capacity included."""
        slots = self.capacities(self.fill(length).counts)
        shapes = buffer_shapes(self.format, batch, kv_heads, key_dim, value_dim, slots, dtype)
        return sum(math.prod(shape) * kind.itemsize for shape, kind in shapes)


@dataclass(frozen=True)
class CacheShape:
    """What a budget has to know of a layer: B, H_kv, D of keys and of values, dtype, and how many layers share it."""

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    layers: int = 1

    def dense_nbytes(self, length: int) -> int:
        """Bytes of this layer's dense keys and values at ``length`` tokens."""
        return self.batch * self.kv_heads * length * (self.key_dim + self.value_dim) * self.dtype.itemsize


def make(
    options: Options, tiers: tuple[Tier, ...], key_dim: int, value_dim: int, dtype: torch.dtype = torch.bfloat16
) -> LayerPlan:
    """The plan of a layer with these tiers.

    Raises:
        OptionError: for options that cannot work on any model.
        CannotPackError: if the head dimensions cannot be packed or grouped as the plan wants.
    """
    names = options.quantizers
    key_quantizer, value_quantizer = (QUANTIZERS[name] for name in names)
    formats = []
    for i, tier in enumerate(tiers):
        sides = []
        for bits, make, dim in (
            (tier.key_bits, key_quantizer.key, key_dim), (tier.value_bits, value_quantizer.value, value_dim)
        ):  # fmt: skip
            side = SideFormat(16, float_name=tier.float_name) if bits == 16 else make(bits, dim, i == 0)
            side.check(dim)
            sides.append(side)
        formats.append(TierFormat(*sides))
    block = max(f.block for f in formats)
    flush = options.resolved("flush_every", max(block, 64))
    if flush % block:
        raise OptionError(
            f"flush_every={flush} does not go with quantizer {' and '.join(dict.fromkeys(map(repr, names)))}, which "
            f"fills blocks of {block} tokens; use a multiple of {block}, or quantizer='mikv'"
        )
    if "k" in key_quantizer.rotates and any(f.key.balanced for f in formats):
        raise OptionError(
            f"quantizer {names[0]!r} rotates keys and balances their channels; the balancer is made for channels as "
            "they are, so a key quantizer can do one of both"
        )
    rotated = ""
    for letter, quantizer, coded in (
        ("k", key_quantizer, any(not f.key.is_float for f in formats)),
        ("v", value_quantizer, any(not f.value.is_float for f in formats)),
    ):
        rotated += letter if coded and letter in quantizer.rotates else ""
    if dtype is torch.float16 and any(f.key.is_float or f.value.is_float for f in formats):
        rotated = ""  # a rotation can gather a vector in one channel, beyond the range of a float16 tier
    name = options.resolved("policy", "snapkv")
    policy, heads = POLICIES[name], options.resolved("heads", "sum")
    evicts = tiers[-1].is_bounded
    movable = evicts or len(tiers) > 1
    watch = policy.watch if movable else None
    if watch is not None:
        # What is dropped is lost for good, so generated tokens need real scores too, not only those of a prompt.
        watch = replace(watch, least=1 if evicts else watch.least, heads=heads)
    by_value = options.resolved("value_norm", policy.value_norm)
    rank = Rank(
        by_age=policy.by_age,
        by_value=by_value,
        floor=policy.floor if by_value else 0.0,
        joint=by_value and policy.watch is not None and policy.watch.joint,
        anew=name if policy.anew else "",
    )
    return LayerPlan(
        tiers=tiers,
        format=LayerFormat(tuple(formats), movable, watch, rank if movable and rank != Rank() else None, rotated),
        policy=name if heads == "sum" else f"{name}+{heads}",
        window=options.resolved("window", 64),
        sinks=options.resolved("sinks", 4),
        recent_share=options.resolved("recent_share", policy.recent_share),
        flush_every=flush,
        slot_bytes=tuple(
            _slot_bytes(f, key_dim, value_dim, dtype.itemsize) + (4 if movable and i == 0 else 0)
            for i, f in enumerate(formats)
        ),
    )


def _recycle(count: int, recycled: tuple[int, int], wanted: int) -> tuple[int, int]:
    """First slot, and number, of the tokens of a tier that are overwritten next; at most ``wanted``, all neighbours."""
    kept, cursor = recycled
    if kept < 0:
        taken = min(wanted, count)
        return cursor if cursor + taken <= count else 0, taken
    taken = max(min(wanted, count - kept), 0)
    if cursor - kept < taken:
        cursor = count  # one range has to do: a long chunk begins anew at the end
    return cursor - taken, taken


def _slot_bytes(fmt: TierFormat, key_dim: int, value_dim: int, itemsize: int = 2) -> float:
    """Bytes of a token in a tier, per KV head, its position included; ``itemsize`` is that of the model's dtype."""
    total = 4.0
    for side, dim in ((fmt.key, key_dim), (fmt.value, value_dim)):
        if side.is_float:
            total += dim * (itemsize if side.float_name == "fp" else 2)
        else:
            total += dim * side.bits / 8 + 4 * dim / side.channels / side.tokens
    return total
