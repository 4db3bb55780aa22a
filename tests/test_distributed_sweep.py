"""``mikv sweep`` shared by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

import sweep_rank

from mikv_compile.eval import results
from mikv_compile.eval.processes import Processes, current
from mikv_compile.eval.results import DONE, FAILED
from mikv_compile.eval.runner import Plan

SUITE = """
texts = ["pydoc@5", "pydoc@9"]
[tasks.continuation]
context = 90
tokens = 8
[[methods]]
kind = "dense"
[[methods]]
name = "int4"
options = {tiers = "int4"}
[[methods]]
name = "bad"
factory = "test_eval:Broken"
arguments = {when = "open", error = 1}
"""


def launch(folder: Path, out: Path, log: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of accelerate, which starts several without GPUs too if told ``--multi_gpu``."""
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
         "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", sweep_rank.__file__,
         str(folder / "suite.toml"), str(out), str(log)],
        cwd=folder, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"))), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def metrics(out: Path) -> dict[tuple[str, str], dict]:
    return {(r.key.method, r.key.text): r.metrics for r in results.read_all(out) if r.status == DONE}


def test_two_processes_measure_each_thing_once_and_one_writes_the_tables(tmp_path):
    (tmp_path / "suite.toml").write_text(SUITE)
    out, log = tmp_path / "out", tmp_path / "log"
    run = launch(tmp_path, out, log)
    assert run.returncode == 1, run.stderr[-4000:]  # a method failed
    assert "4 measured, 0 skipped" in run.stdout and "2 failed" in run.stdout, run.stderr[-4000:]
    assert run.stdout.count("wrote ") == 1
    lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
    assert sorted(rank for rank, status, _ in lines if status == DONE) == ["0", "0", "1", "1"]
    assert sorted(rank for rank, status, _ in lines if status == FAILED) == ["0", "1"]
    assert len({what for *_, what in lines}) == 6
    assert "| int4 |" in (out / "results.md").read_text()

    alone = tmp_path / "alone"
    assert sweep_rank.main(str(tmp_path / "suite.toml"), str(alone), str(tmp_path / "log of one")) == 1
    got, wanted = metrics(out), metrics(alone)
    assert got.keys() == wanted.keys() and len(wanted) == 4
    for key, values in wanted.items():
        assert got[key]["cache"] == values["cache"]
        assert got[key]["kl"] == pytest.approx(values["kl"], rel=1e-3, abs=1e-6)

    # One process goes on where several were.
    assert sweep_rank.main(str(tmp_path / "suite.toml"), str(out), str(tmp_path / "log of more")) == 1
    assert DONE not in (tmp_path / "log of more").read_text()


class Named:
    """A method as far as plans look at it."""

    family, settings = "none", {}

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_measurements_once_in_the_plans_order(count, tmp_path):
    from mikv_compile.eval import make, texts

    read = tuple(texts.Text(f"text@{i}", "x" * 100, i) for i in range(3))
    plan = Plan("m", tuple(map(Named, "abcd")), (make("continuation", {}), make("retrieval", {})), read, tmp_path)
    every = [key.path for method in plan.methods for key, *_ in plan.keys(method)]
    shares = [[key.path for _, keys in plan.shares(Processes(r, count)) for key, *_ in keys] for r in range(count)]
    assert sorted(path for share in shares for path in share) == sorted(every)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [shares[i % count][i // count] for i in range(len(every))] == every


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current() == Processes() and current().is_first
    assert Processes().gathered("x") == ["x"]
    assert Processes().device("cuda") == "cuda"
    assert Processes(3, 4, 1).device("cuda") == "cuda:1" and Processes(3, 4, 1).device("cpu") == "cpu"
