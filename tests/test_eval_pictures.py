"""Tables and pictures from results that were made up."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mikv_compile.eval import aggregate, results, tables
from mikv_compile.eval.results import DONE, FAILED, Key, Result


def made(method, metrics, task="continuation", text="pydoc@1", family="mikv", settings=None, options=None, ratio=0.2):
    key = Key("tiny float32", task, settings or {}, text, method, family, {"options": options or {}})
    cache = {"ratio_16bit": ratio, "nbytes": 2_000_000}
    return Result(key, DONE, {**metrics, "cache": cache})


def failed(method, error, text="pydoc@1"):
    return Result(Key("tiny float32", "continuation", {}, text, method, "mikv", {}), FAILED, error=error)


def kl(value):
    return {"kl": value, "top1": 0.5, "dnll": 0.1, "perplexity": 10 * value}


# Tables


def test_means_are_over_texts_that_all_methods_have_read():
    found = [
        made("dense", kl(0.0), text="kjv@1", family="dense"), made("dense", kl(0.0), family="dense"),
        made("a", kl(0.5), text="kjv@1"), made("a", kl(0.1)), made("b", kl(0.2)),
    ]  # fmt: skip
    (group,) = aggregate.groups(found)
    assert group.methods == ["dense", "a", "b"] and group.common == ["pydoc@1"]
    assert group.mean("a", "kl") == 0.1 and group.mean("a", "cache.nbytes") == 2e6
    table = tables.markdown(found)
    assert "| method | % of 16-bit | MB as run | KL, kjv@1 | KL, pydoc@1 | KL | top-1 | dNLL | perplexity |" in table
    assert "| a | 20.0% | 2.00 | 0.5000 | 0.1000 | 0.1000 | 50.0% | +0.1000 | 1.00 |" in table
    assert "| b | 20.0% | 2.00 | - | 0.2000 | 0.2000 | 50.0% | +0.1000 | 2.00 |" in table
    assert "Means are over pydoc@1, which every method has read." in table
    both = tables.markdown(found[:4])
    assert "Means are over all of them." in both and "| a | 20.0% | 2.00 | 0.5000 | 0.1000 | 0.3000 |" in both


def test_no_common_text_no_mean():
    found = [made("a", kl(0.5), text="kjv@1"), made("b", kl(0.2))]
    table = tables.markdown(found)
    assert "so there are no means" in table and "| a | - | - | 0.5000 | - | - |" in table


def test_other_settings_are_another_table():
    digits = {"digits": 0.5, "exact": 0.2}
    table = tables.markdown([
        made("a", digits, "retrieval", settings={"aware": 0, "lines": 20}),
        made("a", {**digits, "aware_digits": 0.7, "aware_exact": 0.1}, "retrieval", settings={"aware": 6, "lines": 20}),
    ])  # fmt: skip
    assert "## retrieval, tiny float32, aware 0\n" in table and "## retrieval, tiny float32, aware 6\n" in table
    assert table.count("digits, aware") == 1  # a column for what nobody measured is left out


def test_failures_have_their_reason():
    table = tables.markdown([made("a", kl(0.1)), failed("a", "later"), failed("b", "ValueError: no\nmore")])
    assert "| b | failed: ValueError: no |" in table and "later" not in table
    assert "| b | failed: no reason recorded" in tables.markdown([failed("b", "")])


# Pictures


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib").use("Agg")
    from mikv_compile.eval import plots

    return plots


def everything():
    found = [made("dense", {**kl(0.0), "kl_by_chunk": [0.0, 0.0]}, family="dense", ratio=1.0)]
    found += [made("dense", {"digits": 0.9}, "retrieval", family="dense", ratio=1.0)]
    for i, (ratio, family, name) in enumerate(
        [(0.24, "mikv", "mikv 24%"), (0.12, "mikv", "mikv 12%"), (0.5, "eviction", "evict 0.5"),
         (0.25, "eviction", "evict 0.25"), (0.3, "quantized", "quanto int4"), (0.15, "new", "quanto int2")]
    ):  # fmt: skip
        size = {"family": family, "ratio": ratio}
        found.append(made(name, {**kl(0.01 * (i + 1)), "kl_by_chunk": [0.01, 0.02]}, **size))
        found.append(made(name, {"digits": 0.9 - 0.1 * i}, "retrieval", **size))
    grid = {"lengths": [100, 200], "depths": [0.0, 0.5, 1.0], "grid": [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]}
    for name in ("dense", "mikv"):
        found.append(made(name, {**grid, "digits": 0.7}, "needle", family=name))
        found.append(made(name, {"agreement_by_chunk": [1.0, 0.2], "agreement": 0.6}, "drift", family=name))
    for tier, score in (("fp16:0.125", 0.3), ("int8:0.25", 0.1), ("int4:0.5", 0.05), ("int2", 1.0)):
        options = {"policy": "h2o", "tiers": tier}
        found.append(made(f"h2o {tier}", kl(score), family="tokens x bits", options=options))
    return found


def test_every_picture_is_drawn(plots, tmp_path):
    drawn = plots.draw_all(everything(), tmp_path)
    assert {path.stem for path in drawn} == set(plots.PICTURES)
    for path in drawn:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 8_000


def test_pictures_need_something_to_show(plots, tmp_path):
    assert plots.draw_all([failed("b", "no")], tmp_path) == []
    assert plots.draw_all([made("a", kl(0.1))], tmp_path) == []  # one point is no comparison


def texts_in(figure):
    figure.canvas.draw()
    return [[t for t in axis.texts if t.get_text()] for axis in figure.axes]


def test_names_in_the_pareto_picture_do_not_cover_each_other(plots):
    groups = {group.task: group for group in aggregate.groups(everything())}
    figure = plots.pareto(groups, "tiny")
    for shown in texts_in(figure):
        names = [text.get_text() for text in shown]
        assert "mikv" in names and "evict" in names and "quanto int4" in names and len(set(names)) == len(names)
        boxes = [text.get_window_extent() for text in shown]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), names[i]
    assert "dense 90%" in [text.get_text() for text in texts_in(figure)[1]]
    plots._close(figure)


def test_a_line_joins_what_differs_in_its_last_number(plots):
    def series(name):
        return plots.Point(name, "eviction", 1, 1).series

    assert series("evict 0.5") == series("evict 0.25") == "evict" and series("evict tiers=fp:0.5") == "evict tiers=fp"
    assert series("mikv 24%") == "mikv" and series("quanto int4") == "quanto int4"


def test_tokens_and_bits_are_those_of_tags_or_of_a_single_tier(plots):
    assert plots.tags_of({"options": {"tiers": "int4:0.25", "policy": "h2o"}}) == (0.25, 4, "h2o")
    assert plots.tags_of({"options": {"tiers": "int2"}}) == (1, 2, "snapkv")
    assert plots.tags_of({"options": {"tiers": "fp:0.5"}}) == (0.5, 16, "snapkv")
    assert plots.tags_of({"options": {"tiers": "int8:0.1,int4"}}) is None and plots.tags_of({}) is None
    tags = {"tokens": 0.25, "bits": 2, "policy": "mine"}
    assert plots.tags_of({"options": {"tiers": "int8:0,int2:0.25"}, "tags": tags}) == (0.25, 2, "mine")


def test_stacked_names_keep_apart(plots):
    from mikv_compile.eval import labels

    figure, (axis,) = plots._figure(1, 1, (6, 4))
    axis.set_xlim(0, 2)
    axis.set_ylim(0, 1)
    figure.canvas.draw()
    labels.stack(axis, [labels.Label(f"name {i}", [(1, 0.5)], "black", bold=i == 2) for i in range(6)])
    boxes = sorted((text.get_window_extent() for text in texts_in(figure)[0]), key=lambda box: box.y0)
    for low, high in pairwise(boxes):
        assert low.y1 <= high.y0 + 1
    plots._close(figure)


def test_results_in_two_environments_are_one_comparison(tmp_path):
    for result in everything():
        results.write(tmp_path, result)
    again = aggregate.groups(results.read_all(tmp_path))
    assert {group.task: len(group.done) for group in again} == {
        group.task: len(group.done) for group in aggregate.groups(everything())
    }
