"""Tiny models with random weights of every decoder architecture that transformers offers; nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mikv_compile.coverage.overrides import OVERRIDES, Override
from mikv_compile.coverage.shrink import tiny_config

KINDS = ("causal", "seq2seq", "vlm")
PROMPT, SOURCE, CAPACITY = 12, 10, 64
"""Tokens of the prompt (more than the tiny sliding window), of an encoder's input, and of a static cache."""


class CannotBuildError(Exception):
    """There is no such tiny model, and why."""


@dataclass(frozen=True)
class Architecture:
    """One decoder class of transformers."""

    name: str
    """As in transformers' own tables; ``seq2seq:`` and ``vlm:`` go before what is not a causal language model."""
    kind: str
    model_type: str
    class_name: str
    aliases: tuple[str, ...] = ()
    """Other names in transformers of the same class."""


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CannotBuildError("coverage needs transformers: pip install 'mikv-compile[coverage]'") from error


def names(kind: str | None = None) -> list[Architecture]:
    """Every architecture, each class once, in transformers' order."""
    _transformers()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES

    def table(name: str) -> list[tuple[str, str]]:
        entries = getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items()
        return [(k, c if isinstance(c, str) else c[0]) for k, c in entries if k in configs]

    seeing = [*table("IMAGE_TEXT_TO_TEXT"), *table("MULTIMODAL_LM")]
    seeing_classes = {c for _, c in seeing}
    listed = [("vlm" if c in seeing_classes else "causal", k, c) for k, c in table("CAUSAL_LM")]
    listed += [("seq2seq", k, c) for k, c in [*table("SEQ_TO_SEQ_CAUSAL_LM"), *table("SPEECH_SEQ_2_SEQ")]]
    listed += [("vlm", k, c) for k, c in seeing]
    types: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for group, model_type, class_name in listed:
        kinds.setdefault(class_name, "vlm" if class_name in seeing_classes else group)
        if model_type not in types.setdefault(class_name, []):
            types[class_name].append(model_type)
    found: dict[str, Architecture] = {}
    for class_name, group in kinds.items():
        first = max(types[class_name], key=lambda t: _fits(t, class_name, group))
        name = first if group == "causal" else f"{group}:{first}"
        aliases = tuple(t for t in types[class_name] if t != first)
        found.setdefault(name, Architecture(name, group, first, class_name, aliases))
    chosen = [a for a in found.values() if kind in (None, a.kind)]
    return sorted(chosen, key=lambda a: KINDS.index(a.kind))


def _fits(model_type: str, class_name: str, kind: str) -> tuple[bool, bool]:
    """How well a model type goes with a class that several have. A text part's name needs no taking apart."""
    stem = model_type.removesuffix("_text").replace("_", "").replace("-", "").lower()
    return class_name.lower().startswith(stem), kind == "causal" and model_type.endswith("_text")


def select(wanted: Sequence[str] = (), kind: str | None = None) -> list[Architecture]:
    """Architectures by name, alias or class; all without names. A name without prefix means every kind that has it.

    Raises:
        KeyError: for a name that transformers does not know.
    """
    every = names(kind)
    if not wanted:
        return every
    chosen: list[Architecture] = []
    for name in wanted:
        same = [a for a in every if name in (a.name, a.model_type, a.class_name, *a.aliases)]
        if not same:
            raise KeyError(name)
        chosen += [a for a in same if a not in chosen]
    return chosen


@dataclass
class TinyModel:
    """A model, the arguments of its prompt, and how it is called on."""

    architecture: Architecture
    override: Override
    model: torch.nn.Module
    prompt: dict[str, Any]
    """Arguments of the first call, without the cache."""
    first_only: frozenset[str] = frozenset()
    """Arguments that later calls do not repeat."""
    history: torch.Tensor | None = field(default=None, repr=False)

    @property
    def ids_argument(self) -> str:
        """Name of the argument with the decoder's token ids."""
        return "decoder_input_ids" if "decoder_input_ids" in self.prompt else "input_ids"

    def new_cache(self, kind: str, shapes: Sequence[tuple[int, ...]] | None = None) -> Any:
        """An empty cache, ``"dynamic"`` or ``"static"``; None where the model makes its own.

        ``shapes`` are those of a filled cache's keys per layer; a static cache is then allocated at once.
        """
        if self.override.own_cache:
            if kind != "dynamic":
                raise CannotBuildError("the model makes its own kind of cache")
            return None
        transformers: Any = _transformers()
        config = self.model.config
        if "encoder_outputs" in self.prompt:
            source = self.prompt["encoder_outputs"][0].shape[1]
            own = _cache(transformers, config, kind, CAPACITY)
            return transformers.EncoderDecoderCache(own, _cache(transformers, _unwindowed(config), kind, source))
        cache = _cache(transformers, config, kind, CAPACITY)
        if shapes is not None:
            parameter = next(self.model.parameters())
            heads, dims = [s[1] for s in shapes], [s[3] for s in shapes]
            cache.early_initialization(shapes[0][0], heads, dims, parameter.dtype, parameter.device)
        return cache

    def first(self, cache: Any) -> dict[str, Any]:
        """Arguments of the call with the prompt."""
        self.history = self.prompt[self.ids_argument]
        return {**self.prompt, **({} if cache is None else {self.override.cache_argument: cache})}

    def step(self, token: torch.Tensor, cache: Any) -> dict[str, Any]:
        """Arguments of the next call, with one token ``[1, 1]`` and the cache that the last call returned."""
        assert self.history is not None
        if self.override.columns:
            token = token[:, :, None]
        self.history = torch.cat([self.history, token.expand_as(self.history[:, :1])], 1)
        ids = self.history if self.override.whole_history else self.history[:, -1:]
        kept = {k: v for k, v in self.prompt.items() if k not in self.first_only}
        return {**kept, self.ids_argument: ids, self.override.cache_argument: cache}

    def cache_of(self, output: Any, given: Any) -> Any:
        """The cache that a call has returned, or the one that it was given and has filled."""
        returned = getattr(output, self.override.cache_argument, None)
        return given if returned is None and getattr(given, "is_initialized", False) else returned


def _cache(transformers: Any, config: Any, kind: str, tokens: int) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=config)
    return transformers.StaticCache(config=config, max_cache_len=tokens)


def _unwindowed(config: Any) -> Any:
    """The decoder's config without sliding windows, which cross attention has none of."""
    config = copy.deepcopy(config.get_text_config(decoder=True))
    for name in ("sliding_window", "layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return config


def override_of(architecture: Architecture) -> Override:
    """The entry of :data:`OVERRIDES`: by full name, else by model type, else none."""
    return OVERRIDES.get(architecture.name) or OVERRIDES.get(architecture.model_type) or Override()


def model_class(architecture: Architecture) -> Any:
    """The class in transformers.

    Raises:
        CannotBuildError: if it is missing, or needs a package that is missing.
    """
    try:
        return getattr(_transformers(), architecture.class_name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise CannotBuildError(f"{type(error).__name__}: {error}") from error


def build(architecture: Architecture, attention: str | None = None, seed: int = 0) -> TinyModel:
    """A tiny random model in eval mode and float32, with the arguments of a 12-token prompt.

    Raises:
        CannotBuildError: where there is nothing to run.
        Exception: whatever transformers raises on a config or an encoder that the generic way gets wrong.
    """
    override = override_of(architecture)
    if override.skip:
        raise CannotBuildError(override.skip)
    cls = model_class(architecture)
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    config = tiny_config(configs[architecture.model_type], override.config)
    if architecture.kind == "causal":
        config = _decoder_only(config, cls, override)
    torch.manual_seed(seed)
    model = _create(cls, config, attention).float().eval()
    _strengthen(model)
    if override.language:
        model.set_default_language(override.language)
    prompt, first_only = _prompt(architecture, override, model)
    return TinyModel(architecture, override, model, prompt, first_only)


def _decoder_only(config: Any, cls: Any, override: Override) -> Any:
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, wanted) else config
    if not override.keep_roles:
        for name, value in (("is_decoder", True), ("is_encoder_decoder", False)):
            if hasattr(config, name):
                setattr(config, name, value)
    return config


def _create(cls: Any, config: Any, attention: str | None) -> Any:
    if attention is None:
        return cls(config)
    try:
        return cls._from_config(config, attn_implementation=attention)
    except ValueError as error:
        if "attention implementation" not in str(error) or not getattr(config, "sub_configs", None):
            raise
        # Some part, an encoder mostly, has only the eager form: ask for the form in the text part alone.
        parts = {name: attention if "text" in name else "eager" for name in config.sub_configs}
        return cls._from_config(config, attn_implementation={"": "eager", **parts})


def _strengthen(model: Any) -> None:
    """Weights of unit gain: with the usual 0.02, attention is uniform and a broken cache would change no logit."""
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
                continue
            target = 0.3 if isinstance(module, torch.nn.Embedding) else weight.shape[1] ** -0.5
            spread = weight.float().std()
            if 0 < spread < target:
                weight.mul_(target / spread)
        for tensor in [*model.parameters(), *model.buffers()]:
            # Some models leave tensors uninitialized until a checkpoint is loaded.
            if tensor.is_floating_point() and (not torch.isfinite(tensor).all() or tensor.abs().max() > 1e3):
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.normal_(0, 0.02)
                elif torch.isnan(tensor).any():
                    tensor.zero_()


def _ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids away from both ends of the vocabulary, where special tokens are."""
    return torch.randint(5, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _prompt(architecture: Architecture, override: Override, model: Any) -> tuple[dict[str, Any], frozenset[str]]:
    rows = model.config.num_codebooks if override.codebooks else 1
    generator = torch.Generator().manual_seed(3)
    features = {name: torch.rand(*shape, generator=generator) for name, shape in override.features.items()}
    flags = {override.use_cache: True} if _accepts(model, override.use_cache) else {}
    ids = _ids(PROMPT, rows)
    if override.columns:
        ids = ids[:, :, None].repeat(1, 1, override.columns)
    if architecture.kind != "causal" and getattr(model.config, "is_encoder_decoder", False):
        source: dict[str, Any] = features or {"input_ids": _ids(SOURCE, seed=1)}
        with torch.no_grad():
            encoded = model.get_encoder()(**source)
        if isinstance(encoded, tuple):
            encoded = importlib.import_module("transformers.modeling_outputs").BaseModelOutput(*encoded[:1])
        return {"decoder_input_ids": ids, "encoder_outputs": encoded, **flags}, frozenset()
    return {"input_ids": ids, **features, **flags}, frozenset(() if override.repeat_features else features)


def _accepts(model: Any, argument: str) -> bool:
    parameters: Iterable[inspect.Parameter] = inspect.signature(model.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def attentions(architecture: Architecture) -> list[str]:
    """Attention forms that the class offers: sdpa where it does, and eager."""
    cls = model_class(architecture)
    return ["sdpa", "eager"] if getattr(cls, "_supports_sdpa", False) else ["eager"]
