"""Tensor parallelism of transformers: two processes, each of which compresses the KV heads that it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.distributed.tensor_parallel")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import tensor_parallel_rank as one_rank  # noqa: E402  (needs transformers)
from tiny_models import build  # noqa: E402

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model on disk: its ranks each load their part."""
    made = tmp_path_factory.mktemp("tensor_parallel") / "llama"
    build("llama").save_pretrained(made)
    return made


def launch(folder: Path, *cases: str) -> dict[str, list[dict]]:
    """What each rank found."""
    results = folder.parent / "-".join(cases)
    results.mkdir()
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS),
         one_rank.__file__, str(folder), str(results), *cases],
        cwd=results, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return {case: [torch.load(results / f"{case}-{i}.pt") for i in range(RANKS)] for case in cases}


@pytest.fixture(scope="module")
def found(folder) -> dict[str, list[dict]]:
    return launch(folder, "full", "default", "regional", "bytes")


def compare(whole: dict, ranks: list[dict]) -> None:
    """Tokens and logits are equal on all ranks and to those of one process, and so is what the stores hold."""
    for rank in ranks:
        assert rank["tokens"] == whole["tokens"]
        torch.testing.assert_close(rank["logits"], whole["logits"], atol=1e-4, rtol=1e-4)
        assert rank["counts"] == whole["counts"] and not any(rank["fallbacks"])
        assert rank["graphs"] == whole["graphs"] == 2
    assert sum(rank["nbytes"] for rank in ranks) == whole["nbytes"]
    for layer, buffers in enumerate(whole["buffers"]):
        halves = zip(*(rank["buffers"][layer] for rank in ranks), strict=True)
        for buffer, parts in zip(buffers, halves, strict=True):
            heads = torch.cat(parts, dim=1)
            if buffer.dtype.is_floating_point:
                torch.testing.assert_close(heads, buffer, atol=2e-3, rtol=2e-3)
            else:  # sums in another order may move a number across the border between two codes
                assert heads.shape == buffer.shape and (heads != buffer).float().mean().nan_to_num() < 1e-3


def test_full_budget_gives_the_tokens_of_the_plain_model(folder, found):
    compare(one_rank.run(folder, "full"), found["full"])
    plain = one_rank.load(folder).generate(one_rank.prompt(), max_new_tokens=one_rank.STEPS, do_sample=False,
                                           eos_token_id=None)  # fmt: skip
    assert found["full"][0]["tokens"] == plain[0, one_rank.PROMPT :].tolist()


@pytest.mark.parametrize("case", ["default", "regional"])
def test_each_rank_holds_its_heads_of_the_whole_cache(case, folder, found):
    compare(one_rank.run(folder, case), found[case])


def test_a_budget_in_bytes_is_that_of_each_rank(folder, found):
    """Twice as much for one process, which holds all heads."""
    whole = one_rank.run(folder, "bytes", budget="48kB")
    assert sum(whole["counts"][0]) < one_rank.PROMPT  # it does evict
    assert all(rank["nbytes"] <= 24_000 for rank in found["bytes"])
    compare(whole, found["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["evicts", "inductor", "int4", "static"])
def test_other_plans_and_inductor(case, folder):
    compare(one_rank.run(folder, case), launch(folder, case)[case])
