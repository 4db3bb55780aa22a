"""``mikv_compile.export``: programs of torch.export with compressed caches, and packages of AOTInductor."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mikv_compile
from mikv_compile import MikvError, OptionError, UnusableCacheError
from mikv_compile.config import Options
from mikv_compile.export_format import Package
from mikv_compile.export_program import exported_programs
from mikv_compile.export_runner import ExportedDecoder

HEADS, KV, DIM, VOCAB, COLUMNS = 4, 2, 16, 128, 256
PROMPT, STEPS = 130, 70


class Decoder(nn.Module):
    """``forward(tokens [B, S], positions [S])`` with caches that are buffers, written by hand."""

    def __init__(self, layers: int = 2, batch: int = 1, columns: int = COLUMNS) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * DIM
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Embedding(COLUMNS, width)
        self.q, self.k, self.v, self.o = (
            nn.ModuleList(nn.Linear(width, heads * DIM, bias=False) for _ in range(layers))
            for heads in (HEADS, KV, KV, HEADS)
        )
        self.head = nn.Linear(width, VOCAB, bias=False)
        for i in range(layers):
            for name in ("k", "v"):
                self.register_buffer(f"{name}_cache{i}", torch.zeros(batch, KV, columns, DIM), persistent=False)
        self.eval()

    def column(self, positions: torch.Tensor) -> torch.Tensor:
        return positions

    def update(self, i: int, k: torch.Tensor, v: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        caches = getattr(self, f"k_cache{i}"), getattr(self, f"v_cache{i}")
        for cache, new in zip(caches, (k, v), strict=True):
            cache.index_copy_(2, columns, new)
        return caches

    def result(self, logits: torch.Tensor):
        return logits

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor):
        batch, new = tokens.shape
        x = self.embed(tokens) + self.place(positions)
        for i in range(len(self.q)):
            q, k, v = (p[i](x).view(batch, new, -1, DIM).transpose(1, 2) for p in (self.q, self.k, self.v))
            k, v = self.update(i, k, v, self.column(positions))
            mask = torch.arange(k.shape[2]) <= positions[:, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + self.o[i](out.transpose(1, 2).reshape(batch, new, -1))
        return self.result(self.head(x[:, -1:]))


class Growing(Decoder):
    def update(self, i, k, v, columns):
        return torch.cat([k, k], 2), torch.cat([v, v], 2)


class Shifted(Decoder):
    def column(self, positions):
        return positions + 1


class Kept(Decoder):
    """Something else is kept from call to call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def result(self, logits):
        self.calls.add_(1)
        return logits


class Pair(Decoder):
    def result(self, logits):
        return logits, logits.argmax(-1)


class NoCache(nn.Module):
    def forward(self, tokens, positions):
        return F.one_hot(tokens, VOCAB).float()


class OneArgument(nn.Module):
    def forward(self, tokens):
        return tokens


def prompt(tokens: int = PROMPT, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def exported(model, options=None, max_length=COLUMNS, batch=1) -> ExportedDecoder:
    """The runner on programs that AOTInductor has not compiled; the description goes through its text."""
    programs, package = exported_programs(model, max_length, batch, Options.parse(options))
    assert Package.from_json(package.to_json()) == package
    return ExportedDecoder({name: program.module() for name, program in programs.items()}, package)


@torch.no_grad()
def live(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy tokens of a module that takes tokens and positions."""
    tokens, found, length = ids, [ids], 0
    for _ in range(steps):
        positions = torch.arange(length, length + tokens.shape[1])
        length += tokens.shape[1]
        tokens = model(tokens, positions)[:, -1].argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, 1)


PLANS = {
    "default": {},
    "full": {"budget": 1.0},
    "int4": {"tiers": "int4"},
    "evicts": {"tiers": "int8:0.3,k4v2:0.3", "window": 16},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_tokens_and_stores_are_those_of_the_live_backend(options):
    decoder = exported(Decoder(), options)
    cache = decoder.new_cache()
    got = decoder.generate(prompt(), STEPS, cache=cache)
    model = Decoder()
    compiled = torch.compile(model, backend="mikv", options={"lower": "eager", **options})
    assert torch.equal(got, live(compiled, prompt(), STEPS))
    if options == PLANS["full"]:
        assert torch.equal(got, live(Decoder(), prompt(), STEPS))
    assert cache.length == PROMPT + STEPS - 1
    for i, store in enumerate(cache.stores):
        wanted = getattr(model, f"k_cache{i}").store
        assert (store.plan, store.counts, store.nbytes) == (wanted.plan, wanted.counts, wanted.nbytes)
    assert (cache.length > sum(cache.stores[0].counts)) == (options == PLANS["evicts"])
    assert (cache.nbytes < 0.6 * cache.dense_nbytes) == (options != PLANS["full"])


def test_a_prompt_in_parts_cropped_and_copied():
    decoder = exported(Decoder(), {"budget": 1.0})
    cache, ids = decoder.new_cache(), prompt()
    decoder(ids[:, :50], cache)
    decoder(prompt(20, seed=5), cache)
    cache.crop(50)
    branch = cache.copy()
    got = decoder.generate(ids[:, 50:], 5, cache=cache)
    assert torch.equal(got, live(Decoder(), ids, 5)[:, 50:])
    assert branch.length == 50
    assert torch.equal(decoder.generate(ids[:, 50:], 5, cache=branch), got)
    with pytest.raises(MikvError, match="cannot be cropped to 500"):
        cache.crop(500)


def test_a_batch_and_rows_that_end():
    decoder = exported(Decoder(batch=2), {"budget": 1.0}, batch=2)
    ids = prompt(30, batch=2)
    wanted = live(Decoder(batch=2), ids, 12)
    assert torch.equal(decoder.generate(ids, 12), wanted)
    last = [row[30:].tolist() for row in wanted]
    eos = next(token for token in last[0] if token not in last[1])
    got = decoder.generate(ids, 12, eos_token_id=eos)
    at = 30 + last[0].index(eos)
    assert got[0, at:].eq(eos).all() and torch.equal(got[1, : at + 1], wanted[1, : at + 1])


def test_one_token_is_a_prompt_too():
    decoder = exported(Decoder(), {"budget": 1.0})
    assert torch.equal(decoder.generate(prompt(1), 8), live(Decoder(), prompt(1), 8))


def test_tokens_that_do_not_fit_are_refused():
    decoder = exported(Decoder(layers=1), max_length=64)
    cache = decoder.new_cache()
    decoder(prompt(60), cache)
    with pytest.raises(MikvError, match="5 tokens after 60 are more than the 64"):
        decoder(prompt(5), cache)
    with pytest.raises(MikvError, match=r"takes \[1, S\]"):
        decoder(prompt(5, batch=2), cache)
    with pytest.raises(MikvError, match="int64"):
        decoder(prompt(2).int(), cache)
    assert decoder(prompt(4), cache).shape == (1, 1, VOCAB) and cache.length == 64


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_tokens_outside_of_the_vocabulary_are_refused(bad):
    decoder = exported(Decoder(layers=1), max_length=64)
    cache, ids = decoder.new_cache(), prompt(5)
    ids[0, 2] = bad
    with pytest.raises(MikvError, match=f"the model knows 0 to {VOCAB - 1}"):
        decoder(ids, cache)
    assert cache.length == 0
    with pytest.raises(MikvError, match="tokens are a list"):
        decoder([[1, 2]], cache)
    for number in (-1, 1.5, True):
        with pytest.raises(MikvError, match="max_new_tokens is"):
            decoder.generate(prompt(5), number)


class LooksUpByIndex(Decoder):
    def forward(self, tokens, positions):
        self.embed.forward = lambda ids: self.embed.weight[ids]
        return super().forward(tokens, positions)


def test_the_vocabulary_of_a_model_without_an_embedding_is_its_logits():
    decoder = exported(LooksUpByIndex(layers=1), max_length=64)
    with pytest.raises(MikvError, match=f"the model knows 0 to {VOCAB - 1}"):
        decoder(prompt(5) + VOCAB, decoder.new_cache())
    assert decoder(prompt(5), decoder.new_cache()).shape == (1, 1, VOCAB)


def test_caches_of_other_packages_are_refused():
    """Compiled programs would read and write beyond their buffers."""
    decoder = exported(Decoder(), max_length=64)
    package = decoder._package

    def cache_of(**changes):
        layers = [dataclasses.replace(layer, **changes) for layer in package.layers]
        return ExportedDecoder({}, dataclasses.replace(package, layers=tuple(layers))).new_cache()

    fewer, uneven = decoder.new_cache(), decoder.new_cache()
    fewer.stores.pop()
    uneven.stores[1] = decoder.new_cache().stores[1]
    decoder(prompt(5), uneven)
    uneven.stores[1].crop(3)
    layer = package.layers[0]
    for cache, message in (
        (None, "the cache is a NoneType"),
        ((), "the cache is a tuple"),
        (fewer, "has 1 layers, and the package 2"),
        (cache_of(plan=exported(Decoder(), {"tiers": "int4"})._package.layers[0].plan), "another plan"),
        (cache_of(shape=dataclasses.replace(layer.shape, batch=2)), "another shape"),
        (cache_of(shape=dataclasses.replace(layer.shape, dtype=torch.bfloat16)), "another shape"),
        (cache_of(device="meta"), "another device"),
        (uneven, "layer 1 of the cache has another number of tokens"),
    ):
        with pytest.raises(MikvError, match=f"{message}(.|\n)*new_cache"):
            decoder(prompt(1), cache)


def test_packages_of_another_torch_or_schema_are_refused():
    _, package = exported_programs(Decoder(layers=1), 64, 1, Options())
    said = json.loads(package.to_json())
    assert Package.from_json(json.dumps({**said, "torch": torch.__version__.split("+")[0] + "+other"})) == package
    for change, message in (({"torch": "2.3.0+cpu"}, r"torch 2\.3\.0\+cpu(.|\n)*again"), ({"schema": 1}, "schema 1")):
        with pytest.raises(MikvError, match=message):
            Package.from_json(json.dumps({**said, **change}))


def test_a_step_that_fails_while_it_moves_tokens_spoils_the_cache():
    decoder = exported(Decoder(layers=1), {"tiers": "int8:0.1,int4", "window": 4, "flush_every": 64})
    cache = decoder.new_cache()
    decoder(prompt(100), cache)

    def fail(*args):
        raise RuntimeError("disk on fire")

    decoder._programs = {"step": fail, "chunk": fail}
    with pytest.raises(RuntimeError, match="on fire"):
        decoder(prompt(1), cache)
    assert cache.length == 100 and not cache.stores[0].is_spoiled  # it would only have appended
    with pytest.raises(RuntimeError, match="on fire"):
        decoder(prompt(100), cache)
    with pytest.raises(UnusableCacheError):
        decoder(prompt(1), cache)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (NoCache(), {}, "no KV cache was found"),
        (OneArgument(), {}, "does not take tokens and positions"),
        (Growing(), {}, "no KV cache was found(.|\n)*comes from `cat`"),
        (Shifted(), {}, "position 255 to column 256 of the cache"),
        (Kept(), {}, "could not be compressed: calls"),
        (Pair(), {}, "returns 2 values"),
        (Decoder(columns=64), {"max_length": 65}, "max_length is 65, but the cache of .* has 64 columns"),
        (Decoder(), {"max_length": 1}, "max_length is 1"),
        (Decoder(), {"batch": 0}, "batch is 0"),
        (lambda x: x, {}, "function is no module"),
    ],
    ids=["no cache", "one argument", "growing", "shifted", "kept", "pair", "columns", "length", "batch", "function"],
)
def test_what_cannot_be_exported(model, arguments, message, tmp_path):
    with pytest.raises(MikvError, match=message):
        mikv_compile.export(model, tmp_path / "x.pt2", **{"max_length": COLUMNS, **arguments})
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_wrong(tmp_path):
    with pytest.raises(OptionError, match="always compiled by Inductor"):
        mikv_compile.export(Decoder(), tmp_path / "x.pt2", max_length=64, options={"lower": "eager"})
    with pytest.raises(MikvError, match=r"ends in \.pt2"):
        mikv_compile.export(Decoder(), tmp_path / "x", max_length=64)
    with pytest.raises(MikvError, match="there is no folder"):
        mikv_compile.export(Decoder(), tmp_path / "y" / "x.pt2", max_length=64)
    with pytest.raises(MikvError, match="there is no file"):
        mikv_compile.load_exported(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("nothing")
    with pytest.raises(MikvError, match="cannot be loaded"):
        mikv_compile.load_exported(tmp_path / "text.pt2")


# Packages, in processes of their own ----------------------------------------------------------------------------------

CLEAN = """
import json, sys, torch, mikv_compile
decoder = mikv_compile.load_exported(sys.argv[1])
cache = decoder.new_cache()
ids = torch.tensor(json.loads(sys.argv[2]))
got = decoder.generate(ids, int(sys.argv[3]), cache=cache)
print(json.dumps({
    "tokens": got.tolist(), "counts": [store.counts for store in cache.stores], "nbytes": cache.nbytes,
    "modules": [m for m in sys.modules if m.startswith(("transformers", "mikv_compile.passes", "test_"))],
}))
"""


def run_clean(path: Path, ids: torch.Tensor, steps: int, folder: Path) -> dict:
    env = {**os.environ, "PYTHONPATH": str(Path(mikv_compile.__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", CLEAN, str(path), json.dumps(ids.tolist()), str(steps)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["modules"] == []
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return mikv_compile.export(Decoder(layers=1), tmp_path_factory.mktemp("package") / "d.pt2", max_length=COLUMNS)


def test_a_package_gives_the_live_tokens_in_a_clean_process(package, tmp_path):
    found = run_clean(package, prompt(), STEPS, tmp_path)
    model = Decoder(layers=1)
    compiled = torch.compile(model, backend="mikv", options={"lower": "eager"})
    assert found["tokens"] == live(compiled, prompt(), STEPS).tolist()
    store = model.k_cache0.store
    assert found["counts"] == [list(store.counts)] and found["nbytes"] == store.nbytes


def test_weights_are_stored_once(package):
    """Both programs read the same file of each weight."""
    import zipfile

    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    weights = [name for name in names if "/data/weights/" in name]
    assert len(weights) == len(list(Decoder(layers=1).parameters()))


def test_a_package_of_another_torch_is_refused_before_its_code_is_loaded(package, tmp_path):
    import zipfile

    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if name.endswith("/mikv.json"):
                said = {**json.loads(old.read(name)), "torch": "2.3.0"}
                new.writestr(name, json.dumps(said))
    with pytest.raises(MikvError, match=r"other\.pt2: .*exported with torch 2\.3\.0"):
        mikv_compile.load_exported(other)
    with zipfile.ZipFile(other, "w") as new:
        new.writestr("other/version", "1")
    with pytest.raises(MikvError, match="was not written by"):
        mikv_compile.load_exported(other)


def transformers_tokens(model, ids, steps, **kwargs):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, **kwargs)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mistral", "gpt_oss"))]
)
def test_models_of_transformers(name):
    """Past the sliding window of 24 tokens too."""
    pytest.importorskip("transformers")
    from tiny_models import model

    ids = prompt(100)
    full = exported(model(name), {"budget": 1.0}, max_length=200)
    assert torch.equal(full.generate(ids, 30), transformers_tokens(model(name), ids, 30))
    if name == "llama":
        wanted = transformers_tokens(torch.compile(model(name), backend="mikv", options={"lower": "eager"}), ids, 30)
        assert torch.equal(exported(model(name), max_length=200).generate(ids, 30), wanted)


def test_a_state_that_is_no_cache_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from tiny_models import model

    with pytest.raises(MikvError, match="keeps a LinearAttentionLayer from call to call"):
        mikv_compile.export(model("jamba"), tmp_path / "x.pt2", max_length=64)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"budget": 1.0}], ids=["default", "full"])
def test_a_package_of_a_transformers_model(options, tmp_path):
    pytest.importorskip("transformers")
    from tiny_models import build

    path = mikv_compile.export(build("llama"), tmp_path / "llama.pt2", max_length=200, options=options)
    found = run_clean(path, prompt(100), 60, tmp_path)
    compiled = torch.compile(build("llama"), backend="mikv", options=options)
    assert found["tokens"] == transformers_tokens(compiled, prompt(100), 60).tolist()


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """The default plan, on text: the tokens of the live backend."""
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is Paris. " * 20 + "The capital of", return_tensors="pt").input_ids
    path = mikv_compile.export(model, tmp_path / "smollm2.pt2", max_length=512)
    found = run_clean(path, ids, 24, tmp_path)
    compiled = torch.compile(model, backend="mikv", options={"lower": "eager"})
    assert found["tokens"] == transformers_tokens(compiled, ids, 24).tolist()
