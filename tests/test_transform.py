"""``mikv_compile.transform``: the passes on graphs of torch.export and make_fx."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import mikv_compile
from mikv_compile import KVTensor

HEADS, KV, DIM, WIDTH, LAYERS, PAST = 4, 2, 16, 64, 2, 7
Past = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class Step(nn.Module):
    """A decoder whose caches are inputs and outputs: ``forward(x [B, S, WIDTH], past) -> (y, past)``."""

    bends = False
    """Whether attention reads the keys through something that is no view."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.ModuleList(nn.Linear(WIDTH, HEADS * DIM, bias=False) for _ in range(LAYERS))
        self.k = nn.ModuleList(nn.Linear(WIDTH, KV * DIM, bias=False) for _ in range(LAYERS))
        self.v = nn.ModuleList(nn.Linear(WIDTH, KV * DIM, bias=False) for _ in range(LAYERS))
        self.o = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH, bias=False) for _ in range(LAYERS))

    def project(self, i, x):
        batch, tokens, _ = x.shape
        q = self.q[i](x).view(batch, tokens, HEADS, DIM).transpose(1, 2)
        k = self.k[i](x).view(batch, tokens, KV, DIM).transpose(1, 2)
        v = self.v[i](x).view(batch, tokens, KV, DIM).transpose(1, 2)
        return q, k, v

    def write(self, cached, new, position):
        return torch.cat([cached, new], dim=2)

    def attend(self, q, k, v, mask, prefill):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=prefill, enable_gqa=True)

    def forward(self, x, past: Past, mask=None, position=None):
        presents = ()
        prefill = x.shape[1] > 1 and mask is None
        for i, (k_cache, v_cache) in enumerate(past):
            q, k, v = self.project(i, x)
            k, v = self.write(k_cache, k, position), self.write(v_cache, v, position)
            out = self.attend(q, k.cos() if self.bends else k, v, mask, prefill)
            x = x + self.o[i](out.transpose(1, 2).reshape(x.shape))
            presents += ((k, v),)
        return x, presents


class EagerStep(Step):
    """Hugging Face's eager attention, with heads repeated."""

    def attend(self, q, k, v, mask, prefill):
        k, v = (
            t[:, :, None].expand(t.shape[0], KV, HEADS // KV, t.shape[2], DIM).reshape(t.shape[0], HEADS, -1, DIM)
            for t in (k, v)
        )
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
        if mask is not None:
            scores = scores + mask
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


class IndexCopyStep(Step):
    def write(self, cached, new, position):
        return torch.index_copy(cached, 2, position, new)


class SliceScatterStep(Step):
    def write(self, cached, new, position):
        return torch.slice_scatter(cached, new, 2, PAST, PAST + 1)


class IndexPutStep(Step):
    def write(self, cached, new, position):
        return torch.ops.aten.index_put(cached, [None, None, position], new)


class InPlaceStep(Step):
    def write(self, cached, new, position):
        return cached.index_copy_(2, position, new)

    def forward(self, x, past, mask=None, position=None):
        return super().forward(x, past, mask, position)[0]


class BufferStep(InPlaceStep):
    """The caches are buffers of the module."""

    def __init__(self):
        super().__init__()
        for i in range(LAYERS):
            self.register_buffer(f"k_cache{i}", torch.zeros(1, KV, 32, DIM))
            self.register_buffer(f"v_cache{i}", torch.zeros(1, KV, 32, DIM))

    def forward(self, x, mask, position):
        past = tuple((getattr(self, f"k_cache{i}"), getattr(self, f"v_cache{i}")) for i in range(LAYERS))
        return super().forward(x, past, mask, position)


class BendingStep(Step):
    bends = True


def _x(tokens: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def _past(tokens: int) -> Past:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        (torch.randn(1, KV, tokens, DIM, generator=generator), torch.randn(1, KV, tokens, DIM, generator=generator))
        for _ in range(LAYERS)
    )


def _export(model, *args, dynamic=True):
    length = torch.export.Dim("length")
    total = torch.export.Dim("total")
    shapes = None
    if dynamic:
        shapes = [None, tuple(({2: length}, {2: length}) for _ in range(LAYERS)), None, None][: len(args)]
        if len(args) > 2 and args[2] is not None:
            shapes[2] = {3: length + 1}
        del total
    with torch.no_grad():
        return torch.export.export(model.eval(), args, dynamic_shapes=None if shapes is None else tuple(shapes))


def _fx(mode: str, pre_dispatch: bool = False):
    def trace(model, *args):
        with torch.no_grad():
            return make_fx(model, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*args)

    return trace


GROWING = {
    "export": _export,
    "symbolic": _fx("symbolic"),
    "pre_dispatch": _fx("symbolic", pre_dispatch=True),
    "real": _fx("real"),
    "fake": _fx("fake"),
}
STATIC = {**GROWING, "export": lambda model, *args: _export(model, *args, dynamic=False)}


def _report():
    return mikv_compile.graph_reports()[-1]


def _run(call, past, steps: int):
    """Outputs of single steps, and the cache at the end."""
    outputs = []
    for i in range(steps):
        y, past = call(_x(seed=i), past)
        outputs.append(y)
    return torch.stack(outputs), past


@pytest.mark.parametrize("tracer", GROWING)
def test_growing_cache_with_full_budget_equals_dense(tracer):
    model = Step().eval()
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    with torch.no_grad():
        got, past = _run(step, _past(PAST), 4)
        wanted, dense = _run(model, _past(PAST), 4)
    assert type(past) is tuple and type(past[0]) is tuple
    for (k, v), (dense_k, dense_v) in zip(past, dense, strict=True):
        assert isinstance(k, KVTensor) and isinstance(v, KVTensor)
        assert k.shape == dense_k.shape and k.store.fallbacks == {}
        torch.testing.assert_close(k.dequantize(), dense_k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v.dequantize(), dense_v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
