"""The examples that need no download run, and show what they say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

ROOT = Path(__file__).parent.parent


def run(tmp_path: Path, *command: str) -> str:
    """What ``python COMMAND`` prints, run in an empty folder."""
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def example(name: str) -> str:
    return str(ROOT / "examples" / name)


def test_minimal(tmp_path):
    assert "2 compressed" in run(tmp_path, example("minimal.py"))


def test_pipeline(tmp_path):
    said = run(tmp_path, example("pipeline.py"))
    assert "sites rewritten: 2 prefill" in said and "sites rewritten: 2 decode" in said
    assert len(ast.literal_eval(said.splitlines()[0])) > 0


def test_static_cache(tmp_path):
    said = run(tmp_path, example("static_cache.py"))
    assert len(ast.literal_eval(said.splitlines()[0])) == 24
    assert "2 compressed" in said and float(re.search(r"([\d.]+)% of dense", said)[1]) < 40


@pytest.mark.slow
def test_tensor_parallel_equals_one_process(tmp_path):
    whole = run(tmp_path, example("tensor_parallel.py"), "llama")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    split = run(tmp_path, *launch, example("tensor_parallel.py"), "llama")
    assert "rank 0: 2 KV heads" in whole and "rank 0: 1 KV heads" in split and "rank 1: 1 KV heads" in split
    tokens = re.findall(r"\[\d[\d, ]{40,}\]", whole)
    assert len(tokens) == 1 and re.findall(r"\[\d[\d, ]{40,}\]", split) == tokens * 2


@pytest.mark.slow
def test_export_aoti(tmp_path):
    lines = run(tmp_path, example("export_aoti.py")).splitlines()
    assert lines[0].startswith("decoder.pt2") and lines[3] == "transformers was imported: False"
    assert ast.literal_eval(lines[1]) == ast.literal_eval(lines[4].partition("]")[0] + "]")


def test_a_pipeline_with_a_compiled_model_has_the_plain_models_text():
    """``pipeline("text-generation", model=torch.compile(...))``."""
    import transformers
    from tiny_models import build
    from tokenizers import Tokenizer, models

    import mikv_compile

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    plain, reports = build("llama"), len(mikv_compile.graph_reports())
    compiled = torch.compile(build("llama"), backend="mikv", options={"lower": "eager", "budget": 1.0})
    texts = []
    for model in (plain, compiled):
        generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(generate("w7", max_new_tokens=20, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1] and len(texts[0]) > 20
    assert {len(graph.rewritten) for graph in mikv_compile.graph_reports()[reports:]} == {2}
