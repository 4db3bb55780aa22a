"""Print the tables of sizes in docs/formats.md: what papers count, true bytes, and where the difference comes from."""

from __future__ import annotations

import torch

from mikv_compile import Options
from mikv_compile.kernels.formats import buffer_names
from mikv_compile.plan import CacheShape
from mikv_compile.planner import Planner
from mikv_compile.store import LayerStore

PAPER_LENGTH = 4096
HIGH = {"16 bit": "fp", "INT8": "int8", "INT4": "int4", "INT2": "int2"}


def filled_store(length: int, dim: int, **options: object) -> LayerStore:
    """A 16-bit layer of one row and one KV head right after a prompt; on the meta device, so nothing is allocated."""
    shape = CacheShape(1, 1, dim, dim, torch.float16)
    plan = Planner(Options.parse(options)).layer(0, shape)
    orders = plan.fill(length)
    store = LayerStore(plan, shape, torch.device("meta"), orders.counts)
    store.filled(orders, length)
    return store


def paper_sizes() -> None:
    """MiKV's recipe at r = 0.2, D = 128, low tier INT2."""
    print("| high tier | codes, scales and zeros | true bytes |\n|---|--:|--:|")
    for name, high in HIGH.items():
        store = filled_store(PAPER_LENGTH, 128, preset="mikv-paper", tiers=f"{high}:0.2,int2")
        dense = store.dense_nbytes
        print(f"| {name} | {store.coded_nbytes / dense:.2%} | {store.nbytes / dense:.2%} |")


def paper_parts() -> None:
    """Where the first row's bytes are, in percent of the 16-bit cache."""
    store = filled_store(PAPER_LENGTH, 128, preset="mikv-paper")
    parts: dict[str, float] = {"spare": 0.0}
    names = buffer_names(len(store.counts))
    for name, buffer in zip(names, store.buffers, strict=True):
        tier = int(name[4]) if name.startswith("tier") else 0
        share = store.counts[tier] / store.capacities[tier] if name != "balancer" else 1.0
        kind = name.split("_")[-1]
        parts[kind] = parts.get(kind, 0.0) + buffer.nbytes * share / store.dense_nbytes
        parts["spare"] += buffer.nbytes * (1 - share) / store.dense_nbytes
    print(", ".join(f"{kind} {share:.2%}" for kind, share in parts.items()))


def default_sizes() -> None:
    """The default plan right after a prompt."""
    print("| D | tokens | tokens high + low | codes, scales and zeros | true bytes |\n|--:|--:|--:|--:|--:|")
    for dim, length in ((64, 4096), (128, 4096), (128, 32768)):
        store = filled_store(length, dim)
        high, low = store.counts
        coded, true = store.coded_nbytes / store.dense_nbytes, store.nbytes / store.dense_nbytes
        print(f"| {dim} | {length:,} | {high} + {low:,} | {coded:.1%} | {true:.1%} |")


if __name__ == "__main__":
    paper_sizes()
    print()
    paper_parts()
    print()
    default_sizes()
