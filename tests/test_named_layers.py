"""The option ``layers`` names layers that the model has; where that cannot be known, the report says what is odd."""

import pytest
import torch
from decoder import Decoder, inputs, run

import mikv_compile
from mikv_compile import OptionError


def compiled(model, **options):
    return torch.compile(model, backend="mikv", options={"lower": "eager", **options})


class Broken(torch.nn.Module):
    """The layers of a decoder, each traced by itself, as in a model whose layers Dynamo cannot trace together."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(Decoder(layers=1, seed=i) for i in range(3))

    def new_caches(self):
        return [part.new_cache() for part in self.parts]

    def forward(self, x, caches):
        for part, cache in zip(self.parts, caches, strict=True):
            x = part(x, cache)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("layers", ["2=fp", "1=int4; 99=fp", "0-2=int8"])
def test_a_layer_that_the_model_does_not_have(layers):
    named = layers.split("=")[-2].split(";")[-1].split("-")[-1].strip()
    model = Decoder(layers=2)
    message = f"names layer {named}, but this model has 2 layers with a KV cache, numbered from 0 to 1"
    with pytest.raises(Exception, match=message):
        run(compiled(model, layers=layers), model.new_cache(), inputs([20]))
    torch._dynamo.reset()
    model.compile(backend="mikv", options={"lower": "eager", "layers": layers})
    with pytest.raises(Exception, match=message):
        run(model, model.new_cache(), inputs([20]))


def test_layers_that_the_model_has():
    model = Decoder(layers=2)
    cache = model.new_cache()
    run(compiled(model, layers="1=fp"), cache, inputs([100, 1]))
    assert [str(key.plan.format).count("fp") for key in cache.keys] == [0, 2]


@torch.no_grad()
def test_a_model_in_several_graphs_is_only_told():
    model = Broken()
    caches = model.new_caches()
    before = len(mikv_compile.graph_reports())
    fast = compiled(model, layers="2=fp")
    for x in inputs([20, 1]):
        assert fast(x, caches).isfinite().all()
    reports = [report for report in mikv_compile.graph_reports()[before:] if report.rewritten]
    assert len(reports) >= 2  # a prompt and a step; the three layers share them
    for report in reports:
        assert "note: option 'layers' names layer 2, but this graph has 1 layers" in str(report)


def test_regional_compilation_knows_the_number_of_layers():
    pytest.importorskip("transformers")
    import tiny_models

    with pytest.raises(OptionError, match="names layer 7, but this model has 2 layers"):
        mikv_compile.compile(tiny_models.build("llama"), regional=True, lower="eager", layers="7=fp")
