"""``mikv plan``: what a cache will weigh, before anything is loaded or run."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv_compile.commands import common
from mikv_compile.commands.common import AsJson, Budget, Model, Preset, Settings

if TYPE_CHECKING:
    import torch

    from mikv_compile.forecast import Forecast

_LOADED_DTYPE = "float32"
"""What the commands that load a model use unless told."""

_ROUNDED = 1.01
"""How much more than a budget still meets it."""


def command(
    model: Model,
    context: Annotated[str, typer.Option(help="Tokens of the prompt: 4096, 32k (32,768), 1M.")] = "4096",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    options: Settings = None,
    preset: Preset = None,
    budget: Budget = None,
    memory: Annotated[str | None, typer.Option(help="A size such as 16GiB: which context fits into it?")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the config says.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a cache will weigh, dense and compressed, from a model's config; no weights are loaded."""
    with common.mistakes():
        from mikv_compile.config import Options
        from mikv_compile.eval import models
        from mikv_compile.forecast import Forecast, model_shape

        tokens, limit = common.count(context, "--context"), None if memory is None else _size(memory)
        chosen = common.backend_options(options, preset, budget)
        config = models.load_config(model)
        element, notes = _dtype(config, dtype)
        forecast = Forecast(model_shape(config), Options.parse(chosen), element, batch)
        content = _content(models.short_name(model), forecast, tokens, limit)
    if getattr(config, "quantization_config", None):
        content["weights_nbytes"] = None
        notes.append("the checkpoint is quantized, so its weights take other bytes than those of a dtype: not counted")
        for found in content.get("largest_context", {}).values():
            found.pop("with_weights", None)
    content["notes"] = [*notes, *content["notes"], *_over_budget(forecast, tokens)]
    if content["dtype"] != _LOADED_DTYPE:
        content["notes"].append(
            f"planned for {content['dtype']}; the commands that load a model, such as mikv run, use {_LOADED_DTYPE} "
            f"unless --dtype says so, for which --dtype {_LOADED_DTYPE} plans"
        )
    common.print_json(content) if as_json else _show(content)


def _size(text: str) -> int:
    from mikv_compile.config import parse_size
    from mikv_compile.errors import OptionError

    try:
        return parse_size(text)
    except OptionError as error:
        raise common.UsageError(f"--memory is {text!r}; expected a size such as 16GiB or 500MB") from error


def _over_budget(forecast: "Forecast", context: int) -> list[str]:
    """A note on why a fraction given as the budget does not hold for this context, if it does not."""
    from mikv_compile.planner import BUDGET_LENGTH

    budget = forecast.options.resolved("budget", None)
    if not isinstance(budget, float | int):
        return []

    def share(tokens: int) -> float:
        return forecast.nbytes(tokens) / forecast.dense_nbytes(tokens)

    if share(context) <= _ROUNDED * budget:
        return []
    over = f"the cache takes {share(context):.1%}, which is more than the budget of {budget:.1%}: "
    if context < BUDGET_LENGTH and share(BUDGET_LENGTH) <= _ROUNDED * budget:
        why = "the window and the sinks weigh the same at any length"
        return [f"{over}{why}; from {BUDGET_LENGTH:,} tokens on the budget holds"]
    return [f"{over}some layers stay dense, keep only a short window, or have tiers of their own (see the table)"]


def _dtype(config: Any, given: str | None) -> tuple["torch.dtype", list[str]]:
    """The dtype of the model, and a note where neither the user nor the config says which."""
    import torch

    if given is not None:
        return common.torch_dtype(given), []
    found = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if isinstance(found, torch.dtype):
        return found, []
    return torch.bfloat16, ["the config names no dtype: planned for bfloat16 (see --dtype)"]


def _content(name: str, forecast: "Forecast", context: int, limit: int | None) -> dict[str, Any]:
    """The plan as JSON."""
    from mikv_compile.report import describe

    model, dtype = forecast.model, str(forecast.dtype).removeprefix("torch.")
    layers = [
        {
            "layer": layer.shape.layer, "kv_heads": layer.shape.kv_heads, "key_dim": layer.shape.key_dim,
            "value_dim": layer.shape.value_dim, "window": layer.shape.window, "tokens": layer.tokens,
            "tiers": None if layer.plan is None else describe(layer.plan), "dense_because": layer.reason,
            "nbytes": layer.nbytes, "dense_nbytes": layer.dense_nbytes,
        }
        for layer in forecast.layers(context)
    ]  # fmt: skip
    nbytes, dense = forecast.nbytes(context), forecast.dense_nbytes(context)
    content = {
        "model": name, "architecture": model.architecture, "dtype": dtype, "context": context,
        "batch": forecast.batch, "longest_context_of_the_model": model.longest,
        "nbytes": nbytes, "dense_nbytes": dense, "ratio": nbytes / dense, "parameters": model.parameters,
        "weights_nbytes": forecast.weights_nbytes, "layers": layers, "notes": list(model.notes),
    }  # fmt: skip
    if limit is not None:
        content["memory"] = limit
        content["largest_context"] = {
            kind: {
                "cache_alone": forecast.largest_context(limit, dense),
                "with_weights": forecast.largest_context(limit - forecast.weights_nbytes, dense),
            }
            for kind, dense in (("dense", True), ("compressed", False))
        }
    return content


def _show(content: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = common.console()
    table = Table(
        title=f"{content['architecture']}, {content['context']:,} tokens, batch {content['batch']}, {content['dtype']}"
    )
    for heading in ("layers", "KV heads", "head dim", "tokens", "dense, each", "compressed, each", "%"):
        table.add_column(heading, justify="right")
    table.add_column("tiers")
    for numbers, layer in _alike(content["layers"]):
        dims = f"{layer['key_dim']}" + (f" / {layer['value_dim']}" if layer["value_dim"] != layer["key_dim"] else "")
        sliding = "" if layer["window"] is None else f" (window {layer['window']:,})"
        table.add_row(
            numbers, str(layer["kv_heads"]), dims, f"{layer['tokens']:,}{sliding}", common.size(layer["dense_nbytes"]),
            common.size(layer["nbytes"]), f"{layer['nbytes'] / layer['dense_nbytes']:.1%}",
            escape(layer["tiers"] or f"dense: {layer['dense_because']}"),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"cache in {content['dtype']}: {common.size(content['dense_nbytes'])} dense, "
        f"{common.size(content['nbytes'])} compressed ({content['ratio']:.1%})"
    )
    if content["weights_nbytes"] is not None:
        console.print(f"weights: {common.size(content['weights_nbytes'])} ({content['parameters']:,} parameters)")
    for kind, found in content.get("largest_context", {}).items():
        parts = [f"{_tokens(n)} {how.replace('_', ' ')}" for how, n in found.items()]
        console.print(f"largest context in {common.size(content['memory'])}, {kind}: " + ", ".join(parts))
    if content["longest_context_of_the_model"]:
        console.print(f"the model was made for {content['longest_context_of_the_model']:,} tokens")
    for note in content["notes"]:
        console.print(f"note: {note}", markup=False)


def _tokens(number: int | None) -> str:
    return "any number of tokens" if number is None else f"{number:,} tokens" if number else "nothing"


def _alike(layers: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Layers of one shape and plan, by their numbers; the bytes are those of one of them."""
    from mikv_compile.report import ranges

    groups: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for layer in layers:
        rest = {key: value for key, value in layer.items() if key != "layer"}
        groups.setdefault(repr(rest), ([], rest))[0].append(layer["layer"])
    return [(ranges(numbers), rest) for numbers, rest in groups.values()]
