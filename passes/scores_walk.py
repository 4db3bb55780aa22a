"""Find the way from the first product to the softmax and on to the second product."""

from __future__ import annotations

from torch.fx import Node

from mikv_compile.passes.node_utils import (
    argument,
    fake,
    is_metadata,
    names,
    operation,
    output_positions,
    same_shape,
    writes_in_place,
)
from mikv_compile.passes.products import PRODUCTS
from mikv_compile.passes.views import op_name, view_input

SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_MAX_DEPTH = 24  # steps between a product and the softmax
_MAX_SIDE_DEPTH = 6  # steps of a side computation such as the row maximum
_BOTH_SIDES = ("add", "sub", "rsub", "mul", "div", "where", "max", "maximum")
# Steps with one input. Some are not supported; walking through them gives a reason instead of silence.
_ONE_INPUT = (
    "nan_to_num", "relu", "sigmoid", "clamp", "clamp_min", "pow", "abs", "exp", "log", "scatter", "index_fill", "tanh",
    "masked_scatter", "dropout", "softplus", "neg", "masked_fill", "pad", "rdiv",
)  # fmt: skip

_CHECKS = ("_assert_tensor_metadata",)  # what export adds to every cast


def chains_to_products(node: Node, user: Node) -> list[list[Node]]:
    """Ways back from `node`, which `user` reads, to a product: each the product and the steps behind it, in order."""
    seen: set[Node] = set()

    def search(node: Node, user: Node, depth: int) -> list[list[Node]]:
        if depth > _MAX_DEPTH or node in seen or fake(node) is None:
            return []
        seen.add(node)
        steps = [node, *_changes_before(node, user)]
        if operation(node) in PRODUCTS:
            return [steps]
        return [chain + steps for source in _inputs(node) for chain in search(source, node, depth + 1)]

    return search(node, user, 0)


def _changes_before(node: Node, user: Node) -> list[Node]:
    """Nodes that change `node` in place before `user` reads it, though `user` does not read their result."""
    return sorted(w for w in node.users if w is not user and w < user and writes_in_place(w) and w.args[:1] == (node,))


def _inputs(node: Node) -> list[Node]:
    """The tensors that may be the scores before `node`."""
    name = operation(node)
    values: list[object]
    if name in _BOTH_SIDES:
        values = [argument(node, i, n) for i, n in enumerate(("input", "other", "other"))]
        if name == "where":
            values = values[1:]
    elif name == "cat":
        parts = argument(node, 0, "tensors")
        values = list(parts) if isinstance(parts, list | tuple) else []
    elif name in _ONE_INPUT or view_input(node) is not None:
        values = [argument(node, 0, "input", node.kwargs.get("self"))]
    else:
        values = []
    return list(dict.fromkeys(x for x in values if isinstance(x, Node)))


def chain_to_values(softmax: Node) -> list[Node] | None:
    """The steps from behind the softmax to the product with the values, which comes last; None if there is none."""

    def search(node: Node, depth: int) -> list[Node] | None:
        if depth > _MAX_DEPTH:
            return None
        for user in node.users:
            if operation(user) in PRODUCTS and not writes_in_place(user):
                return [user]
        for user in node.users:
            if _may_follow(node, user):
                rest = search(user, depth + 1)
                if rest is not None:
                    return [user, *rest]
        return None

    return search(softmax, 0)


def _may_follow(node: Node, user: Node) -> bool:
    """Whether `user` may be a step behind the softmax, supported or not."""
    if argument(user, 0, "input", user.kwargs.get("self")) is node and op_name(user) is not None:
        return True
    if operation(user) in ("slice", "narrow", "dropout"):
        return argument(user, 0, "input") is node
    return operation(user) in ("mul", "div", "add", "sub", "masked_fill", "where", "nan_to_num") and same_shape(
        user, node
    )


def side_nodes(chain: set[Node], last: Node) -> tuple[set[Node], str | None]:
    """Nodes that hang on the chain and serve only the chain, such as a row maximum; and a problem with other readers.

    `last` is the output: whoever reads it is not looked at.
    """
    inside = set(chain)

    def collect(node: Node, depth: int) -> set[Node] | None:
        if node in inside:
            return set()
        if depth > _MAX_SIDE_DEPTH or node.op not in ("call_function", "call_method") or writes_in_place(node):
            return None
        if not node.users and not (is_metadata(node) or op_name(node) is not None or operation(node) in _CHECKS):
            return None
        found = {node}
        for user in node.users:
            more = collect(user, depth + 1)
            if more is None:
                return None
            found |= more
        return found

    for node in sorted(chain - {last}):
        for user in node.users:
            found = collect(user, 0)
            if found is None:
                return inside - chain, _read_by(node, inside)
            inside |= found
    return inside - chain, None


def _read_by(node: Node, inside: set[Node]) -> str:
    what = "probabilities" if _behind_softmax(node) else "scores"
    if output_positions(node):
        return f"the attention {what} are returned by the graph; call the model without output_attentions"
    return f"the attention {what} are also read by {names(user for user in node.users if user not in inside)}"


def _behind_softmax(node: Node) -> bool:
    for _ in range(_MAX_DEPTH):
        if operation(node) in SOFTMAX:
            return True
        source = argument(node, 0, "input", node.kwargs.get("self"))
        if not isinstance(source, Node) or operation(node) in PRODUCTS:
            return False
        node = source
    return False
