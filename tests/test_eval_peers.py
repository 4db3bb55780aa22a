"""The peers' methods, as far as they go without their packages."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_eval import measured, metrics  # noqa: E402
from tiny_models import build, prompt  # noqa: E402

from mikv_compile.eval import DenseMethod, Session, UnavailableError, suites  # noqa: E402

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import kvpress_press
    import quantized_cache

    yield quantized_cache, kvpress_press
    for name in ("quantized_cache", "kvpress_press"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["peers", "kvpress", "smoke"])
def test_suites_of_peers_can_be_read(name):
    suite = suites.load(str(PEERS / f"{name}.toml"))
    assert len(suite.methods) == {"peers": 4, "kvpress": 24, "smoke": 13}[name]
    if name != "smoke":  # the same inputs as the project's own
        own = suites.load("fidelity")
        assert (suite.tasks, suite.texts, suite.texts_of) == (own.tasks, own.texts, own.texts_of)


def test_every_method_of_the_suites_can_be_made(peers):
    from mikv_compile.eval.suites import LateMethod

    for name in ("peers", "kvpress", "smoke"):
        for method in suites.load(str(PEERS / f"{name}.toml")).methods:
            if isinstance(method, LateMethod):
                module, _, made = method.settings["factory"].partition(":")
                getattr(sys.modules[module], made)(**method.settings["arguments"])


def test_what_is_missing_is_unavailable(peers):
    quantized, press = peers
    model = build("llama", num_hidden_layers=1)
    for module, method in (("hqq", quantized.Quantized("hqq")), ("kvpress", press.Press("snapkv"))):
        if importlib.util.find_spec(module) is None:
            with pytest.raises(UnavailableError, match=r"make peers"), method.open(model):
                pass


def test_fp8_is_half_of_16_bits_and_forks_do_not_meet(peers, tmp_path):
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    model = build("llama")
    method = peers[0].Quantized("fp8")
    got = metrics(measured(model, tmp_path, DenseMethod(), method))
    assert got["fp8"]["cache"]["ratio_16bit"] == pytest.approx(0.5, abs=0.01) and 1e-6 < got["fp8"]["kl"] < 0.1
    with torch.no_grad(), method.open(model) as session:
        cache, _ = session.prefill(prompt(tokens=20))
        first = session.forward(prompt(tokens=8), session.fork(cache))
        session.forward(prompt(tokens=5), session.fork(cache))
        assert cache.get_seq_length() == 20
        assert torch.equal(session.forward(prompt(tokens=8), cache), first)


class Nothing:
    """A press that prunes nothing."""

    @contextmanager
    def __call__(self, model):
        yield


def test_later_tokens_keep_their_positions_when_a_press_has_pruned(peers):
    """Oracle: the plain model with explicit positions, a token at a time."""
    model = build("llama")
    ids, later = prompt(tokens=24), prompt(tokens=6)
    with torch.no_grad():
        session = peers[1].PressSession(model, Nothing(), None, False)
        dense, _ = Session(model).prefill(ids)
        cache, _ = session.prefill(ids)
        assert torch.allclose(session.forward(later, session.fork(cache)), Session(model).forward(later, dense))
        for keep in ((10, 10), (12, 7)):  # layers of one length, read at once; of two, a token at a time
            pruned, other = session.fork(cache), session.fork(cache)
            for one in (pruned, other):
                for layer, count in zip(one.layers, keep, strict=True):
                    layer.keys, layer.values = layer.keys[:, :, :count].clone(), layer.values[:, :, :count].clone()
            want = [
                model(input_ids=later[:, i : i + 1], past_key_values=other, position_ids=torch.tensor([[24 + i]]))
                for i in range(6)
            ]
            got = session.forward(later, pruned)
            assert torch.allclose(got, torch.cat([step.logits[0] for step in want]), atol=1e-5)
            assert session.size(pruned).tokens == 30
            assert session.size(pruned).ratio_16bit == pytest.approx((sum(keep) / 2 + 6) / 30)


def test_a_press_leaves_the_attention_as_it_was(peers):
    model = build("llama")
    before = model.config._attn_implementation
    with torch.no_grad():
        peers[1].PressSession(model, Nothing(), None, True).prefill(prompt(tokens=8))
    assert model.config._attn_implementation == before
