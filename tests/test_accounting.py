"""Sizes: the paper's printed figures from its way of counting, and the true bytes beside them."""

import pytest
import torch
from decoder import Decoder, inputs, run

from mikv_compile import cache_report

# MiKV (arXiv 2402.18096), r = 0.2, INT2 low tier: importance cache at FP16 / INT8 / INT4 / INT2.
PAPER = {"fp": 0.325, "int8": 0.23125, "int4": 0.18125, "int2": 0.15625}


@pytest.mark.parametrize("high", PAPER)
def test_sizes_that_the_paper_prints(high):
    model = Decoder(layers=1, heads=1, kv_heads=1, dim=128, dtype=torch.float16)
    fast = torch.compile(
        model,
        backend="mikv",
        options={"preset": "mikv-paper", "tiers": f"{high}:0.2,int2", "policy": "recent", "lower": "eager"},
    )
    cache = model.new_cache()
    run(fast, cache, inputs([1000], width=128, dtype=torch.float16))
    store, report = cache.keys[0].store, cache_report(cache)
    assert store.counts == (200, 800)
    assert report.coded_ratio_16bit == pytest.approx(PAPER[high], abs=1e-9)
    # True bytes add 4 for each position, 4 for each score of the high tier, the balancer and spare slots.
    spare = [c - n for c, n in zip(store.capacities, store.counts, strict=True)]
    assert all(0 <= s < 32 for s in spare)
    least = report.coded_ratio_16bit + (1000 * 4 + 200 * 4 + 128 * 4) / store.dense_nbytes
    assert least - 1e-9 <= report.ratio_16bit <= least + 1e-9 + sum(spare) * (512 + 8) / store.dense_nbytes
    assert f"{report.coded_ratio_16bit:.1%}" in str(report) and f"{report.ratio_16bit:.1%}" in str(report)


def test_sixteen_bit_ratio_of_a_wider_model():
    model = Decoder(layers=1)
    cache = model.new_cache()
    run(torch.compile(model, backend="mikv", options={"preset": "full", "lower": "eager"}), cache, inputs([256]))
    report = cache_report(cache)
    assert report.ratio_16bit == pytest.approx(2 * report.ratio)
    assert report.nbytes == sum(b.nbytes for b in cache.keys[0].store.buffers)
