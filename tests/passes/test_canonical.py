"""Every form of operands that a record may have, in numbers, on odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from canonical_oracle import evaluate
from torch.fx import Graph, GraphModule

from mikv_compile.passes import Attention, canonical
from mikv_compile.passes.records import ScoreTerm

SIZES = {"b": 2, "k": 3, "g": 2, "r": 4, "t": 63, "d": 5}


def placeholder(graph, name, value):
    node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def run(graph, result, *values):
    graph.output(result)
    graph.lint()
    return GraphModule({}, graph)(*values)


def sizes_of(*forms):
    """The sizes of the letters; those that no form has are 1."""
    letters = "".join("".join(dims) for dims in forms)
    return {letter: size if letter in letters else 1 for letter, size in SIZES.items()}


def arranged(full, letters, dims):
    """A tensor with one dimension for each of `letters`, in the dimensions `dims`; missing letters have size 1."""
    sizes = dict(zip(letters, full.shape, strict=True))
    wanted = "".join(dims).replace("1", "")
    gone = [letter for letter in letters if letter not in wanted]
    assert all(sizes[letter] == 1 for letter in gone)
    order = [letters.index(letter) for letter in [*gone, *wanted]]
    return full.permute(order).reshape([math.prod(sizes.get(letter, 1) for letter in name) for name in dims])


HEADED = ("b", "kg", "r", "d")
FORMS = [
    HEADED,
    ("b", "r", "kg", "d"),
    ("r", "b", "kg", "d"),
    ("bkg", "r", "d"),
    ("b", "k", "g", "r", "d"),
    ("b", "r", "k", "g", "d"),
    ("b", "k", "gr", "d"),
    ("b", "k", "rg", "d"),
    ("bk", "g", "r", "d"),
    ("bk", "gr", "d"),
    ("b", "r", "kgd"),
    ("b", "g", "k", "r", "d"),
    ("b", "gk", "r", "d"),
    ("b", "kg", "d"),
    ("b", "kg", "1", "d"),
    ("1", "b", "kg", "r", "d"),
    ("kg", "r", "d"),
    ("b", "k", "1", "r", "d"),
    ("b", "gr", "d"),
    ("b", "r", "d"),
    ("r", "kg", "d"),
    ("r", "d"),
]


def heads_of(sizes):
    return sizes["k"] * sizes["g"], sizes["g"]


@pytest.mark.parametrize("dims", FORMS, ids=" ".join)
def test_query(dims):
    sizes = sizes_of(dims)
    full = torch.randn(*[sizes[letter] for letter in "bkgrd"])
    given = arranged(full, "bkgrd", dims)
    graph = Graph()
    result = canonical.query(graph, placeholder(graph, "q", given), dims, *heads_of(sizes))
    assert torch.equal(run(graph, result, given), full.flatten(1, 2))


@pytest.mark.parametrize("dims", FORMS, ids=" ".join)
def test_output(dims):
    sizes = sizes_of(dims)
    full = torch.randn(*[sizes[letter] for letter in "bkgrd"])
    given = full.flatten(1, 2)
    graph = Graph()
    result = canonical.output(graph, placeholder(graph, "o", given), dims, *heads_of(sizes))
    assert torch.equal(run(graph, result, given), arranged(full, "bkgrd", dims))


@pytest.mark.parametrize("layout", ["BHTD", "BTHD", "TBHD", "BHDT", "BTD"])
def test_tokens_of_a_layout_and_back(layout):
    sizes = {"B": 2, "H": 3, "T": 63, "D": 5}
    value = torch.randn(*[sizes[letter] for letter in layout])
    expected = value.permute(*[layout.index(letter) for letter in "BHTD" if letter in layout])
    expected = expected if "H" in layout else expected.unsqueeze(1)
    graph = Graph()
    tokens = canonical.new_tokens(graph, placeholder(graph, "new", value), layout)
    back = canonical.in_layout(graph, tokens, layout)
    got, again = run(graph, (tokens, back), value)
    assert torch.equal(got, expected) and torch.equal(again, value)


SCORE_FORMS = [
    ("b", "kg", "r", "t"),
    ("bkg", "r", "t"),
    ("b", "k", "g", "r", "t"),
    ("b", "k", "gr", "t"),
    ("bk", "g", "r", "t"),
    ("bk", "gr", "t"),
    ("b", "r", "kg", "t"),
    ("b", "r", "k", "g", "t"),
    ("b", "kg", "1", "r", "t"),
    ("b", "kg", "t"),
    ("kg", "r", "t"),
    ("b", "kg", "t", "r"),
]


def term_shapes(dims):
    """All shapes that broadcast to scores of `dims` from the right: some sizes are 1, leading ones may be missing."""
    sizes = sizes_of(dims)
    full = [math.prod(sizes.get(letter, 1) for letter in name) for name in dims]
    shapes = set()
    for rank in range(len(dims) + 1):
        for ones in range(2**rank):
            tail = full[len(dims) - rank :]
            shapes.add(tuple(1 if ones >> i & 1 else size for i, size in enumerate(tail)))
    return sorted(shapes)


def spread(value, dims, sizes):
    """A term as `[B, Hq, R, T]`."""
    full = [math.prod(sizes.get(letter, 1) for letter in name) for name in dims]
    order = "".join(dims).replace("1", "")
    value = value.expand(full).reshape([sizes[letter] for letter in order])
    missing = [letter for letter in "bkgrt" if letter not in order]
    value = value.reshape(*[1] * len(missing), *value.shape)
    order = "".join(missing) + order
    return value.permute([order.index(letter) for letter in "bkgrt"]).flatten(1, 2)


def attention(node, terms):
    return Attention(node, (node,), node, node, node, tuple(terms), 1.0, False, False, "test")


def mask_of(terms_and_values, sizes):
    """The one mask that canonical form makes of terms, in numbers."""
    graph = Graph()
    nodes = [placeholder(graph, f"m{i}", value) for i, (_, value) in enumerate(terms_and_values)]
    terms = [ScoreTerm(node=node, **kwargs) for node, (kwargs, _) in zip(nodes, terms_and_values, strict=True)]
    copies = {node: node for node in nodes}
    result = canonical.mask(graph, attention(nodes[0], terms), copies, *heads_of(sizes))
    return run(graph, result, *[value for _, value in terms_and_values])


@pytest.mark.parametrize("dims", SCORE_FORMS, ids=" ".join)
def test_one_term_of_every_shape(dims):
    sizes = sizes_of(dims)
    target = sizes["b"], sizes["k"] * sizes["g"], sizes["r"], sizes["t"]
    for shape in term_shapes(dims):
        value = torch.randn(shape)
        got = mask_of([({"kind": "add", "dims": dims}, value)], sizes)
        expected = spread(value, dims, sizes)
        assert torch.equal(got.expand(target), expected), (dims, shape, got.shape)
        assert got.dim() <= 4
        keep = mask_of([({"kind": "keep", "dims": dims}, value > 0)], sizes)
        assert keep.dtype == torch.bool and torch.equal(keep.expand(target), expected > 0)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("fill", [-1e4, torch.finfo(torch.float32).min, -math.inf])
def test_fills(fill, inverted):
    dims = ("b", "k", "g", "r", "t")
    sizes = sizes_of(dims)
    value = torch.rand(2, 1, 1, 4, 63) > 0.5
    got = mask_of([({"kind": "fill", "value": fill, "inverted": inverted, "dims": dims}, value)], sizes)
    filled = spread(~value if inverted else value, dims, sizes)
    assert torch.equal(got.expand(filled.shape), torch.zeros(()).masked_fill(filled, fill))


def test_a_factor_of_an_added_term():
    sizes = sizes_of(HEADED[:3] + ("t",))
    value = torch.randn(2, 1, 4, 63)
    assert torch.equal(mask_of([({"kind": "add", "value": -0.5}, value)], sizes), value * -0.5)


def test_no_terms_are_no_mask():
    graph = Graph()
    record = attention(graph.placeholder("q"), [])
    assert canonical.mask(graph, record, {}, 6, 2) is None


@pytest.mark.parametrize("dims", [("bkg", "r", "t"), ("b", "k", "g", "r", "t"), ("b", "k", "gr", "t")], ids=" ".join)
def test_several_terms_equal_dense_attention(dims):
    sizes = sizes_of(dims, ("d",))
    full = {letter: sizes[letter] for letter in sizes}
    shapes = [math.prod(full[letter] for letter in name) for name in dims]
    ones = [1] * (len(dims) - 1)
    query = torch.randn(2, 6, 4, 5)
    key, value = torch.randn(2, 3, 63, 5), torch.randn(2, 3, 63, 5)
    keep = torch.rand(*ones, 63) > 0.2
    fill = torch.rand(shapes[-2:]) > 0.8
    given = [
        ({"kind": "add", "value": 0.3, "dims": dims}, torch.randn(shapes)),
        ({"kind": "keep", "dims": dims}, keep),
        ({"kind": "fill", "value": -1e9, "dims": dims}, fill),
        ({"kind": "fill", "value": -1e9, "dims": dims, "inverted": True}, torch.rand(63) > 0.1),
        ({"kind": "add", "dims": dims}, torch.randn(())),
    ]
    mask = mask_of(given, sizes)
    actual = F.scaled_dot_product_attention(query, key, value, mask, scale=0.7, enable_gqa=True)
    graph = Graph()
    q, k, v = (placeholder(graph, name, x) for name, x in (("q", query), ("k", key), ("v", value)))
    nodes = [placeholder(graph, f"m{i}", x) for i, (_, x) in enumerate(given)]
    terms = tuple(ScoreTerm(node=node, **kwargs) for node, (kwargs, _) in zip(nodes, given, strict=True))
    record = Attention(q, (q,), q, k, v, terms, 0.7, False, True, "test")
    oracle = evaluate(record, dict(zip([q, k, v, *nodes], [query, key, value, *[x for _, x in given]], strict=True)))
    torch.testing.assert_close(actual.double(), oracle, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (2, 6, 4, 1), (1,), (6, 1, 3), (2, 1, 4, 2)])
def test_sinks(shape):
    query, key, value = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 63, 5), torch.randn(2, 6, 63, 5)
    sinks = torch.randn(shape)
    scores = query @ key.mT
    columns = sinks.expand(2, 6, 4, shape[-1])
    expected = torch.softmax(torch.cat([scores, columns], -1), -1)[..., :63] @ value
    graph = Graph()
    out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    nodes = [placeholder(graph, name, x) for name, x in (("out", out), ("lse", lse), ("sinks", sinks))]
    got, total = run(graph, canonical.with_sinks(graph, *nodes), out, lse, sinks)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(total, torch.cat([scores, columns], -1).logsumexp(-1))


def test_sinks_keep_the_dtype():
    graph = Graph()
    out, lse, sinks = torch.randn(2, 6, 4, 5).bfloat16(), torch.randn(2, 6, 4), torch.randn(6, 1, 1).bfloat16()
    nodes = [placeholder(graph, name, x) for name, x in (("out", out), ("lse", lse), ("sinks", sinks))]
    assert run(graph, canonical.with_sinks(graph, *nodes), out, lse, sinks)[0].dtype == torch.bfloat16
