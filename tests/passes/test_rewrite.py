from operator import getitem

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from pass_graphs import GROUPS, HQ, H, capture, capture_calls, new, past, query, step_inputs
from torch.fx import Node

from mikv_compile.passes import analyze, canonical, rewrite

ALL = slice(None)


class DenseLowering:
    """The oracle: the buffers of a site are its dense caches, and a step is plain attention over them."""

    def __init__(self):
        self.born, self.updated, self.read, self.appended = [], [], [], []

    def buffers(self, site):
        if site.born:
            return []
        return [(name, u.past.meta["example_value"]) for name, u in (("keys", site.key), ("values", site.value))]

    def source(self, site, name):
        return {"keys": site.key, "values": site.value}[name].past._dynamo_source

    def emit_born(self, graph, site, first, new, buffers):
        self.born.append((site.name, new.key.name, new.value.name))

    def emit_attend(self, graph, site, operands, new, buffers):
        def full(name, new_tokens):
            update = {"keys": site.key, "values": site.value}[name]
            joined = joined_by_hand(graph, update, buffers[name], new_tokens, site.reads[0].whole)
            return graph.call_function(torch.repeat_interleave, (joined, operands.groups), {"dim": 1})

        output = graph.call_function(
            F.scaled_dot_product_attention,
            (operands.query, full("keys", new.key), full("values", new.value), operands.mask),
            {"scale": operands.scale},
        )
        return output, output

    def emit_update(self, graph, site, operands, lse, new, buffers):
        self.updated.append(site.name)

    def emit_step(self, graph, site, operands, new, buffers):
        found = self.emit_attend(graph, site, operands, new, buffers)
        self.emit_update(graph, site, operands, found[1], new, buffers)
        return found

    def emit_read(self, graph, site, columns, buffers):
        self.read.append((site.name, columns))
        copies = (graph.call_method("clone", (buffers[name],)) for name in ("keys", "values"))  # written in place
        return tuple(canonical.new_tokens(graph, copy, site.key.layout) for copy in copies)

    def emit_append(self, graph, site, new, buffers):
        self.appended.append(site.name)


def joined_by_hand(graph, update, past, new, whole):
    """The tokens that attention sees, `[B, H, T, D]`, by the meaning of the record."""
    past = canonical.new_tokens(graph, past, update.layout)
    if not update.tail:
        if update.first or update.position is not None:
            past = graph.call_function(getitem, (past, (ALL, ALL, slice(update.first, update.position))))
        return graph.call_function(torch.cat, ([past, new], 2))
    if isinstance(update.position, Node):
        (columns,) = [node for node in graph.nodes if node.name == update.position.name]
        return graph.call_function(torch.index_copy, (past, 2, columns, new))
    end = update.position + update.new.meta["example_value"].shape[update.token_dim]
    joined = graph.call_function(torch.slice_scatter, (past, new, 2, update.position, end))
    return joined if whole else graph.call_function(getitem, (joined, (ALL, ALL, slice(None, end))))


def rewritten(gm, lowering=None):
    analysis = analyze(gm)
    before = gm.code, str(gm.graph)
    result = rewrite(gm, analysis.sites, lowering or DenseLowering())
    assert (gm.code, str(gm.graph)) == before
    result.gm.graph.lint()
    return result


def run_both(gm, result, inputs):
    """Outputs of the original and of the rewritten graph on the same graph inputs."""
    with torch.no_grad():
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]  # caches are written in place
        expected = gm(*copies)
        extra = [inputs[i] for site in result.sites for i in (site.key_input, site.value_input) if i is not None]
        actual = result.gm(*[inputs[i] for i in result.kept_inputs], *extra)
    return expected, actual


def check(gm, result, inputs):
    expected, actual = run_both(gm, result, inputs)
    gone = {i for site in result.sites for i in site.key_outputs + site.value_outputs}
    assert len(expected) == len(actual)
    for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if i in gone:
            assert got is None
        else:
            torch.testing.assert_close(got, want)


def graph_inputs(gm, by_name):
    return [by_name[node.name] for node in gm.graph.find_nodes(op="placeholder")]


def repeat(x):
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, GROUPS, t, d).reshape(b, h * GROUPS, t, d)


def eager_step(q, k, v, pk, pv, mask):
    keys, values = torch.cat([pk, k + 1], -2), torch.cat([pv, v + 1], -2)
    weights = F.softmax(q @ repeat(keys).transpose(2, 3) * 0.3 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ repeat(values)).transpose(1, 2), keys, values


def sdpa_step(q, k, v, pk, pv):
    keys, values = torch.cat([pk, k + 1], -2), torch.cat([pv, v + 1], -2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True) * pk.shape[2], keys, values


def named(**tensors):
    return {f"l_{name}_": value for name, value in tensors.items()}


def test_eager_step_equals_the_original():
    q, k, v, pk, pv = step_inputs(2)
    mask = torch.randn(1, 1, 2, 7)
    gm = capture(eager_step, q, k, v, pk, pv, mask)
    result = rewritten(gm)
    check(gm, result, graph_inputs(gm, named(q=q, k=k, v=v, pk=pk, pv=pv, mask=mask)))
    (site,) = result.sites
    assert site.buffers == ("keys", "values")
    total = len(result.kept_inputs)
    assert site.buffer_inputs == (total, total + 1)
    originals = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert (originals[site.key_input], originals[site.value_input]) == ("l_pk_", "l_pv_")
    assert [originals[i] for i in result.kept_inputs] == [n for n in originals if n not in ("l_pk_", "l_pv_")]


def test_the_idiom_and_the_dense_cache_are_gone():
    q, k, v, pk, pv = step_inputs(2)
    result = rewritten(capture(eager_step, q, k, v, pk, pv, torch.randn(1, 1, 2, 7)))
    targets = [node.target for node in result.gm.graph.nodes]
    assert F.softmax not in targets and "expand" not in targets and torch.matmul not in targets
    assert targets.count(torch.cat) == 2  # the oracle's own


def test_born_reads_the_new_tokens_directly():
    def prefill(q, k, v):
        keys = torch.cat([torch.tensor([]), k + 1], -2)
        values = torch.cat([torch.tensor([]), v + 1], -2)
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True), keys, values

    q, k, v = query(3), new(3), new(3)
    gm = capture(prefill, q, k, v)
    lowering = DenseLowering()
    result = rewritten(gm, lowering)
    check(gm, result, graph_inputs(gm, named(q=q, k=k, v=v)))
    (site,) = result.sites
    assert (site.key_input, site.value_input, site.buffers) == (None, None, ())
    assert lowering.born == [(site.site.name, "add", "add_1")]
    targets = [node.target for node in result.gm.graph.nodes]
    assert torch.cat not in targets and torch.tensor not in targets
    assert F.scaled_dot_product_attention in targets


def test_emit_born_stands_right_behind_the_attention():
    class Emit(DenseLowering):
        def emit_born(self, graph, site, first, new, buffers):
            graph.call_function(torch.neg, (new.key,))
            graph.call_function(torch.abs, (new.value,))

    def prefill(q, k, v):
        keys = torch.cat([torch.tensor([]), k + 1], -2)
        values = torch.cat([torch.tensor([]), v + 1], -2)
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True) + 1, keys, values

    result = rewritten(capture(prefill, query(3, H), new(3), new(3)), Emit())
    targets = [node.target for node in result.gm.graph.nodes]
    at = targets.index(F.scaled_dot_product_attention)
    assert targets[at + 1 : at + 3] == [torch.neg, torch.abs]


def test_sizes_of_the_cache_are_made_from_symbolic_inputs():
    def step(q, k, v, pk, pv):
        keys, values = torch.cat([pk, k + 1], -2), torch.cat([pv, v + 1], -2)
        out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return out * pk.numel() + keys.shape[2], keys, values

    calls = [(query(), new(), new(), past(n), past(n)) for n in (5, 6)]
    gm = capture_calls(step, *calls)[-1]
    analysis = analyze(gm)
    assert [node.target for node in analysis.sites[0].key.metadata_users] == ["numel"]
    result = rewritten(gm)
    assert not any(node.target == "numel" for node in result.gm.graph.nodes)
    length = past(9)
    q, k, v = query(), new(), new()
    values = named(q=q, k=k, v=v, pk=length, pv=length.clone())
    inputs = [
        values.get(node.name, 9)  # every symbolic input is the length
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    check(gm, result, inputs)


def test_sizes_asked_by_hand():
    gm = capture(sdpa_step, *step_inputs())
    graph = gm.graph
    (past_node,) = [node for node in graph.find_nodes(op="placeholder") if node.name == "l_pk_"]
    with graph.inserting_before(graph.output_node()):
        size = graph.call_method("size", (past_node,))
        item = graph.call_function(torch.ops.aten.add.Scalar, (graph.find_nodes(op="placeholder")[0], 1))
        shape = graph.call_function(getattr, (past_node, "shape"))
        total = graph.call_function(sum, (shape,))
        graph.call_method("dim", (past_node,))
    graph.output_node().args = ((*graph.output_node().args[0], size, total, item),)
    gm.recompile()
    result = rewritten(gm)
    output = result.gm.graph.output_node().args[0]
    assert output[3] == tuple(past().shape)
    assert output[4].args == (tuple(past().shape),)


def test_a_size_that_nothing_gives_declines():
    def step(q, k, v, pk, pv):
        keys, values = torch.cat([pk, k + 1], -2), torch.cat([pv, v + 1], -2)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True) * pk.numel(), keys, values

    gm = capture_calls(step, *[(query(), new(), new(), past(n), past(n)) for n in (5, 6)])[-1]
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta["example_value"], torch.SymInt):
            del node.meta["example_value"]
    before = len(gm.graph.nodes)
    result = rewritten(gm)
    assert result.sites == () and len(result.gm.graph.nodes) == before
    (declined,) = result.declined
    assert declined.stage == "rewrite" and "no graph input gives it" in declined.reason
    assert result.kept_inputs == list(range(len(gm.graph.find_nodes(op="placeholder"))))


def test_one_site_reads_the_output_of_another():
    def step(q, k, v, cache):
        outputs = []
        for pk, pv in cache:
            keys, values = torch.cat([pk, k + 1], -2), torch.cat([pv, v + 1], -2)
            q = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            k, v = q[:, :H], q[:, H : 2 * H]
            outputs += [keys, values]
        return q, outputs

    cache = [(past(), past()), (past(), past())]
    q, k, v = query(), new(), new()
    gm = capture(step, q, k, v, cache)
    result = rewritten(gm)
    assert len(result.sites) == 2
    values = named(q=q, k=k, v=v)
    for i, layer in enumerate(cache):
        for j, tensor in enumerate(layer):
            values[f"l_cache_{i}_{j}_"] = tensor
    check(gm, result, graph_inputs(gm, values))


def test_in_place_writes_without_users_survive():
    def step(q, k, v, pk, pv, log):
        log.index_copy_(0, torch.tensor([1]), q.reshape(1, -1))
        return sdpa_step(q, k, v, pk, pv)

    inputs = [x[:1].clone() for x in step_inputs()]
    gm = capture(step, *inputs, torch.zeros(3, HQ * 4))
    result = rewritten(gm)
    assert any(node.target == "index_copy_" for node in result.gm.graph.nodes)


def test_metadata_of_dynamo_is_kept():
    gm = capture(sdpa_step, *step_inputs())
    result = rewritten(gm)
    assert result.gm.meta == gm.meta and result.gm.meta is not gm.meta
    assert result.gm._param_name_to_source is gm._param_name_to_source
    originals = gm.graph.find_nodes(op="placeholder")
    copies = result.gm.graph.find_nodes(op="placeholder")
    for i, copy in zip(result.kept_inputs, copies, strict=False):
        assert copy._dynamo_source is originals[i]._dynamo_source
        assert copy.meta["example_value"] is originals[i].meta["example_value"]
    assert all(hasattr(node, "_dynamo_source") for node in copies)


def test_aot_autograd_takes_the_rewritten_graph():
    outputs = []

    def backend(gm, example_inputs):
        result = rewritten(gm)
        (site,) = result.sites
        moved = [*result.kept_inputs, site.key_input, site.value_input]
        compiled = torch._dynamo.lookup_backend("aot_eager")(result.gm, [example_inputs[i] for i in moved])

        def call(*args):
            outputs.append(compiled(*[args[i] for i in moved]))
            return gm.forward(*args)

        return call

    fn = torch.compile(sdpa_step, backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in (5, 6, 7):
            expected = fn(query(), new(), new(), past(length), past(length))
            got = [x for x in outputs[-1] if x is not None]
            torch.testing.assert_close(got, [expected[0]])
    assert len(outputs) == 3


def test_rewritten_step_graph():
    result = rewritten(capture(sdpa_step, *step_inputs()))
    lines = [
        f"{node.name} = {getattr(node.target, '__name__', node.target)}{node.args}"
        for node in result.gm.graph.nodes
        if node.op != "placeholder"
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
add = add(l_k_, 1)
add_1 = add(l_v_, 1)
cat = cat([scaled_dot_product_attention_keys, add], 2)
repeat_interleave = repeat_interleave(cat, 2)
cat_1 = cat([scaled_dot_product_attention_values, add_1], 2)
repeat_interleave_1 = repeat_interleave(cat_1, 2)
scaled_dot_product_attention_1 = scaled_dot_product_attention(l_q_, repeat_interleave, repeat_interleave_1, None)
mul = mul(scaled_dot_product_attention_1, 5)
output = output((mul, None, None),)""",
    )


def step_by_hand(fn, lowering=None, symbolic=None, **tensors):
    """Rewrite `fn(**tensors)` with one site, and compare it with the original."""
    gm = capture(fn, *tensors.values())
    result = rewritten(gm, lowering)
    assert result.declined == () and len(result.sites) == 1
    check(gm, result, graph_inputs(gm, named(**tensors)))
    return result


def gqa(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


CAPACITY = 7


def fixed(**more):
    """Inputs of a step with preallocated caches."""
    mask = torch.where(torch.arange(CAPACITY) > 4, -torch.inf, torch.randn(CAPACITY)).view(1, 1, 1, -1)
    return {"q": query(2), "k": new(2), "v": new(2), "pk": past(CAPACITY), "pv": past(CAPACITY), "mask": mask, **more}


def by_slice(p, x, i):
    p[:, :, 3:5] = x + 1
    return p


def by_index(p, x, i):
    p[:, :, i] = x + 1
    return p


def by_narrow(p, x, i):
    p.narrow(2, 3, 2).copy_(x + 1)
    return p


def by_scatter(p, x, i):
    return p.scatter_(2, i.view(1, 1, -1, 1).expand_as(x), x + 1)


WRITES = {
    "slice": by_slice,
    "index": by_index,
    "narrow": by_narrow,
    "scatter": by_scatter,
    "index_copy_": lambda p, x, i: p.index_copy_(2, i, x + 1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_preallocated_step_equals_the_original(write):
    def step(q, k, v, pk, pv, mask, i):
        keys, values = write(pk, k, i), write(pv, v, i)
        return gqa(q, keys, values, mask) + 1

    lowering = DenseLowering()
    result = step_by_hand(step, lowering, **fixed(i=torch.tensor([3, 4])))
    assert len(lowering.updated) == 1 and result.sites[0].site.key.tail
    assert not any(node.op != "placeholder" and node.name in ("l_pk_", "l_pv_") for node in result.gm.graph.nodes)


def test_preallocated_copies_equal_the_original():
    def step(q, k, v, pk, pv, mask, i):
        keys, values = pk.index_copy(2, i, k + 1), pv.index_copy(2, i, v + 1)
        return gqa(q, keys, values, mask) + 1, keys, values

    result = step_by_hand(step, **fixed(i=torch.tensor([3, 4])))
    assert result.sites[0].key_outputs and result.sites[0].value_outputs


def test_a_prefix_of_a_preallocated_cache_equals_the_original():
    def step(q, k, v, pk, pv):
        keys, values = by_slice(pk, k, None), by_slice(pv, v, None)
        return gqa(q, keys[:, :, :5], values[:, :, :5])

    inputs = fixed()
    del inputs["mask"]
    result = step_by_hand(step, **inputs)
    assert not result.sites[0].site.reads[0].whole


def test_tokens_first_in_a_preallocated_cache():
    def step(q, k, v, pk, pv, mask, i):
        pk.index_copy_(1, i, k + 1)
        pv.index_copy_(1, i, v + 1)
        return gqa(q, pk.transpose(1, 2), pv.transpose(1, 2), mask)

    inputs = fixed(i=torch.tensor([4, 3]))
    inputs.update({name: inputs[name].transpose(1, 2).contiguous() for name in ("k", "v", "pk", "pv")})
    assert step_by_hand(step, **inputs).sites[0].site.key.layout == "BTHD"


def test_rolled_windows_equal_the_original():
    def roll(p, x):
        moved = p.roll(-1, 2)
        moved[:, :, [-1]] = x + 1
        p.copy_(moved)
        return p

    def step(q, k, v, pk, pv, mask):
        return gqa(q, roll(pk, k), roll(pv, v), mask)

    result = step_by_hand(step, **fixed(q=query(), k=new(), v=new()))
    assert result.sites[0].site.key.kind == "roll"
    assert not any(node.target in ("roll", "copy_") for node in result.gm.graph.nodes)


def test_sliding_windows_equal_the_original():
    def step(q, k, v, pk, pv):
        keys, values = torch.cat([pk, k + 1], 2), torch.cat([pv, v + 1], 2)
        return gqa(q, keys, values), keys[:, :, -5:], values[:, :, -5:]

    q, k, v, pk, pv = step_inputs(2)
    assert step_by_hand(step, q=q, k=k, v=v, pk=pk, pv=pv).sites[0].site.key.keep == 5


def test_a_prompt_at_the_start_of_a_preallocated_cache():
    def step(q, k, v, pk, pv):
        pk[:, :, :2] = k + 1
        pv[:, :, :2] = v + 1
        return F.scaled_dot_product_attention(q, pk[:, :, :2], pv[:, :, :2], is_causal=True, enable_gqa=True)

    inputs = fixed()
    del inputs["mask"]
    lowering = DenseLowering()
    result = step_by_hand(step, lowering, **inputs)
    assert result.sites[0].fills and len(lowering.born) == 1


def test_a_prompt_that_replaces_the_window():
    def step(q, k, v, pk, pv, mask):
        keys, values = k + 1, v + 1
        pk.copy_(keys[:, :, -CAPACITY:])
        pv.copy_(values[:, :, -CAPACITY:])
        return gqa(q, keys, values, mask)

    long = CAPACITY + 2
    inputs = fixed(q=query(long), k=new(long), v=new(long), mask=torch.ones(long, long).tril().bool())
    result = step_by_hand(step, **inputs)
    assert result.sites[0].fills and result.sites[0].site.key.kind == "replace"


DENSE_READS = {
    "chunked": lambda q, k, v, mask: (gqa(q, k, v, mask), v.chunk(2, -1)[0] * 2),
    "arithmetic": lambda q, k, v, mask: gqa(q, k * 2, v, mask),
    "slice": lambda q, k, v, mask: gqa(q, k[:, :, 1:], v[:, :, 1:]),
}


@pytest.mark.parametrize("read", DENSE_READS.values(), ids=DENSE_READS)
@pytest.mark.parametrize("write", [*WRITES, "cat"])
def test_dense_reads_equal_the_original(read, write):
    def step(q, k, v, pk, pv, mask, i):
        if write == "cat":
            keys, values = torch.cat([pk, k + 1], 2), torch.cat([pv, v + 1], 2)
            return read(q, keys, values, None), keys, values
        keys, values = WRITES[write](pk, k, i), WRITES[write](pv, v, i)
        return read(q, keys, values, mask)

    lowering = DenseLowering()
    result = step_by_hand(step, lowering, **fixed(i=torch.tensor([3, 4])))
    (site,) = result.sites
    assert site.site.reads == () and lowering.read == [(site.site.name, CAPACITY)]
    assert lowering.appended == [site.site.name] and lowering.updated == []


def test_dense_reads_before_the_write_equal_the_original():
    def step(q, k, v, pk, pv, mask, i):
        out = gqa(q, pk, pv, mask)
        pk.index_copy_(2, i, k + 1)
        pv.index_copy_(2, i, v + 1)
        return out + gqa(q, pk, pv, mask)

    lowering = DenseLowering()
    step_by_hand(step, lowering, **fixed(i=torch.tensor([3, 4])))
    assert len(lowering.read) == len(lowering.appended) == 1


def test_dense_reads_of_tokens_first_equal_the_original():
    def step(q, k, v, pk, pv):
        keys, values = torch.cat([pk, k + 1], 1), torch.cat([pv, v + 1], 1)
        return gqa(q, keys.transpose(1, 2) * 2, values.transpose(1, 2)), keys, values

    q, *rest = step_inputs(2)
    names = ("k", "v", "pk", "pv")
    inputs = {name: x.transpose(1, 2).contiguous() for name, x in zip(names, rest, strict=True)}
    assert step_by_hand(step, q=q, **inputs).sites[0].site.key.layout == "BTHD"
