"""The command `mikv`: what each subcommand prints, its JSON, and what it says about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402  (needs transformers)
from saved_models import TEMPLATE, save, tokenizer  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from mikv_compile import OptionError, Options, cache_report, cli, doctor  # noqa: E402
from mikv_compile.commands import common, run_command  # noqa: E402
from mikv_compile.eval.methods import Session  # noqa: E402
from mikv_compile.forecast import CannotForecastError, Forecast, model_shape  # noqa: E402


def mikv(*arguments, code=0, **kwargs):
    """Run a command in this process; its exit code has to be `code`."""
    result = CliRunner().invoke(cli.make_app(), [str(a) for a in arguments], **kwargs)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def told(*arguments, code=0):
    """What a command with --json prints."""
    return json.loads(mikv(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE)


# All commands


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_json(command):
    text = mikv(command, "--help", env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).output
    assert "--json" in text and command in text


def test_help_does_not_import_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from mikv_compile import cli;"
        "r = CliRunner().invoke(cli.make_app(), ['--help']); assert r.exit_code == 0 and 'doctor' in r.output;"
        "r = CliRunner().invoke(cli.make_app(), ['run', '--help']); assert r.exit_code == 0 and 'compare' in r.output;"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", [("explain",), ("plan",), ("run", "--prompt", "x"), ("bench",)])
def test_mistakes_are_one_clear_message(command, llama, tmp_path):
    name, *more = command
    missing = mikv(name, tmp_path / "nothing", *more, code=2).stderr
    assert missing.strip() == f"there is no model at {tmp_path / 'nothing'}"
    empty = tmp_path / "empty"
    empty.mkdir()
    said = mikv(name, empty, *more, code=2).stderr
    assert said.startswith(f"cannot load the model '{empty}'") and len(said.strip().splitlines()) == 1
    for arguments, advice in (
        (("-o", "polcy=h2o"), "unknown option 'polcy'; did you mean 'policy'?"),
        (("-o", "policy"), "-o 'policy' is not NAME=VALUE"),
        (("--preset", "mikv-papr"), "did you mean 'mikv-paper'?"),
        (("--budget", "lots"), "option 'budget' is 'lots'"),
        (("--budget", "0.5", "-o", "tiers=int4"), "both choose the tiers"),
        (("--budget", "1KB"), "too small"),
        (("--dtype", "int8"), "dtype is 'int8'; it can be float32"),
    ):
        assert advice in mikv(name, llama, *more, *arguments, code=2).stderr


def test_booleans_are_options_too(llama):
    plan = told("plan", llama, "-o", "value_norm=True", "--preset", "evict")["layers"][0]["tiers"]
    assert "by value norm" in plan


# Budgets


@pytest.mark.parametrize(
    ("given", "meant"),
    [("25%", 0.25), (" 12.5 % ", 0.125), ("100%", 1.0), ("0.25", 0.25), (".5", 0.5), ("1", 1.0), (0.3, 0.3), ("2GiB",
     "2GiB"), ("4096", "4096")],
)  # fmt: skip
def test_budgets_as_people_write_them(given, meant):
    assert Options(budget=given).budget == meant and Options.parse({"budget": given}) == Options(budget=meant)


@pytest.mark.parametrize("given", ["0%", "101%", "0.0", "1.5", "-1", "%", "25 percent", "", 2, True, [0.2]])
def test_budgets_that_are_none(given):
    with pytest.raises(OptionError, match="option 'budget' is"):
        Options(budget=given)


def test_counts_and_sizes():
    assert [common.count(text, "-") for text in ("4096", "32k", "1M", "1.5k")] == [4096, 32768, 1 << 20, 1536]
    for wrong in ("", "k", "0", "-3", "many", "inf"):
        with pytest.raises(common.UsageError, match="--context is"):
            common.count(wrong, "--context")
    assert [common.size(n) for n in (512, 1536, 3 * 2**30)] == ["512 B", "1.50 KiB", "3.00 GiB"]


# plan


def config_of(name):
    """A config that `tiny_models` builds from, or one of the kinds that it lacks."""
    if name == "qwen3":
        return transformers.Qwen3Config(**tiny_models.SIZES)
    if name == "gpt2":
        return transformers.GPT2Config(vocab_size=128, n_positions=512, n_embd=64, n_layer=3, n_head=4)
    if name == "gemma4":  # heads of two sizes
        sliding = ["sliding_attention", "full_attention"]
        sizes = {**tiny_models.SIZES, "sliding_window": 24, "layer_types": sliding, "global_head_dim": 32}
        return transformers.Gemma4TextConfig(**sizes, hidden_size_per_layer_input=0)
    return tiny_models.build(name).config


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("llama", "qwen3", "gpt2", "gemma2", "mistral", "gpt_oss", "gemma4")),
        *((name, {"budget": "40%"}) for name in ("gpt2", "gemma4")),
        ("llama", {"preset": "evict"}), ("gemma2", {"budget": "300KB"}), ("llama", {"layers": "1=fp"}),
    ],
    ids=str,
)  # fmt: skip
def test_planned_bytes_are_those_of_a_real_cache(name, options):
    config, batch, tokens = config_of(name), 2, 333
    forecast = Forecast(model_shape(config), Options.parse(options), torch.float32, batch)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        compiled = torch.compile(model, backend="mikv", options={**options, "lower": "eager"})
        compiled(input_ids=tiny_models.prompt(batch, tokens), past_key_values=cache, use_cache=True)
    real, planned = cache_report(cache).layers, forecast.layers(tokens)
    assert [x.nbytes for x in planned] == [x.nbytes for x in real]
    assert [x.dense_nbytes for x in planned] == [x.dense_nbytes for x in real]
    assert [x.plan for x in planned] == [x.plan for x in real] and all(x.plan is not None for x in planned)
    assert forecast.nbytes(tokens) == sum(x.nbytes for x in real)
    assert forecast.weights_nbytes == sum(p.nbytes for p in model.parameters())


def test_plan_of_layers_that_keep_something_else():
    shape = model_shape(tiny_models.build("jamba").config)
    assert [layer.layer for layer in shape.layers] == [1] and "layers 0 (LinearAttentionLayer)" in shape.notes[0]
    latent = transformers.DeepseekV3Config(
        **{**tiny_models.SIZES, "head_dim": 8, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    )  # fmt: skip
    assert any("latent" in note for note in model_shape(latent).notes)
    with pytest.raises(CannotForecastError, match="keeps no keys and values"):
        model_shape(transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(CannotForecastError, match="config of a t5"):
        model_shape(tiny_models.build("t5").config)


def test_layers_that_cannot_be_packed_stay_dense_in_the_plan():
    odd = transformers.LlamaConfig(**{**tiny_models.SIZES, "head_dim": 6})
    forecast = Forecast(model_shape(odd), Options(), torch.float32)
    assert [layer.plan for layer in forecast.layers(100)] == [None, None]
    assert "head_dim" in forecast.layers(100)[0].reason and forecast.nbytes(100) == forecast.dense_nbytes(100)


@pytest.mark.parametrize("dense", [True, False])
def test_the_largest_context_fits_and_the_next_does_not(dense):
    forecast = Forecast(model_shape(config_of("llama")), Options(budget="25%"), torch.bfloat16, 4)
    most = forecast.largest_context(10**7, dense)
    size = forecast.dense_nbytes if dense else forecast.nbytes
    assert size(most) <= 10**7 < size(most + 1)
    assert forecast.largest_context(0, dense) == 0
    bounded = Forecast(forecast.model, Options(budget="1MB"), torch.bfloat16)
    assert bounded.largest_context(10**6) is None and bounded.largest_context(10**6, dense=True) == 10**6 // 256


def test_plan(llama, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)  # no weights are loaded
    arguments = ("plan", llama, "--context", "8k", "--batch", "8", "--budget", "25%", "--memory", "16MiB")
    content = told(*arguments)
    dense = 8 * 2 * 2 * 2 * 8192 * 16 * 4
    assert (content["dense_nbytes"], content["dtype"], content["context"]) == (dense, "float32", 8192)
    assert content["nbytes"] == sum(x["nbytes"] for x in content["layers"]) and 0.24 < content["ratio"] <= 0.251
    largest = content["largest_context"]
    assert largest["dense"]["cache_alone"] == 2**24 // (dense // 8192)
    assert largest["compressed"]["cache_alone"] > 3 * largest["dense"]["cache_alone"]
    assert 0 < largest["compressed"]["with_weights"] < largest["compressed"]["cache_alone"]
    text = mikv(*arguments).stdout
    for expected in (
        "0-1",
        "8,192",
        "[the rest]",
        f"{content['ratio']:.1%}",
        "made for 512 tokens",
        "parameters",
        "largest context in 16.00",
    ):
        assert expected in text
    assert told("plan", llama, "--dtype", "bfloat16")["dense_nbytes"] == 2 * 2 * 2 * 4096 * 16 * 2
    for wrong in (("--context", "long"), ("--memory", "much"), ("--batch", "0")):
        mikv("plan", llama, *wrong, code=2)


def test_plan_says_why_a_budget_is_exceeded_and_for_which_dtype(llama):
    def notes(*arguments):
        return " ".join(told("plan", llama, *arguments)["notes"])

    assert "window and the sinks" in notes("--budget", "25%", "--context", "64")
    assert "from 4,096 tokens on the budget holds" in notes("--budget", "25%", "--context", "64")
    assert notes("--budget", "25%", "--context", "4096") == notes("--budget", "1MB", "--context", "64") == ""
    assert notes("--context", "64") == ""
    assert "tiers of their own" in notes("--budget", "25%", "--context", "8k", "-o", "layers=0=fp")
    assert "mikv run, use float32" in notes("--dtype", "bfloat16")
    assert "cache in bfloat16" in mikv("plan", llama, "--dtype", "bfloat16").stdout


def test_plan_does_not_guess_the_weights_of_a_quantized_checkpoint(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    content = told("plan", tmp_path, "--memory", "1GiB")
    assert content["weights_nbytes"] is None and "quantized" in content["notes"][0]
    assert set(content["largest_context"]["dense"]) == {"cache_alone"}


# explain; the HTML page has tests of its own


def test_explain(llama):
    content = told("explain", llama, "--tokens", "200")
    prefill, decode = content["graphs"]
    assert [s["phase"] for g in (prefill, decode) for s in g["rewritten"]] == ["prefill"] * 2 + ["decode"] * 2
    assert [s["layer"] for s in decode["rewritten"]] == [0, 1] and prefill["declined"] == []
    layers = content["cache"]["layers"]
    assert [x["length"] for x in layers] == [201, 201] and sum(layers[0]["tokens_per_tier"]) == 201
    assert content["cache"]["nbytes"] == sum(x["nbytes"] for x in layers) < content["cache"]["dense_nbytes"]
    text = mikv("explain", llama, "--prompt", "a short prompt", "-o", "layers=0=fp").stdout
    assert "2 attention calls; sites rewritten: 2 decode" in text and "tiers fp / fp" in text and "14 tokens" in text
    assert "fewer than two tokens" in mikv("explain", llama, "--prompt", "x", code=2).stderr
    mikv("explain", llama, "--html", "/no/such/folder/x.html", code=2)


# run


def test_run_generates_what_the_model_does(llama, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("some words " * 20)
    content = told(
        "run", llama, "--prompt-file", file, "--max-new-tokens", "12", "--compare", "--budget", "100%", "--raw"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor([tokenizer()(file.read_text()).input_ids])
    want = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert content["dense"]["tokens"] == content["compressed"]["tokens"] == want
    assert content["first_difference"] is None and content["prompt_tokens"] == 220
    assert content["compressed"]["text"] == tokenizer().decode(want, skip_special_tokens=True)
    assert content["compressed"]["tokens_per_second"] > 0 and content["compressed"]["stopped"] == "length"
    assert content["dense"]["cache"]["compressed_layers"] == 0 and content["dense"]["cache"]["ratio"] == 1
    assert content["compressed"]["cache"]["compressed_layers"] == 2


def test_run_prints_the_text_and_what_differs(llama):
    # Two bits change the tokens of a random model.
    arguments = ("run", llama, "--prompt", "words " * 40, "--max-new-tokens", "10", "-o", "tiers=int2",
                 "-o", "window=0", "-o", "sinks=0", "-o", "quantizer=mikv")  # fmt: skip
    content = told(*arguments, "--compare")
    result = mikv(*arguments, "--compare")
    found = content["first_difference"]
    at = found["token"] - 1
    assert content["dense"]["tokens"][:at] == content["compressed"]["tokens"][:at]
    assert content["dense"]["tokens"][at] != content["compressed"]["tokens"][at]
    assert result.stdout == f"--- compressed\n{content['compressed']['text']}\n--- dense\n{content['dense']['text']}\n"
    assert f"token {at + 1} is the first that differs" in result.stderr and "of 16-bit" in result.stderr
    assert mikv(*arguments).stdout == content["compressed"]["text"] + "\n"


def test_run_uses_the_chat_template(llama):
    asked = "hello there"
    framed = told("run", llama, "--prompt", asked, "--max-new-tokens", "1")["prompt_tokens"]
    assert framed == len(f"<user>{asked}</>") and told(
        "run", llama, "--prompt", asked, "--max-new-tokens", "1", "--raw"
    )["prompt_tokens"] == len(asked)  # fmt: skip


def test_run_ends_where_the_model_ends(llama):
    _, model = tokenizer(), transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor([tokenizer()("some words").input_ids])
    free = run_command.generate(Session(model), ids, 6, set())
    ended = run_command.generate(Session(model), ids, 6, {free.tokens[2]})
    assert ended.stopped == "end" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert len(free.seconds) == 5 and free.rate > 0


def test_run_keeps_what_was_generated_before_an_interruption(llama, monkeypatch):
    forward, calls = Session.forward, []

    def interrupted(self, ids, cache):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, ids, cache)

    arguments = ("run", llama, "--prompt", "some words", "--max-new-tokens", "9", "--compare")
    whole = told(*arguments)["compressed"]["tokens"]
    monkeypatch.setattr(Session, "forward", interrupted)
    content = told(*arguments, code=130)
    assert content["compressed"]["stopped"] == "interrupted" and content["compressed"]["tokens"] == whole[:4]
    assert "dense" not in content
    calls.clear()
    assert "4 tokens (interrupted)" in mikv(*arguments, code=130).stderr


def test_run_says_what_stayed_dense(tmp_path):
    # A head_dim of 6 cannot be packed at 2 bits.
    odd = save(tmp_path, "llama", head_dim=6)
    result = mikv("run", odd, "--prompt", "some words", "--max-new-tokens", "2")
    assert "the cache of 2 of 2 layers stayed dense" in result.stderr and "head_dim" in result.stderr


def test_run_wants_one_prompt(llama, tmp_path):
    for arguments in ((), ("--prompt", "x", "--prompt-file", "y")):
        assert "--prompt TEXT or by --prompt-file" in mikv("run", llama, *arguments, code=2).stderr
    assert "the prompt is empty" in mikv("run", llama, "--prompt", " ", code=2).stderr
    assert "cannot read" in mikv("run", llama, "--prompt-file", tmp_path / "none", code=2).stderr
    piped = mikv("run", llama, "--prompt-file", "-", "--max-new-tokens", "1", "--json", input="from a pipe")
    assert json.loads(piped.stdout)["prompt_tokens"] == len("<user>from a pipe</>")


# bench


def test_bench(llama):
    content = told("bench", llama, "--context", "300", "--steps", "4")
    for name in ("dense", "compressed"):
        ms = content[name]["step_ms"]
        assert 0 < ms["least"] <= ms["median"] <= ms["most"]
        assert content[name]["tokens_per_second"] == pytest.approx(1e3 / ms["median"])
    assert content["speedup"] > 0 and content["dense"]["cache"]["dense_nbytes"] == 2 * 2 * 2 * 307 * 16 * 4
    assert content["dense"]["cache"]["compressed_layers"] == 0
    assert content["compressed"]["cache"]["compressed_layers"] == 2 and content["compressed"]["cache"]["ratio"] < 0.6
    text = mikv("bench", llama, "--context", "100", "--steps", "2").stdout
    assert "times as fast" in text and "compressed" in text


# doctor


def test_doctor():
    content = told("doctor")
    found = {finding["name"]: finding for finding in content["findings"]}
    assert content["ok"] and found["torch"]["said"] == torch.__version__
    assert found["kernels on cpu"]["said"].startswith("C++") and found["entry point"]["status"] == "ok"
    assert ".so" in found["C++ kernels: attention"]["said"] and "self-test on cpu, budget=1.0" in found
    assert found["self-test on cpu, compiled by Inductor"]["status"] == "ok"
    assert "everything that is needed works" in mikv("doctor").stdout


def test_doctor_names_what_is_broken(monkeypatch):
    def broken():
        yield doctor.Finding("a thing", doctor.BROKEN, "it is [bold]gone", "get another")

    def raising():
        raise RuntimeError("odd")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", {"a thing": broken, "odd": raising})
    result = mikv("doctor", code=1)
    for expected in ("broken", "it is [bold]gone", "get another", "RuntimeError: odd", "2 broken"):
        assert expected in result.stdout
    assert told("doctor", code=1)["ok"] is False


def test_doctor_looks_for_itself(monkeypatch, tmp_path):
    from mikv_compile import _compat
    from mikv_compile.kernels import cpp_common, dispatch

    def fails(*args, **kwargs):
        raise dispatch.BuildError("no compiler")

    monkeypatch.setattr(cpp_common, "build", fails)
    kernels = [f for f in doctor._cpp_kernels() if f.name.startswith("C++ kernels")]
    assert len(kernels) == 3 and all(f.status == doctor.BROKEN and "g++" in f.advice for f in kernels)
    monkeypatch.setattr(_compat, "cache_folder", lambda: str(tmp_path / "none"))
    assert next(doctor._cache_folder()).status == doctor.BROKEN
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    assert "pip install" in next(doctor._entry_point()).advice
    monkeypatch.setenv("MIKV_KERNELS", "fast")
    assert next(doctor._devices()).status == doctor.BROKEN


def test_doctor_says_what_works_where_only_inductor_fails(monkeypatch):
    import torch._inductor.compile_fx

    def fails(*args, **kwargs):
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", fails)
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", fails)
    *eager, compiled = doctor._run("cpu")
    assert [finding.status for finding in eager] == ["ok", "ok"]
    assert compiled.status == doctor.BROKEN and "Python.h" in compiled.said
    assert all(word in compiled.advice for word in ('"lower": "eager"', "g++", "headers"))


@pytest.mark.parametrize("version, status", [("2.10.1", "broken"), ("2.11.0a0+git", "ok"), ("99.0", "note")])
def test_doctor_knows_which_torch_it_wants(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    torch_finding = next(f for f in doctor._versions() if f.name == "torch")
    assert torch_finding.status == status and bool(torch_finding.advice) == (status != "ok")


def test_doctors_self_test_notices_a_wrong_kernel(monkeypatch):
    from mikv_compile.kernels import cpp_step

    step = cpp_step.step

    def wrong(*args, **kwargs):
        out = step(*args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out

    monkeypatch.setattr(cpp_step, "step", wrong)
    assert any(f.status == doctor.BROKEN for f in doctor._run("cpu"))
