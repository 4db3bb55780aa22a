"""Attention written out: `softmax(q k^T * scale + mask) v` with two products, in any order that keeps the meaning.

The walk starts at the softmax and finds the first product before and the second behind it (`scores_walk`). The steps
between are then followed in the order of the computation (`score_steps`, `probability_steps`), with every dimension of
the scores traced to the operand it comes from (`axes`). Only what has a product on both sides is reported as declined.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from mikv_compile.passes.axes import Axis, Dim, Layout, dim_name, layout_names, leaves, name_axes
from mikv_compile.passes.node_utils import argument, fake, known_equal, operation, same_kind, shape_of, writes_in_place
from mikv_compile.passes.probability_steps import Probabilities
from mikv_compile.passes.products import MATMUL_TARGETS as MATMUL_TARGETS
from mikv_compile.passes.products import Operand, Product, read_product, strip_factors, strip_transpose, widens
from mikv_compile.passes.records import Attention, Dims
from mikv_compile.passes.report import Declined
from mikv_compile.passes.score_steps import Scores, Unsupported
from mikv_compile.passes.scores_walk import SOFTMAX, chain_to_values, chains_to_products, side_nodes
from mikv_compile.passes.views import is_cast, view_input


def recognize(node: Node) -> Attention | Declined | None:
    """Recognize the attention around one softmax over the last dimension of the scores."""
    if operation(node) not in SOFTMAX or not _over_last_dim(node):
        return None
    source = argument(node, 0, "input")
    if not isinstance(source, Node):
        return None
    before = [chain for chain in chains_to_products(source, node) if _contracts(chain[0])]
    behind = chain_to_values(node)
    if not before or behind is None:
        return None  # no product on both sides: a router or a classifier, not attention
    try:
        return _canonical(before, node, behind)
    except Unsupported as problem:
        return Declined(behind[-1].name, "canonicalize", str(problem))


def _over_last_dim(softmax: Node) -> bool:
    dim, shape = argument(softmax, 1, "dim"), shape_of(softmax)
    return isinstance(dim, int) and shape is not None and len(shape) > 1 and dim in (-1, len(shape) - 1)


def _contracts(node: Node) -> bool:
    """Whether a node is a product that sums over one dimension of both factors, or a problematic one."""
    product = read_product(node)
    if not isinstance(product, Product):
        return product is not None
    return len(set(product.left.letters) & set(product.right.letters) - set(product.letters)) == 1


def _product(node: Node) -> Product:
    product = read_product(node)
    if isinstance(product, Product):
        return product
    raise Unsupported(product or f"`{node.name}` is not a product of two tensors")


def _canonical(before: list[list[Node]], softmax: Node, behind: list[Node]) -> Attention:
    """The record of one attention; raises `Unsupported`."""
    if len(before) > 1:
        raise Unsupported("two products are added up to scores; scores with a second term are not supported")
    chain, product, second = before[0], _product(before[0][0]), _product(behind[-1])
    roles = _Roles(product)
    scores = Scores.of(product, roles.layout)
    for node in chain[1:]:
        scores.step(node)
    scores.finish()
    if not (same_kind(softmax, chain[-1]) or _widens(chain[-1], softmax)):
        raise Unsupported(f"`{softmax.name}` computes softmax in a lower precision than the scores")
    roles.find_tokens(scores.tokens)
    probabilities = Probabilities(scores.layout, scores if scores.sinks is not None else None)
    for source, node in zip([softmax, *behind], behind[:-1], strict=False):
        probabilities.step(node, source)
    if probabilities.sinks is not None:
        raise Unsupported("the sink column joined to the scores is not cut off before the product with the values")
    roles.bind_values(second, behind[-2] if len(behind) > 1 else softmax, probabilities.layout)
    roles.name()

    query = strip_factors(roles.query, product.node)
    key = strip_factors(roles.key, product.node)
    if not key.letters.endswith(roles.channels):
        key = strip_factors(strip_transpose(key, product.node), product.node)
    value = strip_factors(roles.value, second.node, factors=False)
    output = _back_to_kind(second.node, query.node)
    for operand in (query, key, value):
        if not same_kind(operand.node, output):
            raise Unsupported(f"the output does not have the dtype of the operand `{operand.node.name}`")
    terms = tuple(term.record() for term in scores.terms)
    if scores.sinks is not None and layout_names(scores.sink_layout) != ("b", "kg", "r", "t"):
        raise Unsupported(f"the sinks `{scores.sinks.name}` are not joined to scores [batch, heads, rows, tokens]")

    idiom = {*query.nodes, *key.nodes, *value.nodes, *chain, softmax, *behind, output}
    side, problem = side_nodes(idiom, output)
    if problem is not None:
        raise Unsupported(problem)
    idiom |= side
    sinks = [] if scores.sinks is None else [scores.sinks]
    _check_operands([query.node, key.node, value.node, *(term.node for term in terms), *sinks], idiom, output)
    scale, softcap = scores.softcap()
    return Attention(
        output=output,
        nodes=(*sorted(idiom - {output}), output),
        query=query.node,
        key=key.node,
        value=value.node,
        terms=terms,
        scale=scale * query.scale * key.scale,
        is_causal=False,
        enable_gqa=False,
        form="eager",
        softcap=softcap,
        sinks=scores.sinks,
        query_dims=roles.query_dims(query.letters),
        key_dims=roles.key_dims(key),
        value_dims=roles.value_dims(value),
        output_dims=roles.output_dims,
    )


class _Roles:
    """Which dimension of query, key, value and output is what."""

    def __init__(self, product: Product) -> None:
        self._product = product
        shapes = {operand: shape_of(operand.node) or () for operand in (product.left, product.right)}
        sizes = dict(zip(product.letters, shape_of(product.node) or (), strict=True))
        shared = [x for x in product.left.letters if x in product.right.letters and x in product.letters]
        self._axes = {letter: Axis(size, flat=shared == [letter]) for letter, size in sizes.items()}
        for operand, shape in shapes.items():
            for letter, size in zip(operand.letters, shape, strict=True):
                both = letter in product.left.letters and letter in product.right.letters
                if letter not in self._axes and not both:
                    raise Unsupported(f"`{product.node.name}` sums over a dimension of one factor only")
                if letter not in self._axes:
                    self.channels = letter
                    self._axes[letter] = Axis(size)
        self.query, self.key, self.value = product.left, product.right, product.right
        self.output_dims: Dims = ()
        self._tokens: Axis | None = None
        self._value_axes: dict[str, Dim] = {}

    @property
    def layout(self) -> Layout:
        """The dimensions of the first product."""
        return tuple((self._axes[letter],) for letter in self._product.letters)

    def find_tokens(self, tokens: tuple[Axis, ...]) -> None:
        """Tell key from query: softmax goes over the tokens of the key."""
        letters = [letter for letter, axis in self._axes.items() if tokens == (axis,)]
        if len(letters) != 1 or (letters[0] in self.query.letters and letters[0] in self.key.letters):
            raise Unsupported("softmax does not go over exactly the tokens of the key")
        if letters[0] in self.query.letters:
            self.query, self.key = self.key, self.query
        if any(x not in self.query.letters and x != letters[0] for x in self.key.letters):
            raise Unsupported("the key has a dimension besides the tokens that the query lacks")
        self._tokens = self._axes[letters[0]]
        for letter, size in zip(self.query.letters, shape_of(self.query.node) or (), strict=True):
            if not known_equal(size, self._axes[letter].size):
                raise Unsupported("the query is broadcast along a dimension of the keys")

    def bind_values(self, product: Product, probabilities: Node, layout: Layout) -> None:
        """Find the values: the other factor of the second product; its dimensions are those of the probabilities."""
        is_left = product.left.node is probabilities
        if is_left == (product.right.node is probabilities):
            raise Unsupported("the probabilities are not one factor of the product with the values")
        own, self.value = (product.left, product.right) if is_left else (product.right, product.left)
        if product.alpha != 1 or product.bias is not None:
            raise Unsupported(f"`{product.node.name}` does more than multiply probabilities and values")
        axes = dict(zip(own.letters, layout, strict=True))
        summed = [letter for letter in own.letters if letter not in product.letters]
        if len(summed) != 1 or leaves(axes[summed[0]]) != (self._tokens,) or summed[0] not in self.value.letters:
            side = "" if is_left else ": they are the right side"
            raise Unsupported(f"the product of probabilities and values does not sum over exactly the tokens{side}")
        channels = [letter for letter in self.value.letters if letter not in axes]
        if len(channels) != 1 or channels[0] not in product.letters:
            raise Unsupported("the values have more dimensions than batch, heads, tokens and channels")
        rows = {leaf for x in self.query.letters if x not in self.key.letters for leaf in self._axes[x].leaves()}
        if any(leaf in rows for x in self.value.letters if x in axes for leaf in leaves(axes[x])):
            raise Unsupported("the values differ from query row to query row")
        before = dict(zip(own.letters, shape_of(own.node) or (), strict=True))
        for letter, size in zip(product.letters, shape_of(product.node) or (), strict=True):
            if letter in before and not known_equal(before[letter], size):
                raise Unsupported("the probabilities are broadcast along a dimension of the values")
        self._channel_axis = Axis(None)
        self._channel_axis.name = "d"
        self._value_axes = {**axes, channels[0]: (self._channel_axis,)}
        self._output_letters = product.letters

    def name(self) -> None:
        """Name all axes."""
        query_only = [x for x in self.query.letters if x not in self.key.letters]
        batch = [x for x in self.query.letters if x in self.key.letters and x != self.channels]
        rows_last = True
        if len(query_only) == 2:
            letters = self.query.letters if len(batch) > 1 else self._product.letters
            if len(batch) > 1:  # [B, R, H, G, D]: the heads that share keys stand behind their KV head
                after = letters[letters.index(batch[-1]) + 1 :][:1]
                rows_last = after != query_only[1]
            else:
                rows_last = letters.index(query_only[0]) < letters.index(query_only[1])
        problem = name_axes(
            [self._axes[x] for x in batch], [self._axes[x] for x in query_only], rows_outer_first=rows_last
        )
        if problem:
            raise Unsupported(problem)
        assert self._tokens is not None
        self._tokens.name = "t"
        self._axes[self.channels].name = "d"
        self.output_dims = tuple(dim_name(self._value_axes[x]) for x in self._output_letters)
        if "rg" in "".join(self.output_dims) and not {"r", "g"} <= set(self.query_dims(self.query.letters)):
            raise Unsupported("rows and query groups are merged in one order in the query and in another in the output")

    def query_dims(self, letters: str) -> Dims:
        """Names of the query's dimensions."""
        return tuple(dim_name((self._axes[letter],)) for letter in letters)

    def key_dims(self, key: Operand) -> Dims:
        """Names of the key's dimensions."""
        return _shared_dims(key, {letter: (axis,) for letter, axis in self._axes.items()})

    def value_dims(self, value: Operand) -> Dims:
        """Names of the value's dimensions."""
        return _shared_dims(value, self._value_axes)


def _shared_dims(operand: Operand, axes: Mapping[str, Dim]) -> Dims:
    """Names of the dimensions of key or value; the query heads of one KV head are 1 there if they broadcast."""
    names = []
    for letter, size in zip(operand.letters, shape_of(operand.node) or (), strict=True):
        name = dim_name(axes[letter])
        names.append("1" if name == "g" and known_equal(size, 1) else name)
    return tuple(names)


def _widens(before: Node, after: Node) -> bool:
    left, right = fake(before), fake(after)
    return left is not None and right is not None and left.device == right.device and widens(left.dtype, right.dtype)


def _back_to_kind(output: Node, query: Node) -> Node:
    """The cast behind the output that brings it back to the dtype of the query, if there is one."""
    if not same_kind(output, query) and len(output.users) == 1:
        (user,) = output.users
        if is_cast(user) and view_input(user) is output and same_kind(user, query):
            return user
    return output


def _check_operands(operands: list[Node], idiom: set[Node], output: Node) -> None:
    """Operands live on without the idiom, and hold at `output` what they held when the idiom read them."""
    for operand in operands:
        if operand in idiom:
            raise Unsupported(f"`{operand.name}` is computed from the scores")
        node, base = min(user for user in operand.users if user in idiom), _base(operand)
        while node is not output:
            target = node.kwargs.get("out", node.args[0] if node.args else None)
            if node not in idiom and writes_in_place(node) and isinstance(target, Node) and _base(target) is base:
                raise Unsupported(f"`{operand.name}` is changed in place by `{node.name}` while attention is computed")
            node = node.next


def _base(node: Node) -> Node:
    """The tensor that a node may be a view of."""
    source = view_input(node)
    while source is not None:
        node, source = source, view_input(source)
    return node
