"""The records that travel from stage to stage: an attention call, a cache update, and the two joined to a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Attention:
    """One attention call in canonical form: `softmax(scale * q k^T + mask) v`.

    Shapes: query `[B, Hq, R, D]`, key `[B, Hk, T, D]`, value `[B, Hk, T, Dv]`, output `[B, Hq, R, Dv]`.
    """

    output: Node
    """The node whose value is the attention output."""
    nodes: tuple[Node, ...]
    """The idiom's nodes in graph order, `output` last; all of them are dead once `output` is replaced."""
    query: Node
    key: Node
    """The key operand before the idiom's own transpose."""
    value: Node
    mask: Node | None
    """Bool (True = attend) or additive float, as the model wrote it, broadcastable to `[B, Hq, R, T]`."""
    scale: float
    is_causal: bool
    """In torch's meaning: aligned to the top left corner."""
    enable_gqa: bool
    form: str
    """"sdpa" or "eager"."""


@dataclass(frozen=True)
class CacheUpdate:
    """One place where new tokens join a cached tensor: past `[B, H, T, D]`, new `[B, H, S, D]`."""

    result: Node
    """The node whose value is past and new together, `[B, H, T + S, D]`."""
    past: Node | None
    """Placeholder of the cached tensor; None when the cache is born in this graph."""
    new: Node
    dim: int
    """The dimension of the tokens, never negative."""
    kind: str
    """The write idiom: "cat"."""
    outputs: tuple[int, ...]
    """Positions of `result` in the graph's output tuple."""
    metadata_users: tuple[Node, ...] = ()
    """Nodes that read only the size, dtype or device of `past` or `result`, in graph order."""

    @property
    def born(self) -> bool:
        """Whether the cache starts in this graph."""
        return self.past is None


@dataclass(frozen=True)
class Site:
    """One attention call together with the two cache updates that feed it."""

    attention: Attention
    key: CacheUpdate
    value: CacheUpdate
    groups: int
    """Query heads per cached head, proved to be interleaved: query head h reads cached head `h // groups`."""
    name: str
    key_views: tuple[Node, ...] = ()
    """Views and head repeats between `key.result` and `attention.key`, in graph order."""
    value_views: tuple[Node, ...] = ()

    @property
    def born(self) -> bool:
        """Whether the caches start in this graph."""
        return self.key.born
