"""What :func:`mikv_compile.explain` found, as one HTML file that needs nothing else: no scripts, no network."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mikv_compile import tier_map
from mikv_compile.graph_text import GraphLine, GraphText
from mikv_compile.report import CacheReport, Explanation, GraphReport, describe
from mikv_compile.tier_map import LayerTiers

_STYLE = """
body{font:15px/1.45 sans-serif;margin:2rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}
th,td{padding:.15rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}pre{white-space:pre-wrap}svg{width:100%;max-width:960px}
.key{margin-right:1.2rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
.graph{table-layout:fixed;width:100%;font:11px/1.35 monospace}
.graph td,.graph th{overflow-wrap:anywhere;border:0;padding:1px 6px;width:50%}
.graph td.site{border-left:4px solid hsl(var(--hue) 65% 55%)}.gone{background:#ffe4e1}.new{background:#dff3df}
.all:not(:checked)~.graph tr.plain{display:none}summary{cursor:pointer}
"""


def render(title: str, told: Mapping[str, Any], explanation: Explanation, layers: Sequence[LayerTiers] = ()) -> str:
    """The page.

    Args:
        title: what was explained.
        told: facts to begin with, such as the model and the options, by name.
        explanation: its graphs' text is shown where it was kept (``keep_graphs=True``).
        layers: the tiers of a live cache's tokens, for the picture.
    """
    picture = tier_map.svg(layers)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(None, ((escape(name), escape(str(value))) for name, value in told.items())),
        f"<h2>Summary</h2><pre>{escape(str(explanation))}</pre>",
    ]
    if explanation.cache is not None:
        parts.append(f"<h2>Tiers and bytes of each layer</h2>{_cache(explanation.cache)}")
    if picture:
        parts.append(
            "<h2>Where each token is</h2><p>A row is a KV head of a layer, in the first row of the batch.</p>"
            f"<p>{tier_map.legend(layers)}</p>{picture}"
        )
    parts += [_graph(number, graph) for number, graph in enumerate(explanation.graphs)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(headings: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a cell that is a number is aligned as one."""
    head = "" if headings is None else "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in headings) + "</tr>"

    def cell(text: str) -> str:
        return f'<td class="n">{text}</td>' if text[:1].isdigit() and len(text) < 24 else f"<td>{text}</td>"

    return f"<table>{head}" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def _cache(cache: CacheReport) -> str:
    rows = []
    for number, layer in enumerate(cache.layers):
        tiers = "dense" if layer.plan is None else describe(layer.plan)
        gone = layer.length - sum(layer.tokens) if layer.plan is not None else 0
        tokens = " + ".join(map(str, layer.tokens)) + (f" + {gone} evicted" if gone else "")
        rows.append((
            str(number), f"{layer.length:,}", tokens, f"{layer.nbytes:,}", f"{layer.dense_nbytes:,}",
            f"{layer.nbytes / max(layer.dense_nbytes, 1):.1%}", escape(tiers),
        ))  # fmt: skip
    rows.append((
        "<b>all</b>", "", "", f"{cache.nbytes:,}", f"{cache.dense_nbytes:,}", f"{cache.ratio:.1%}",
        f"{cache.ratio_16bit:.1%} of a 16-bit cache",
    ))  # fmt: skip
    return _table(("layer", "length", "tokens per tier", "bytes", "dense bytes", "ratio", "tiers"), rows)


def _graph(number: int, graph: GraphReport) -> str:
    phases = ", ".join(dict.fromkeys(site.phase for site in graph.rewritten)) or "nothing rewritten"
    parts = [f"<h2>Graph {number}: {escape(phases)}</h2>"]
    if graph.rewritten:
        sites = (
            (str(s.layer), escape(s.name), s.phase, escape(s.form), s.reads, escape(s.reason or ""))
            for s in graph.rewritten
        )
        parts.append(_table(("layer", "site", "phase", "attention", "reads", "why densely"), sites))
    if graph.declined:
        declined = ((escape(d.site), escape(d.stage), escape(d.reason)) for d in graph.declined)
        parts.append("<h3>Left as it was</h3>" + _table(("node", "stage", "why"), declined))
    if graph.text is not None:
        parts.append(_side_by_side(graph.text, number))
    return "\n".join(parts)


def _side_by_side(text: GraphText, number: int) -> str:
    """Both graphs, equal nodes in one row; a checkbox shows the rows that did not change."""
    hues = {site: str(137 * i % 360) for i, site in enumerate(dict.fromkeys(x.site for x in text.before if x.site))}
    before, after = ([line.name for line in lines] for lines in (text.before, text.after))
    rows = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for left, right in itertools.zip_longest(text.before[a:b], text.after[c:d]):
            same = kind == "equal" and left.text == right.text
            plain = same and left.site is None
            cells = _cell(left, text.removed, "gone", hues) + _cell(right, text.added, "new", hues)
            rows.append(f'<tr class="plain">{cells}</tr>' if plain else f"<tr>{cells}</tr>")
    counts = (
        f"{len(text.before)} nodes before, {len(text.after)} after; {len(text.removed)} removed, {len(text.added)} new"
    )
    return (
        f"<details><summary>The graph before and after: {counts}</summary>"
        f'<input type="checkbox" class="all" id="all{number}"><label for="all{number}">also nodes that stayed as they '
        'were</label> <span class="key"><i class="gone"></i>removed</span>'
        '<span class="key"><i class="new"></i>new</span>'
        "The stripe of a node tells its site; point at it for its role."
        f'<table class="graph"><tr><th>before</th><th>after</th></tr>{"".join(rows)}</table></details>'
    )


def _cell(line: GraphLine | None, changed: frozenset[str], what: str, hues: Mapping[str, str]) -> str:
    if line is None:
        return "<td></td>"
    classes = [what] * (line.name in changed) + ["site"] * (line.site is not None)
    hue = "" if line.site is None else f' style="--hue:{hues[line.site]}"'
    role = "" if line.site is None else f"{line.role} of site {line.site}".strip()
    fate = {"gone": "removed", "new": "new"}[what] if line.name in changed else ""
    told = "; ".join(filter(None, (role, fate)))
    hint = f' title="{escape(told)}"' if told else ""
    return f'<td class="{" ".join(classes)}"{hue}{hint}>{escape(line.text)}</td>'
