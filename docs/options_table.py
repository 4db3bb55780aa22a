"""Writes docs/options.md from the dataclass of the options and the presets: ``python docs/options_table.py``."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mikv_compile.config import PRESETS, Options
from mikv_compile.plan import make, parse_tiers
from mikv_compile.policies import Policy

PAGE = Path(__file__).parent / "options.md"
UNSET = {"layer_budget": "uniform", "heads": "sum"}
"""What options mean that are None, where no plan has an attribute for it."""

_TEXT = """<!-- Made by `python docs/options_table.py`; do not edit by hand. -->

# Options

`torch.compile(model, backend="mikv", options={{...}})`, or `mikv_compile.compile(model, budget=0.25, ...)`. Defaults
need no thought. An unknown name, a wrong type or an impossible combination is refused at the first call;
`mikv_compile.Options.parse(options)` does so at once:

```python
from mikv_compile import OptionError, Options

Options.parse({{"budget": 0.25, "policy": "h2o"}})
try:
    Options.parse({{"bugdet": 0.25}})
except OptionError as error:
    print(error)  # unknown option 'bugdet'; did you mean 'budget'?
```

{options}

"preset" and "policy" in the column of defaults: the preset or the policy says it. `-`: not set. More about tiers:
[formats](formats.md); about `plan`: [calibration](calibration.md); about `policy` and `layer_budget`:
[policies](policies.md); about `quantizer`: [quantizers](quantizers.md).

## Presets

`preset` names a set of options; those that are given beside it win. An empty cell is the default above.

{presets}
"""


def defaults() -> dict[str, str]:
    """What each option is when nobody sets it: its own default, the one that plans take, or who says it."""
    plan = make(Options(), parse_tiers(PRESETS["mikv"]["tiers"]), 64, 64)
    unset = {"window": plan.window, "sinks": plan.sinks, "flush_every": plan.flush_every, **UNSET}
    found = {}
    for option in fields(Options):
        value = option.default_factory() if option.default_factory is not MISSING else option.default
        found[option.name] = _shown(unset.get(option.name) if value is None else value)
        if option.name in PRESETS["mikv"]:
            found[option.name] = "preset"
        elif option.name in {setting.name for setting in fields(Policy)}:
            found[option.name] = "policy"
    return found


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render() -> str:
    """The page."""
    usual = defaults()
    options = [
        [f"`{o.name}`", str(o.type).replace(" | None", "").replace(" | ", " or "), usual[o.name], o.metadata["help"]]
        for o in fields(Options)
    ]
    set_by_presets = [o.name for o in fields(Options) if any(o.name in preset for preset in PRESETS.values())]
    presets = [
        [f"`{name}`", *(_shown(preset[name]) if name in preset else "" for preset in PRESETS.values())]
        for name in set_by_presets
    ]
    return _TEXT.format(
        options=_table(["option", "type", "default", "meaning"], options),
        presets=_table(["option", *(f"`{name}`" for name in PRESETS)], presets),
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
