"""Which tier each token of a live cache is in, and a picture of it: a row for each KV head, a column for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mikv_compile.store import LayerStore

EVICTED = -1
COLOURS = ("#b2182b", "#2166ac", "#7fbf7b", "#984ea3")
"""Of the tiers, highest precision first; a plan with more tiers uses the last colour for the rest."""
_WIDTH, _MARGIN = 960, 64
_COLUMNS = 480
"""Tokens are put together where there are more."""


@dataclass(frozen=True)
class LayerTiers:
    """The first row of the batch of one layer.

    Attributes:
        first: position of the first token that is stored.
        heads: for each KV head, the tier of every token from ``first`` on, or ``EVICTED``. Empty for a dense layer.
        tiers: what each tier is.
    """

    first: int
    heads: tuple[tuple[int, ...], ...]
    tiers: tuple[str, ...] = ()


def layer_tiers(store: LayerStore | None) -> LayerTiers:
    """Read the positions that a store keeps beside its codes."""
    if store is None:
        return LayerTiers(0, ())
    found = [[EVICTED] * store.length for _ in range(store.site.kv_heads)]
    for number, (tier, used) in enumerate(zip(store.typed().tiers, store.counts, strict=True)):
        for head, positions in enumerate(tier.positions[0, :, :used].tolist()):
            for position in positions:
                found[head][position] = number
    names = tuple(f"{fmt.key} / {fmt.value}" for fmt in store.plan.format.tiers)
    return LayerTiers(store.base, tuple(map(tuple, found)), names)


def svg(layers: Sequence[LayerTiers]) -> str:
    """The picture as SVG; where a column stands for several tokens, it shows the highest tier of them."""
    end = max((layer.first + len(head) for layer in layers for head in layer.heads), default=0)
    if not end:
        return ""
    together = -(-end // _COLUMNS)
    columns = -(-end // together)
    rows = sum(max(len(layer.heads), 1) for layer in layers)
    wide, high = (_WIDTH - _MARGIN) / columns, max(2.0, min(10.0, 640 / rows))
    parts: list[str] = []
    paths: dict[int, list[str]] = {}
    top = 0.0
    for number, layer in enumerate(layers):
        height = max(len(layer.heads), 1) * high
        if height >= 10 or number % 5 == 0:
            parts.append(f'<text x="{_MARGIN - 6}" y="{top + 9:.1f}" text-anchor="end">layer {number}</text>')
        if not layer.heads:
            parts.append(f'<text x="{_MARGIN + 4}" y="{top + 9:.1f}">dense</text>')
        for head in layer.heads:
            for tier, start, length in _runs(_columns(head, layer.first, together, columns)):
                x = _MARGIN + start * wide
                paths.setdefault(tier, []).append(f"M{x:.2f} {top:.1f}h{length * wide:.2f}v{high - 0.5:.1f}H{x:.2f}z")
            top += high
        top += 1.5 if layer.heads else high + 1.5
    marks = [f'<path class="tier{tier}" fill="{_colour(tier)}" d="{"".join(d)}"/>' for tier, d in sorted(paths.items())]
    axis = f'<text x="{_MARGIN}" y="{top + 12:.1f}">position 0</text>'
    axis += f'<text x="{_WIDTH}" y="{top + 12:.1f}" text-anchor="end">{end - 1}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 18:.0f}" role="img" '
        f'font-family="sans-serif" font-size="9"><title>Tier of each token</title>{"".join(marks)}{"".join(parts)}'
        f"{axis}</svg>"
    )


def legend(layers: Sequence[LayerTiers]) -> str:
    """What the colours mean, as HTML."""
    names: dict[int, dict[str, None]] = {}
    for layer in layers:
        for number, name in enumerate(layer.tiers):
            names.setdefault(min(number, len(COLOURS) - 1), {})[name] = None
    if any(EVICTED in head for layer in layers for head in layer.heads):
        names[EVICTED] = {"evicted": None}
    return "".join(
        f'<span class="key"><i style="background:{_colour(number)}"></i>{escape(", ".join(found))}</span>'
        for number, found in names.items()
    )


def _colour(tier: int) -> str:
    return "#dddddd" if tier == EVICTED else COLOURS[min(tier, len(COLOURS) - 1)]


def _columns(head: Sequence[int], first: int, together: int, columns: int) -> list[int | None]:
    """The tier that each column shows; None where nothing is stored."""
    shown: list[int | None] = [None] * columns
    for position, tier in enumerate(head, first):
        column = position // together
        before = shown[column]
        shown[column] = tier if before is None or before == EVICTED or EVICTED < tier < before else before
    return shown


def _runs(shown: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """Neighbours of one tier: (tier, first column, columns)."""
    runs: list[list[int]] = []
    for column, tier in enumerate(shown):
        if tier is None:
            continue
        if runs and runs[-1][0] == tier and runs[-1][1] + runs[-1][2] == column:
            runs[-1][2] += 1
        else:
            runs.append([tier, column, 1])
    return [(tier, start, length) for tier, start, length in runs]
