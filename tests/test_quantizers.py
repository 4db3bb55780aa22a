"""Each quantizer through torch.compile: attention over what it stores, formats, bytes, and one from outside."""

import dataclasses
import importlib.util
import textwrap

import pytest
import torch
from decoder import Decoder

from mikv_compile import OptionError, Options, cache_report
from mikv_compile.config import PRESETS
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.quantizers import QUANTIZERS, Quantizer, register

SITE = CacheShape(1, 2, 64, 64, torch.float16)


def planned(**options):
    return Planner(Options(**options)).layer(0, SITE)


def filled(tokens=400, **options):
    """Outputs of a prompt and a few later calls, dense and compressed, and the compressed cache."""
    torch.manual_seed(0)
    decoder = Decoder(dim=64, heads=4, kv_heads=2)
    fast = torch.compile(decoder, backend="mikv", options={"lower": "eager", **options})
    width = decoder.heads * decoder.dim
    caches, outputs = (decoder.new_cache(), decoder.new_cache()), ([], [])
    torch.manual_seed(1)
    for length in (tokens, 1, 5, 1):
        x = torch.randn(1, length, width)
        for call, cache, out in zip((decoder, fast), caches, outputs, strict=True):
            with torch.no_grad():
                out.append(call(x, cache))
    return outputs, caches[1], caches[0]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bits", ["int4", "int2"])
def test_attention_reads_what_a_quantizer_stored(name, bits):
    (dense, got), cache, plain = filled(tiers=f"int8:0.02,{bits}", quantizer=name)
    assert torch.equal(dense[0], got[0])  # a prompt attends exactly
    off = torch.cat([(a - b).square().mean(1, True) for a, b in zip(got[1:], dense[1:], strict=True)])
    assert 1e-9 < off.mean() < {"int4": 0.02, "int2": 0.3}[bits] * torch.cat(dense[1:], 1).square().mean()
    for handle, want in zip(cache.keys + cache.values, plain.keys + plain.values, strict=True):
        lost = (handle.dequantize() - want).square().mean() / want.square().mean()
        assert 1e-6 < lost < {"int4": 0.05, "int2": 0.6}[bits]


def test_keys_and_values_have_quantizers_of_their_own():
    text = str(planned(tiers="int8:0.02,k4v2", key_quantizer="kivi", value_quantizer="rotate").format)
    assert text.startswith("8:t1c64,8:t1c64|4:t64c1,2:t1c64~unbiased+") and text.endswith("+rotate:v")
    text = str(planned(tiers="int8:0.02,k4v2", key_quantizer="rotate", value_quantizer="mikv").format)
    assert text.startswith("8:t1c64,8:t1c32|4:t1c64~clip,2:t1c32+") and text.endswith("+rotate:k")


def test_a_quantizer_that_is_given_replaces_both_of_the_preset():
    assert PRESETS["mikv"]["key_quantizer"] == "gptq"
    assert Options(quantizer="kivi").quantizers == ("kivi", "kivi")
    assert Options(quantizer="kivi", value_quantizer="rotate").quantizers == ("kivi", "rotate")
    assert Options(preset="mikv-paper").quantizers == ("mikv", "mikv")
    with pytest.raises(OptionError, match="unknown value_quantizer 'rotat'; did you mean 'rotate'"):
        Options(value_quantizer="rotat")


def test_the_paper_is_not_touched_by_better_rounding():
    text = str(planned(preset="mikv-paper").format)
    assert "~" not in text and "rotate" not in text and text.startswith("fp,fp|2:t1c32b,2:t1c32")


def test_nothing_is_rotated_where_nothing_is_rounded():
    assert planned(tiers="fp", value_quantizer="rotate").format.rotated == ""
    assert planned(tiers="fp:0.2,k4v16", value_quantizer="rotate").format.rotated == ""


def test_a_quantizer_from_a_file_of_ones_own(tmp_path):
    source = textwrap.dedent('''
        """Per token, groups of 32 channels: more scales, smaller errors."""

        from mikv_compile.kernels.formats import SideFormat
        from mikv_compile.quantizers import Quantizer, register


        def side(bits, dim, entry):
            return SideFormat(bits, 1, 32)


        register("group32", Quantizer(side, side))
    ''')
    path = tmp_path / "group32.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("group32", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        (_, _), cache, _ = filled(tiers="int4", quantizer="group32")
        assert str(cache.keys[0].store.plan.format) == "4:t1c32,4:t1c32"
        assert cache_report(cache).coded_ratio_16bit == pytest.approx((4 + 1) / 16, rel=0.05)
        with pytest.raises(ValueError, match="already"):
            register("group32", Quantizer(side := QUANTIZERS["kivi"].key, side))
    finally:
        QUANTIZERS.pop("group32", None)


def test_the_default_rounding_loses_less_than_rounding_by_the_range():
    """Its largest single error may be larger: clipping gives up the ends of a range for all that lies between."""
    lost = {}
    for name in ("default", "kivi"):
        options = {} if name == "default" else {"quantizer": "kivi"}
        _, cache, plain = filled(tiers="int8:0.0,k4v2", **options)
        pairs = zip(cache.values, plain.values, strict=True)
        lost[name] = sum((handle.dequantize() - want).square().mean().item() for handle, want in pairs)
    assert lost["default"] < 0.8 * lost["kivi"]


def test_keys_are_not_both_rotated_and_balanced(monkeypatch):
    """The balancer would be made for channels that the rotation has mixed."""
    both = dataclasses.replace(QUANTIZERS["mikv"], rotates="k")
    monkeypatch.setitem(QUANTIZERS, "both", both)
    with pytest.raises(OptionError, match="'both' rotates keys and balances their channels"):
        planned(tiers="int8:0.1,int4", key_quantizer="both", flush_every=1)
    with pytest.raises(OptionError, match="'both' rotates keys"):
        Planner(Options(tiers="int4", quantizer="both"))
    monkeypatch.setitem(QUANTIZERS, "both", dataclasses.replace(both, rotates="v"))
    assert planned(tiers="int4", quantizer="both").format.rotated == "v"
