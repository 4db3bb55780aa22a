"""Plan files: what is measured, what tiers follow from it, and that layers get them."""

import copy
import json
import math
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import mikv_compile
from mikv_compile import Calibration, MikvError, OptionError, Options, calibration, sensitivity
from mikv_compile.calibration import Sample
from mikv_compile.plan import CacheShape, make, parse_tiers
from mikv_compile.planner import BUDGET_LENGTH, Planner
from mikv_compile.sensitivity import LayerShape

NAMES = ("k4", "k3", "k2", "v4", "v3", "v2", "keep0.5", "keep0.25", "keep0.125", "keep0.0")
MILD = (0.001, 0.004, 0.02, 0.0005, 0.002, 0.01, 0.02, 0.05, 0.1, 0.4)
SHAPE = LayerShape(3, 64, 64)


def table(scales, layer=SHAPE, **changes):
    """A calibration whose layers suffer alike, but for a factor."""
    damage = tuple({name: scale * kl for name, kl in zip(NAMES, MILD, strict=True)} for scale in scales)
    given = {
        "model": "M", "fingerprint": "0", "layers": (layer,) * len(scales), "options": {}, "inputs": ((100, 20),),
        "damage": {"text": damage}, "weights": {"text": 1.0},
    }  # fmt: skip
    return Calibration(**{**given, **changes})


def nbytes(tiers, dtype, shape=SHAPE):
    plans = [make(Options(), parse_tiers(text), shape.key_dim, shape.value_dim) for text in tiers]
    return sum(p.nbytes(BUDGET_LENGTH, 1, shape.kv_heads, shape.key_dim, shape.value_dim, dtype) for p in plans)


def dense(layers, dtype, shape=SHAPE):
    return layers * shape.kv_heads * (shape.key_dim + shape.value_dim) * BUDGET_LENGTH * dtype.itemsize


# Measuring


@pytest.fixture(scope="module")
def measured():
    """A random model of three layers, of which the second's values are all zero."""
    torch._dynamo.reset()
    model = tiny_models.build("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    seen = []
    found = mikv_compile.calibrate(
        model, [tiny_models.prompt(tokens=320)], continue_tokens=64, candidates=("k2", "v2", "keep0.25"), window=16,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    return model, found, seen


def test_damage_is_of_the_layers_that_do_something(measured):
    _, found, _ = measured
    for layer, row in found.rows():
        for name, kl in row.items():
            if layer == 1:
                assert abs(kl) < 1e-7, (layer, name)
            else:
                assert kl > 1e-6, (layer, name)


def test_facts_and_progress(measured):
    model, found, seen = measured
    assert seen == [(i + 1, 9) for i in range(9)]
    assert found.layers == (LayerShape(2, 16, 16, True),) * 3
    assert (found.model, found.options, found.inputs) == ("LlamaForCausalLM", {"window": 16}, ((256, 64),))
    assert found.fingerprint == calibration.fingerprint(model)
    assert found.fingerprint != calibration.fingerprint(tiny_models.model("llama"))


def test_the_model_is_left_uncompiled(measured):
    model, _, _ = measured
    assert not any("forward" in vars(module) for module in model.modules())


def test_check_runs_the_combined_tiers(measured):
    """The exact cache's own budget costs nothing; a small one costs what it costs, in the bytes that it may take."""
    model, found, _ = measured
    sample = Sample(tiny_models.prompt(tokens=320), 256)
    full, small = calibration.check(model, found, [sample], (1.0, 0.1)).checks
    assert (full.budget, full.predicted) == (1.0, {"text": 0}) and abs(full.measured["text"]) < 1e-7
    assert small.nbytes_fraction < 0.25 < 1 <= full.nbytes_fraction
    assert small.predicted["text"] > 0 and 0.1 < small.measured["text"] / small.predicted["text"] < 10
    with pytest.raises(ValueError, match="part other, which was not measured"):
        calibration.check(model, found, [Sample(sample.ids, 256, "other")], (0.2,))
    with pytest.raises(OptionError, match="of 3 layers, but the model has 2"):
        calibration.check(tiny_models.model("llama"), found, [sample], (0.2,))


def test_sliding_layers_are_told_apart():
    model = tiny_models.build("gemma2")  # the first layer slides, the second does not
    inputs = [tiny_models.prompt(tokens=120)]
    found = mikv_compile.calibrate(model, inputs, continue_tokens=32, candidates=("keep0.0",), window=8)
    assert [layer.evicts for layer in found.layers] == [False, True]
    assert 100 * found.measured(0, "keep0.0") < found.measured(1, "keep0.0")


def test_a_layer_that_stays_exact_has_no_damage():
    sample = Sample(tiny_models.prompt(tokens=120), 60)
    bench = calibration._Bench(tiny_models.build("llama"), {})
    with bench.open():
        (exact,), (again,) = bench.read_contexts("fp", [sample]), bench.read_contexts("fp", [sample])
        (coarse,) = bench.read_contexts("int2", [sample])
        want = bench.model(sample.ids).logits[0, 60:].log_softmax(-1)  # no cache at all
        mixed = {}
        for name, source in (("exact", again), ("coarse", coarse)):
            mixed[name] = copy.deepcopy(exact)
            calibration._put_layer(mixed[name], source, 1)
        kl = {name: calibration._divergence(want, bench.continued(sample, cache)) for name, cache in mixed.items()}
    assert abs(kl["exact"]) < 1e-6 < 1e-3 < kl["coarse"]
    # What the others were made of is as it was.
    assert {key.store.length for cache in (exact, again, coarse) for key, _ in calibration._handles(cache)} == {60}


def test_damage_is_what_the_exact_caches_predictions_lose():
    torch.manual_seed(0)
    want, got = torch.randn(2, 5, 7).log_softmax(-1)
    there, back = (F.kl_div(a, b, log_target=True, reduction="batchmean").item() for a, b in ((got, want), (want, got)))
    found = calibration._divergence(want, got)
    assert found == pytest.approx(there, rel=1e-5) != pytest.approx(back, rel=1e-2)


def test_only_counted_positions_count():
    ids = tiny_models.prompt(tokens=100)
    bench = calibration._Bench(tiny_models.build("llama"), {})
    counts = tuple(i in (3, 39) for i in range(40))
    with bench.open():
        (cache,) = bench.read_contexts("fp", [Sample(ids, 60)])
        every = bench.continued(Sample(ids, 60), copy.deepcopy(cache))
        some = bench.continued(Sample(ids, 60, counts=counts), copy.deepcopy(cache))
    assert torch.allclose(some, every[[3, 39]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tiers": "int8"}, "'tiers' is not for"),
        ({"lower": "inductor"}, "'lower' is not for"),
        ({"polcy": "h2o"}, "did you mean 'policy'"),
        ({"candidates": ("k5",)}, "unknown candidate 'k5'"),
        ({"candidates": ("keep1.5",)}, "unknown candidate"),
    ],
)
def test_calibrate_refuses(arguments, message):
    with pytest.raises(OptionError, match=message):
        mikv_compile.calibrate(tiny_models.model("llama"), [tiny_models.prompt(tokens=200)], **arguments)


def test_inputs_that_cannot_be_used():
    model = tiny_models.model("llama")
    for inputs, message in (
        ([], "at least one"),
        (["text"], "need a tokenizer"),
        ([tiny_models.prompt(tokens=20)], "do not fit in 20"),
        ([tiny_models.prompt(2, tokens=300)], r"expected \[1, tokens\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mikv_compile.calibrate(model, inputs)


def test_a_folder_that_is_missing_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mikv_compile.calibrate(None, [tiny_models.prompt(tokens=200)], path=tmp_path / "nowhere" / "plan.json")


def test_a_layer_that_stays_dense_is_named():
    with pytest.raises(MikvError, match="compressed"):
        calibration._handles((torch.zeros(1),))
    with pytest.raises(MikvError, match="layer 0 keeps a cache that cannot be calibrated"):
        calibration._handles([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))])


# Choosing


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6), *[st.floats(0.06, 1, exclude_max=True)] * 2,
    st.sampled_from([torch.float16, torch.float32]),
)  # fmt: skip
def test_budgets_are_kept_and_more_is_never_worse(scales, one, other, dtype):
    """Below 1, with which everything stays as it is and positions come on top."""
    found = table(scales)
    damages = []
    for budget in sorted((one, other)):
        tiers = found.tiers(budget, dtype=dtype)
        assert nbytes(tiers, dtype) <= budget * dense(len(scales), dtype)
        damages.append(found.damage_of(tiers))
    assert damages[0] >= damages[1] - 1e-12


@pytest.mark.parametrize("budget", [0.08, 0.12, 0.2, 0.25, 0.4])
def test_uneven_layers_beat_every_uniform_choice(budget):
    found = table([20, 0.05, 0.05, 8, 0.05, 0.05, 0.05, 1])
    chosen = found.damage_of(found.tiers(budget))
    offers = sensitivity._offers(SHAPE, torch.float16, ())
    fits = [text for text, *_, size in offers if 8 * size <= budget * dense(8, torch.float16)]
    assert fits and chosen < 0.5 * min(found.damage_of([text] * 8) for text in fits)


def test_a_layer_that_suffers_more_gets_more():
    tiers = table([10, 1, 0.01]).tiers(0.15)
    sizes = [nbytes([text], torch.float16) for text in tiers]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_budget_is_nearly_used_up():
    found = table([5, 3, 2, 1, 1, 0.7, 0.5, 0.3, 0.2, 0.1])
    for budget in (0.1, 0.15, 0.25):
        assert nbytes(found.tiers(budget), torch.float16) > 0.985 * budget * dense(10, torch.float16)


@pytest.mark.parametrize("budget", [0.06, 0.12, 0.16, 0.24, 0.4])
@pytest.mark.parametrize("length", [3000, 4096, 8192, 32768, 131072])
def test_the_bytes_are_the_budgets_part_at_any_length(budget, length):
    found = sensitivity.load("smollm2-135m")
    plans = [make(Options(), parse_tiers(text), 64, 64) for text in found.tiers(budget)]
    total = sum(plan.nbytes(length, 1, 3, 64, 64, torch.bfloat16) for plan in plans)
    part = total / (30 * CacheShape(1, 3, 64, 64, torch.bfloat16).dense_nbytes(length))
    assert 0.97 * budget < part < 1.01 * budget


def test_without_a_budget_the_stored_part_of_a_16_bit_cache_is_taken():
    found = table([3, 1], budget=0.2)
    assert found.tiers() == found.tiers(0.2)
    assert nbytes(found.tiers(dtype=torch.float32), torch.float32) <= 0.2 * dense(2, torch.float16)


def test_full_budget_keeps_everything():
    assert table([1, 1]).tiers(1.0) == ("fp", "fp")


def test_a_budget_below_the_least():
    with pytest.raises(OptionError, match=r"budget=0.005 is below the least .* 0\.0\d\d; raise it"):
        table([1, 1]).tiers(0.005)


def test_bits_that_cannot_be_packed_are_not_offered():
    """A head of 100 channels has no whole bytes of 3 bits."""

    def chosen(dim):
        found = table([1, 0.2], LayerShape(4, dim, dim))
        return " ".join(text for budget in (0.15, 0.2, 0.25, 0.3) for text in found.tiers(budget))

    assert re.search("[kv]3", chosen(64)) and not re.search("[kv]3", chosen(100))


def test_a_sliding_layer_evicts_nothing():
    found = table([1, 1], LayerShape(3, 64, 64, evicts=False))
    assert not any(parse_tiers(text)[-1].is_bounded for text in found.tiers(0.2))
    assert any(parse_tiers(text)[-1].is_bounded for text in table([1, 1]).tiers(0.08))


def test_weights_decide_whose_damage_counts():
    flat = tuple({name: 0.001 for name in NAMES} for _ in range(2))
    one, two = table([50, 0.01]).damage["text"], table([0.01, 50]).damage["text"]
    found = table([1, 1], damage={"a": one, "b": two, "c": flat}, weights={"a": 1.0, "b": 0.0, "c": 0.0})
    first, second = (nbytes([text], torch.float16) for text in found.tiers(0.15))
    assert first > second
    second, first = (nbytes([text], torch.float16) for text in found.tiers(0.15, weights={"a": 0, "b": 1, "c": 0}))
    assert first > second


def test_predicted_damage():
    found = table([1])
    assert found.predicted(0, 8, 8, 1.0) == found.predicted(0, 16, 16, 1.0) == 0
    assert found.predicted(0, 3, 2, 1.0) == pytest.approx(0.004 + 0.01)
    assert found.predicted(0, 2, 4, 0.25) == pytest.approx(0.02 + 0.0005 + 0.05)
    assert found.predicted(0, 8, 8, 0.1875) == pytest.approx(math.sqrt(0.05 * 0.1))
    assert found.predicted(0, 8, 8, 0.75) == pytest.approx(0.01)


def test_fewer_tokens_or_bits_never_count_as_less_damage():
    found = table([1])
    row = {**found.damage["text"][0], "k2": 0.0, "keep0.25": -1e-9, "keep0.0": 0.03}
    found = table([1], damage={"text": (row,)})
    assert found.predicted(0, 2, 8, 1.0) == found.predicted(0, 3, 8, 1.0) == 0.004
    assert found.predicted(0, 8, 8, 0.25) == found.predicted(0, 8, 8, 0.5) == 0.02
    assert found.predicted(0, 8, 8, 0.0) == pytest.approx(0.1)  # as keep0.125


def test_the_packaged_file():
    path = Path(mikv_compile.__file__).parent / "plans" / "smollm2-135m.json"
    found = Calibration.load(path)
    assert len(found.layers) == 30 and found.weights == {"text": 1.0, "retrieval": 0.2}
    assert found.measured(7, "k2") > 100 * found.measured(13, "k2")
    assert nbytes(found.tiers(0.12), torch.float16) <= 0.12 * dense(30, torch.float16)


# Files


def test_the_page_gives_the_bytes_and_the_number_of_offers_that_there_are():
    page = (Path(__file__).parent.parent / "docs" / "calibration.md").read_text(encoding="utf-8")
    usual = tuple(sorted((name, getattr(Options(), name)) for name in sensitivity._OF_BYTES))
    shape = sensitivity.load("smollm2-135m").layers[0]
    offers = {tiers for tiers, *_ in sensitivity._offers(shape, torch.float16, usual)}
    assert f" {len(offers)} different tiers" in page
    site = CacheShape(1, shape.kv_heads, shape.key_dim, shape.value_dim, torch.float16, 30)
    rows = re.findall(r"^\| (\d+) % \| (.*) % \|$", page, re.M)
    assert [budget for budget, _ in rows] == ["3", "6", "12", "25"]
    for budget, cells in rows:
        planner = Planner(Options(plan="smollm2-135m", budget=int(budget) / 100))
        plans = [planner.layer(i, site) for i in range(site.layers)]
        for length, cell in zip((1700, 3584, 4096, 32768), cells.split(" % | "), strict=True):
            sizes = (site.batch, site.kv_heads, site.key_dim, site.value_dim, site.dtype)
            nbytes = sum(plan.nbytes(length, *sizes) for plan in plans)
            assert f"{100 * nbytes / site.dense_nbytes(length) / site.layers:.1f}" == cell, (budget, length)


def test_round_trip(tmp_path):
    found = table([3, 1], options={"window": 32}, checks=(sensitivity.Check(0.2, 0.19, {"text": 0.1}, {"text": 0.2}),))
    found.save(tmp_path / "plan.json")
    assert Calibration.load(tmp_path / "plan.json") == found
    assert found != table([3, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(mikv_plan=99), "has version 99; this release reads version 1"),
        (lambda c: c.pop("mikv_plan"), "is not a plan file"),
        (lambda c: c.pop("layers"), "damaged: 'layers'"),
        (lambda c: c.update(more=1), "unknown entries more"),
        (lambda c: c["layers"].pop(), "is of 2 layers, but there are 1"),
        (lambda c: c["damage"]["text"][0].update(k2="x"), "'k2' of 'text' is 'x', which is no number"),
        (lambda c: c["damage"]["text"][0].update(k7=0.1), "not of the same candidates|unknown candidate"),
        (lambda c: c["damage"]["text"][1].pop("k2"), "not of the same candidates"),
        (lambda c: c["damage"]["text"][0].update(k2=math.nan), "no number"),
        (lambda c: c.update(weights={"text": -1}), "at least 0|from 0 on"),
        (lambda c: c.update(budget=2), "budget of a calibration is 2"),
        (lambda c: c["layers"][0].update(kv_head=1), "damaged: .*kv_head"),
        (lambda c: c["layers"][0].update(kv_heads="three"), "is no shape of a layer"),
        (lambda c: c["layers"][0].update(kv_heads=0), "is no shape of a layer"),
        (lambda c: c["layers"][1].update(key_dim=-64), "is no shape of a layer"),
        (lambda c: c["layers"][1].update(evicts="no"), "is no shape of a layer"),
        (lambda c: c.update(options=[1]), "the options of a calibration are"),
        (lambda c: c.update(weights={"text": math.inf}), "from 0 on"),
    ],
)
def test_tampered_files(tmp_path, change, message):
    path = tmp_path / "plan.json"
    table([3, 1]).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=message) as error:
        Calibration.load(path)
    assert "calibrate" in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(OptionError, match="there is no plan file"):
        sensitivity.load(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("tiers")
    with pytest.raises(OptionError, match="is not JSON"):
        sensitivity.load(str(tmp_path / "text.json"))


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "plan.json"
    table([3, 1]).save(path)
    first = sensitivity.load(str(path))
    assert sensitivity.load(str(path)) is first
    table([1, 3, 1]).save(path)
    assert len(sensitivity.load(str(path)).layers) == 3


def test_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mikv_compile import calibration_command, cli

    asked = {}

    def calibrate(model, inputs, **settings):
        asked.update(settings, model=model, inputs=inputs)
        settings["progress"](1, 2)
        return table([3, 1], checks=(sensitivity.Check(0.06, 0.07, {"text": 0.1234}, {"text": 0.5678}),))

    monkeypatch.setattr(calibration_command, "calibrate", calibrate)
    monkeypatch.setattr(calibration_command.models, "load", lambda name, dtype, device: ("tokenizer", (name, dtype)))
    monkeypatch.setattr(calibration_command, "default_inputs", lambda tokenizer, context: [tokenizer, context])
    arguments = ["calibrate", "m", "--out", str(tmp_path / "p.json"), "-o", "window=32", "--check", "0.06"]
    result = CliRunner().invoke(cli.make_app(), [*arguments, "--budget", "20%", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert asked["model"] == ("m", torch.bfloat16) and asked["inputs"] == ["tokenizer", 2048]
    assert (asked["window"], asked["budget"], asked["check"]) == (32, 0.2, [0.06])
    for expected in ("keep0.25", "60.000", "int8:0.035-68,", "measured KL 0.56780, predicted 0.12340", "wrote"):
        assert expected in result.stdout
    result = CliRunner().invoke(cli.make_app(), [*arguments, "--json"])
    printed = json.loads(result.stdout)
    assert printed["file"] == str(tmp_path / "p.json") and printed["checks"][0]["measured"] == {"text": 0.5678}
    assert len(printed["layers"]) == len(printed["tiers"]) == 2
    for wrong in (["--dtype", "int3"], ["--budget", "2GiB"], ["--check", "lots"]):
        result = CliRunner().invoke(cli.make_app(), ["calibrate", "m", *wrong])
        assert result.exit_code == 2 and wrong[1] in result.stderr


# The option


def test_option_conflicts(tmp_path):
    path = str(tmp_path / "plan.json")
    for other in ({"tiers": "int8"}, {"layers": "0=fp"}, {"layer_budget": "pyramid"}, {"budget": "1GiB"}):
        with pytest.raises(OptionError, match="'plan'"):
            Options.parse({"plan": path, **other})
    with pytest.raises(OptionError, match="a string"):
        Options.parse({"plan": 3})
    Options.parse({"plan": path, "budget": 0.2, "preset": "evict"})


def test_the_planner_refuses_files_of_other_models(tmp_path):
    path = tmp_path / "plan.json"
    table([3, 1]).save(path)
    planner = Planner(Options(plan=str(path), budget=0.2))
    site = CacheShape(1, 3, 64, 64, torch.float16, layers=2)
    want = table([3, 1]).tiers(0.2)
    assert [planner.layer(i, site).tiers for i in range(2)] == [parse_tiers(text) for text in want]
    with pytest.raises(OptionError, match=r"with 2 layers, but 3 are compiled here; make one .*calibrate"):
        planner.layer(0, CacheShape(1, 3, 64, 64, torch.float16, layers=3))
    with pytest.raises(OptionError, match=r"3 KV heads of 64 .*; here it has 3 of 32 and 64; make one"):
        planner.layer(0, CacheShape(1, 3, 32, 64, torch.float16, layers=2))


@pytest.mark.parametrize("regional", [False, True])
def test_layers_get_the_tiers_of_the_file(tmp_path, regional):
    shape = LayerShape(2, 16, 16)
    found = table([0.01, 30, 1, 0.01], shape)
    found.save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json"), "budget": 0.2, "lower": "eager"}
    want = found.tiers(0.2, dtype=torch.float32)
    assert len(set(want)) >= 3
    model = tiny_models.build("llama", num_hidden_layers=4)
    if regional:
        compiled = mikv_compile.compile(model, regional=True, **options)
    else:
        compiled = torch.compile(model, backend="mikv", options=options)
    with torch.no_grad():
        cache = compiled(tiny_models.prompt(tokens=400), use_cache=True).past_key_values
        compiled(tiny_models.prompt(tokens=1), past_key_values=cache)
    stores = calibration._stores(cache)
    assert [store.plan.tiers for store in stores] == [parse_tiers(text) for text in want]
    assert stores[0].evicted and {store.length for store in stores} == {401}


def test_regional_refuses_a_file_of_another_model_at_once(tmp_path):
    table([3, 1, 1], LayerShape(2, 16, 16)).save(tmp_path / "plan.json")
    with pytest.raises(OptionError, match="with 3 layers, but 2 are compiled here"):
        mikv_compile.compile(tiny_models.build("llama"), regional=True, plan=str(tmp_path / "plan.json"), lower="eager")
