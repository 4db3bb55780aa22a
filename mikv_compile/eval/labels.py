"""Puts names beside what they name in a picture, where they cover neither points, lines nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

XY = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""

MARK = 5.0
"""Half the width of a point's mark, pixels."""


@dataclass(frozen=True)
class Label:
    """A name, and the points beside any of which it may stand."""

    text: str
    near: Sequence[XY]
    colour: str
    bold: bool = False


def place(axis: Any, labels: Sequence[Label], points: Sequence[XY], lines: Sequence[Sequence[XY]]) -> None:
    """Draw labels where they cover least: bold ones first, and then those with fewest places to be.

    A label that is not right beside its point gets a thin line to it.
    """
    inside = _box_of(axis)
    marks = [_around(axis.transData.transform(point), MARK) for point in points]
    strokes = [box for line in lines for box in _stroke(axis, line)]
    taken: list[Box] = []
    for label in sorted(labels, key=lambda one: (not one.bold, len(one.near))):
        width, height = _extent(axis, label)
        best: tuple[float, Box, XY] | None = None
        for point in label.near:
            px, py = axis.transData.transform(point)
            for distance in (8, 18, 32, 50, 75, 105, 140):
                for dx, dy in _DIRECTIONS:
                    cx, cy = px + dx * (distance + width / 2), py + dy * (distance + height / 2)
                    box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                    cost = (
                        100 * sum(_shared(box, other) for other in taken)
                        + 20 * sum(_shared(box, mark) for mark in marks)
                        + 2 * sum(_shared(box, stroke) for stroke in strokes)
                        + 1000 * _outside(box, inside)
                        + 0.4 * distance * height
                    )
                    if best is None or cost < best[0]:
                        best = cost, box, (px, py)
        assert best is not None
        _, box, point = best
        taken.append(box)
        _write(axis, label, box, point)


def stack(axis: Any, labels: Sequence[Label]) -> None:
    """Draw labels to the right of the ends of lines, moved up and down until none covers another."""
    if not labels:
        return
    inside = _box_of(axis)
    sizes = [_extent(axis, label) for label in labels]
    ends = [axis.transData.transform(label.near[-1]) for label in labels]
    gap = max(height for _, height in sizes)
    order = sorted(range(len(labels)), key=lambda i: ends[i][1])
    middles = {i: ends[i][1] for i in order}
    for _ in range(200):  # push neighbours apart; the frame pushes back
        for low, high in pairwise(order):
            lack = gap - (middles[high] - middles[low])
            if lack > 0:
                middles[low] -= lack / 2
                middles[high] += lack / 2
        over = max(middles[order[-1]] + gap / 2 - inside[3], 0)
        under = max(inside[1] - middles[order[0]] + gap / 2, 0)
        middles[order[-1]] -= over
        middles[order[0]] += under
    for i in order:
        width, height = sizes[i]
        left = ends[i][0] + 22
        box = (left, middles[i] - height / 2, left + width, middles[i] + height / 2)
        _write(axis, labels[i], box, (ends[i][0], ends[i][1]))


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.8), (-0.7, 0.8), (0.7, -0.8), (-0.7, -0.8))
_SIZE = 7.5


def _write(axis: Any, label: Label, box: Box, point: XY) -> None:
    back = axis.transData.inverted().transform
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    nearest = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
    if abs(nearest[0] - point[0]) + abs(nearest[1] - point[1]) > 14:
        (x0, y0), (x1, y1) = back(point), back(nearest)
        axis.plot([x0, x1], [y0, y1], color=label.colour, linewidth=0.5, alpha=0.7, zorder=2.5)
    x, y = back(middle)
    axis.text(x, y, label.text, fontsize=_SIZE + 1.5 * label.bold, fontweight="bold" if label.bold else None,
              color=label.colour, ha="center", va="center", zorder=6, clip_on=False)  # fmt: skip


def _extent(axis: Any, label: Label) -> XY:
    """Width and height of a label, pixels."""
    drawn = axis.text(0.5, 0.5, label.text, transform=axis.transAxes, fontsize=_SIZE + 1.5 * label.bold,
                      fontweight="bold" if label.bold else None)  # fmt: skip
    extent = drawn.get_window_extent()
    drawn.remove()
    return extent.width + 4, extent.height + 2


def _box_of(axis: Any) -> Box:
    extent = axis.get_window_extent()
    return extent.x0, extent.y0, extent.x1, extent.y1


def _around(middle: XY, half: float) -> Box:
    x, y = middle
    return x - half, y - half, x + half, y + half


def _stroke(axis: Any, line: Sequence[XY]) -> list[Box]:
    """Small boxes along a line."""
    at = [axis.transData.transform(point) for point in line]
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(at):
        count = int(max(abs(x1 - x0), abs(y1 - y0)) / 6) + 1
        boxes += [_around((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count), 2) for i in range(count + 1)]
    return boxes


def _shared(a: Box, b: Box) -> float:
    """Area that two boxes have in common."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _outside(box: Box, frame: Box) -> float:
    """How far a box sticks out of a frame, pixels."""
    return sum(max(d, 0) for d in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3]))
