"""Measures how much each layer of a model suffers from fewer bits and fewer tokens, and writes it to a plan file."""

from __future__ import annotations

import copy
import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mikv_compile.errors import MikvError, OptionError
from mikv_compile.handle import KVTensor
from mikv_compile.report import _walk, cache_report
from mikv_compile.sensitivity import Calibration, Check, LayerShape, candidate_tiers
from mikv_compile.store import LayerStore

CANDIDATES = ("k4", "k3", "k2", "v4", "v3", "v2", "keep0.5", "keep0.25", "keep0.125", "keep0.0")
"""What is measured in each layer; see :class:`~mikv_compile.sensitivity.Calibration`."""

WEIGHTS = {"retrieval": 0.2}
"""Weights of parts that are not 1 unless told: a number that cannot be fetched costs nats, prose hundredths of one."""

CHUNK = 64
"""Tokens of a continuation that are read at a time."""

_OWN = ("tiers", "layers", "budget", "layer_budget", "plan", "lower")


@dataclass(frozen=True)
class Sample:
    """A text: what is compressed, what is read on from it, and what of that counts.

    Attributes:
        ids: token ids [1, T].
        context: how many of them are compressed; the others are the continuation, at least one.
        part: kind of text; the damage of each is kept apart.
        counts: for each position of the continuation, whether what the model predicts behind it counts; None: all do.
    """

    ids: torch.Tensor
    context: int
    part: str = "text"
    counts: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[0] != 1:
            raise ValueError(f"token ids have shape {tuple(self.ids.shape)}; expected [1, tokens]")
        if not 0 < self.context < self.ids.shape[1]:
            raise ValueError(f"a context of {self.context} tokens and a continuation do not fit in {self.ids.shape[1]}")
        if self.counts is not None and (len(self.counts) != self.ids.shape[1] - self.context or not any(self.counts)):
            raise ValueError("counts must have an entry for each position of the continuation, and one that is True")


def calibrate(
    model: Any,
    inputs: Sequence[torch.Tensor | Sample | str],
    *,
    tokenizer: Any = None,
    candidates: Sequence[str] = CANDIDATES,
    weights: Mapping[str, float] | None = None,
    budget: float = 0.25,
    check: Sequence[float] = (),
    continue_tokens: int = 128,
    path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Calibration:
    """Measure how much each layer suffers from fewer bits and fewer tokens.

    Every text's context is read, its cache compressed, and the rest of the text read on from it (teacher-forced, 64
    tokens a call). For each layer and candidate, the cache has this layer stored so and all others exact; the layer's
    damage is the mean KL divergence of the next-token distribution from the exact cache's, in nats per token. All of it
    runs through the backend and its stores, compiled layer by layer with ``lower="eager"``.

    Keys, values and evicting are measured apart and their damages added: one layer's damage under 3-bit keys and 2-bit
    values is that of 3-bit keys (values at 8 bits) and that of 2-bit values (keys at 8 bits). Evicting is measured with
    8 bits for what is kept. ``check`` measures what adding misses.

    Args:
        model: a causal language model called as ``model(input_ids, past_key_values=cache, use_cache=True)``, whose
            result has ``logits`` and ``past_key_values``. It is compiled while it is measured, and left uncompiled.
        inputs: token ids [1, tokens], texts (with a tokenizer) or :class:`Sample`; see :func:`default_inputs`.
        tokenizer: encodes texts.
        candidates: what to measure.
        weights: of each part of the inputs; by default 1, and 0.2 of ``retrieval``.
        budget: part of a 16-bit cache that the plan takes where the options name no budget.
        check: budgets, as parts of a cache in the model's dtype, whose combined tiers are run in the end.
        continue_tokens: how many of the last tokens of an input are read on; a :class:`Sample` says it itself.
        path: where to save the result.
        progress: called with the numbers of calls that are done and of all.
        options: of :class:`~mikv_compile.config.Options` that hold for all layers: policy, quantizers, window, ...

    Raises:
        OptionError: for options that are impossible or that choose tiers.
        MikvError: for a model that cannot be compiled layer by layer, or a layer that stays dense.
        ValueError: for inputs that are too short or of another form.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    from mikv_compile import __version__
    from mikv_compile.config import Options

    for name in _OWN:
        if name in options:
            raise OptionError(f"option {name!r} is not for calibrate(), which chooses it itself")
    Options.parse(options)
    samples = [_sample(item, tokenizer, continue_tokens) for item in inputs]
    if not samples:
        raise ValueError("calibrate() needs at least one input")
    for name in candidates:
        candidate_tiers(name)
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(Path(path).parent)!r} to write the plan file to")
    parts = list(dict.fromkeys(sample.part for sample in samples))
    bench = _Bench(model, dict(options))
    with bench.open():
        exact = bench.read_contexts("fp", samples)
        stores = _stores(exact[0])
        counter = _Counter(len(samples) * len(candidates) * len(stores), progress)
        wanted = [bench.continued(sample, copy.deepcopy(cache)) for sample, cache in zip(samples, exact, strict=True)]
        damage: dict[str, list[dict[str, float]]] = {part: [{} for _ in stores] for part in parts}
        evicts = [True] * len(stores)
        for name in candidates:
            stored = bench.read_contexts(candidate_tiers(name), samples)
            if name.startswith("keep"):
                evicts = [store.plan.evicts for store in _stores(stored[0])]
            for layer in range(len(stores)):
                for part in parts:
                    damage[part][layer][name] = 0.0
                for sample, cache, theirs, want in zip(samples, exact, stored, wanted, strict=True):
                    mixed = copy.deepcopy(cache)
                    _put_layer(mixed, theirs, layer)
                    kl = _divergence(want, bench.continued(sample, mixed))
                    damage[sample.part][layer][name] += kl / sum(s.part == sample.part for s in samples)
                    counter.advance()
        sites = [store.site for store in stores]
        found = Calibration(
            model=type(model).__name__,
            fingerprint=fingerprint(model),
            layers=tuple(
                LayerShape(site.kv_heads, site.key_dim, site.value_dim, evicting)
                for site, evicting in zip(sites, evicts, strict=True)
            ),
            options=dict(options),
            inputs=tuple((sample.context, sample.ids.shape[1] - sample.context) for sample in samples),
            damage={part: tuple(table) for part, table in damage.items()},
            weights={part: WEIGHTS.get(part, 1.0) for part in parts} | dict(weights or {}),
            budget=budget,
            versions={"mikv_compile": __version__, "torch": str(torch.__version__)},
        )
        if path is not None:
            found.save(path)  # before the checks: they are no reason to lose it
        found = _checked(found, bench, samples, wanted, sites[0].dtype, check)
    if path is not None:
        found.save(path)
    return found


def check(model: Any, found: Calibration, inputs: Sequence[Sample], budgets: Sequence[float]) -> Calibration:
    """Run the combined tiers of some budgets, without measuring the layers again.

    Args:
        model: that was measured.
        found: its calibration, maybe with other weights.
        inputs: to measure the KL on; their parts are those of the calibration.
        budgets: parts of a cache in the model's dtype.

    Returns:
        The calibration with ``checks`` of these budgets.

    Raises:
        OptionError: for a budget that cannot be met, or a model with other layers.
        ValueError: if there is an input of a part that was not measured.
    """
    unknown = {sample.part for sample in inputs} - set(found.damage)
    if unknown:
        raise ValueError(f"inputs are of part {', '.join(sorted(unknown))}, which was not measured")
    bench = _Bench(model, dict(found.options))
    with bench.open():
        exact = bench.read_contexts("fp", inputs)
        stores = _stores(exact[0])
        if len(stores) != len(found.layers):
            raise OptionError(f"the calibration is of {len(found.layers)} layers, but the model has {len(stores)}")
        wanted = [bench.continued(sample, cache) for sample, cache in zip(inputs, exact, strict=True)]
        return _checked(found, bench, inputs, wanted, stores[0].site.dtype, budgets)


def _checked(
    found: Calibration, bench: _Bench, samples: Sequence[Sample], wanted: Sequence[torch.Tensor], dtype: torch.dtype,
    budgets: Sequence[float],
) -> Calibration:  # fmt: skip
    checks = [_check(found, bench, samples, wanted, budget, dtype) for budget in budgets]
    return replace(found, checks=tuple(checks))


def _check(
    found: Calibration, bench: _Bench, samples: Sequence[Sample], wanted: Sequence[torch.Tensor], budget: float,
    dtype: torch.dtype,
) -> Check:  # fmt: skip
    """Run the combined tiers of a budget."""
    tiers = found.tiers(budget, dtype=dtype)
    layers = "; ".join(f"{number}={text}" for number, text in enumerate(tiers))
    stored = bench.read_contexts("fp", samples, layers=layers)
    ratio = cache_report(stored[0]).ratio
    measured = dict.fromkeys((sample.part for sample in samples), 0.0)
    for sample, cache, want in zip(samples, stored, wanted, strict=True):
        kl = _divergence(want, bench.continued(sample, cache))
        measured[sample.part] += kl / sum(s.part == sample.part for s in samples)
    return Check(budget, ratio, {part: found.damage_of(tiers, part) for part in measured}, measured)


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def advance(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Bench:
    """A model that reads contexts and continuations with the backend."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.model, self.options = getattr(model, "_orig_mod", model), options
        names = inspect.signature(self.model.forward).parameters
        self._accepts = {name for name in ("use_cache", "logits_to_keep") if name in names}

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, the model is compiled, in evaluation mode and records no gradients."""
        from mikv_compile.regional import uncompile

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            uncompile(self.model)
            self.model.train(was_training)

    def read_contexts(self, tiers: str, samples: Sequence[Sample], **more: Any) -> list[Any]:
        """Compile anew, so that graphs of other tiers do not add up, and compress each sample's context."""
        from mikv_compile.regional import compile

        compile(self.model, regional=True, **{**self.options, "lower": "eager", "tiers": tiers, **more})
        return [self._call(sample.ids[:, : sample.context], None, 1)[1] for sample in samples]

    def continued(self, sample: Sample, cache: Any) -> torch.Tensor:
        """Log-probabilities [tokens, vocabulary] behind each token of the continuation, where they count; float32."""
        parts = []
        for start in range(sample.context, sample.ids.shape[1], CHUNK):
            stop = min(start + CHUNK, sample.ids.shape[1])
            logits, cache = self._call(sample.ids[:, start:stop], cache, 0)
            logits = logits[0]
            if sample.counts is not None:
                logits = logits[torch.tensor(sample.counts[start - sample.context : stop - sample.context])]
            parts.append(logits.float().log_softmax(-1))
        return torch.cat(parts)

    def _call(self, ids: torch.Tensor, cache: Any, keep: int) -> tuple[torch.Tensor, Any]:
        more: dict[str, Any] = {"use_cache": True, "logits_to_keep": keep}
        more = {name: more[name] for name in self._accepts}
        device = next(self.model.parameters()).device
        result = self.model(ids.to(device), past_key_values=cache, **more)
        if isinstance(result, tuple):
            return result[0], result[1]
        return result.logits, result.past_key_values


def _sample(item: torch.Tensor | Sample | str, tokenizer: Any, continue_tokens: int) -> Sample:
    if isinstance(item, Sample):
        return item
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError("texts need a tokenizer: calibrate(model, texts, tokenizer=...)")
        item = torch.tensor([tokenizer(item, add_special_tokens=False).input_ids])
    if not isinstance(item, torch.Tensor):
        raise ValueError(f"an input is a {type(item).__name__}; expected token ids [1, tokens], a text or a Sample")
    return Sample(item, item.shape[-1] - continue_tokens)


def _handles(cache: Any) -> list[tuple[KVTensor, KVTensor]]:
    """The handles of keys and values of each layer, in order.

    Raises:
        MikvError: if a layer's cache is not compressed, or not one that grows.
    """
    pairs: dict[int, dict[str, KVTensor]] = {}
    for item in _walk(cache, set()):
        if not isinstance(item, KVTensor) or item.store is None or item.is_preallocated:
            raise MikvError(
                f"layer {len(pairs)} keeps a cache that cannot be calibrated: it stayed dense, or has a fixed size. "
                "mikv_compile.explain(model, input_ids) says why a layer stays dense"
            )
        pairs.setdefault(id(item.store), {})[item.role] = item
    if not pairs or any(len(pair) != 2 for pair in pairs.values()):
        raise MikvError("the model returned no cache of keys and values that the backend has compressed")
    return [(pair["key"], pair["value"]) for pair in pairs.values()]


def _stores(cache: Any) -> list[LayerStore]:
    return [key.store for key, _ in _handles(cache) if key.store is not None]


def _put_layer(cache: Any, source: Any, layer: int) -> None:
    """Let a layer of a cache show a copy of what another cache of the same tokens holds there."""
    theirs = _handles(source)[layer][0]
    mine = _handles(cache)[layer]
    assert theirs.store is not None
    store = theirs.store.copy()
    for handle in mine:
        handle.show(store)


def _divergence(want: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL of log-probabilities [tokens, vocabulary] from those that are wanted, in nats per token."""
    return float((want.exp() * (want - got)).sum(-1).double().mean())


def fingerprint(model: torch.nn.Module) -> str:
    """Of the names, shapes and first values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().reshape(-1)[:4].float().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {first}\n".encode())
    return digest.hexdigest()[:16]


# What is read

INSTRUCTION = "Some sentences follow. Between them are lines with a name and a number; each number will be needed.\n\n"


def default_inputs(
    tokenizer: Any, context: int = 2048, text_tokens: int = 128, retrieval_tokens: int = 192
) -> list[Sample]:
    """Two texts that need nothing but Python's own documentation.

    Part ``text`` is prose that goes on as prose. Part ``retrieval`` is prose in which lines such as
    ``line fuzzy-teapot: <90317>`` are planted, some of which are asked for again afterwards; only the digits count, so
    its damage tells which layers fetch what was read long before.

    Args:
        tokenizer: of the model.
        context: tokens of each text that are compressed, roughly for ``retrieval``.
        text_tokens, retrieval_tokens: that are read on from them.
    """
    from mikv_compile.eval import prompts, texts

    prose = texts.load("pydoc@20000").tokens(tokenizer, context + text_tokens)
    samples = [Sample(torch.tensor([prose]), context, "text")]

    draw = random.Random(7919)
    sentences = texts.load("pydoc@300000").sentences(longest=130)
    adjectives, nouns = draw.sample(_ADJECTIVES, len(_ADJECTIVES)), draw.sample(_NOUNS, len(_NOUNS))
    names = [f"{adjective}-{noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
    values = [str(draw.randrange(10**4, 10**5)) for _ in names]
    opening = prompts.encode(tokenizer, prompts.Frame.of(tokenizer).opening + INSTRUCTION)
    ids, planted = list(opening), []
    for name, value in zip(names, values, strict=True):
        piece = "\n".join([*(next(sentences) for _ in range(3)), f"line {name}: <{value}>", ""])
        encoded = prompts.encode(tokenizer, piece)
        if len(ids) + len(encoded) > context:
            break
        ids += encoded
        planted.append((name, value))
    if not planted:
        raise ValueError(f"a context of {context} tokens is too short for a planted line")
    start, counts = len(ids), []
    asked = draw.sample(planted, len(planted))
    for name, value in asked:
        question, digits = prompts.encode_before(tokenizer, f"\n\nline {name}: <", value)
        ids += [*question, *digits, *prompts.encode(tokenizer, ">")]
        # What is predicted behind a token counts if a digit follows it.
        counts += [*[False] * (len(question) - 1), *[True] * len(digits), False, False]
    stop = min(start + retrieval_tokens, len(ids))
    samples.append(Sample(torch.tensor([ids[:stop]]), start, "retrieval", tuple(counts[: stop - start])))
    return samples


_ADJECTIVES = (
    "fuzzy", "square", "salty", "eager", "pale", "steep", "cosmic", "loyal", "sleepy", "royal", "crisp", "fragile",
    "magnetic", "orange", "shy", "thorny", "urban", "windy", "young", "blunt", "cheap", "dizzy", "early", "foggy",
)  # fmt: skip
_NOUNS = (
    "teapot", "rabbit", "bridge", "carrot", "dentist", "engine", "forest", "guitar", "helmet", "insect", "jungle",
    "kitchen", "lemon", "magnet", "napkin", "oyster", "parrot", "rocket", "spider", "temple", "uncle", "vessel",
    "whistle", "yacht",
)  # fmt: skip
