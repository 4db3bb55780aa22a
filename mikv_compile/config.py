"""The options of ``torch.compile(model, backend="mikv", options={...})``, checked, and the presets."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mikv_compile.errors import OptionError

PRESETS: dict[str, dict[str, Any]] = {
    # Keys need about two bits more than values; `make demo` measures what this costs on a real model.
    "mikv": {"tiers": "int8:0.02,k4v2", "policy": "snapkv", "key_quantizer": "gptq", "value_quantizer": "rotate"},
    # MiKV as published (arXiv 2402.18096): half of the 20 % are heavy hitters, half are recent; per-step demotion.
    "mikv-paper": {
        "tiers": "fp:0.2,int2",
        "policy": "h2o",
        "quantizer": "mikv",
        "window": 0,
        "sinks": 0,
        "recent_share": 0.5,
        "flush_every": 1,
    },
    "int4": {"tiers": "int4", "quantizer": "mikv"},
    "evict": {"tiers": "fp:0.25", "policy": "snapkv"},
    "full": {"tiers": "fp"},
}
"""Named sets of options. Options that are given beside ``preset`` replace the preset's."""

_SIZE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


MOST_TOKENS = 2**31
"""Positions are stored as int32."""

MOST_BYTES = 2**60


def _fail(name: str, value: object, expected: str) -> OptionError:
    return OptionError(f"option {name!r} is {value!r}; expected {expected}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def parse_budget(budget: float | str) -> float | str:
    """A budget as a fraction where it is written as one (``"25%"``, ``"0.25"``); a size in bytes stays a string.

    Raises:
        OptionError: for what is neither a fraction above 0 and at most 1, nor a size of at least a byte.
    """
    expected = "a fraction above 0 and at most 1 such as 0.25 or '25%', or a size such as '2GiB'"
    if not isinstance(budget, str):
        fraction: Any = budget
    elif found := re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", budget):
        fraction = float(found.group(1)) / (100 if found.group(2) else 1)
        if not found.group(2) and fraction > 1 and fraction.is_integer():
            return budget  # bytes without a unit
    else:
        if parse_size(budget) <= 0:
            raise _fail("budget", budget, "more than no bytes")
        return budget
    if not _is_number(fraction) or not 0 < fraction <= 1:
        raise _fail("budget", budget, expected)
    return fraction


def parse_size(text: str) -> int:
    """Bytes of a size such as ``"2GiB"``, ``"500 MB"`` or ``"4096"``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _SIZE_UNITS.get((found.group(2) or "b").lower()) if found else None
    if found is None or unit is None:
        raise _fail("budget", text, "a size such as '2GiB' or '500MB', or a fraction such as 0.25 or '25%'")
    size = float(found.group(1)) * unit
    if size >= MOST_BYTES:
        raise _fail("budget", text, "a size that a memory may have")
    return int(size)


@dataclass(frozen=True)
class Options:
    """Everything that can be set. The defaults need no thought.

    Raises:
        OptionError: on construction, for a value that is of the wrong type, out of range or impossible in combination.
    """

    preset: str = field(default="mikv", metadata={"help": "named set of the options below: " + ", ".join(PRESETS)})
    budget: float | str | None = field(
        default=None,
        metadata={
            "help": "part of the dense cache's bytes (0.25, '25%'), or bytes per layer stack ('2GiB'); picks tiers"
        },
    )
    tiers: str | None = field(
        default=None,
        metadata={"help": "tiers by hand, highest precision first: 'int8:0.02,k4v2'; tokens beyond all shares go"},
    )
    layers: str | None = field(default=None, metadata={"help": "other tiers for some layers: '0-1=fp; 28-29=int8'"})
    plan: str | None = field(
        default=None,
        metadata={"help": "a file of mikv_compile.calibrate; picks each layer's tiers by what was measured there"},
    )
    layer_budget: str | None = field(
        default=None, metadata={"help": "'pyramid' gives lower layers larger shares of tokens, 'uniform' all the same"}
    )
    policy: str | None = field(
        default=None,
        metadata={"help": "what scores tokens: snapkv, h2o, h2o-age, tova, expected, knorm, keydiff, recent"},
    )
    heads: str | None = field(
        default=None, metadata={"help": "'sum' or 'max': how scores of the query heads of a KV head are put together"}
    )
    value_norm: bool | None = field(
        default=None, metadata={"help": "weigh a token's score by the norm of its value; 'expected' does by itself"}
    )
    quantizer: str | None = field(
        default=None,
        metadata={"help": "how tokens become codes: kivi, clip, gptq, rotate, mikv, rtn, flexgen, hqq, nuq"},
    )
    key_quantizer: str | None = field(default=None, metadata={"help": "the same for keys alone"})
    value_quantizer: str | None = field(default=None, metadata={"help": "the same for values alone"})
    window: int | None = field(default=None, metadata={"help": "newest tokens that always stay in the high tier"})
    sinks: int | None = field(default=None, metadata={"help": "first tokens that always stay in the high tier"})
    recent_share: float | None = field(
        default=None, metadata={"help": "part of the high tier's share that goes to the newest tokens"}
    )
    flush_every: int | None = field(
        default=None, metadata={"help": "tokens demoted at a time; 1 demotes in every step, as the paper does"}
    )
    lower: str = field(
        default="inductor", metadata={"help": "'inductor' compiles the rewritten graph, 'eager' only runs it"}
    )
    inductor: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "options for Inductor; also given as 'inductor.NAME' keys"}
    )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from the dict that was given to ``torch.compile``.

        Raises:
            OptionError: for an unknown key, with the nearest known name, and for what is no mapping.
        """
        if not isinstance(options, Mapping | None):
            raise OptionError(f"options are {options!r}; they must be a dict such as {{'budget': 0.25}}")
        given = dict(options or {})
        told = [k for k in given if isinstance(k, str) and k.startswith("inductor.")]
        inductor = {k.removeprefix("inductor."): given.pop(k) for k in told}
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{_nearest(str(name), known)}")
        if inductor and isinstance(given.get("inductor", {}), Mapping):
            given["inductor"] = {**given.get("inductor", {}), **inductor}
        return cls(**given)

    def __post_init__(self) -> None:
        from mikv_compile.policies import POLICIES
        from mikv_compile.quantizers import QUANTIZERS

        for name in ("preset", "policy", "quantizer", "key_quantizer", "value_quantizer"):
            if not isinstance(getattr(self, name), str | None):
                raise _fail(name, getattr(self, name), "a name")
        if self.preset not in PRESETS:
            raise OptionError(f"unknown preset {self.preset!r}{_nearest(str(self.preset), list(PRESETS))}")
        for name, registry in (
            ("policy", POLICIES), ("quantizer", QUANTIZERS), ("key_quantizer", QUANTIZERS),
            ("value_quantizer", QUANTIZERS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in registry:
                raise OptionError(f"unknown {name} {value!r}{_nearest(str(value), list(registry))}")
        for name, least in (("window", 0), ("sinks", 0), ("flush_every", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MOST_TOKENS:
                raise _fail(name, value, f"a whole number of tokens, at least {least} and below 2**31")
        for name, known in (("heads", ("sum", "max")), ("layer_budget", ("uniform", "pyramid"))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise _fail(name, value, " or ".join(map(repr, known)))
        if not isinstance(self.value_norm, bool | None):
            raise _fail("value_norm", self.value_norm, "True or False")
        policy = self.resolved("policy", "snapkv")
        if self.heads == "max" and not POLICIES[policy].attention:
            raise OptionError(f"option 'heads' is 'max', but policy {policy!r} does not look at the query heads")
        if self.value_norm and policy == "recent":
            raise OptionError("option 'value_norm' is True, but policy 'recent' gives no scores to weigh")
        share = self.recent_share
        if share is not None and not (_is_number(share) and 0 <= share <= 1):
            raise _fail("recent_share", share, "a number from 0 to 1")
        if self.lower not in ("inductor", "eager"):
            raise _fail("lower", self.lower, "'inductor' or 'eager'")
        for name in ("tiers", "layers", "plan"):
            if not isinstance(getattr(self, name), str | None):
                raise _fail(name, getattr(self, name), "a string")
        if not isinstance(self.inductor, Mapping):
            raise _fail("inductor", self.inductor, "a dict of Inductor options")
        self._check_tiers()
        if self.budget is not None:
            if self.tiers is not None:
                raise OptionError("options 'budget' and 'tiers' both choose the tiers; give one of them")
            object.__setattr__(self, "budget", parse_budget(self.budget))
        if self.plan is not None:
            self._check_plan()

    def _check_plan(self) -> None:
        if not self.plan:
            raise OptionError("option 'plan' is empty; expected the name of a plan file, such as 'plan.json'")
        for name in ("tiers", "layers", "layer_budget"):
            if getattr(self, name) is not None:
                raise OptionError(f"options 'plan' and {name!r} both choose the tiers of layers; give one of them")
        if isinstance(self.budget, str):
            raise OptionError(
                f"option 'plan' takes a budget that is a fraction of the dense bytes, such as 0.25, not {self.budget!r}"
            )

    def _check_tiers(self) -> None:
        from mikv_compile.plan import check_tiers

        check_tiers(self)

    def resolved(self, name: str, default: Any) -> Any:
        """An option's value: as given, else the preset's, else ``default``."""
        value = getattr(self, name)
        return PRESETS[self.preset].get(name, default) if value is None else value

    @property
    def quantizers(self) -> tuple[str, str]:
        """Names of the quantizers of keys and of values: the nearest to what was given, then the preset's."""
        preset = PRESETS[self.preset]
        found = []
        for name in ("key_quantizer", "value_quantizer"):
            choices = (getattr(self, name), self.quantizer, preset.get(name), preset.get("quantizer"), "kivi")
            found.append(next(choice for choice in choices if choice is not None))
        return found[0], found[1]

    def replace(self, **changes: Any) -> Options:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
