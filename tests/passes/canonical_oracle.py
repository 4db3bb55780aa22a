"""Evaluate an `Attention` record by its documented meaning, from the values of its operands, and compare the output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from mikv_compile.passes import Attention

ATOMS = "bkgrtd"


class Recorder(Interpreter):
    """Runs a graph and keeps a copy of what each wanted node was when `at` was computed.

    A record is read where the output stands: an operand that changes in place before must be seen changed.
    """

    def __init__(self, gm: GraphModule, wanted: dict[Node, list[Node]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.wanted = wanted
        self.operands: dict[Node, dict[Node, Any]] = {}
        self.outputs: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n in self.wanted:
            self.operands[n] = {x: _copy(self.env[x]) for x in self.wanted[n]}
        value = super().run_node(n)
        if n in self.wanted:
            self.outputs[n] = _copy(value)
        return value


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def operands_of(found: Attention) -> list[Node]:
    """Every node that a record refers to as an input."""
    sinks = [] if found.sinks is None else [found.sinks]
    return [found.query, found.key, found.value, *(term.node for term in found.terms), *sinks]


def check(gm: GraphModule, inputs: tuple[Any, ...], found: list[Attention], tolerance: float = 2e-5) -> None:
    """Every record of `found` gives the value of its output."""
    recorder = Recorder(gm, {record.output: operands_of(record) for record in found})
    with torch.no_grad():
        recorder.run(*inputs)
    for record in found:
        check_nodes(record)
        expected = recorder.outputs[record.output].double()
        actual = evaluate(record, recorder.operands[record.output])
        assert actual.shape == expected.shape, (record, actual.shape, expected.shape)
        masked = expected.isnan()  # rows in which everything is masked
        error = (actual - expected).masked_fill(masked, 0).abs().max().item()
        assert error <= tolerance * max(1.0, expected.masked_fill(masked, 0).abs().max().item()), (record, error)


def check_nodes(record: Attention) -> None:
    """The idiom's nodes are in order, end with the output, and nothing outside reads them."""
    nodes = set(record.nodes)
    assert list(record.nodes[:-1]) == sorted(record.nodes[:-1]) and record.nodes[-1] is record.output
    for node in record.nodes[:-1]:
        assert set(node.users) <= nodes, f"{node} is read by others"
    assert not nodes & set(operands_of(record))


def evaluate(record: Attention, values: dict[Node, torch.Tensor]) -> torch.Tensor:
    """`softmax(terms(cap(scale * q k^T))) v` in float64, in the output's dimensions."""
    sizes = _sizes(record, values)
    query = _spread(values[record.query], record.query_dims, sizes, "bkgrd")
    key = _spread(values[record.key], record.key_dims, sizes, "bkgtd")
    value_sizes = {**sizes, "d": values[record.value].shape[record.value_dims.index("d")]}
    value = _spread(values[record.value], record.value_dims, value_sizes, "bkgtd")
    scores = record.scale * torch.einsum("bkgrd,bkgtd->bkgrt", query, key)
    if record.softcap is not None:
        scores = record.softcap * torch.tanh(scores / record.softcap)
    for term in record.terms:
        scores = _apply(term, scores, values[term.node], sizes)
    if record.is_causal:
        rows, tokens = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(rows, tokens, dtype=torch.bool).tril(), -math.inf)
    tokens = scores.shape[-1]
    if record.sinks is not None:
        sinks = values[record.sinks].double()
        columns = sinks.shape[-1]
        flat = (sizes["b"], sizes["k"] * sizes["g"], sizes["r"], columns)
        sinks = sinks.expand(flat).reshape(*scores.shape[:-1], columns)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., :tokens]
    output = torch.einsum("bkgrt,bkgtd->bkgrd", weights, value)
    order = [ATOMS.index(atom) for dim in record.output_dims for atom in dim if atom != "1"]
    shape = [math.prod(value_sizes[atom] for atom in dim if atom != "1") for dim in record.output_dims]
    place = {atom: i for i, atom in enumerate("bkgrd")}
    missing = [place[a] for a in "bkgrd" if a not in "".join(record.output_dims)]
    return output.permute(*missing, *(place[ATOMS[i]] for i in order)).reshape(shape)


def _sizes(record: Attention, values: dict[Node, torch.Tensor]) -> dict[str, int]:
    """The size of every atom, solved from the sizes of the operands' dimensions, of which many are merged.

    Where nothing tells two merged atoms apart any split gives the same result, because nothing broadcasts along one.
    """
    equations = list(zip(record.query_dims, values[record.query].shape, strict=True))
    for node, dims in ((record.key, record.key_dims), (record.value, record.value_dims)):
        for dim, size in zip(dims, values[node].shape, strict=True):
            if record.enable_gqa and dim == "kg":
                equations.append(("k", size))
            elif dim == "t" or (dim != "d" and size != 1):
                equations.append((dim, size))
    for term in record.terms:
        shape = values[term.node].shape
        equations += [(dim, size) for dim, size in zip(term.dims[::-1], shape[::-1], strict=False) if size != 1]
    if record.sinks is not None:
        shape = values[record.sinks].shape
        equations += [(dim, size) for dim, size in zip(("r", "kg", "b"), shape[-2::-1], strict=False) if size != 1]
    known: dict[str, int] = {}
    for _ in range(4):
        for dim, size in equations:
            unknown = [atom for atom in dim if atom not in known and atom != "1"]
            if len(unknown) == 1:
                known[unknown[0]] = size // math.prod(known.get(atom, 1) for atom in dim)
    for dim, size in sorted(equations, key=lambda equation: len(equation[0])):
        for atom in (atom for choice in "kbgrtd" for atom in dim if atom == choice and atom not in known):
            known[atom] = size // math.prod(known.get(other, 1) for other in dim)
    return {atom: known.get(atom, 1) for atom in ATOMS}


def _spread(value: torch.Tensor, dims: tuple[str, ...], sizes: dict[str, int], atoms: str) -> torch.Tensor:
    """`value` with one dimension for each of `atoms`; those that it lacks or broadcasts along are of size 1."""
    shape: list[int] = []
    order: list[str] = []
    for dim, size in zip(dims, value.shape, strict=True):
        parts = [atom for atom in dim if atom != "1"]
        full = [sizes[atom] for atom in parts]
        if math.prod(full) != size:  # KV heads that enable_gqa repeats, or one that broadcasts
            full = [sizes[atom] if atom == "k" and size == sizes["k"] else 1 for atom in parts]
        assert math.prod(full) == size, (dims, value.shape, sizes)
        shape += full
        order += parts
    result = value.double().reshape(shape)
    result = result.permute([order.index(atom) for atom in atoms if atom in order])
    for i, atom in enumerate(atoms):
        if atom not in order:
            result = result.unsqueeze(i)
    return result.expand([sizes[atom] if atom in "t" or result.shape[i] != 1 else 1 for i, atom in enumerate(atoms)])


def _apply(term: Any, scores: torch.Tensor, node: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor:
    shape = [math.prod(sizes[atom] for atom in dim if atom != "1") for dim in term.dims]
    spread = _spread_term(node.expand(shape), term.dims, sizes)
    if term.kind == "add":
        return scores + term.value * spread.double()
    if term.kind == "keep":
        return scores.masked_fill(~spread, -math.inf)
    assert term.kind == "fill"
    return scores.masked_fill(~spread if term.inverted else spread, term.value)


def _spread_term(value: torch.Tensor, dims: tuple[str, ...], sizes: dict[str, int]) -> torch.Tensor:
    order = [atom for dim in dims for atom in dim if atom != "1"]
    result = value.reshape([sizes[atom] for atom in order])
    result = result.permute([order.index(atom) for atom in "bkgrt" if atom in order])
    for i, atom in enumerate("bkgrt"):
        if atom not in order:
            result = result.unsqueeze(i)
    return result
