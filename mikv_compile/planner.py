"""The planner: from options, and a budget, to the tiers of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mikv_compile.config import Options, parse_size
from mikv_compile.errors import OptionError
from mikv_compile.kernels.formats import CannotPackError, buffer_shapes
from mikv_compile.plan import FIRST_STEP, GROWTH, CacheShape, LayerPlan, Tier, make, parse_layers, parse_tiers, pyramid

BUDGET_LENGTH = 4096
"""Sequence length at which a fractional budget has to leave room for window and sinks."""

ROUNDING = 64
"""Tokens that the high tier must have to spare, so that whole blocks of a low one below 8 bits can be filled."""

KEEPING = (("fp", "int8"), ("int8", "int4"), ("int8", "k4v3"), ("int8", "k4v2"))
"""High and low tier that hold all tokens, best first; the budget says how many are in the high one."""

MIXED = ("int8", "k4v2", "k3v2")
"""Tiers that hold all tokens where the last of these would not: window and sinks, as many as fit, the rest."""

WAITING = 50
"""Of the up to 63 tokens that fill no block of ``MIXED`` and wait in the high tier: what a budget pays for."""

EVICTING = ("int8", "k4v2", 0.01)
"""High and low tier below that, and the high tier's share; the budget says how many tokens the low one keeps."""


@dataclass(frozen=True)
class Planner:
    """Makes the plan of each layer from the options. Raises OptionError for options that cannot work on any model."""

    options: Options

    def __post_init__(self) -> None:
        for tiers in (parse_tiers(self.options.resolved("tiers", "fp")), *parse_layers(self.options.layers).values()):
            make(self.options, tiers, 64, 64)

    def layer(self, index: int, site: CacheShape, sliding: bool = False) -> LayerPlan:
        """The plan of layer ``index`` (in graph order).

        Args:
            index, site: which layer, and its sizes.
            sliding: the layer drops its oldest tokens. It then keeps them first in, first out
                (:attr:`LayerPlan.is_fifo`): the first and the last tier of the plan, policy ``recent``, no sinks, and
                nothing is evicted, as the window bounds the cache anyway.

        Raises:
            CannotPackError: if the head dimensions cannot be packed or grouped as the plan wants.
        """
        options = self.options
        by_hand = parse_layers(options.layers).get(index)
        tiers = by_hand or self._chosen(index, site)
        if sliding:
            tiers = (*tiers[:1], *tiers[1:][-1:])
            tiers = (*tiers[:-1], replace(tiers[-1], share=None, less=0))
            options = options.replace(policy="recent", sinks=0, heads=None, value_norm=None)
        elif by_hand is None and options.resolved("layer_budget", "uniform") == "pyramid":
            if isinstance(options.budget, str):
                # Capacities are rounded up in each layer: a block less per layer pays for that.
                block = max(tier.block for tier in _plan(options, tiers, site).format.tiers)
                tiers = tuple(
                    replace(t, share=max(t.share - block, 0)) if isinstance(t.share, int) else t for t in tiers
                )
            tiers = pyramid(tiers, index, site.layers)
        by_budget = by_hand is None and options.budget is not None and options.plan is None
        if by_budget and tiers[-1].is_bounded and options.resolved("policy", "snapkv") == "snapkv":
            # Where tokens are lost for good, those of large values are better kept (docs/fidelity.md).
            options = options.replace(value_norm=options.resolved("value_norm", True))
        return _plan(options, tiers, site)

    def _chosen(self, index: int, site: CacheShape) -> tuple[Tier, ...]:
        """The tiers by a plan file, a budget or the tiers of all layers."""
        options = self.options
        if options.plan is not None:
            from mikv_compile.sensitivity import planned  # it needs the planner's own parts

            return planned(options, index, site)
        if options.budget is None:
            return parse_tiers(options.resolved("tiers", "fp"))
        return (tiers_for_bytes if isinstance(options.budget, str) else tiers_for_fraction)(options, site)


def _plan(options: Options, tiers: tuple[Tier, ...], site: CacheShape) -> LayerPlan:
    return make(options, tiers, site.key_dim, site.value_dim, site.dtype)


def tiers_for_fraction(options: Options, site: CacheShape) -> tuple[Tier, ...]:
    """Tiers whose bytes are ``budget`` times the dense bytes, from ``BUDGET_LENGTH`` tokens on.

    What is of one size at any length is taken off a share (``0.41-85``), so longer prompts do not leave bytes unused.
    In short ones, window and sinks may alone be more than their part: 5 % above at 2,048 tokens, 10 % at 1,024.
    While tokens are generated, up to ``flush_every`` of them wait in the high tier on top.

    Raises:
        OptionError: for a budget that window and sinks alone exceed at ``BUDGET_LENGTH`` tokens.
    """
    assert isinstance(options.budget, int | float)
    if options.budget >= 1:
        return parse_tiers("fp")
    per_token = options.budget * (site.key_dim + site.value_dim) * site.dtype.itemsize
    always = options.resolved("window", 64) + options.resolved("sinks", 4)

    def slots(*names: str) -> tuple[float, ...]:
        """Bytes of a token in each of these tiers, and last those of a head that do not depend on the length.

        Raises CannotPackError for a head dimension that cannot be packed so.
        """
        plan = _plan(options, parse_tiers(",".join([f"{name}:0.1" for name in names[:-1]] + [names[-1]])), site)
        return *plan.slot_bytes, 4.0 * site.key_dim if plan.format.is_balanced else 0.0

    for high, low in KEEPING:
        try:
            of_high, of_low, fixed = slots(high, low)
        except CannotPackError:
            continue
        share = (per_token - of_low) / (of_high - of_low)
        if share >= 1:
            return parse_tiers(high)
        # Capacities are rounded up, which the share pays for in advance.
        less = math.ceil(always + (fixed + FIRST_STEP * of_high) / (of_high - of_low))
        if share * BUDGET_LENGTH >= less + (ROUNDING if low != "int8" else 0):
            return parse_tiers(f"{high}:{_floor(share)}-{less},{low}")
    mixed = _mixed(slots, per_token, always)
    if mixed is not None:
        return mixed
    high, low, high_share = EVICTING
    of_high, of_low, fixed = slots(high, low)
    share = (per_token - of_high * high_share) / of_low
    if share * BUDGET_LENGTH < (of_high * always + fixed) / of_low:  # the few most important tokens are not affordable
        high_share, share = 0.0, per_token / of_low
    less = math.ceil((of_high * (always + FIRST_STEP / 2) + fixed) / of_low)
    if share * BUDGET_LENGTH < less:
        least = less * of_low / BUDGET_LENGTH / (site.key_dim + site.value_dim) / site.dtype.itemsize
        raise OptionError(
            f"budget={options.budget} is below the least that window={options.resolved('window', 64)} and "
            f"sinks={options.resolved('sinks', 4)} allow here, {least:.3f}; raise it, or lower those"
        )
    most = 1.0 - high_share - 1e-4
    less -= min(
        math.floor(max(share - most, 0.0) * BUDGET_LENGTH), less
    )  # a share beyond all tokens pays for the window
    return parse_tiers(f"{high}:{high_share},{low}:{_floor(min(share, most))}-{less}")


def _mixed(slots: Callable[..., tuple[float, ...]], per_token: float, always: int) -> tuple[Tier, ...] | None:
    """``MIXED`` with as many tokens in the middle tier as ``per_token`` bytes allow, or None if it is too few bytes."""
    high, middle, low = MIXED
    try:
        of_high, of_middle, of_low, fixed = slots(*MIXED)
    except CannotPackError:
        return None
    if of_low >= of_middle:  # rounding up may make them equal, where heads are small
        return None
    high_share = max((per_token - of_middle) / (of_high - of_middle), 0.0)
    share = min((per_token - of_low) / (of_middle - of_low), 1.0 - high_share)
    # What the window and waiting tokens cost beyond the low tier is paid for by tokens that go down to it. A share of
    # the high tier beyond the window gives up tokens to fill a block, so fewer wait.
    beyond = high_share * BUDGET_LENGTH - always
    unpaid = max(-beyond, 0.0) + max(WAITING - max(beyond, 0.0), 0.0)
    less = math.ceil((fixed + unpaid * (of_high - of_low)) / (of_middle - of_low))
    if share * BUDGET_LENGTH < less:
        return None
    return parse_tiers(f"{high}:{_floor(high_share)}-{always},{middle}:{_floor(share)}-{less},{low}")


def _floor(share: float) -> str:
    return f"{math.floor(share * 1e5) / 1e5:.5f}"


def tiers_for_bytes(options: Options, site: CacheShape) -> tuple[Tier, ...]:
    """Tiers of fixed token counts whose bytes never exceed this layer's part of the budget; the rest is evicted."""
    assert isinstance(options.budget, str)
    limit = parse_size(options.budget) / site.layers
    high, low, _ = EVICTING

    def size(tokens: int) -> int:
        plan = _plan(options, parse_tiers(f"{high}:0.0,{low}:{tokens}"), site)
        # Up to one flush and one block of tokens wait in the high tier, and the low tier grows in chunks.
        full = plan.fill(10**9)
        waiting = plan.flush_every + plan.format.tiers[1].block
        wanted = (full.counts[0] + waiting, full.counts[1] + full.counts[1] // GROWTH)
        slots = plan.capacities(wanted, (0, 0))
        shapes = buffer_shapes(plan.format, site.batch, site.kv_heads, site.key_dim, site.value_dim, slots, site.dtype)
        return sum(math.prod(shape) * kind.itemsize for shape, kind in shapes)

    least = 2
    if size(least) > limit:
        raise OptionError(
            f"budget={options.budget!r} is too small: the window and sinks of {site.layers} layers alone take "
            f"{size(least) * site.layers} bytes; raise it, or lower window and sinks"
        )
    most = least
    while size(most * 2) <= limit and most < 2**31:
        most *= 2
    low_count, high_count = most, most * 2
    while high_count - low_count > 1:
        middle = (low_count + high_count) // 2
        low_count, high_count = (middle, high_count) if size(middle) <= limit else (low_count, middle)
    return parse_tiers(f"{high}:0.0,{low}:{low_count}")
