"""Pictures from results: PNG files beside the tables. Only matplotlib and the results are needed.

Each picture is for one model and one set of settings; of several settings of a task, the one with the most methods is
drawn.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikv_compile.eval import aggregate, labels
from mikv_compile.eval.aggregate import Group
from mikv_compile.eval.results import Result

FAMILIES = {
    "mikv": ("#c2185b", "o"),
    "mikv-paper": ("#7b1fa2", "D"),
    "uniform bits": ("#00838f", "s"),
    "eviction": ("#ef6c00", "^"),
    "eviction + bits": ("#5d4037", "P"),
    "quantized": ("#2e7d32", "v"),
    "dense": ("#424242", "*"),
}
"""Family -> colour and marker. Others get the rest of the colours, in the order in which they come."""
OTHERS = (("#1565c0", "X"), ("#9e9d24", "h"), ("#78909c", "<"), ("#d81b60", ">"))
OURS = "mikv"
"""The family that is drawn above the others."""


@dataclass(frozen=True)
class Point:
    """A method in a picture."""

    method: str
    family: str
    x: float
    y: float

    @property
    def series(self) -> str:
        """Methods whose names differ in their last number only are one line: ``evict 0.5`` and ``evict 0.25``."""
        return re.sub(r"[\s=:]+-?\d+(\.\d+)?\s*%?$", "", self.method) or self.method


def draw_all(found: Sequence[Result], out: Path) -> list[Path]:
    """Draw every picture that the results allow; returns the files. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")  # files only, also where there is a display
    made = []
    by_model: dict[str, list[Group]] = defaultdict(list)
    for group in aggregate.groups(found):
        if group.done:
            by_model[group.model].append(group)
    for model, members in by_model.items():
        tasks: dict[str, Group] = {}
        for group in members:  # of several settings, those that most methods have
            if group.task not in tasks or len(group.done) > len(tasks[group.task].done):
                tasks[group.task] = group
        end = "" if len(by_model) == 1 else "-" + re.sub(r"[^A-Za-z0-9.]+", "-", model)
        for name, draw in PICTURES.items():
            figure = draw(tasks, model)
            if figure is not None:
                path = out / f"{name}{end}.png"
                figure.savefig(path, dpi=150, facecolor="white")
                made.append(path)
                _close(figure)
    return made


# Pareto


def pareto(tasks: dict[str, Group], model: str) -> Any:
    """Error and retrieval over bytes, all methods."""
    panels = [
        (tasks[task], metric)
        for task, metric in (("continuation", "kl"), ("retrieval", "digits"))
        if task in tasks and len(points(tasks[task], metric)) > 1
    ]
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), (6.9 * len(panels), 6.2))
    families = list(dict.fromkeys(p.family for group, metric in panels for p in points(group, metric)))
    for axis, (group, metric) in zip(axes, panels, strict=True):
        shown = points(group, metric)
        log = metric == "kl"
        dense = next((p.y for p in shown if p.family == "dense"), None)
        shown = [p for p in shown if p.family != "dense" and (p.y > 0 or not log)]
        axis.set_xscale("log")
        if log:
            axis.set_yscale("log")
            axis.set_ylabel("KL(dense || method), nats  (lower is better)")
        else:
            axis.set_ylabel("digits found  (higher is better)")
            axis.yaxis.set_major_formatter(_percent())
            axis.set_ylim(0, 1.03)
            axis.axhline(0.1, color="#bdbdbd", linewidth=0.8, linestyle=":", zorder=1)
            if dense is not None:
                axis.axhline(dense, color="#424242", linewidth=1, linestyle="--", zorder=1)
        axis.set_xlabel("bytes of the cache, part of a dense 16-bit one")
        over = ", ".join(text.partition("@")[0] for text in group.common)
        axis.set_title(f"{'Reading on' if log else 'Line retrieval'} ({over})", fontsize=10, loc="left")
        _bytes_axis(axis, shown)
        marked = []
        for name, line in _series(shown).items():
            colour, marker = style(line[0].family, families)
            ours = line[0].family == OURS
            xs, ys = [p.x for p in line], [p.y for p in line]
            axis.plot(xs, ys, color=colour, linewidth=2.6 if ours else 0.9, alpha=1 if ours else 0.6,
                      zorder=4 if ours else 2)  # fmt: skip
            axis.scatter(xs, ys, color=colour, marker=marker, s=70 if ours else 32, zorder=5 if ours else 3,
                         edgecolor="white", linewidth=0.6)  # fmt: skip
            marked.append((name, line, colour, ours))
        figure.canvas.draw()
        texts = [labels.Label(name, [(p.x, p.y) for p in line], colour, ours) for name, line, colour, ours in marked]
        if not log:
            _level(axis, 0.1, "chance 10%", "#9e9e9e")
            if dense is not None:
                _level(axis, dense, f"dense {dense:.0%}", "#424242")
        labels.place(axis, texts, [(p.x, p.y) for p in shown], [[(p.x, p.y) for p in ln] for _, ln, _, _ in marked])
        axis.grid(True, which="major", color="#eeeeee", zorder=0)
    _legend(figure, [f for f in families if f != "dense"], families)
    figure.suptitle(f"What a compressed cache costs, {model}", x=0.01, ha="left", fontsize=11)
    return figure


def points(group: Group, metric: str) -> list[Point]:
    """Methods that have both bytes and the number."""
    made = []
    for name in group.methods:
        x, y = group.mean(name, "cache.ratio_16bit"), group.mean(name, metric)
        if x is not None and y is not None:
            made.append(Point(name, group.family(name), x, y))
    return made


def style(family: str, families: Sequence[str]) -> tuple[str, str]:
    """A family's colour and marker."""
    if family in FAMILIES:
        return FAMILIES[family]
    unknown = [name for name in families if name not in FAMILIES]
    return OTHERS[unknown.index(family) % len(OTHERS)]


# Needles


def needles(tasks: dict[str, Group], model: str) -> Any:
    """A heat map of lengths and depths for each method."""
    group = tasks.get("needle")
    if group is None or not group.common:
        return None
    names = group.methods
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure, axes = _figure(lines, columns, (0.9 + 2.75 * columns, 0.9 + 2.5 * lines))
    image: Any = None
    for i, axis in enumerate(axes):
        if i >= len(names):
            axis.set_visible(False)
            continue
        found = [group.done[names[i]][text].metrics for text in group.common]
        grid = [
            [sum(m["grid"][r][c] for m in found) / len(found) for c in range(len(found[0]["depths"]))]
            for r in range(len(found[0]["lengths"]))
        ]
        across = list(map(list, zip(*grid, strict=True)))  # depth downwards, length to the right
        image = axis.imshow(across, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for r, line in enumerate(across):
            for c, share in enumerate(line):
                axis.text(c, r, f"{share:.0%}", ha="center", va="center", fontsize=7,
                          color="white" if share < 0.15 or share > 0.9 else "black")  # fmt: skip
        axis.set_xticks(range(len(found[0]["lengths"])), [f"{n:,}" for n in found[0]["lengths"]], fontsize=7)
        axis.set_yticks(range(len(found[0]["depths"])), [f"{d:.0%}" for d in found[0]["depths"]], fontsize=7)
        if i % columns == 0:
            axis.set_ylabel("depth of the needle", fontsize=8)
        if i + columns >= len(names):
            axis.set_xlabel("tokens of the context", fontsize=8)
        ratio = group.mean(names[i], "cache.ratio_16bit")
        of = "" if ratio is None else f"\n{ratio:.1%} of 16-bit"
        axis.set_title(_shortened(names[i], 30) + of, fontsize=8,
                       color=style(group.family(names[i]), [])[0] if group.family(names[i]) in FAMILIES else "black",
                       fontweight="bold" if group.family(names[i]) == OURS else None)  # fmt: skip
    bar = figure.colorbar(image, ax=[a for a in axes if a.get_visible()], shrink=0.8, pad=0.02)
    bar.ax.yaxis.set_major_formatter(_percent())
    bar.set_label("digits found", fontsize=8)
    figure.suptitle(f"Needles in a haystack, {model}", x=0.01, ha="left", fontsize=11)
    return figure


# Tokens or precision


def tokens_precision(tasks: dict[str, Group], model: str) -> Any:
    """At a fixed number of bytes: many tokens of few bits, or few tokens of many bits?"""
    panels = []
    for task, metric in (("continuation", "kl"), ("retrieval", "digits")):
        lines = _token_lines(tasks[task], metric) if task in tasks else {}
        if any(len(line) > 1 for line in lines.values()):
            panels.append((metric, lines))
    if not panels:
        return None
    policies = list(dict.fromkeys(policy for _, lines in panels for policy, _ in lines))
    budgets = sorted({budget for _, lines in panels for _, budget in lines}, reverse=True)
    figure, axes = _figure(len(policies), len(panels), (5.6 * len(panels), 0.9 + 2.9 * len(policies)))
    shades = ["#880e4f", "#c2185b", "#f06292", "#f4a3c0"] if len(budgets) <= 4 else None
    for i, axis in enumerate(axes):
        policy, (metric, lines) = policies[i // len(panels)], panels[i % len(panels)]
        ends = []
        for j, budget in enumerate(budgets):
            line = sorted(lines.get((policy, budget), []))
            if not line:
                continue
            colour = shades[j] if shades else f"C{j}"
            axis.plot([bits for bits, _ in line], [y for _, y in line], "o-", color=colour, linewidth=1.8)
            name = f"1/{round(1 / budget)}" if abs(1 / budget - round(1 / budget)) < 0.01 else f"{budget:.1%}"
            ends.append(labels.Label(name, [line[-1]], colour))
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 3, 4, 8, 16], ["2", "3", "4", "8", "16"])
        axis.set_xlim(21, 1.6)
        axis.set_title(policy, fontsize=9, loc="left")
        if metric == "kl":
            axis.set_yscale("log")
            axis.set_ylabel("KL, nats (lower is better)", fontsize=8)
        else:
            axis.set_ylim(0, 1.03)
            axis.yaxis.set_major_formatter(_percent())
            axis.set_ylabel("digits found (higher is better)", fontsize=8)
        if i >= len(axes) - len(panels):
            axis.set_xlabel("bits of a number: fewer tokens to the left, more to the right", fontsize=8)
        axis.grid(True, color="#eeeeee")
        figure.canvas.draw()
        drawn = [line for (p, _), line in lines.items() if p == policy]
        labels.place(axis, ends, [point for line in drawn for point in line], [sorted(line) for line in drawn])
    figure.suptitle(
        f"Tokens or precision, {model}. A line: one budget, as part of a 16-bit cache (scales come on top)",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    return figure


def tags_of(settings: Any) -> tuple[float, float, str] | None:
    """Share of tokens that are kept, their bits and what chose them: of ``tags`` in a method's settings, or of options
    with a single tier such as ``int4:0.25``. None for others."""
    tags = settings.get("tags") or {}
    options = settings.get("options") or {}
    chosen = str(tags.get("policy", options.get("policy", "snapkv")))
    if "tokens" in tags and "bits" in tags:
        return float(tags["tokens"]), float(tags["bits"]), chosen
    tier = re.fullmatch(r"(?:fp|fp16|bf16|int(\d+))(?::(\d*\.\d+|1))?", str(options.get("tiers", "")))
    if tier is None:
        return None
    return float(tier.group(2) or 1), float(tier.group(1) or 16), chosen


def _token_lines(group: Group, metric: str) -> dict[tuple[str, float], list[tuple[float, float]]]:
    """(policy, budget) -> bits and the number."""
    lines: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    every: list[tuple[float, tuple[float, float]]] = []  # of methods that keep all tokens: any policy is the same
    for name in group.methods:
        y, tags = group.mean(name, metric), tags_of(group.keys[name].method_settings)
        if y is None or tags is None:
            continue
        tokens, bits, policy = tags
        budget = round(tokens * bits / 16, 6)
        if tokens == 1:
            every.append((budget, (bits, y)))
        else:
            lines[policy, budget].append((bits, y))
    for budget, point in every:
        for (_, other), line in lines.items():
            if other == budget and point not in line:
                line.append(point)
    return dict(lines)


# Along the text


def positions(tasks: dict[str, Group], model: str) -> Any:
    """KL along the tokens that follow the context."""
    group = tasks.get("continuation")
    return _along(group, "kl_by_chunk", "chunk", f"KL along the text after the context, {model}", "KL, nats", log=True)


def drift(tasks: dict[str, Group], model: str) -> Any:
    """How greedy generation leaves the dense model's."""
    group = tasks.get("drift")
    title = f"Greedy generation: the same token as the dense model's, {model}"
    return _along(group, "agreement_by_chunk", "chunk", title, "same token at the same place", log=False)


def _along(group: Group | None, metric: str, chunk: str, title: str, label: str, log: bool) -> Any:
    lines = {}
    for name in group.methods if group and group.common else []:
        assert group is not None
        found = [group.done[name][text].metrics.get(metric) for text in group.common]
        if all(found) and (group.family(name) != "dense"):
            lines[name] = [sum(column) / len(found) for column in zip(*found, strict=True)]
    if group is None or not lines:
        return None
    step, total = group.settings.get(chunk, 1), group.settings.get("tokens", 0)
    figure, (axis,) = _figure(1, 1, (8.6, 5.4))
    families = [group.family(name) for name in lines]
    named = _worth_a_name(group, lines)
    drawn, ends = [], []
    for name, ys in lines.items():
        xs = [min((i + 1) * step, total or (i + 1) * step) for i in range(len(ys))]
        colour, _ = style(group.family(name), families)
        ours = group.family(name) == OURS
        axis.plot(xs, ys, color=colour, linewidth=2.4 if ours else 1, zorder=3 if ours else 2,
                  alpha=1 if ours else 0.85 if name in named else 0.25)  # fmt: skip
        drawn.append(list(zip(xs, ys, strict=True)))
        if name in named:
            ends.append(labels.Label(name, [drawn[-1][-1]], colour, ours))
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(-0.02, 1.03)
        axis.yaxis.set_major_formatter(_percent())
    last = max(x for line in drawn for x, _ in line)
    axis.set_xlim(0, last * 1.35)
    axis.set_xticks([x for x in axis.get_xticks() if x <= last * 1.02])
    few = "" if len(named) == len(lines) else "; pale: other methods of the families"
    axis.set_xlabel("tokens after the context" + few)
    axis.set_ylabel(label)
    axis.grid(True, color="#eeeeee")
    axis.set_title(title, fontsize=10, loc="left")
    figure.canvas.draw()
    labels.stack(axis, ends)
    return figure


def _worth_a_name(group: Group, lines: dict[str, list[float]], most: int = 12) -> set[str]:
    """Ours, and of every other family the least and the greatest, if there are too many for all."""
    if len(lines) <= most:
        return set(lines)
    by_family: dict[str, list[str]] = defaultdict(list)
    for name in lines:
        by_family[group.family(name)].append(name)
    chosen = set(by_family.pop(OURS, []))
    for names in by_family.values():
        ordered = sorted(names, key=lambda name: sum(lines[name]))
        chosen |= {ordered[0], ordered[-1]}
    return chosen


PICTURES: dict[str, Callable[[dict[str, Group], str], Any]] = {
    "pareto": pareto,
    "needles": needles,
    "tokens_precision": tokens_precision,
    "positions": positions,
    "drift": drift,
}
"""File name -> what draws it from the groups of a model's tasks; it gives None if there is nothing to draw."""


# Parts


def _figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes.flat)


def _close(figure: Any) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)


def _bytes_axis(axis: Any, shown: Sequence[Point]) -> None:
    low, high = min(p.x for p in shown), max(p.x for p in shown)
    axis.set_xlim(low / 1.5, max(high * 1.3, low * 3))
    ticks = [t for t in (0.01, 0.02, 0.03, 0.06, 0.125, 0.25, 0.5, 1) if low / 1.5 <= t <= max(high * 1.3, low * 3)]
    axis.set_xticks(ticks, [f"{t:.3g}" if t < 0 else f"{100 * t:.3g}%" for t in ticks])
    axis.minorticks_off()


def _level(axis: Any, y: float, text: str, colour: str) -> None:
    """Names a level line at its left end, above it."""
    axis.annotate(text, (0, y), (4, 2), xycoords=("axes fraction", "data"), textcoords="offset points", color=colour,
                  fontsize=7.5, va="bottom")  # fmt: skip


def _series(shown: Sequence[Point]) -> dict[str, list[Point]]:
    """Lines of a picture, by the names they are labelled with. Our family is one line."""
    found: dict[str, list[Point]] = defaultdict(list)
    for p in shown:
        found[OURS if p.family == OURS else p.series].append(p)
    made = {}
    for name, line in found.items():
        made[name if len(line) > 1 else line[0].method] = sorted(line, key=lambda p: p.x)
    return made


def _legend(figure: Any, shown: Sequence[str], families: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for family in shown:
        colour, marker = style(family, families)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=2.6 if family == OURS else 0.9))
    figure.legend(handles, shown, loc="outside lower center", ncols=min(len(shown), 7), fontsize=8, frameon=False)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
