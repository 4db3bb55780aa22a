"""``mikv_compile.transform``: the passes on graphs of torch.export and make_fx."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import mikv_compile
from mikv_compile import KVTensor, report

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
            t[:, :, None]
            .expand(t.shape[0], KV, HEADS // KV, t.shape[2], DIM)
            .reshape(t.shape[0], HEADS, t.shape[2], DIM)
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


class SliceCopyStep(InPlaceStep):
    def write(self, cached, new, position):
        cached[:, :, PAST : PAST + 1].copy_(new)
        return cached


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
    masked = len(args) > 2 and args[2] is not None
    # For the strides of repeated heads, torch assumes more than a named dimension may promise.
    length = torch.export.Dim.AUTO if masked else torch.export.Dim("length")
    shapes = None
    if dynamic:
        shapes = [None, tuple(({2: length}, {2: length}) for _ in range(LAYERS)), None, None][: len(args)]
        if masked:
            shapes[2] = {3: length}
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


@pytest.mark.parametrize("tracer", ["export", "symbolic", "pre_dispatch"])
def test_prefill_graph_then_decode_graph(tracer, monkeypatch):
    model = Step().eval()
    options = {"tiers": "int8"}
    prefill = mikv_compile.transform(STATIC[tracer](model, _x(70), _past(0)), options=options)
    assert [site.phase for site in _report().rewritten] == ["prefill"] * LAYERS, str(_report())
    decode = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options=options)
    assert [site.phase for site in _report().rewritten] == ["decode"] * LAYERS, str(_report())
    graphs = []
    monkeypatch.setattr(report, "_listeners", [graphs.append])
    with torch.no_grad():
        y, past = prefill(_x(70), _past(0))
        wanted, dense = model(_x(70), _past(0))
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        got, past = _run(decode, past, 5)
        wanted, dense = _run(model, dense, 5)
    assert past[0][0].shape == dense[0][0].shape == (1, KV, 75, DIM)
    assert past[0][0].store.fallbacks == {}
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)
    assert not graphs  # the decode graph knew this plan


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_int4_is_smaller_and_near(tracer):
    model = Step().eval()
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options={"tiers": "int4"})
    with torch.no_grad():
        got, past = _run(step, _past(600), 3)
        wanted, dense = _run(model, _past(600), 3)
    bytes_dense = sum(t.numel() * t.element_size() for pair in dense for t in pair)
    assert sum(k.store.nbytes for k, _ in past) < 0.3 * bytes_dense
    error = (got - wanted).norm() / wanted.norm()
    assert 0 < error < 0.1


def test_plan_that_evicts_goes_from_prefill_to_decode():
    model = Step().eval()
    options = {"tiers": "int8:0.5", "window": 8, "sinks": 2, "flush_every": 1}
    prefill = mikv_compile.transform(STATIC["export"](model, _x(70), _past(0)), options=options)
    decode = mikv_compile.transform(GROWING["export"](model, _x(), _past(PAST)), options=options)
    with torch.no_grad():
        _, past = prefill(_x(70), _past(0))
        _, past = _run(decode, past, 3)
    assert [site.phase for site in _report().rewritten] == ["decode"] * LAYERS, str(_report())
    assert past[0][0].shape[2] == 73 and sum(past[0][0].store.counts) < 60


@pytest.mark.parametrize("tracer", ["export", "symbolic", "pre_dispatch"])
def test_eager_attention_with_mask_and_repeated_heads(tracer):
    model = EagerStep().eval()
    mask = torch.zeros(1, 1, 1, PAST + 1)
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST), mask), options={"budget": 1.0})
    assert [(site.reads, site.groups) for site in _report().rewritten] == [("fused", 2)] * LAYERS, str(_report())
    past = dense = _past(PAST)
    for i in range(3):
        mask = torch.zeros(1, 1, 1, PAST + 1 + i)
        mask[..., 2:4] = -1e4
        with torch.no_grad():
            got, past = step(_x(seed=i), past, mask)
            wanted, dense = model(_x(seed=i), dense, mask)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert isinstance(past[0][0], KVTensor) and past[0][0].store.fallbacks == {}


@pytest.mark.parametrize("kind", [IndexCopyStep, IndexPutStep])
@pytest.mark.parametrize("tracer", STATIC)
def test_preallocated_cache_as_input_and_output(kind, tracer):
    model = kind().eval()
    mask, position = torch.zeros(1, 1, 1, 32), torch.tensor([PAST])
    step = mikv_compile.transform(STATIC[tracer](model, _x(), _past(32), mask, position), options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    past = dense = _past(32)
    for i in range(3):
        mask = torch.full((1, 1, 1, 32), -torch.inf)
        mask[..., : PAST + 1 + i] = 0
        position = torch.tensor([PAST + i])
        with torch.no_grad():
            got, past = step(_x(seed=i), past, mask, position)
            wanted, dense = model(_x(seed=i), dense, mask, position)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert isinstance(past[0][0], KVTensor) and past[0][0].shape == dense[0][0].shape


@pytest.mark.parametrize("tracer", ["export", "symbolic", "real"])
def test_slice_scatter(tracer):
    model = SliceScatterStep().eval()
    mask = torch.full((1, 1, 1, 32), -torch.inf)
    mask[..., : PAST + 1] = 0
    step = mikv_compile.transform(STATIC[tracer](model, _x(), _past(32), mask), options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    with torch.no_grad():
        got, past = step(_x(), _past(32), mask)
        wanted, _ = model(_x(), _past(32), mask)
    assert isinstance(past[0][0], KVTensor)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tracer", ["export", "symbolic", "pre_dispatch", "real"])
def test_inputs_written_in_place_become_handles(tracer):
    model = InPlaceStep().eval()
    mask, position = torch.zeros(1, 1, 1, 32), torch.tensor([PAST])
    step = mikv_compile.transform(STATIC[tracer](model, _x(), _past(32), mask, position), options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    past, dense = _past(32), _past(32)
    for i in range(3):
        mask = torch.full((1, 1, 1, 32), -torch.inf)
        mask[..., : PAST + 1 + i] = 0
        position = torch.tensor([PAST + i])
        with torch.no_grad():
            got, wanted = step(_x(seed=i), past, mask, position), model(_x(seed=i), dense, mask, position)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert past[0][0].store.nbytes > 0
    assert past[0][0].untyped_storage().nbytes() == 0


@pytest.mark.parametrize("kind", [InPlaceStep, SliceCopyStep])
def test_functionalized_export(kind):
    """Decompositions make copies of what a model writes in place, and export copies them back."""
    model = kind().eval()
    mask, position = torch.full((1, 1, 1, 32), -torch.inf), torch.tensor([PAST])
    mask[..., : PAST + 1] = 0
    program = _export(model, _x(), _past(32), mask, position, dynamic=False).run_decompositions({})
    step = mikv_compile.transform(program, options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    past, dense = _past(32), _past(32)
    with torch.no_grad():
        for i in range(2):
            got, wanted = step(_x(seed=i), past, mask, position), model(_x(seed=i), dense, mask, position)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert past[0][0].store.nbytes > 0


@pytest.mark.parametrize("tracer", ["export", "functional", "symbolic"])
def test_buffers_written_in_place(tracer):
    model = BufferStep().eval()
    trace = {
        "export": lambda m, *a: torch.export.export(m, a),
        "functional": lambda m, *a: torch.export.export(m, a).run_decompositions({}),
        "symbolic": _fx("symbolic"),
    }[tracer]
    mask, position = torch.zeros(1, 1, 1, 32), torch.tensor([0])
    with torch.no_grad():
        graph = trace(BufferStep().eval(), _x(), mask, position)
    step = mikv_compile.transform(graph, options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    with torch.no_grad():
        for i in range(4):
            mask = torch.full((1, 1, 1, 32), -torch.inf)
            mask[..., : 1 + i] = 0
            args = _x(seed=i), mask, torch.tensor([i])
            torch.testing.assert_close(step(*args), model(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tracer", ["export", "symbolic", "real"])
def test_near_miss_is_read_densely_with_a_reason(tracer):
    model = BendingStep().eval()
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options={"budget": 1.0})
    assert all(site.reads == "dense" and site.reason for site in _report().rewritten)
    with torch.no_grad():
        got, _ = _run(step, _past(PAST), 3)
        wanted, _ = _run(model, _past(PAST), 3)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_cache_that_is_not_returned_stays_dense_with_a_reason():
    def attend(q, past_k, past_v, k, v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v)

    args = (torch.randn(1, 2, 1, 8), *(torch.randn(1, 2, n, 8) for n in (5, 5, 1, 1)))
    graph = make_fx(attend, tracing_mode="symbolic")(*args)
    step = mikv_compile.transform(graph)
    assert not _report().rewritten
    assert any("returns" in declined.reason or "return" in declined.reason for declined in _report().declined)
    torch.testing.assert_close(step(*args), attend(*args))


@pytest.mark.parametrize("tracer", ["real", "fake"])
def test_length_that_is_a_constant_of_the_graph_runs_as_traced(tracer):
    """Repeated heads leave the length in the graph; another one is up to the graph as it was."""
    model = EagerStep().eval()
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options={"budget": 1.0})
    with torch.no_grad():
        y, past = step(_x(), _past(PAST))
        torch.testing.assert_close(y, model(_x(), _past(PAST))[0], atol=1e-5, rtol=1e-5)
        assert isinstance(past[0][0], KVTensor)
        with pytest.raises(RuntimeError):
            step(_x(), past)


def test_static_export_refuses_other_lengths_as_export_does():
    step = mikv_compile.transform(_export(Step().eval(), _x(), _past(PAST), dynamic=False))
    with torch.no_grad():
        _, past = step(_x(), _past(PAST))
        assert isinstance(past[0][0], KVTensor)
        with pytest.raises((AssertionError, RuntimeError)):
            step(_x(), past)


def test_other_plan_gets_a_graph_of_its_own(monkeypatch):
    model = Step().eval()
    first, second = (
        mikv_compile.transform(_export(model, _x(), _past(PAST)), options={"tiers": tiers})
        for tiers in ("int8", "int4")
    )
    with torch.no_grad():
        _, past = first(_x(), _past(PAST))
        graphs = []
        monkeypatch.setattr(report, "_listeners", [graphs.append])
        _, past = _run(second, past, 2)
    assert len(graphs) == 1
    assert [fmt.key.bits for fmt in past[0][0].plan.format.tiers] == [8]


def test_batch_of_another_size():
    """A batch of 5 is a symbol of make_fx (2 would be that of the KV heads); of 1, it runs the graph as it was."""
    model = Step().eval()
    x, past = _x().expand(5, 1, WIDTH), tuple((k.repeat(5, 1, 1, 1), v.repeat(5, 1, 1, 1)) for k, v in _past(PAST))
    step = mikv_compile.transform(_fx("symbolic")(model, x, past), options={"budget": 1.0})
    assert [site.reads for site in _report().rewritten] == ["fused"] * LAYERS, str(_report())
    for rows, kind in ((3, KVTensor), (1, torch.Tensor)):
        given = tuple((k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in _past(PAST))
        with torch.no_grad():
            got, present = step(_x().expand(rows, 1, WIDTH), given)
            wanted, _ = model(_x().expand(rows, 1, WIDTH), given)
        assert type(present[0][0]) is kind
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_handle_goes_to_a_graph_that_runs_as_it_was():
    model = Step().eval()
    step = mikv_compile.transform(_export(model, _x(), _past(PAST)), options={"budget": 1.0})
    short = mikv_compile.transform(_fx("symbolic")(model, _x(70), _past(0)), options={"budget": 1.0})
    with torch.no_grad():
        _, past = step(_x(), _past(PAST))
        y, _ = short(_x(70), past)  # traced for an empty past
        wanted, _ = model(_x(70), model(_x(), _past(PAST))[1])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


def test_calls_that_record_gradients_stay_dense():
    model = Step().eval()
    step = mikv_compile.transform(_export(model, _x(), _past(PAST)))
    y, past = step(_x(), _past(PAST))
    assert y.requires_grad and not isinstance(past[0][0], KVTensor)
    assert "gradients" in _report().declined[0].reason


def test_module_of_a_program_and_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = Step()

        def forward(self, x, *, past):
            y, past = self.step(x, past)
            return {"y": y, "past": past}

    model = Named().eval()
    length = torch.export.Dim("length")
    shapes = {"x": None, "past": tuple(({2: length}, {2: length}) for _ in range(LAYERS))}
    program = torch.export.export(model, (_x(),), {"past": _past(PAST)}, dynamic_shapes=shapes)
    step = mikv_compile.transform(program.module(), options={"budget": 1.0})
    with torch.no_grad():
        got = step(_x(), past=_past(PAST))
        got = step(_x(seed=1), past=got["past"])
        wanted = model(_x(seed=1), past=model(_x(), past=_past(PAST))["past"])
    torch.testing.assert_close(got["y"], wanted["y"], atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="structured"):
        step(_x())


def test_graph_without_shapes_needs_example_inputs():
    class Plain(nn.Module):
        def forward(self, q, k, v, past_k, past_v):
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            return F.scaled_dot_product_attention(q, k, v), k, v

    graph = torch.fx.symbolic_trace(Plain())
    args = (torch.randn(1, 2, 1, 8), *(torch.randn(1, 2, n, 8) for n in (1, 1, 5, 5)))
    assert mikv_compile.transform(graph)(*args)[1].shape == (1, 2, 6, 8)
    assert "example_inputs" in _report().declined[0].reason
    step = mikv_compile.transform(graph, args, options={"budget": 1.0})
    out, k, v = step(*args)
    assert isinstance(k, KVTensor)
    torch.testing.assert_close(out, graph(*args)[0])
    out, k, v = step(*args[:3], k, v)
    assert isinstance(k, KVTensor) and k.shape == (1, 2, 7, 8)


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_inductor(tracer):
    model = Step().eval()
    options = {"budget": 1.0, "lower": "inductor"}
    step = mikv_compile.transform(GROWING[tracer](model, _x(), _past(PAST)), options=options)
    with torch.no_grad():
        got, past = _run(step, _past(PAST), 3)
        wanted, _ = _run(model, _past(PAST), 3)
    assert isinstance(past[0][0], KVTensor)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [None, lambda x: x, Step()])
def test_what_is_no_graph_is_refused(wrong):
    with pytest.raises(TypeError, match="GraphModule or an ExportedProgram"):
        mikv_compile.transform(wrong)


def test_unknown_option():
    with pytest.raises(mikv_compile.OptionError, match="tiers"):
        mikv_compile.transform(_export(Step().eval(), _x(), _past(PAST)), options={"tier": "int4"})
