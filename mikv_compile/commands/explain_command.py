"""``mikv explain``: what the backend does to a model, as text, JSON or an HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv_compile.commands import common
from mikv_compile.commands.common import AsJson, Budget, Device, Dtype, Model, Preset, Settings

if TYPE_CHECKING:
    from mikv_compile.report import Explanation


def command(
    model: Model,
    options: Settings = None,
    preset: Preset = None,
    budget: Budget = None,
    prompt: Annotated[str | None, typer.Option(help="What the model reads; by default a text of its own.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of that text.")] = 256,
    html: Annotated[Path | None, typer.Option(help="Write a page with graphs and pictures to this file.")] = None,
    attn: Annotated[str | None, typer.Option(help="sdpa or eager; by default sdpa where the model has it.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Run a model once on a short prompt and say what is found, rewritten, declined, and what the cache weighs."""
    with common.mistakes():
        from mikv_compile.eval import models

        chosen = common.backend_options(options, preset, budget)
        if html is not None and not html.parent.is_dir():
            raise common.UsageError(f"--html: there is no folder {html.parent}")
        tokenizer, loaded = models.load(model, common.torch_dtype(dtype), device, attn)
        ids = _read(tokenizer, prompt, tokens)
        explanation, cache = _explain(loaded, ids, chosen, html is not None)
    if html is not None:
        from mikv_compile import __version__, explain_html
        from mikv_compile.report import stores
        from mikv_compile.tier_map import layer_tiers

        told = {
            "model": model, "class": type(loaded).__name__, "prompt": f"{ids.shape[1] - 1} tokens, then one more",
            "options": chosen or "the defaults", "dtype": dtype, "mikv-compile": __version__,
        }  # fmt: skip
        title = f"mikv explain {models.short_name(model)}"
        page = explain_html.render(title, told, explanation, [layer_tiers(store) for store in stores(cache)])
        html.write_text(page, encoding="utf-8")
    if as_json:
        common.print_json(_content(model, ids.shape[1], explanation) | ({"html": str(html)} if html else {}))
        return
    print(explanation)
    if html is not None:
        print(f"wrote {html}")


def _read(tokenizer: Any, prompt: str | None, tokens: int) -> Any:
    """Token ids [1, T + 1]: a prompt, and the token that is read on from it."""
    import torch

    from mikv_compile.eval import prompts, texts

    ids = texts.load("pydoc").tokens(tokenizer, tokens + 1) if prompt is None else prompts.encode(tokenizer, prompt)
    if len(ids) < 2:
        raise common.UsageError("the prompt has fewer than two tokens")
    return torch.tensor([ids])


def _explain(model: Any, ids: Any, options: dict[str, Any], keep_graphs: bool) -> tuple["Explanation", Any]:
    """The prompt's graphs, and those of one more token, with the cache that is left."""
    from transformers import DynamicCache

    from mikv_compile.report import Explanation, explain

    cache, ids = DynamicCache(config=model.config), ids.to(model.device)
    parts = [
        explain(model, input_ids=part, past_key_values=cache, use_cache=True, options=options, keep_graphs=keep_graphs)
        for part in (ids[:, :-1], ids[:, -1:])
    ]
    return Explanation([graph for part in parts for graph in part.graphs], parts[-1].cache), cache


def _content(model: str, tokens: int, explanation: "Explanation") -> dict[str, Any]:
    """The explanation as JSON."""
    from mikv_compile.report import describe

    graphs = [
        {
            "attentions": graph.attentions,
            "rewritten": [
                {
                    "site": site.name, "layer": site.layer, "phase": site.phase, "attention": site.form,
                    "query_heads_per_kv_head": site.groups, "reads": site.reads, "reason": site.reason,
                    "tiers": describe(site.plan),
                }
                for site in graph.rewritten
            ],
            "declined": [vars(declined) for declined in graph.declined],
        }
        for graph in explanation.graphs
    ]  # fmt: skip
    content: dict[str, Any] = {"model": model, "tokens": tokens, "graphs": graphs, "cache": None}
    if explanation.cache is not None:
        content["cache"] = common.cache_json(explanation.cache) | {
            "layers": [
                {
                    "length": layer.length, "tokens_per_tier": layer.tokens, "nbytes": layer.nbytes,
                    "dense_nbytes": layer.dense_nbytes, "dequantized_reads": layer.fallbacks,
                    "tiers": None if layer.plan is None else describe(layer.plan),
                }
                for layer in explanation.cache.layers
            ]
        }  # fmt: skip
    return content
