"""The page of `mikv explain --html`: well formed, self-contained, escaped, and true to the graphs and the cache."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from decoder import Decoder, inputs

import mikv_compile
from mikv_compile import cache_report, explain_html, tier_map
from mikv_compile.graph_text import GraphLine, GraphText
from mikv_compile.passes import Declined
from mikv_compile.report import Explanation, GraphReport, stores
from mikv_compile.tier_map import EVICTED, LayerTiers, layer_tiers

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """The elements of a page; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def explained():
    """Prompt and one step of a decoder of two layers, with its cache."""
    model = Decoder(layers=2)
    cache, x = model.new_cache(), inputs([200, 1])
    parts = [
        mikv_compile.explain(model, part, cache, options={"layers": "1=int8:0.1,int4:0.2"}, keep_graphs=True)
        for part in x
    ]  # fmt: skip
    return Explanation([g for part in parts for g in part.graphs], cache_report(cache)), cache


def test_graph_text_tells_what_became_of_each_site(explained):
    prefill, decode = (graph.text for graph in explained[0].graphs)
    for text in (prefill, decode):
        assert len({line.site for line in text.before if line.site}) == 2
        roles = {line.name: line.role for line in text.before}
        assert {roles[name] for name in text.removed} >= {"cache"}
        new = [line for line in text.after if line.name in text.added]
        assert {"buffer", "op"} <= {line.role for line in new} <= {"buffer", "op", ""}
        assert all(line.site for line in new if line.role)
    # A prompt's attention stays as it is; that of a step becomes an op.
    attention = {line.name for line in prefill.before if line.role == "attention"}
    assert attention and not attention & prefill.removed
    assert {line.name for line in decode.before if line.role == "attention"} <= decode.removed
    steps = [line for line in decode.after if "mikv.step_v1" in line.text]
    assert len(steps) == 2 and {s.role for s in steps} == {"op"} and len({s.site for s in steps}) == 2


def test_graphs_are_not_kept_unless_asked_for():
    model = Decoder(layers=1)
    told = mikv_compile.explain(model, inputs([8])[0], model.new_cache())
    assert told.graphs[0].text is None
    model = Decoder(layers=1)
    with pytest.raises(ZeroDivisionError):
        mikv_compile.explain(lambda: 1 / 0, keep_graphs=True)
    told = mikv_compile.explain(model, inputs([8])[0], model.new_cache())
    assert told.graphs[0].text is None


def test_tiers_of_tokens_are_those_of_the_store(explained):
    first, second = (layer_tiers(store) for store in stores(explained[1]))
    for found, store in zip((first, second), stores(explained[1]), strict=True):
        for head in found.heads:
            assert len(head) == store.length == 201
            assert tuple(head.count(i) for i in range(len(store.counts))) == store.counts
        assert found.first == 0 and len(found.tiers) == 2
    assert second.heads[0].count(EVICTED) == store.length - sum(store.counts) > 0
    assert all(head[-64:] == (0,) * 64 and head[:4] == (0,) * 4 for head in first.heads)  # window and sinks
    assert len(set(second.heads)) == len(second.heads)  # heads differ


def test_the_page(explained):
    explanation, cache = explained
    layers = [layer_tiers(store) for store in stores(cache)]
    text = explain_html.render("a <title>", {"model": "x & <y>"}, explanation, layers)
    page = Page(text)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe"} and "@import" not in text
    addresses = re.findall(r"https?://[^\"' <]*", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert "a &lt;title&gt;" in text and "x &amp; &lt;y&gt;" in text and "<y>" not in text
    shown = "".join(page.texts)
    report = explanation.cache
    assert f"{report.nbytes:,}" in shown and f"{report.layers[1].nbytes:,}" in shown and str(explanation) in shown
    assert f"+ {201 - sum(report.layers[1].tokens)} evicted" in shown
    cells = page.all("td")
    removed = sum(len(g.text.removed) for g in explanation.graphs)
    added = sum(len(g.text.added) for g in explanation.graphs)
    assert sum("gone" in (c.get("class") or "") for c in cells) == removed > 0
    assert sum("new" in (c.get("class") or "").split() for c in cells) == added > 0
    lines = [line.text for g in explanation.graphs for line in (*g.text.before, *g.text.after)]
    assert all(line in shown for line in lines)
    hints = {c["title"] for c in cells if "title" in c}
    assert any(h.startswith("attention of site") and h.endswith("; removed") for h in hints)


def test_everything_from_the_model_is_escaped():
    evil = "<script>alert('&')</script>"
    lines = (GraphLine(evil, evil, evil, "cache"),)
    graph = GraphReport(1, (), (Declined(evil, "pair", evil),), "eager", text=GraphText(lines, lines))
    page = Page(explain_html.render(evil, {evil: evil}, Explanation([graph]), [LayerTiers(0, ((0,),), (evil,))]))
    assert "script" not in {tag for tag, _ in page.found}
    assert not any("script" in name or "alert" in name for _, attributes in page.found for name in attributes)
    assert "".join(page.texts).count(evil) >= 7


def test_without_graphs_or_a_cache_the_page_is_short():
    page = Page(explain_html.render("none", {}, Explanation([GraphReport(0, (), (), "eager")])))
    assert "svg" not in {tag for tag, _ in page.found} and not page.all("details")
    assert "Graph 0: nothing rewritten" in page.texts


def rectangles(picture):
    """(tier, x, y, width) of everything that is drawn."""
    found = []
    for tier, path in re.findall(r'class="tier(-?\d+)" fill="[^"]*" d="([^"]*)"', picture):
        for x, y, width in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path):
            found.append((int(tier), float(x), float(y), float(width)))
    return found


def test_the_picture_draws_each_run_once():
    layers = [LayerTiers(0, ((0, 0, 1, 1, EVICTED, 0), (1,) * 6), ("a", "b")), LayerTiers(0, ()),
              LayerTiers(2, ((0, 1, 1, 0),), ("a", "b"))]  # fmt: skip
    picture = tier_map.svg(layers)
    found = rectangles(picture)
    assert sorted(tier for tier, *_ in found) == [-1, 0, 0, 0, 0, 1, 1, 1]
    step = min(width for *_, width in found)
    rows = sorted({y for _, _, y, _ in found})
    cover = {y: sum(w for _, _, top, w in found if top == y) / step for y in rows}
    assert [round(n) for n in cover.values()] == [6, 6, 4]
    left = {y: min(x for _, x, top, _ in found if top == y) for y in rows}
    assert left[rows[2]] - left[rows[0]] == pytest.approx(2 * step, abs=0.02)  # it begins at position 2
    assert ">dense<" in picture and ">5<" in picture
    assert tier_map.svg([LayerTiers(0, ())]) == ""
    keys = tier_map.legend(layers)
    assert keys.count("<span") == 3 and "evicted" in keys


def test_many_tokens_share_a_column_that_shows_the_highest_tier():
    head = [1] * 2000
    head[777] = 0
    found = rectangles(tier_map.svg([LayerTiers(0, (tuple(head),), ("a", "b"))]))
    high = [r for r in found if r[0] == 0]
    assert len(high) == 1 and len(found) == 3
    whole = sum(r[3] for r in found)
    assert (high[0][1] - min(r[1] for r in found)) / whole == pytest.approx(777 // 5 / 400, abs=1e-3)


def test_the_command_writes_the_page(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("transformers")
    from saved_models import save
    from typer.testing import CliRunner

    from mikv_compile import cli

    model, html = save(tmp_path / "m", "gemma2"), tmp_path / "page.html"
    result = CliRunner().invoke(cli.make_app(), ["explain", str(model), "--tokens", "150", "--html", str(html)])
    assert result.exit_code == 0 and f"wrote {html}" in result.stdout, result.output
    page = Page(html.read_text(encoding="utf-8"))
    shown = "".join(page.texts)
    assert "Gemma2ForCausalLM" in shown and "mikv.step_v1" in shown and "mikv.compress_v1" in shown
    assert len(page.all("details")) == 2 and len(page.all("svg")) == 1
