"""One rank of tests/test_tensor_parallel.py: ``python tensor_parallel_rank.py MODEL_FOLDER RESULTS_FOLDER CASE...``.

Under torchrun the model is split over the ranks, otherwise it is whole. Each case's tokens, last logits and stores go
to ``RESULTS_FOLDER/CASE-RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers
from transformers.distributed import DistributedConfig

import mikv_compile

PROMPT, STEPS = 150, 30

CASES = {
    "full": {"budget": 1.0},
    "int4": {"tiers": "int4"},
    "default": {},
    "evicts": {"tiers": "int8:0.3,k4v2:0.3", "window": 16},
    "regional": {"tiers": "int4"},
    "static": {"tiers": "int4"},
    "bytes": {"budget": "24kB"},
    "inductor": {"tiers": "int4", "lower": "inductor"},
}


def prompt() -> torch.Tensor:
    return torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def load(folder: str) -> torch.nn.Module:
    split = {"distributed_config": DistributedConfig(tp_plan="auto")} if "RANK" in os.environ else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **split).eval()


def cache_for(case: str, config):
    if case == "static":
        return transformers.StaticCache(config=config, max_cache_len=PROMPT + STEPS)
    return transformers.DynamicCache()


@torch.no_grad()
def run(folder: str, case: str, **changes) -> dict:
    """Greedy tokens, the logits of the last step, and what each layer's store holds."""
    torch._dynamo.reset()
    reports = len(mikv_compile.graph_reports())
    model = load(folder)
    options = {"lower": "eager", **CASES[case], **changes}
    if case == "regional":
        compiled = mikv_compile.compile(model, regional=True, **options)
    else:
        compiled = torch.compile(model, backend="mikv", options=options)
    cache, tokens, found = cache_for(case, model.config), prompt(), []
    for _ in range(STEPS):
        logits = compiled(tokens, past_key_values=cache).logits[:, -1:]
        tokens = logits.argmax(-1)
        found.append(int(tokens))
    stores = [layer.keys.store for layer in cache.layers]
    return {
        "tokens": found,
        "logits": logits.clone(),
        "buffers": [store.buffers for store in stores],
        "counts": [store.counts for store in stores],
        "nbytes": sum(store.nbytes for store in stores),
        "fallbacks": [store.fallbacks for store in stores],
        "graphs": len(mikv_compile.graph_reports()) - reports,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for case in sys.argv[3:]:
        torch.save(run(sys.argv[1], case), Path(sys.argv[2]) / f"{case}-{rank}.pt")
