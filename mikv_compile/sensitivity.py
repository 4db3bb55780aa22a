"""How much each layer of a model suffers from fewer bits and fewer tokens, and the tiers that follow from it."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mikv_compile.errors import OptionError
from mikv_compile.kernels.formats import CannotPackError

if TYPE_CHECKING:
    from mikv_compile.config import Options
    from mikv_compile.plan import CacheShape, LayerPlan, Tier

VERSION = 1
"""Of the file's form."""

PACKAGED = Path(__file__).parent / "plans"
"""Calibrations that come with the package."""

BITS = (8, 4, 3, 2)
"""Widths that keys or values of a layer may get; 8 is what the others are measured against."""

KEPT = (1.0, 0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.09375, 0.0)
"""Parts of the tokens that a layer may keep, window and sinks among them; with 0 they are all.

Few, as every distinct plan is compiled once.
"""

HIGH = (0.035, 0.01)
"""Part of the tokens at 8 bits, in a layer that keeps all tokens (window and sinks included) and in one that evicts."""

MEASURED_HIGH = 0.02
"""Part of the tokens at 8 bits, besides window and sinks, where fewer bits of the others are measured."""

UNITS = 2**16
"""A dense cache is so many units of bytes; a layer's tiers are counted in whole ones, rounded up."""


@dataclass(frozen=True)
class LayerShape:
    """KV heads and head dimensions of a layer, and whether it may evict (not where a sliding window bounds it)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    evicts: bool = True

    def __post_init__(self) -> None:
        sizes = (self.kv_heads, self.key_dim, self.value_dim)
        if not all(type(size) is int and size > 0 for size in sizes) or type(self.evicts) is not bool:
            raise OptionError(f"{self} is no shape of a layer: sizes are whole numbers above 0, evicts true or false")


@dataclass(frozen=True)
class Check:
    """The combined tiers for a budget, run: what the table predicts, and what was measured.

    Attributes:
        budget: part of a cache in the measured model's dtype.
        nbytes_fraction: true bytes at the measured length, as such a part.
        predicted, measured: KL in nats per token, by part.
    """

    budget: float
    nbytes_fraction: float
    predicted: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """What :func:`mikv_compile.calibrate` measured of a model. The option ``plan`` takes the file it is saved in.

    Attributes:
        model: class of the model.
        fingerprint: of its parameters' names, shapes and first values; for the reader, nothing checks it.
        layers: shape of each layer's cache.
        options: that all candidates were measured with (policy, quantizers, window, ...).
        inputs: lengths of each text: ``[context, continuation]`` in tokens.
        damage: by part (kind of text), for each layer: KL in nats per token, by candidate. ``k3`` are keys at 3 bits
            and values at 8, ``v2`` values at 2 bits and keys at 8, ``keep0.25`` a quarter of the tokens at 8 bits,
            ``keep0.0`` window and sinks alone.
        weights: of each part in the damage that is minimized.
        budget: part of a 16-bit cache that the tiers take where the options name no budget.
        checks: combined tiers that were run.
        versions: of mikv_compile and torch.
    """

    model: str
    fingerprint: str
    layers: tuple[LayerShape, ...]
    options: Mapping[str, Any]
    inputs: tuple[tuple[int, int], ...]
    damage: Mapping[str, tuple[Mapping[str, float], ...]]
    weights: Mapping[str, float]
    budget: float = 0.25
    checks: tuple[Check, ...] = ()
    versions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.layers or not self.damage:
            raise OptionError("a calibration needs layers and their damage")
        if not _is_number(self.budget) or not 0 < self.budget <= 1:
            raise OptionError(f"the budget of a calibration is {self.budget!r}; expected a fraction above 0, at most 1")
        if not isinstance(self.options, Mapping):
            raise OptionError(f"the options of a calibration are {self.options!r}; expected names and values")
        weights = self.weights.values()
        if set(self.weights) != set(self.damage) or not all(_is_number(w) and 0 <= w < math.inf for w in weights):
            raise OptionError(
                f"weights are {dict(self.weights)}; each of {', '.join(self.damage)} needs one, from 0 on"
            )
        names: set[str] | None = None
        for part, table in self.damage.items():
            if len(table) != len(self.layers):
                raise OptionError(f"the damage of {part!r} is of {len(table)} layers, but there are {len(self.layers)}")
            for row in table:
                names = set(row) if names is None else names
                if set(row) != names:
                    raise OptionError(f"the damage of {part!r} is not of the same candidates in every layer")
                for name, value in row.items():
                    _parse_candidate(name)
                    if not _is_number(value) or not math.isfinite(value):
                        raise OptionError(f"the damage {name!r} of {part!r} is {value!r}, which is no number")

    def __hash__(self) -> int:
        return hash((self.model, self.fingerprint, self.layers, self.inputs, self.budget))

    # Files

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"mikv_plan": VERSION, **asdict(self)}
        Path(path).write_text(_to_json(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            OptionError: for a file that is missing, of another form or version, or damaged.
        """
        again = "; make it anew with mikv_compile.calibrate(model, inputs, path=...)"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"there is no plan file {str(path)!r} to read ({error.strerror}){again}") from error
        except ValueError as error:
            raise OptionError(f"{str(path)!r} is not JSON ({error}){again}") from error
        version = content.get("mikv_plan") if isinstance(content, dict) else None
        if version is None:
            raise OptionError(f"{str(path)!r} is not a plan file{again}")
        if version != VERSION:
            raise OptionError(
                f"plan file {str(path)!r} has version {version}; this release reads version {VERSION}{again}"
            )
        del content["mikv_plan"]
        known = {f.name for f in fields(cls)}
        try:
            if set(content) - known:
                raise OptionError(f"unknown entries {', '.join(sorted(set(content) - known))}")
            content["layers"] = tuple(LayerShape(**shape) for shape in content["layers"])
            content["inputs"] = tuple((int(a), int(b)) for a, b in content["inputs"])
            content["damage"] = {part: tuple(dict(row) for row in table) for part, table in content["damage"].items()}
            content["checks"] = tuple(Check(**check) for check in content.get("checks", ()))
            return cls(**content)
        except (OptionError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise OptionError(f"plan file {str(path)!r} is damaged: {error}{again}") from error

    # What the table says

    def measured(self, layer: int, candidate: str, weights: Mapping[str, float] | None = None) -> float:
        """Weighted damage of a layer under a measured candidate."""
        weights = self.weights if weights is None else weights
        return sum(weights[part] * max(table[layer][candidate], 0.0) for part, table in self.damage.items())

    def predicted(self, layer: int, key_bits: int, value_bits: int, kept: float, part: str | None = None) -> float:
        """Damage of one layer in nats per token.

        The damages of keys, of values and of evicting are added. Between kept parts the logarithm of the damage is a
        straight line; between the largest measured part and all tokens the damage itself is. Fewer bits or tokens
        never count as less damage than more of them.

        Args:
            layer: number of the layer.
            key_bits, value_bits: of ``BITS``, or 16 (no damage).
            kept: part of the tokens that are kept besides window and sinks.
            part: of the texts; by default all, with their weights.
        """
        weights = None if part is None else {name: float(name == part) for name in self.damage}
        curves = _curves(self, layer, tuple(sorted(weights.items())) if weights else None)
        return curves.bits("k", key_bits) + curves.bits("v", value_bits) + curves.evicting(kept)

    def damage_of(self, tiers: Sequence[str], part: str | None = None) -> float:
        """Predicted damage of all layers' tiers together, such as :meth:`tiers` gives; see :meth:`predicted`."""
        from mikv_compile.plan import parse_tiers
        from mikv_compile.planner import BUDGET_LENGTH

        total = 0.0
        for layer, text in enumerate(tiers):
            *high, low = parse_tiers(text)
            stored = sum(tier.quota(BUDGET_LENGTH) for tier in (*high, low)) / BUDGET_LENGTH
            kept = stored if low.is_bounded else 1.0
            total += self.predicted(layer, low.key_bits, low.value_bits, kept, part)
        return total

    def tiers(
        self,
        budget: float | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        options: Options | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[str, ...]:
        """The tiers of each layer, as the option ``tiers`` writes them, that do least damage within a budget.

        Args:
            budget: part of the bytes of a dense cache in ``dtype`` at 4,096 tokens; by default the stored part of a
                16-bit cache. 1 keeps everything as it is; below, no layer gets more than 8 bits.
            dtype: of the model that will run.
            options: that it will run with, which bytes depend on; by default those of the measurement.
            weights: of the parts, instead of the stored ones.

        Raises:
            OptionError: for a budget below the least that the candidates need.
        """
        chosen = self if weights is None else replace(self, weights=dict(weights))
        if options is None:
            options = _options(self)
        return _tiers(chosen, budget, dtype, options)

    def rows(self, part: str | None = None) -> Iterable[tuple[int, dict[str, float]]]:
        """Number and damages of each layer; of one part of the texts, or of all with their weights."""
        names = self.candidates
        for layer in range(len(self.layers)):
            if part is None:
                yield layer, {name: self.measured(layer, name) for name in names}
            else:
                yield layer, dict(self.damage[part][layer])

    @property
    def candidates(self) -> list[str]:
        """Names of what was measured."""
        return list(next(iter(self.damage.values()))[0])


def load(path: str) -> Calibration:
    """The calibration in a file, read again only when the file has changed; or one of the package's, by its name.

    Raises:
        OptionError: as :meth:`Calibration.load`.
    """
    place = Path(path)
    if not place.exists() and place.name == path and (PACKAGED / f"{path}.json").exists():
        place = PACKAGED / f"{path}.json"
    try:
        status = place.stat()
    except OSError:
        return Calibration.load(path)  # says what is wrong
    return _load(str(place.resolve()), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _load(path: str, changed: int, size: int) -> Calibration:
    return Calibration.load(path)


def layer_tiers(options: Options, dtype: torch.dtype, layers: int) -> tuple[str, ...]:
    """The tiers of each layer of a model with ``layers`` of them, for options that name a plan file.

    Raises:
        OptionError: if the file is of a model with other layers, or as :meth:`Calibration.tiers` and :func:`load`.
    """
    assert options.plan is not None and not isinstance(options.budget, str)
    calibration = load(options.plan)
    if layers != len(calibration.layers):
        raise OptionError(
            f"plan file {options.plan!r} is of a {calibration.model} with {len(calibration.layers)} layers, but "
            f"{layers} are compiled here; {_anew(options)}. A model that torch.compile splits into several graphs "
            "needs mikv_compile.compile(model, regional=True)"
        )
    return _tiers(calibration, options.budget, dtype, options)


def planned(options: Options, index: int, site: CacheShape) -> tuple[Tier, ...]:
    """The tiers of one layer, for options that name a plan file.

    Raises:
        OptionError: if the file is of a model with other layers, or the budget cannot be met.
    """
    from mikv_compile.plan import parse_tiers

    assert options.plan is not None
    tiers = layer_tiers(options, site.dtype, site.layers)[index]
    made, here = load(options.plan).layers[index], (site.kv_heads, site.key_dim, site.value_dim)
    if (made.kv_heads, made.key_dim, made.value_dim) != here:
        raise OptionError(
            f"plan file {options.plan!r} is of a model whose layer {index} has {made.kv_heads} KV heads of "
            f"{made.key_dim} (keys) and {made.value_dim} (values); here it has {here[0]} of {here[1]} and {here[2]}; "
            f"{_anew(options)}"
        )
    return parse_tiers(tiers)


def _anew(options: Options) -> str:
    return f"make one for this model with mikv_compile.calibrate(model, inputs, path={options.plan!r})"


# Damage


@dataclass(frozen=True)
class _Curves:
    keys: Mapping[int, float]
    values: Mapping[int, float]
    kept: tuple[tuple[float, float], ...]
    """(kept part, damage), from most tokens to fewest."""

    def bits(self, side: str, bits: int) -> float:
        table = self.keys if side == "k" else self.values
        return 0.0 if bits >= 8 else table.get(bits, math.inf)

    def evicting(self, kept: float) -> float:
        if kept >= 1.0:
            return 0.0
        above = (1.0, 0.0)
        for part, damage in self.kept:
            if kept >= part:
                share = (above[0] - kept) / (above[0] - part)
                if above[1] <= 0 or damage <= 0:
                    return above[1] + share * (damage - above[1])
                return math.exp(math.log(above[1]) + share * (math.log(damage) - math.log(above[1])))
            above = part, damage
        return math.inf


def _curves(calibration: Calibration, layer: int, weights: tuple[tuple[str, float], ...] | None) -> _Curves:
    tables: dict[str, dict[float, float]] = {"k": {}, "v": {}, "keep": {}}
    given = None if weights is None else dict(weights)
    for name in calibration.candidates:
        kind, amount = _parse_candidate(name)
        tables[kind][amount] = calibration.measured(layer, name, given)
    for table in tables.values():
        worst = 0.0
        for amount in sorted(table, reverse=True):
            worst = table[amount] = max(worst, table[amount])
    ordered = tuple(sorted(tables["keep"].items(), reverse=True))
    return _Curves(
        {int(bits): damage for bits, damage in tables["k"].items()},
        {int(bits): damage for bits, damage in tables["v"].items()},
        ordered if calibration.layers[layer].evicts else (),
    )


def _parse_candidate(name: str) -> tuple[str, float]:
    """``("k", 3)`` of ``"k3"``, ``("keep", 0.25)`` of ``"keep0.25"``."""
    for kind in ("keep", "k", "v"):
        if name.startswith(kind):
            try:
                amount = float(name.removeprefix(kind))
            except ValueError:
                break
            if (kind == "keep" and 0 <= amount < 1) or (kind != "keep" and amount in BITS[1:]):
                return kind, amount
            break
    raise OptionError(f"unknown candidate {name!r}; candidates are such as 'k3', 'v2' and 'keep0.25'")


def candidate_tiers(name: str) -> str:
    """The tiers that a candidate is measured with."""
    kind, amount = _parse_candidate(name)
    if kind == "keep":
        # In two tiers, as generated tokens then take the place of less important ones.
        return f"int8:0.0,int8:{amount}" if amount else "int8:0.0"
    return f"int8:{MEASURED_HIGH},k{amount:.0f}v8" if kind == "k" else f"int8:{MEASURED_HIGH},k8v{amount:.0f}"


# Choosing


@dataclass(frozen=True)
class _Choice:
    tiers: str
    damage: float
    units: int


def _options(calibration: Calibration) -> Options:
    from mikv_compile.config import Options

    return Options.parse(dict(calibration.options))


def _tiers(calibration: Calibration, budget: float | None, dtype: torch.dtype, options: Options) -> tuple[str, ...]:
    relevant = tuple(sorted((f.name, getattr(options, f.name)) for f in fields(options) if f.name in _OF_BYTES))
    return _choose(calibration, budget, dtype, relevant)


_OF_BYTES = (
    "preset", "policy", "heads", "value_norm", "quantizer", "key_quantizer", "value_quantizer", "window", "sinks",
    "recent_share", "flush_every",
)  # fmt: skip
"""Options that a layer's bytes depend on."""


@functools.lru_cache(maxsize=64)
def _choose(
    calibration: Calibration, budget: float | None, dtype: torch.dtype, options_given: tuple[tuple[str, Any], ...]
) -> tuple[str, ...]:
    from mikv_compile.planner import BUDGET_LENGTH

    if budget is not None and budget >= 1:
        return ("fp",) * len(calibration.layers)
    elements = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in calibration.layers) * BUDGET_LENGTH
    dense = elements * dtype.itemsize
    limit = calibration.budget * elements * 2 if budget is None else budget * dense
    unit = dense / UNITS
    layers = []
    for number, shape in enumerate(calibration.layers):
        curves = _curves(calibration, number, None)
        choices = [
            _Choice(
                text, curves.bits("k", k) + curves.bits("v", v) + curves.evicting(kept), math.ceil(nbytes / unit - 1e-9)
            )
            for text, k, v, kept, nbytes in _offers(shape, dtype, options_given)
        ]
        layers.append(_pareto(choices))
    capacity = math.floor(limit / unit + 1e-9)
    least = sum(choices[0].units for choices in layers)
    if least > capacity:
        raise OptionError(
            f"budget={limit / dense:.3g} is below the least that the plan file's candidates, window and sinks allow, "
            f"{least * unit / dense:.3f}; raise it, or lower window and sinks"
        )
    return tuple(choice.tiers for choice in _knapsack(layers, capacity))


@functools.lru_cache(maxsize=64)
def _offers(
    shape: LayerShape, dtype: torch.dtype, options_given: tuple[tuple[str, Any], ...]
) -> list[tuple[str, int, int, float, int]]:
    """Tiers, key bits, value bits, kept part and bytes of everything that a layer may get."""
    from mikv_compile.config import Options
    from mikv_compile.plan import make, parse_tiers
    from mikv_compile.planner import BUDGET_LENGTH

    options = Options(**dict(options_given))
    found = []

    def plan_of(tiers: str) -> LayerPlan:
        return make(options, parse_tiers(tiers), shape.key_dim, shape.value_dim, dtype)

    for k, v, part in itertools.product(BITS, BITS, KEPT):
        if not part and (k, v) != (8, 8):
            continue  # window and sinks alone are stored at 8 bits
        try:
            text, kept = _text(plan_of, k, v, part)
            plan = plan_of(text)
        except CannotPackError:
            continue
        nbytes = plan.nbytes(BUDGET_LENGTH, 1, shape.kv_heads, shape.key_dim, shape.value_dim, dtype)
        found.append((text, k, v, kept, nbytes))
    return found


def _text(plan_of: Callable[[str], LayerPlan], key_bits: int, value_bits: int, kept: float) -> tuple[str, float]:
    """Tiers of some bits for a part of the tokens, and the part of them that is stored at ``BUDGET_LENGTH``.

    Window and sinks are of one size at any length; they are taken off the part, so that bytes grow with the length and
    are a budget's part of the dense ones at any length that is not short.
    """
    from mikv_compile.planner import BUDGET_LENGTH

    low = "int8" if key_bits == value_bits == 8 else f"k{key_bits}v{value_bits}"
    if kept <= 0:
        return "int8:0.0", 0.0
    if kept >= 1 and low == "int8":
        return low, 1.0
    probe = plan_of(f"int8:0.5,{low}")
    always = probe.window + probe.sinks
    if kept >= 1:
        return f"int8:{HIGH[0]}-{always},{low}", 1.0
    less = math.ceil(always * probe.slot_bytes[0] / probe.slot_bytes[1])
    share = round(kept - HIGH[1], 4)
    return f"int8:{HIGH[1]},{low}:{share}-{less}", max(kept - less / BUDGET_LENGTH, 0.0)


def _pareto(choices: Sequence[_Choice]) -> list[_Choice]:
    """The choices that no other one beats in bytes and damage, cheapest first."""
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.units, c.damage, c.tiers)):
        if math.isfinite(choice.damage) and (not kept or choice.damage < kept[-1].damage):
            kept.append(choice)
    return kept


def _knapsack(layers: Sequence[Sequence[_Choice]], capacity: int) -> list[_Choice]:
    """One choice per layer with the least sum of damages whose units do not exceed the capacity; exact."""
    # Beyond the dearest choices nothing changes.
    capacity = min(capacity, sum(choices[-1].units for choices in layers))
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    picks = []
    for choices in layers:
        total = torch.full_like(best, math.inf)
        pick = torch.zeros(capacity + 1, dtype=torch.int16)
        for number, choice in enumerate(choices):
            if choice.units > capacity:
                break
            with_it = best[: capacity + 1 - choice.units] + choice.damage
            better = with_it < total[choice.units :]
            total[choice.units :][better] = with_it[better]
            pick[choice.units :][better] = number
        best = total
        picks.append(pick)
    found: list[_Choice] = []
    for choices, pick in zip(reversed(layers), reversed(picks), strict=True):
        choice = choices[int(pick[capacity])]
        found.append(choice)
        capacity -= choice.units
    return found[::-1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_json(content: Any) -> str:
    """JSON with a line for each layer."""
    lines = json.dumps(content, indent=1)
    # Innermost objects and lists go on one line.
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: re.sub(r"\s*\n\s*", " ", found.group()), lines)
