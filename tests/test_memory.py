"""Peak during prefill: all compressed bytes, one layer's dense keys and values, and attention's own work."""

import pytest
import torch

from mikv_compile import cache_report

HEADS, TOKENS, DIM = 4, 2048, 64


class Layers(torch.nn.Module):
    """Nothing but caches: each layer's keys and values need the layer before, as in a model."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, keys, values):
        out = x.new_zeros(())
        for i in range(self.layers):
            weight = out + torch.eye(DIM)
            k, v = x @ weight, x @ (2 * weight)
            if len(keys) <= i:
                keys.append(torch.tensor([]))
                values.append(torch.tensor([]))
            keys[i], values[i] = torch.cat([keys[i], k], -2), torch.cat([values[i], v], -2)
            out = torch.nn.functional.scaled_dot_product_attention(k, keys[i], values[i], is_causal=True).mean()
        return out


def peak_and_compressed(layers, lower):
    """Largest sum of live allocations in one prefill, and the bytes of the cache that it leaves."""
    torch._dynamo.reset()
    x = torch.randn(1, HEADS, TOKENS, DIM)
    model = torch.compile(Layers(layers), backend="mikv", options={"lower": lower})
    with torch.no_grad():
        model(x, [], [])  # compile
        keys, values = [], []
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x, keys, values)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, cache_report([keys, values]).nbytes


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_prefill_holds_one_layer_dense(lower):
    one_layer = 2 * HEADS * TOKENS * DIM * 4
    peak_1, compressed_1 = peak_and_compressed(1, lower)
    peak_8, compressed_8 = peak_and_compressed(8, lower)
    assert compressed_8 == 8 * compressed_1 < 0.16 * 8 * one_layer
    # Beside the compressed bytes, eight layers take what one layer takes: its keys and values, and the work on them.
    assert peak_8 - compressed_8 <= peak_1 - compressed_1 + 0.05 * one_layer
    assert one_layer <= peak_1 - compressed_1 <= 2.5 * one_layer
