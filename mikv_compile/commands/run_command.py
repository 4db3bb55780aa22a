"""``mikv run``: generate text with a compressed cache, and with the dense one beside it."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv_compile.commands import common
from mikv_compile.commands.common import AsJson, Budget, Device, Dtype, Lower, Model, Preset, Settings

if TYPE_CHECKING:
    from mikv_compile.eval.methods import Session

_EVERY = 0.1
"""Seconds between two looks at what is generated."""


def command(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt; - reads standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the dense model on the same prompt afterwards.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt into the chat template.")] = False,
    options: Settings = None,
    preset: Preset = None,
    budget: Budget = None,
    lower: Lower = "eager",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate text with a compressed cache: the likeliest token each time. Ctrl-C keeps what there is."""
    with common.mistakes():
        from mikv_compile.eval import models
        from mikv_compile.eval.methods import DenseMethod
        from mikv_compile.eval.mikv_method import MikvMethod

        text = _prompt(prompt, prompt_file)
        chosen = common.backend_options(options, preset, budget, lower=lower)
        tokenizer, loaded = models.load(model, common.torch_dtype(dtype), device)
        ids, ends = _encode(tokenizer, text, raw), _end_tokens(loaded, tokenizer)
        runs: dict[str, Generation] = {}
        for name, method in (("compressed", MikvMethod(chosen, partly=True)), ("dense", DenseMethod())):
            if name == "dense" and (not compare or runs["compressed"].stopped == "interrupted"):
                break
            with method.open(loaded) as session, _shown(tokenizer, name if compare else "", as_json) as show:
                runs[name] = generate(session, ids, max_new_tokens, ends, show)
                left = session.facts().get("declined", [])
            if name == "compressed":
                declined = left
    _report(runs, tokenizer, ids.shape[1], chosen, declined, as_json)
    raise typer.Exit(130 if any(run.stopped == "interrupted" for run in runs.values()) else 0)


@dataclass
class Generation:
    """What a model has generated so far.

    Attributes:
        tokens: their ids.
        first_seconds: from the prompt to the first token; a compiled model is traced in it.
        seconds: of each later token.
        cache: the model's cache; None until the prompt is read.
        stopped: ``"length"``, ``"end"`` (the model has ended its answer) or ``"interrupted"``.
    """

    tokens: list[int] = field(default_factory=list)
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cache: Any = None
    stopped: str = "length"

    @property
    def rate(self) -> float | None:
        """Tokens per second in the median step, in which nothing is traced or compiled."""
        return 1 / statistics.median(self.seconds) if self.seconds else None


def generate(
    session: "Session", ids: Any, count: int, ends: set[int], show: Callable[[Generation], None] = lambda made: None
) -> Generation:
    """Read a prompt [1, T] and generate up to ``count`` tokens, greedily.

    Args:
        session: the model, dense or compiled.
        ids, count, ends: the prompt, and the tokens that end an answer.
        show: is told what there is after each token.
    """
    import torch

    made = Generation()
    try:
        with torch.no_grad():
            started = time.perf_counter()
            made.cache, logits = session.prefill(ids)
            made.tokens.append(int(logits.argmax()))
            made.first_seconds = time.perf_counter() - started
            show(made)
            while made.tokens[-1] not in ends and len(made.tokens) < count:
                started = time.perf_counter()
                logits = session.forward(torch.tensor([made.tokens[-1:]]), made.cache)[-1]
                made.tokens.append(int(logits.argmax()))
                made.seconds.append(time.perf_counter() - started)
                show(made)
            made.stopped = "end" if made.tokens[-1] in ends else "length"
    except KeyboardInterrupt:
        made.stopped = "interrupted"
    return made


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise common.UsageError("give the prompt by --prompt TEXT or by --prompt-file FILE")
    if file is not None:
        try:
            prompt = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise common.UsageError(f"--prompt-file: cannot read {file}: {error}") from error
    if not prompt or not prompt.strip():
        raise common.UsageError("the prompt is empty")
    return prompt


def _encode(tokenizer: Any, text: str, raw: bool) -> Any:
    """Token ids [1, T], in the chat template where there is one."""
    import torch

    from mikv_compile.eval import prompts

    if raw or not getattr(tokenizer, "chat_template", None):
        ids = list(tokenizer(text).input_ids)
    else:
        frame = prompts.Frame.of(tokenizer)
        ids = prompts.encode(tokenizer, f"{frame.opening}{text}{frame.closing}")
    return torch.tensor([ids])


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in (*several, getattr(tokenizer, "eos_token_id", None)) if token is not None}


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@contextmanager
def _shown(tokenizer: Any, name: str, quiet: bool) -> Iterator[Callable[[Generation], None]]:
    """Shows what is generated: live on a terminal, as it comes in a pipe, not at all beside JSON."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    if quiet:
        yield lambda made: None
        return
    if name:
        print(f"--- {name}")
    console, written, looked, last = Console(), "", -_EVERY, Generation()

    def piece(made: Generation, final: bool = False) -> None:
        nonlocal written, looked, last
        last = made
        now = time.perf_counter()
        if not final and now - looked < _EVERY:
            return
        looked, text = now, _text(tokenizer, made.tokens)
        if live.is_started:
            lines = Text(text).wrap(console, console.width)[-max(console.height - 3, 1) :]
            live.update(Group(*lines, Text(_status(made), style="reverse")))
        elif final or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character is not written
            print(text[len(written) :], end="", flush=True)
            written = text

    live = Live(console=console, transient=True, refresh_per_second=8)
    if console.is_terminal:
        live.start()
    try:
        yield piece
    finally:
        live.stop()
        piece(last, final=True)
        print(flush=True)


def _status(made: Generation) -> str:
    """Tokens, speed and the cache in a line."""
    from mikv_compile.report import cache_report

    rate = f"{made.rate:.1f} tokens/s, " if made.rate else ""
    report = cache_report(made.cache)
    return f"{len(made.tokens)} tokens, {rate}cache {report.nbytes:,} bytes, {report.ratio_16bit:.1%} of 16-bit"


def _report(
    runs: dict[str, Generation],
    tokenizer: Any,
    prompt: int,
    options: dict[str, Any],
    declined: list[str],
    as_json: bool,
) -> None:
    """What the runs took, and where they part."""
    from mikv_compile.report import cache_report

    content: dict[str, Any] = {"prompt_tokens": prompt, "options": options}
    for name, run in runs.items():
        content[name] = {
            "text": _text(tokenizer, run.tokens), "tokens": run.tokens, "stopped": run.stopped,
            "first_token_seconds": run.first_seconds, "tokens_per_second": run.rate,
            "cache": None if run.cache is None else common.cache_json(cache_report(run.cache)),
        }  # fmt: skip
    content["compressed"]["declined"] = declined
    if len(runs) > 1:
        content["first_difference"] = _difference(tokenizer, *(run.tokens for run in runs.values()))
    if as_json:
        common.print_json(content)
        return
    err = sys.stderr  # so that standard output is the text alone
    for name, run in runs.items():
        speed = f"first after {run.first_seconds:.1f} s" + (f", then {run.rate:.1f} tokens/s" if run.rate else "")
        weighs = "" if run.cache is None else f"; {_status(run).partition('cache ')[2]}"
        print(f"{name}: {len(run.tokens)} tokens ({run.stopped}), {speed}{weighs}", file=err)
    stayed = content["compressed"]["cache"] or {"layers": 0, "compressed_layers": 0}
    if stayed["layers"] != stayed["compressed_layers"]:
        left = stayed["layers"] - stayed["compressed_layers"]
        reasons = "; ".join(declined[:3])
        print(f"the cache of {left} of {stayed['layers']} layers stayed dense: {reasons}", file=err)
    if len(runs) > 1:
        found = content["first_difference"]
        print("the same tokens" if found is None else
              f"token {found['token']} is the first that differs: {found['compressed']!r} where dense has "
              f"{found['dense']!r}", file=err)  # fmt: skip


def _difference(tokenizer: Any, compressed: list[int], dense: list[int]) -> dict[str, Any] | None:
    """The first token that differs, counted from 1; None if there is none as far as both go."""
    for number, (got, want) in enumerate(zip(compressed, dense, strict=False), 1):
        if got != want:
            return {"token": number, "compressed": tokenizer.decode([got]), "dense": tokenizer.decode([want])}
    return None
