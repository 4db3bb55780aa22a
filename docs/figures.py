"""Draws the pictures of docs/how_it_works.md from real stores: ``make figures``.

SmolLM2-135M-Instruct reads a part of Python's documentation with three sets of options; what lies in which tier is read
from the buffers of the compressed cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mikv_compile.handle import KVTensor
from mikv_compile.store import LayerStore

FOLDER = Path(__file__).parent / "figures"
TOKENS = 1024
RUNS: dict[str, dict[str, Any]] = {
    "default options": {},
    "budget=0.06 (12 % of a 16-bit cache)": {"budget": 0.06},
    'plan="smollm2-135m", budget=0.06': {"plan": "smollm2-135m", "budget": 0.06},
}
"""Title -> options. The model is float32, so 0.06 of its own cache is 12 % of a 16-bit one."""
CALIBRATED = 'plan="smollm2-135m", budget=0.06'
EVICTED = -1


def stores(cache: Any) -> list[LayerStore]:
    """The stores of a transformers cache, one per layer.

    Raises:
        ValueError: if a layer is dense.
    """
    found = []
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer.keys, KVTensor) or layer.keys.store is None:
            raise ValueError(f"layer {i} is not compressed")
        found.append(layer.keys.store)
    return found


def tiers_of(store: LayerStore) -> torch.Tensor:
    """The tier of each token of the first batch row: int64 [H_kv, T], ``EVICTED`` where it is in none."""
    tiers = store.typed().tiers
    found = torch.full((tiers[0].positions.shape[1], store.length), EVICTED)
    for number, (tier, count) in enumerate(zip(tiers, store.counts, strict=True)):
        found.scatter_(1, tier.positions[0, :, :count].long() - store.base, number)
    return found


def bits_of(store: LayerStore, side: str) -> torch.Tensor:
    """Bits of each token's ``"key"`` or ``"value"``, mean over the KV heads: float32 [T]; evicted tokens count 0."""
    floating = 8 * store.site.dtype.itemsize
    bits = [getattr(fmt, side).bits for fmt in store.plan.format.tiers]
    table = torch.tensor([float(floating if n == 16 else n) for n in bits] + [0.0])  # the last is what EVICTED finds
    return table[tiers_of(store)].mean(0)


def draw_tiers(caches: dict[str, list[LayerStore]], path: Path) -> None:
    """Tiers over positions (x) and layers (y) of the first KV head, one panel for each set of options."""
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    colours, names = ["#f5f5f5", "#c2185b", "#80cbc4"], ["evicted", "high tier", "low tier"]
    figure, axes = pyplot.subplots(len(caches), 1, figsize=(9, 2.3 * len(caches)), sharex=True, layout="constrained",
                                   squeeze=False)  # fmt: skip
    norm = BoundaryNorm([-1.5, -0.5, 0.5, 1.5], 3)
    for axis, (title, layers) in zip(axes[:, 0], caches.items(), strict=True):
        image = torch.stack([tiers_of(store)[0].clamp(max=1) for store in layers])  # all tiers below the first: low
        axis.imshow(image.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), norm=norm)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel("layer")
    axes[-1, 0].set_xlabel("position of the token")
    patches = [Patch(facecolor=c, edgecolor="#9e9e9e", label=n) for c, n in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def draw_precision(layers: list[LayerStore], title: str, path: Path) -> None:
    """Bits of keys and values over positions (x) and layers (y), mean over KV heads."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, side in zip(axes, ("key", "value"), strict=True):
        image = torch.stack([bits_of(store, side) for store in layers])
        shown = axis.imshow(image.numpy(), aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0, vmax=8)
        axis.set_title(f"bits of a {side}", fontsize=10, loc="left")
        axis.set_xlabel("position of the token")
    axes[0].set_ylabel("layer")
    figure.colorbar(shown, ax=axes, label="bits of a number, 0: evicted")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=90, facecolor="white")
    pyplot.close(figure)


def compressed(model: torch.nn.Module, ids: torch.Tensor, options: dict[str, Any]) -> list[LayerStore]:
    """Let a model read ids [1, T] through the backend; the stores of its layers."""
    torch._dynamo.reset()
    call = torch.compile(model, backend="mikv", options={**options, "lower": "eager"})
    with torch.no_grad():
        return stores(call(ids, use_cache=True, logits_to_keep=1).past_key_values)


def main() -> None:
    """Draw both pictures."""
    import matplotlib

    from mikv_compile.eval import models, texts

    matplotlib.use("Agg")
    tokenizer, model = models.load("smollm2")
    ids = torch.tensor([texts.load("pydoc").tokens(tokenizer, TOKENS)])
    caches = {title: compressed(model, ids, options) for title, options in RUNS.items()}
    draw_tiers(caches, FOLDER / "tiers.png")
    draw_precision(caches[CALIBRATED], f"{CALIBRATED}, mean over KV heads", FOLDER / "precision.png")


if __name__ == "__main__":
    main()
