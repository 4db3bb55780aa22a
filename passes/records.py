"""The records that travel from stage to stage: an attention call, a cache update, and the two joined to a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

Dims = tuple[str, ...]
"""What each dimension of a node holds: b (batch), k (KV heads), g (query heads that share one), r (query rows),
t (tokens), d (channels), or several of them merged, outermost first. `"1"` is a dimension of size 1."""

HEADED: Dims = ("b", "kg", "r", "d")
"""Query and output as SDPA has them: `[B, Hq, R, D]`, query head h reads KV head `h // groups`."""


@dataclass(frozen=True)
class ScoreTerm:
    """A step that changes the scaled scores, by a tensor that broadcasts to them from the right."""

    kind: Literal["add", "keep", "fill"]
    """add: `s + value * node`; keep: -inf where the bool `node` is False; fill: `value` where it is True."""
    node: Node
    value: float = 1.0
    dims: Dims = ("b", "kg", "r", "t")
    """Dimensions of the scores that it broadcasts to."""
    inverted: bool = False
    """fill only: it is filled where `node` is False."""


@dataclass(frozen=True)
class Attention:
    """One attention call in canonical form: `softmax(terms(cap(scale * q k^T))) v`.

    `cap(s) = softcap * tanh(s / softcap)`. The dimensions of the operands are what their `dims` say; by default query
    `[B, Hq, R, D]`, key `[B, Hk, T, D]`, value `[B, Hk, T, Dv]`, output `[B, Hq, R, Dv]`.
    """

    output: Node
    """The node whose value is the attention output."""
    nodes: tuple[Node, ...]
    """The idiom's nodes in graph order, but `output` last; all of them are dead once `output` is replaced."""
    query: Node
    key: Node
    """The key operand before the idiom's own transpose."""
    value: Node
    terms: tuple[ScoreTerm, ...]
    """What is done to the scores after scale and softcap, in the model's order."""
    scale: float
    is_causal: bool
    """In torch's meaning: aligned to the top left corner."""
    enable_gqa: bool
    form: str
    """The idiom, such as "sdpa" or "eager"."""
    softcap: float | None = None
    sinks: Node | None = None
    """Logits of columns that take part in the softmax and have no value, broadcastable to `[B, Hq, R, n]`."""
    query_dims: Dims = HEADED
    key_dims: Dims = ("b", "kg", "t", "d")
    value_dims: Dims = ("b", "kg", "t", "d")
    output_dims: Dims = HEADED

    @property
    def mask(self) -> Node | None:
        """The one mask, bool (True = attend) or additive, if that is all that is done to the scores."""
        if len(self.terms) != 1 or self.terms[0].kind == "fill" or self.terms[0].value != 1.0:
            return None
        return self.terms[0].node


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
