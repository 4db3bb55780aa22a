"""The records that travel from stage to stage: an attention call, a cache update, and the two joined to a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    """One place where new tokens join a cached tensor.

    The updated tensor holds columns of the past, then the new tokens, then, in preallocated caches, columns that were
    not written yet.
    """

    result: Node
    """A node whose value is the updated tensor."""
    past: Node | None
    """Placeholder of the cached tensor; None when the cache is born in this graph."""
    new: Node
    """The new tokens, in the layout of the cache."""
    layout: str
    """What its dimensions are: "BHTD", "BTHD", ... (batch, KV heads, tokens, channels), or "BTD" for one head."""
    kind: str
    """The write idiom, such as "cat"."""
    outputs: tuple[int, ...] = ()
    """Positions in the graph's output tuple that hold the cache after the update."""
    metadata_users: tuple[Node, ...] = ()
    """Nodes that read only the size, dtype or device of `past` or `result`, in graph order."""
    sources: tuple[Node, ...] = ()
    """More nodes with the value of `result`; `past` itself among them where the write is in place."""
    written: Node | None = None
    """The in-place write; only what reads `past` behind it sees the new tokens. None for a write that makes a copy."""
    first: Any = 0
    """The column of `past` that becomes column 0; the ones before it are dropped."""
    position: Any = None
    """Columns of `past` from this one on are dropped: where the new tokens go. A maybe symbolic integer, the
    node of a tensor of the new tokens' columns, or None: behind all of them."""
    tail: bool = False
    """Whether the result has columns behind the new tokens, as a preallocated cache has."""
    keep: Any = None
    """How many of the newest tokens stay cached, as in a sliding window; None: all."""
    capacity: Any = None
    """Columns of a preallocated cache; None for one that grows."""
    rows: Any = None
    """How many rows of the batch are written, the first ones, where the cache may have more; None: all of them."""
    nodes: tuple[Node, ...] = ()
    """Nodes of the idiom that are dead once nothing reads the result, in graph order."""

    @property
    def born(self) -> bool:
        """Whether the cache starts in this graph."""
        return self.past is None

    @property
    def token_dim(self) -> int:
        """The dimension of the tokens."""
        return self.layout.index("T")

    @property
    def all_sources(self) -> tuple[Node, ...]:
        """Every node that shows the updated tensor."""
        return (self.result, *(node for node in self.sources if node is not self.result))


@dataclass(frozen=True)
class Read:
    """One attention call of a site, shown to read the cache through plain views."""

    attention: Attention
    groups: int
    """Query heads per cached head, proved to be interleaved: query head h reads cached head `h // groups`."""
    key_views: tuple[Node, ...] = ()
    """Views and head repeats between the cache and `attention.key`, in graph order."""
    value_views: tuple[Node, ...] = ()
    whole: bool = True
    """Whether the columns behind the new tokens are read as well, if there are any."""


@dataclass(frozen=True)
class Site:
    """The keys and the values of one layer, and the attention calls that read them."""

    name: str
    key: CacheUpdate
    value: CacheUpdate
    reads: tuple[Read, ...]
    """The attention calls, in graph order; empty if the cache has to be read as a dense tensor."""
    dense: str | None = None
    """Why the cache has to be read as a dense tensor; None if only `reads` read it."""
    starts_empty: bool = False
    """The past holds no token for sure although it is a graph input."""

    @property
    def born(self) -> bool:
        """Whether the caches start in this graph."""
        return self.key.born
