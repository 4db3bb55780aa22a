"""Writes the tables of docs/fidelity.md and README.md from the results: ``python docs/fidelity_tables.py``.

A table of a page is found by its first line, and replaced. `make fidelity` measures what they show.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from mikv_compile.eval import aggregate, results
from mikv_compile.eval.results import Result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fidelity"
TEXTS = {"pydoc@120000": "Python docs", "jargon@400000": "Jargon", "kjv@2500000": "Bible"}
PYDOC, _, KJV = TEXTS
DRIFT_TEXTS = (PYDOC, KJV)

GOALS = {24: (0.0065, 0.84, 0.004), 16: (0.020, 0.78, 0.010), 12: (0.020, 0.70, 0.012), 6: (0.035, 0.45, 0.025)}
"""% of a 16-bit cache -> KL at most on Python's documentation, digits at least, KL to hope for."""
OTHER_TEXTS = 1.5
"""How many times the goal's KL another text may have, so that nothing is tuned to one."""

SHOWN = {
    "mikv": "mikv (default preset)",
    "int4": "int4 (preset)",
    "mikv-paper": "mikv-paper (preset)",
    "mikv tiers=int8:0.01,k4v2:0.9899-173 value_norm=True": "2 % evicted, 4-bit keys",
}
"""Methods that the tables call otherwise."""
IN_README = {
    "dense": "dense",
    "quanto int4": "transformers' QuantizedCache, quanto int4",
    "mikv": "default",
    "calibrated 24%": '`plan="smollm2-135m"`, budget of 24 %',
    "mikv 24%": "`budget` of 24 %",
    "calibrated 16%": "plan file, 16 %",
    "mikv 16%": "`budget` of 16 %",
    "kvpress snapkv + int4 0.5": "kvpress SnapKV, half of the tokens, + quanto int4",
    "calibrated 12%": "plan file, 12 %",
    "mikv 12%": "`budget` of 12 %",
    "kvpress expected + int4 0.75": "kvpress expected attention, a quarter, + quanto int4",
    "kvpress snapkv + int4 0.75": "kvpress SnapKV, a quarter, + quanto int4",
    "calibrated 6%": "plan file, 6 %",
    "mikv 6%": "`budget` of 6 %",
}
"""Methods of README's table."""

CLAIMS = (
    ("eviction to 20 % destroys retrieval", "4.0 %", "evict 80 % (h2o)"),
    ("evicted tokens kept at INT4 recover it", "100 %", "16 bit + int4, balancer"),
    ("kept at INT2, no balancer", "64.0 %", "16 bit + int2, no balancer"),
    ("kept at INT2, balancer", "92.6 %", "16 bit + int2, balancer"),
    ("high tier INT8 instead of 16 bit, INT2 and balancer", "92.4 %", "int8 + int2, balancer"),
)
"""Of arXiv 2402.18096, and what it prints for line retrieval; the method of the suite mikv_paper."""

PRUNED = (
    ("SnapKV, 1/8 of the bytes", "snapkv", ("fp16:0.125", "int8:0.25", "int4:0.5", "int2")),
    ("SnapKV, 1/16", "snapkv", ("fp16:0.0625", "int8:0.125", "int4:0.25", "int2:0.5")),
    ("SnapKV, 1/32", "snapkv", ("fp16:0.03125", "int8:0.0625", "int4:0.125", "int2:0.25")),
    ("H2O, 1/16", "h2o", ("fp16:0.0625", "int8:0.125", "int4:0.25", "int2:0.5")),
    ("newest tokens, 1/16", "recent", ("fp16:0.0625", "int8:0.125", "int4:0.25", "int2:0.5")),
    ("SnapKV, keys `gptq` and values `rotate`, 1/16", "better rounding", ("", "", "int4:0.25", "int2:0.5")),
)
"""Rows of the suite tokens_precision: few tokens of many bits to many of few."""


@cache
def _measured(suite: str) -> dict[tuple[str, str, str], Result]:
    """Results of a suite by method, task and text.

    Raises:
        ValueError: for two results of one name; the older one has other settings and has to be deleted.
    """
    measured: dict[tuple[str, str, str], Result] = {}
    for found in results.read_all(RESULTS if suite == "fidelity" else RESULTS / suite):
        name = found.key.method, found.key.task, found.key.text
        if found.status == results.DONE and measured.setdefault(name, found) is not found:
            raise ValueError(f"{measured[name].key.path} and {found.key.path} are of one name: delete the older one")
    return measured


def number(suite: str, method: str, task: str, text: str, metric: str) -> float:
    """A measured number.

    Raises:
        KeyError: if it was not measured.
    """
    found = aggregate.value(_measured(suite)[method, task, text], metric)
    if found is None:
        raise KeyError((suite, method, task, text, metric))
    return found


def _percent(value: float, places: int = 0) -> str:
    return f"{value:.{places}%}".replace("%", " %")


def _size(method: str, task: str = "continuation", text: str = PYDOC) -> float:
    return number("fidelity", method, task, text, "cache.ratio_16bit")


def _kl(method: str) -> list[float]:
    """By text."""
    return [number("fidelity", method, "continuation", text, "kl") for text in TEXTS]


def _digits(method: str) -> float:
    return number("fidelity", method, "retrieval", KJV, "digits")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first ``words`` columns are of words, the others of numbers."""
    marks = ["---"] * words + ["--:"] * (len(headings) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, *rows)).replace(
        "\n", f"\n|{'|'.join(marks)}|\n", 1
    )


def methods() -> str:
    """Every method that has read all texts, by bytes."""
    measured = _measured("fidelity")
    names = {method for method, task, _ in measured if task == "continuation"}
    names = {name for name in names if all((name, "continuation", text) in measured for text in TEXTS)}
    rows = []
    for name in sorted(names, key=lambda name: (-_size(name), name)):
        kl = _kl(name)
        has_lines = (name, "retrieval", KJV) in measured
        lines = [_percent(_size(name, "retrieval", KJV), 1), _percent(_digits(name))] if has_lines else ["-", "fails"]
        numbers = [f"{value:.4f}" for value in (*kl, sum(kl) / len(kl))]
        later = number("fidelity", name, "continuation", PYDOC, "cache_at_end.ratio_16bit")
        rows.append([SHOWN.get(name, name), _percent(_size(name), 1), _percent(later, 1), *numbers, *lines])
    kl_of = [f"KL, {text}" for text in TEXTS.values()]
    return _table(
        ["method", "% of 16-bit, texts", "512 tokens later", *kl_of, "KL, mean", "% of 16-bit, lines", "digits"], rows
    )


def goals() -> str:
    """What became of :data:`GOALS`."""
    rows = [
        [f"{size} %", f"{kl}, {_percent(digits)} ({hope})", _verdict(f"calibrated {size}%"), _verdict(f"mikv {size}%")]
        for size, (kl, digits, hope) in GOALS.items()
    ]
    return _table(["size", "goal: KL, digits (stretch KL)", "calibrated", "uniform `budget`"], rows, words=4)


def _verdict(method: str) -> str:
    most, least, hope = GOALS[int(method.split()[-1].removesuffix("%"))]
    (kl, *others), digits = _kl(method), _digits(method)
    missed = [name for name, bad in (("KL", kl > most), ("digits", digits < least)) if bad]
    said = f"**missed**: {' and '.join(missed)}" if missed else "stretch reached" if kl <= hope else "reached"
    beyond = max(others) / most
    elsewhere = (
        f"within {OTHER_TEXTS}x on the other texts" if beyond <= OTHER_TEXTS else f"**{beyond:.1f}x on another text**"
    )
    return f"{_percent(_size(method), 1)}: {kl:.4f}, {_percent(digits)}; {said}; {elsewhere}"


def in_readme() -> str:
    """The short table."""
    rows = []
    for name, shown in IN_README.items():
        kl = _kl(name)
        rows.append([shown, _percent(_size(name), 1), f"{sum(kl) / len(kl):.4f}", _percent(_digits(name))])
    return _table(["cache", "% of 16-bit", "KL", "digits"], rows)


def needles() -> str:
    """The suite needle."""
    columns = {"% of 16-bit": ("needle", KJV, "cache.ratio_16bit", 1), "digits found": ("needle", KJV, "digits", 0)}
    return _by_method("needle", columns)


def ruler() -> str:
    """The suite ruler, questions."""
    names = {"multi_key": "several keys", "multi_value": "several values", "tracking": "tracking",
             "common_words": "common words", "accuracy": "mean"}  # fmt: skip
    columns = {shown: ("ruler", KJV, metric, 0) for metric, shown in names.items()}
    return _by_method("ruler", {"% of 16-bit": ("ruler", KJV, "cache.ratio_16bit", 1), **columns})


def drift() -> str:
    """The suite ruler, generation."""
    rows = []
    for name, shown in _shown("ruler").items():
        size, first, same, kl = (
            [number("ruler", name, "drift", text, metric) for text in DRIFT_TEXTS]
            for metric in ("cache.ratio_16bit", "first_divergence", "agreement", "kl")
        )
        other = ["-" if equal == 1 else f"{place + 1:.0f}" for place, equal in zip(first, same, strict=True)]
        means = [_percent(statistics.mean(same)), f"{statistics.mean(kl):.4f}"]
        rows.append([shown, _percent(statistics.mean(size), 1), *other, *means])
    first_in = [f"first other token, {TEXTS[text]}" for text in DRIFT_TEXTS]
    return _table(["cache", "% of 16-bit, drift", *first_in, "same tokens", "KL"], rows)


def _shown(suite: str) -> dict[str, str]:
    """Methods of a suite, as the tables call them: dense first, then by size."""
    sizes = {name: found.metrics["cache"]["ratio_16bit"] for (name, _, _), found in _measured(suite).items()}
    return {name: SHOWN.get(name, name) for name in sorted(sizes, key=lambda name: (name != "dense", -sizes[name]))}


def _by_method(suite: str, columns: dict[str, tuple[str, str, str, int]]) -> str:
    """Shares in percent: heading -> task, text, metric and decimal places."""
    rows = [
        [shown, *(_percent(number(suite, name, *where), places) for *where, places in columns.values())]
        for name, shown in _shown(suite).items()
    ]
    return _table(["cache", *columns], rows)


def paper() -> str:
    """The suite mikv_paper beside the paper."""
    rows = [
        [claim, printed, _percent(number("mikv_paper", method, "retrieval", KJV, "digits")),
         f"{number('mikv_paper', method, 'continuation', PYDOC, 'kl'):.3f}"]
        for claim, printed, method in CLAIMS
    ]  # fmt: skip
    return _table(["claim of the paper", "paper", "here: digits", "here: KL"], rows, words=2)


def pruning() -> str:
    """The suite tokens_precision; the best of each row is bold."""
    rows = []
    for shown, method, tiers in PRUNED:
        kl = [number("tokens_precision", f"{method} {t}", "continuation", PYDOC, "kl") if t else None for t in tiers]
        best = min(value for value in kl if value is not None)
        cells = []
        for tier, value in zip(tiers, kl, strict=True):
            if value is None:
                cells.append("")
                continue
            digits = number("tokens_precision", f"{method} {tier}", "retrieval", KJV, "digits")
            cell = f"{value:.3f} ({_percent(digits)})"
            cells.append(f"**{cell}**" if value == best else cell)
        rows.append([shown, *cells])
    return _table(["KL (digits)", "16 bits x 1", "8 bits x 2", "4 bits x 4", "2 bits x 8"], rows)


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "docs/fidelity.md": (methods, goals, needles, ruler, drift, paper, pruning),
    "README.md": (in_readme,),
}


def fill(text: str, tables: Iterable[Callable[[], str]]) -> str:
    """A page with its tables as they are measured.

    Raises:
        ValueError: for a table whose first line is not in the page.
    """
    for table in tables:
        made = table()
        heading = made.partition("\n")[0]
        before, found, behind = text.partition(heading)
        if not found:
            raise ValueError(f"the page has no table that begins with {heading}")
        _, end, rest = behind.partition("\n\n")
        text = before + made + (end or "\n") + rest
    return text


if __name__ == "__main__":
    for page, tables in PAGES.items():
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print("\n\n".join(table() for table in tables), end="\n\n")
