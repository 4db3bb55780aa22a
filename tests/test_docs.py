"""The pages say what is true: code blocks run, commands exist, links lead somewhere, references are complete."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402  (needs transformers)
from decoder import Decoder, inputs, run  # noqa: E402

import mikv_compile  # noqa: E402
from mikv_compile import Options, _compat  # noqa: E402
from mikv_compile.config import PRESETS  # noqa: E402
from mikv_compile.eval import results  # noqa: E402
from mikv_compile.policies import POLICIES, Policy  # noqa: E402
from mikv_compile.quantizers import QUANTIZERS, Quantizer  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
NOT_CODE = ("text",)
"""Languages of blocks that only show something."""
NOT_RUN = Counter({"docs/deployment.md": 5})
"""Page -> number of its blocks with ``<!-- not run: REASON -->`` before them; every one has to be entered here."""

GIVEN = {
    "docs/saved_caches.md": """
from transformers import DynamicCache
compiled = torch.compile(model, backend="mikv")
document, prompt = input_ids, torch.cat([input_ids, input_ids[:, :4]], dim=1)
"""
}
"""Page -> what its blocks take for granted besides the names of the fixture ``namespace``."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, where a comment before it says so."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_in(page: str, text: str) -> list[Block]:
    found, lines, i = [], text.split("\n"), 0
    while i < len(lines):
        fence = re.fullmatch(r"( *)(```+)\s*([\w-]*).*", lines[i])
        if fence is None:
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == fence.group(2))
        before = next((line for line in reversed(lines[:i]) if line.strip()), "")
        marked = re.fullmatch(r"\s*<!-- not run: (.+) -->\s*", before)
        body = "\n".join(line.removeprefix(fence.group(1)) for line in lines[i + 1 : end])
        found.append(Block(page, i + 1, fence.group(3), body, marked and marked.group(1)))
        i = end + 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_in(page, read(page))]


def of_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and block.reason is None]


def load(path: str) -> types.ModuleType:
    """A Python file of the repository that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Code blocks


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n\n```toml\ny = 2\n```\n````text\n```\n````"
    found = blocks_in("a.md", text)
    assert [(b.line, b.language, b.text, b.reason) for b in found] == [
        (2, "python", "x = 1", None), (7, "toml", "y = 2", "needs a GPU"), (10, "text", "```", None)
    ]  # fmt: skip
    assert len(of_language("python")) > 25 and len(of_language("console")) >= 7


def test_no_block_is_skipped_silently():
    known = ("python", "console", "toml", "json", *NOT_CODE)
    for block in BLOCKS:
        assert block.language in known, f"{block}: language {block.language!r} is none of {', '.join(known)}"
    assert Counter(block.page for block in BLOCKS if block.reason is not None) == NOT_RUN


class Letters:
    """A tokenizer: each character is a token, as a vocabulary of 128 allows."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [ord(c) % 128 for c in text]
        given = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]} if return_tensors else {"input_ids": ids}
        return transformers.BatchEncoding(given, tensor_type=return_tensors)

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """What a page's blocks find: ``torch``, ``model``, ``tokenizer``, ``input_ids``, and small stand-ins behind names.

    Hub models are a tiny Llama, Inductor leaves graphs as they are, calibration reads less; the options of each compile
    are checked at once, though nothing is compiled before the first call.
    """
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_models.build("llama"), Letters()
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_models.build("llama")
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(_compat, "compile_with_inductor", lambda gm, inputs, options: gm.forward)
    from mikv_compile import calibration

    monkeypatch.setattr(calibration, "calibrate", functools.partial(calibration.calibrate, candidates=("keep0.0",)))
    small = {"context": 640, "text_tokens": 64, "retrieval_tokens": 64}
    monkeypatch.setattr(calibration, "default_inputs", functools.partial(calibration.default_inputs, **small))
    compiles = torch.compile

    def checked(*args, backend="inductor", options=None, **kwargs):
        if backend == "mikv":
            Options.parse(options)
        return compiles(*args, backend=backend, options=options, **kwargs)

    monkeypatch.setattr(torch, "compile", checked)
    module = types.ModuleType("page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    module.__dict__.update(torch=torch, model=model, tokenizer=tokenizer, input_ids=tiny_models.prompt())
    policies, quantizers = dict(POLICIES), dict(QUANTIZERS)
    yield module.__dict__
    for registry, before in ((POLICIES, policies), (QUANTIZERS, quantizers)):
        for name in registry.keys() - before.keys():
            del registry[name]


def execute(block: Block, names: dict) -> None:
    exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)


RUN_AS_A_PAGE = list(dict.fromkeys(b.page for b in of_language("python") if b.page != "CONTRIBUTING.md"))


@pytest.mark.parametrize("page", RUN_AS_A_PAGE)
def test_python_blocks_run(page, namespace):
    exec(GIVEN.get(page, ""), namespace)
    for block in of_language("python"):
        if block.page == page:
            execute(block, namespace)


def test_a_mistake_in_a_block_fails(namespace):
    with pytest.raises(mikv_compile.OptionError, match="did you mean 'policy'"):
        execute(
            Block("a.md", 1, "python", 'torch.compile(model, backend="mikv", options={"polcy": "h2o"})', None),
            namespace,
        )


def test_comments_say_what_is_printed(namespace, capsys):
    (block,) = (b for b in of_language("python") if b.page == "docs/options.md")
    execute(block, namespace)
    assert capsys.readouterr().out.strip() == re.search(r"print\(error\)  # (.*)", block.text).group(1)


def test_toml_and_json_blocks():
    from mikv_compile.eval import suites

    for block in of_language("json"):
        json.loads(block.text)
    found = of_language("toml")
    assert found
    for block in found:
        content = tomllib.loads(block.text)
        if block.page == "docs/evaluation.md":
            assert suites.parse(content).methods, block


# Examples of CONTRIBUTING.md: the policy is used in test_policies.py


def example(section: str, number: int) -> Block:
    text = read("CONTRIBUTING.md")
    start = text[: text.index(f"\n## {section}\n") + 1].count("\n") + 1
    return [b for b in of_language("python") if b.page == "CONTRIBUTING.md" and b.line > start][number]


def as_module(monkeypatch, block: Block, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    execute(block, module.__dict__)
    return module


def entry(block: Block, names: dict) -> dict:
    """Lines of a dict that a block shows."""
    return eval("{" + block.text.strip() + "}", names)


def test_every_example_is_used_here():
    sections = {"A recognizer": 2, "A policy": 2, "A quantizer": 2, "A kernel": 2}
    used = [example(section, i) for section, count in sections.items() for i in range(count)]
    assert used == [b for b in of_language("python") if b.page == "CONTRIBUTING.md"]


@torch.no_grad()
def test_the_recognizer(monkeypatch):
    from mikv_compile.passes import cache_updates, update_cat, update_shift, update_write

    def step(q, k, v, keys, values):
        keys, values = torch.hstack([keys, k]), torch.hstack([values, v])
        q, k, v = (x.transpose(1, 2) for x in (q, keys, values))
        return F.scaled_dot_product_attention(q, k, v), keys, values

    past = [torch.randn(1, 12, 2, 16) for _ in range(2)]
    first, second = ([torch.randn(1, 1, 2, 16) for _ in range(3)] for _ in range(2))
    assert mikv_compile.explain(step, *first, *past, options={"budget": 1.0}).sites == 0
    made = as_module(monkeypatch, example("A recognizer", 0), "mikv_compile.passes.update_hstack")
    names = dict(update_cat=update_cat, update_shift=update_shift, update_write=update_write, update_hstack=made)
    execute(example("A recognizer", 1), names)
    listed = names["CACHE_UPDATE_RECOGNIZERS"]
    assert listed == (*cache_updates.CACHE_UPDATE_RECOGNIZERS, made.recognize)  # the page shows those there are
    monkeypatch.setattr(cache_updates, "CACHE_UPDATE_RECOGNIZERS", listed)
    found = mikv_compile.explain(step, *first, *past, options={"budget": 1.0})
    assert found.sites == 1 and not found.declined
    compiled = torch.compile(step, backend="mikv", options={"budget": 1.0, "lower": "eager"})
    want, got = step(*first, *past), compiled(*first, *past)
    assert isinstance(got[1], mikv_compile.KVTensor)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(compiled(*second, *got[1:])[0], step(*second, *want[1:])[0])


def test_the_policy_in_the_project(namespace):
    execute(example("A policy", 0), namespace)
    value_length = types.SimpleNamespace(scorer=namespace["scorer"])
    assert entry(example("A policy", 1), {"Policy": Policy, "value_length": value_length}) == {
        "value-length": POLICIES["value-length"]
    }


def test_the_quantizer(monkeypatch, namespace):
    made = as_module(monkeypatch, example("A quantizer", 0), "mikv_compile.quantizers.group32")
    QUANTIZERS.update(entry(example("A quantizer", 1), {"Quantizer": Quantizer, "group32": made}))
    model = Decoder(layers=1, heads=2, kv_heads=1, dim=64)
    (x,) = inputs([200], width=128)
    options = {"quantizer": "group32", "tiers": "int8:0.1,int4", "lower": "eager"}
    cache = model.new_cache()
    run(torch.compile(model, backend="mikv", options=options), cache, [x])
    text = str(cache.keys[0].store.plan.format)
    assert text.startswith("8:t1c32,8:t1c32|4:t1c32~clip,4:t1c32~unbiased"), text
    _, dense = run(model, want := model.new_cache(), [x]), want.keys[0]
    assert 0 < (cache.keys[0].dequantize() - dense).norm() < 0.2 * dense.norm()


def test_the_kernel(monkeypatch):
    from mikv_compile.kernels import dispatch

    made = as_module(monkeypatch, example("A kernel", 0), "mikv_compile.kernels.cpu_read")
    shown = entry(example("A kernel", 1), {})["cpp"]
    assert shown["attend"] == dispatch._IMPLEMENTATIONS["cpp"]["attend"]
    calls, read_tokens = [], made.read_tokens
    monkeypatch.setattr(made, "read_tokens", lambda *args: calls.append(read_tokens(*args)) or calls[-1])
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "cpp", {**dispatch._IMPLEMENTATIONS["cpp"], **shown})
    model = Decoder(layers=1, dim=64)
    cache = model.new_cache()
    run(
        torch.compile(model, backend="mikv", options={"tiers": "int8", "lower": "eager"}),
        cache,
        inputs([100], width=256),
    )
    with dispatch.use("reference"):
        want = cache.keys[0].dequantize()
    assert not calls
    torch.testing.assert_close(cache.keys[0].dequantize(), want)
    assert calls


# Commands


def commands(block: Block) -> list[list[str]]:
    """The words of each command; lines that start with ``$`` are all the commands of a block that has any."""
    lines = block.text.replace("\\\n", " ").split("\n")
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def phony_targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M).group(1).split())


def parse_with(app, words: list[str], name: str) -> None:
    """Let a typer application parse a command without running it; a wrong option or argument raises."""
    import typer

    group = typer.main.get_command(app)
    assert words, f"{name} without a subcommand"
    command = group.commands[words[0]]
    if "--help" not in words:
        command.make_context(words[0], words[1:])


def check_command(words: list[str]) -> None:
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, rest = words[0], words[1:]
    if program == "make":
        for word in rest:
            name, mark, _ = word.partition("=")
            assert f"$({name})" in read("Makefile") if mark else word in phony_targets(), word
    elif program == "mikv" or re.fullmatch(r"\.venv[\w-]*/bin/mikv", program):
        from mikv_compile.cli import make_app

        parse_with(make_app(), rest, "mikv")
        for word in rest:
            if word.startswith("benchmarks/"):
                assert (ROOT / word).exists(), word
    elif program in ("accelerate", "torchrun"):
        assert rest[rest.index("-m") + 1] == "mikv_compile.cli"
        check_command(["mikv", *rest[rest.index("-m") + 2 :]])
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[:2] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import app

        parse_with(app, rest[2:], "benchmarks")
    elif program == "python" and rest[:1] != ["-m"]:
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "python":
        assert importlib.util.find_spec(rest[1]) is not None, rest[1]
    else:
        assert os.access(ROOT / program, os.X_OK), f"{program}: neither a known program nor a file of the repository"


def check_pip(words: list[str]) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    known = {re.split(r"[^\w-]", line)[0] for line in read("constraints.txt").split("\n")}
    assert words[0] in ("install", "download"), words
    for previous, word in itertools.pairwise(words):
        if word.startswith("-"):
            assert word in ("-e", "-c", "--no-deps", "--upgrade"), word
        elif previous == "-c":
            assert (ROOT / word).is_file(), word
        else:
            name, given = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:[=<>~].*)?", word).groups()
            assert name in (".", project["name"]) or name in known, name
            assert all(extra in extras for extra in (given or "").split(",") if extra), given


@pytest.mark.parametrize("block", of_language("console"), ids=str)
def test_commands_exist(block):
    found = commands(block)
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    ["make tests", "make test ARG=1", "mikv evaluate smollm2", "mikv eval smollm2 --bugdet 1", "mikv sweep", "mikv",
     "pip install 'mikv-compile[evil]'", "pip install other", "python -m benchmarks speed", "python examples/min.py",
     "mikv sweep benchmarks/peers/none.toml", "frobnicate"],
)  # fmt: skip
def test_commands_that_do_not_exist_are_noticed(line):
    import typer

    usage_error = typer.BadParameter.__base__  # typer brings its own click along
    with pytest.raises((AssertionError, KeyError, usage_error)):
        check_command(shlex.split(line))


def test_the_example_prints_what_the_page_shows():
    (shown,) = (b.text for b in BLOCKS if b.page == "docs/index.md" and b.language == "text")
    assert ["python", "examples/minimal.py"] in [c for b in of_language("console") for c in commands(b)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "examples/minimal.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == shown


# References are complete


def test_options_page_is_that_of_the_dataclass():
    table = load("docs/options_table.py")
    assert read("docs/options.md") == table.render(), "run `python docs/options_table.py`"
    for option in fields(Options):
        assert f"\n| `{option.name}` | " in table.render()
    for name, value in table.UNSET.items():
        assert table.make(Options(**{name: value}), table.parse_tiers("int8:0.02,k4v2"), 64, 64) == table.make(
            Options(), table.parse_tiers("int8:0.02,k4v2"), 64, 64
        )


def test_tables_of_measurements_are_those_of_the_results():
    tables = load("docs/fidelity_tables.py")
    for page, made in tables.PAGES.items():
        assert read(page) == tables.fill(read(page), made), "run `python docs/fidelity_tables.py`"
    with pytest.raises(ValueError, match=r"the page has no table that begins with \| cache \|"):
        tables.fill("a page", [tables.needles])


def test_two_results_of_one_name_are_refused(tmp_path):
    tables = load("docs/fidelity_tables.py")
    tables.RESULTS = tmp_path
    for context in (512, 1024):
        settings = {"context": context}
        key = results.Key("smollm2 float32", "needle", settings, tables.KJV, "dense", "dense", {})
        results.write(tmp_path / "needle", results.Result(key, results.DONE, {"digits": 1.0}))
    with pytest.raises(ValueError, match="are of one name: delete the older one"):
        tables.needles()


def readme_options() -> dict[str, list[str]]:
    """Option -> the cells behind it in README's table."""
    found = {}
    for line in read("README.md").split("## Options")[1].split("\n## ")[0].split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 3:
            names = re.findall(r"`([^`]+)`", cells[0])
            found.update({name: cells[1:] if len(names) == 1 else ["", cells[2]] for name in names})
    return found


def test_readme_has_every_option_preset_policy_and_quantizer():
    table, usual = readme_options(), load("docs/options_table.py").defaults()
    for option in fields(Options):
        assert option.name in table or f"{option.name}.NAME" in table, option.name
    for name in table.keys() & usual.keys():
        if re.fullmatch(r'"\w+"|`[^`]*`|\d+', table[name][0]):
            assert table[name][0].strip("`") == usual[name].strip("`"), name
    for preset, given in PRESETS.items():
        assert table[preset][0] == f"`{given['tiers']}`", preset
    for name, names in (("policy", POLICIES), ("quantizer", QUANTIZERS)):
        for value in names:
            assert f"`{value}`" in table[name][1], value


@pytest.mark.parametrize(("kind", "registry"), [("policies", POLICIES), ("quantizers", QUANTIZERS)])
def test_each_policy_and_quantizer_has_its_page(kind, registry):
    pages = {path.stem for path in (ROOT / "docs" / kind).glob("*.md")}
    assert pages == set(registry)
    overview, papers, cited = read(f"docs/{kind}.md"), {}, {}
    for name, item in registry.items():
        text = read(f"docs/{kind}/{name}.md")
        assert text.startswith(f"# {name}\n") and f"[`{name}`]({kind}/{name}.md)" in overview
        assert f'"{name}"' in text or any(f'"{p}"' in text and name in PRESETS[p].values() for p in PRESETS)
        module = (item.scorer if kind == "policies" else item.key).__module__
        assert f"`{module.replace('.', '/')}.py`" in text
        pattern = r"\d{4}\.\d{5}|mobiusml\.github\.io/hqq_blog"
        papers[module] = set(re.findall(pattern, importlib.import_module(module).__doc__))
        links = {re.search(pattern, link).group() for link in re.findall(r"\(https://[^)]*\)", text)}
        assert links, f"{name} has no paper"
        cited[module] = cited.get(module, set()) | links
    for module, ids in papers.items():
        assert ids <= cited[module], module


def test_papers_are_those_that_links_lead_to():
    found = [
        pair
        for page in PAGES
        for pair in re.findall(r"\[(?:arXiv )?([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", read(page))
    ]
    assert len(found) > 25 and all(shown == linked for shown, linked in found)


def test_api_page_has_every_public_name():
    found = re.findall(r"^::: mikv_compile\.(\w+)$", read("docs/api.md"), re.M)
    assert sorted(found) == sorted(mikv_compile.__all__)


def messages_in_source() -> list[str]:
    """Strings of the source, with a gap where a value is put in."""
    found = []
    for folder in ("mikv_compile", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sd]", "\0", node.value))
    return found


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", read("docs/troubleshooting.md"), re.M)
    return [message for _, message in rows]


def occurs(message: str, source: list[str]) -> bool:
    """All fixed parts of a message in one string, in their order."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    return any(re.search(".*".join(parts), text, re.S) for text in source)


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    source, found = messages_in_source(), quoted_messages()
    assert len(found) > 50
    missing = [message for message in found if not occurs(message, source)]
    assert not missing
    assert not occurs("the cache is full of … eels", source)
    for message in found:
        assert max(len(part.split()) for part in message.split("…")) >= 2 or message.count("…") > 1, message


# Links and the site


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page):
    hooks = load("docs/site_hooks.py")
    for _, _, link in hooks.links(read(page)):
        target, _, anchor = link.partition("#")
        path = hooks.in_repository(page, target) if target else page
        if path is not None:
            assert (ROOT / path).exists(), f"{page}: {link}"
            if anchor and path.endswith(".md"):
                assert anchor in anchors(path), f"{page}: {link}"
        else:
            assert re.match(r"https?://", link), f"{page}: {link}"


def pictures_in(text: str) -> list[str]:
    """Addresses of a page's pictures, as Markdown or HTML shows them."""
    return re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""<img[^>]*\ssrc=["']([^"']+)""", text)


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_in_the_repository(page):
    hooks = load("docs/site_hooks.py")
    for target in pictures_in(read(page)):
        path = hooks.in_repository(page, target)
        if path is None:
            assert re.match(r"https://", target), f"{page}: {target}"
        else:
            assert (ROOT / path).is_file(), f"{page}: {target}"


def test_pictures_are_found():
    assert pictures_in('![a](x.png) ![](<y.svg> "t")\n<img alt="b" src="z.png">') == ["x.png", "y.svg", "z.png"]


PLACEHOLDER = re.compile(r"@[A-Z0-9]+@")


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    assert not PLACEHOLDER.findall(read(page))


def test_placeholders_are_noticed():
    assert PLACEHOLDER.findall("about @NEEDLES@ of them, @KL2@, a@b.org, @torch") == ["@NEEDLES@", "@KL2@"]


def test_links_are_rewritten():
    hooks = load("docs/site_hooks.py")
    text = (
        "[a](../README.md#use), `[b](../README.md)`, [c](limits.md), [d](https://x.org), ![e](../x/y.png), [f](../no)"
    )
    files = {"README.md", "x/y.png", "docs/limits.md"}
    done, needed = hooks.rewritten(text, "docs/policies/h2o.md", files.__contains__)
    assert needed == [] and done == text  # from a folder deeper they lead elsewhere
    done, needed = hooks.rewritten(text, "docs/index.md", files.__contains__)
    assert needed == ["README.md", "x/y.png"]
    assert done == text.replace("[a](../README", "[a](repository/README").replace("../x", "repository/x")
    done, needed = hooks.rewritten("[a](docs/limits.md#gpu) [b](README.md)", "README.md", files.__contains__)
    assert done == "[a](../limits.md#gpu) [b](README.md)" and needed == ["README.md"]
    assert hooks.roles("<p>:func:<code>~mikv_compile.x.compile</code> :mod:<code>torch</code></p>") == (
        "<p><code>compile</code> <code>torch</code></p>"
    )


def test_the_site_builds(tmp_path):
    """Strict: broken links and anchors, and pages that the nav forgets, fail."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            importlib.import_module(package)
        except ImportError:
            pytest.skip(f"the docs site needs {package}: pip install -c constraints.txt -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in mikv_compile.__all__:
        assert re.search(rf'id="mikv_compile(\.\w+)*\.{name}"', api), name
    assert ":func:" not in api and ":class:" not in api
    how = (tmp_path / "how_it_works" / "index.html").read_text(encoding="utf-8")
    for picture in re.findall(r'<img[^>]* src="([^"]*)"', how):
        assert (tmp_path / "how_it_works" / picture).resolve().is_file(), picture
    readme = (tmp_path / "repository" / "index.html").read_text(encoding="utf-8")
    assert 'href="../limits/"' in readme and 'href="CONTRIBUTING/"' in readme


# Pictures


@torch.no_grad()
def test_pictures_show_where_tokens_lie(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    figures = load("docs/figures.py")
    model, ids = tiny_models.model("llama"), tiny_models.prompt(tokens=160)
    options = {"tiers": "int8:0.1,k4v2:0.3", "quantizer": "rtn", "window": 16}
    layers = figures.compressed(model, ids, options)
    assert len(layers) == 2
    for store in layers:
        tiers = figures.tiers_of(store)
        assert tiers.shape == (2, 160)
        for head in tiers:
            assert [(head == n).sum().item() for n in (0, 1)] == list(store.counts)
            assert (head == figures.EVICTED).sum() == 160 - sum(store.counts) > 0
        assert (tiers[:, :4] == 0).all() and (tiers[:, -16:] == 0).all()  # sinks and window
        bits = torch.tensor([8.0, 2.0, 0.0])[tiers].mean(0)
        assert torch.equal(figures.bits_of(store, "value"), bits)
        assert figures.bits_of(store, "key").max() == 8 and figures.bits_of(store, "key").sum() > bits.sum()
    figures.draw_tiers({"a": layers, "b": layers}, tmp_path / "tiers.png")
    figures.draw_precision(layers, "a", tmp_path / "precision.png")
    for name in ("tiers.png", "precision.png"):
        assert (tmp_path / name).stat().st_size > 5_000 and 0 < (ROOT / "docs/figures" / name).stat().st_size < 200_000
    (full,) = {store.plan.format.tiers[0].key.bits for store in figures.compressed(model, ids, {"preset": "full"})}
    assert full == 16
    with pytest.raises(ValueError, match="layer 0 is not compressed"):
        figures.stores(model(ids, use_cache=True).past_key_values)
