"""What each operation between the two products of attention does, step by step in the order of the computation.

`Scores` is the state: `terms(cap(scale * q k^T))` with every dimension accounted for. A step that would leave this form
raises `Unsupported` with a sentence for users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from mikv_compile.passes.axes import Axis, Layout, layout_names, leaves, view_layout
from mikv_compile.passes.constants import constant
from mikv_compile.passes.node_utils import argument, fake, known_equal, operation, same_shape, shape_of, writes_in_place
from mikv_compile.passes.products import Product, is_upcast
from mikv_compile.passes.records import ScoreTerm
from mikv_compile.passes.views import NotAView, is_cast, op_name, view_input

MASKED = -1e4
"""A number that masks: exp of anything this low is zero beside any score that is not masked."""


class Unsupported(Exception):
    """Why the scores are not in canonical form; a sentence for users."""


@dataclass(frozen=True)
class Term:
    """A `ScoreTerm` whose dimensions have no names yet."""

    kind: Literal["add", "keep", "fill"]
    node: Node
    value: float
    layout: Layout
    inverted: bool = False

    def record(self) -> ScoreTerm:
        """The term with names for its dimensions, once the axes have theirs."""
        return ScoreTerm(self.kind, self.node, self.value, layout_names(self.layout), self.inverted)


@dataclass
class Scores:
    """The scores after some steps."""

    current: set[Node]
    """Nodes whose value the scores are now: the last step, and tensors that it changed in place."""
    layout: Layout
    scale: float = 1.0
    cap_scale: float | None = None
    """The scale in front of tanh; `scale` is then the factor behind it."""
    terms: list[Term] = field(default_factory=list)
    shifted: bool = False
    """Whether something constant along the tokens was added: softmax takes it away, other steps do not."""
    shift_tokens: list[tuple[Axis, ...]] = field(default_factory=list)
    """What the last dimension was at every such step."""
    sinks: Node | None = None
    sinks_first: bool = False
    sink_layout: Layout = ()

    @staticmethod
    def of(product: Product, layout: Layout) -> Scores:
        """The scores right behind the first product."""
        scores = Scores({product.node}, layout, product.alpha)
        if product.bias is not None:
            scores._check_added(product.node, product.bias)
            scores.terms.append(Term("add", product.bias, product.beta, layout))
        return scores

    def softcap(self) -> tuple[float, float | None]:
        """Scale and softcap: `m * tanh(s * x) == cap(m * s * x)` with the softcap `abs(m)`."""
        if self.cap_scale is None:
            return self.scale, None
        return self.scale * self.cap_scale, abs(self.scale)

    def step(self, node: Node) -> None:
        """Take in one step."""
        handler = _STEPS.get(operation(node) or "")
        if handler is not None and not (handler is Scores._maximum and node.kwargs.get("dim") is not None):
            handler(self, node)
        else:
            self._view_or_cast(node)
        if writes_in_place(node) and node.args and node.args[0] in self.current:
            self.current.add(node)
        else:
            self.current = {node}

    def finish(self) -> None:
        """Check what only the end of the steps can tell."""
        if any(leaves(axes) != self.tokens for axes in self.shift_tokens):
            raise Unsupported("something is added to scores whose last dimension is not the tokens yet")
        for term in self.terms:
            if term.kind == "fill" and not term.value <= MASKED:
                raise Unsupported(
                    f"`{term.node.name}` fills masked scores with {term.value:g}, which does not mask them; "
                    "fill with -inf or torch.finfo(dtype).min"
                )

    def _operands(self, node: Node, *names: str) -> tuple[Any, Any, bool]:
        """The scores and the other operand of a binary operation, and whether the scores come first."""
        left, right = argument(node, 0, names[0]), argument(node, 1, names[1])
        if left in self.current and right in self.current:
            raise Unsupported(f"`{node.name}` combines the scores with themselves")
        return (left, right, True) if left in self.current else (right, left, False)

    def _same_shape(self, node: Node, main: Node) -> None:
        if not same_shape(node, main):
            raise Unsupported(f"`{node.name}` changes the shape of the scores")

    def _no_sinks(self, node: Node) -> None:
        if self.sinks is not None:
            raise Unsupported(f"`{node.name}` changes the scores after a sink column was joined to them")

    def _multiply(self, node: Node) -> None:
        main, other, first = self._operands(node, "input", "other")
        factor = constant(other)
        name = operation(node)
        if name == "div" and (not first or node.kwargs.get("rounding_mode") is not None):
            raise Unsupported(f"`{node.name}` divides something by the scores, or rounds them")
        if factor is None or not math.isfinite(factor) or factor == 0:
            raise Unsupported(f"the scores are scaled by `{node.name}`, which is not a plain number")
        self._same_shape(node, main)
        self._scale(node, 1 / factor if name == "div" else factor)

    def _negate(self, node: Node) -> None:
        self._scale(node, -1.0)

    def _scale(self, node: Node, factor: float) -> None:
        self._no_sinks(node)
        if factor < 0 and any(term.kind != "add" for term in self.terms):
            raise Unsupported(f"`{node.name}` changes the sign of masked scores")
        self.scale *= factor
        # A mask of -inf stays what it is; everything else is scaled along.
        self.terms = [t if t.kind == "keep" else replace(t, value=t.value * factor) for t in self.terms]

    def _add(self, node: Node) -> None:
        main, other, first = self._operands(node, "input", "other")
        name = operation(node)
        alpha = constant(node.kwargs.get("alpha", 1))
        if alpha is None:
            raise Unsupported(f"`{node.name}` has an alpha that is not a plain number")
        # (factor of the first operand, factor of the second)
        factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name or ""]
        own, its = factors if first else factors[::-1]
        self._same_shape(node, main)
        if own != 1.0:
            self._scale(node, own)
        if constant(other) == 0:
            return
        number = constant(other)
        if (number is not None and math.isfinite(number)) or self._constant_along_tokens(other):
            self.shifted = True  # softmax does not see it
            self.shift_tokens.append(self.tokens)
            return
        self._no_sinks(node)
        self._check_added(node, other)
        self.terms.append(Term("add", other, its, self.layout))

    def _check_added(self, node: Node, other: object) -> None:
        value = fake(other)
        if value is None or not value.dtype.is_floating_point:
            raise Unsupported(f"the term `{node.name}` adds to the scores is not a floating point mask")

    def _constant_along_tokens(self, other: object) -> bool:
        shape = shape_of(other)
        if shape is None:
            return False
        dim = self.layout[len(self.layout) - len(shape) :] if shape else ()
        return all(known_equal(size, 1) for size, axes in zip(shape, dim, strict=True) if self._holds_tokens(axes))

    def _holds_tokens(self, axes: tuple[Axis, ...]) -> bool:
        return any(leaf in self.tokens for leaf in leaves(axes))

    @property
    def tokens(self) -> tuple[Axis, ...]:
        """The axes of the last dimension, over which softmax goes at the end (see `finish`)."""
        return leaves(self.layout[-1])

    def _masked_fill(self, node: Node) -> None:
        main, mask, value = (argument(node, i, n) for i, n in enumerate(("input", "mask", "value")))
        if main not in self.current:
            raise Unsupported(f"`{node.name}` uses the scores as a mask or as a filling")
        self._fill(node, main, mask, value, inverted=False)

    def _where(self, node: Node) -> None:
        mask, kept, other = (argument(node, i, n) for i, n in enumerate(("condition", "input", "other")))
        if mask in self.current or (kept in self.current) == (other in self.current):
            raise Unsupported(f"`{node.name}` uses the scores as a mask or as a filling")
        if kept in self.current:
            self._fill(node, kept, mask, other, inverted=True)
        else:
            self._fill(node, other, mask, kept, inverted=False)

    def _fill(self, node: Node, main: Node, mask: object, value: object, *, inverted: bool) -> None:
        number = constant(value)
        mask_value = fake(mask)
        if number is None or math.isnan(number):
            raise Unsupported(f"`{node.name}` fills masked scores with something that is not a plain number")
        if not isinstance(mask, Node) or mask_value is None or mask_value.dtype != torch.bool:
            raise Unsupported(f"the mask of `{node.name}` is not a bool tensor")
        self._same_shape(node, main)
        self._no_sinks(node)
        if self.shifted and not math.isinf(number):
            raise Unsupported(f"`{node.name}` fills scores from which something was subtracted before")
        mask = self._without_expand(mask)
        if inverted and number == -math.inf:
            self.terms.append(Term("keep", mask, 1.0, self.layout))
        else:
            self.terms.append(Term("fill", mask, number, self.layout, inverted))

    def _without_expand(self, mask: Node) -> Node:
        """A mask before `mask.expand_as(scores)`: it broadcasts anyway, and must not hang on the scores."""
        source = view_input(mask)
        if op_name(mask) == "expand_as" and source is not None and argument(mask, 1, "other") in self.current:
            return source
        return mask

    def _tanh(self, node: Node) -> None:
        if self.terms or self.shifted or self.cap_scale is not None or self.sinks is not None:
            raise Unsupported(f"`{node.name}` soft-caps the scores (tanh) after something was added to them")
        self.cap_scale, self.scale = self.scale, 1.0

    def _maximum(self, node: Node) -> None:
        """A lower bound on masked scores, which keeps -inf out; it decides nothing unless a whole row is masked."""
        name = operation(node)
        if name in ("max", "maximum"):
            main, other, _ = self._operands(node, "input", "other")
        else:
            main, other = argument(node, 0, "input"), argument(node, 1, "min")
            if name == "clamp" and argument(node, 2, "max") is not None:
                raise Unsupported(f"`{node.name}` bounds the scores from above")
        floor = constant(other)
        if floor is None or floor > MASKED or main not in self.current:
            raise Unsupported(f"`{node.name}` bounds the scores by something else than a mask's value")
        self._same_shape(node, main)
        self.terms = [
            replace(term, kind="fill", value=floor, inverted=True)
            if term.kind == "keep"
            else replace(term, value=max(term.value, floor))
            if term.kind == "fill"
            else term
            for term in self.terms
        ]

    def _cat(self, node: Node) -> None:
        """A column of logits without a value: attention sinks."""
        parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", node.kwargs.get("axis", 0))
        count = len(self.layout)
        if (
            not isinstance(parts, list | tuple)
            or len(parts) != 2
            or not isinstance(dim, int)
            or dim % count != count - 1
        ):
            raise Unsupported(f"`{node.name}` joins the scores to something else than one sink column")
        if parts[0] in self.current and parts[1] in self.current:
            raise Unsupported(f"`{node.name}` joins the scores to themselves")
        self._no_sinks(node)
        if self.shifted:
            raise Unsupported(f"`{node.name}` joins sinks to scores from which something was subtracted before")
        self.sinks_first = parts[1] in self.current
        sinks = parts[0] if self.sinks_first else parts[1]
        if fake(sinks) is None:
            raise Unsupported(f"`{node.name}` joins the scores to something that is not a tensor")
        self.sinks, self.sink_layout = sinks, self.layout

    def _view_or_cast(self, node: Node) -> None:
        source = view_input(node)
        if source is None or source not in self.current:
            raise Unsupported(f"`{node.name}` changes the scores in a way that is not supported")
        if is_cast(node):
            if not is_upcast(node):
                raise Unsupported(
                    f"the scores are cast to a lower precision or another device by `{node.name}` before softmax"
                )
            return
        if self.sinks is not None and op_name(node) not in ("contiguous", "clone", "detach", "alias"):
            raise Unsupported(f"`{node.name}` reshapes or slices the scores after a sink column was joined to them")
        try:
            self.layout = view_layout(node, self.layout)
        except NotAView as problem:
            raise Unsupported(f"the scores are reshaped or sliced before softmax: {problem}") from None


_STEPS = {
    "mul": Scores._multiply,
    "div": Scores._multiply,
    "neg": Scores._negate,
    "add": Scores._add,
    "sub": Scores._add,
    "rsub": Scores._add,
    "masked_fill": Scores._masked_fill,
    "where": Scores._where,
    "tanh": Scores._tanh,
    "max": Scores._maximum,
    "maximum": Scores._maximum,
    "clamp": Scores._maximum,
    "clamp_min": Scores._maximum,
    "cat": Scores._cat,
}
