import pytest
import torch
import torch.nn.functional as F
from pass_graphs import GROUPS, HQ, B, D, H, capture, new, past, query, step_inputs

from mikv_compile.passes import analyze


def grow(p, x):
    return torch.cat([p, x + 1], -2)


def with_cache(read):
    """A decode step; `read(q, K, V)` is the attention over the grown caches."""

    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return read(q, keys, values), keys, values

    return step


def sdpa(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def eager(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * 0.5, -1) @ v


def one_site(fn, *inputs, **kwargs):
    analysis = analyze(capture(fn, *inputs, **kwargs))
    assert analysis.declined == ()
    (site,) = analysis.sites
    return site


def refused(text, fn, *inputs, **kwargs):
    analysis = analyze(capture(fn, *inputs, **kwargs))
    assert not any(site.reads for site in analysis.sites)
    reasons = [d.reason for d in analysis.declined if d.stage == "pair"] + [site.dense for site in analysis.sites]
    assert any(text in reason for reason in reasons), analysis.declined
    return analysis


def expand_getitem(x):
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, GROUPS, t, d).reshape(b, h * GROUPS, t, d)


def expand_unsqueeze(x):
    b, _, t, d = x.shape
    return x.unsqueeze(2).expand(-1, -1, GROUPS, -1, -1).reshape(b, -1, t, d)


REPEATS = {
    "getitem, expand, reshape": expand_getitem,
    "unsqueeze, expand, reshape": expand_unsqueeze,
    "short getitem": lambda x: x[:, :, None].expand(-1, -1, GROUPS, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(GROUPS, dim=1),
    "repeat_interleave function": lambda x: torch.repeat_interleave(x, GROUPS, dim=-3),
    "unsqueeze, repeat": lambda x: x.unsqueeze(2).repeat(1, 1, GROUPS, 1, 1).view(B, HQ, -1, D),
    "tokens first and back": lambda x: x.transpose(1, 2).repeat_interleave(GROUPS, 2).permute(0, 2, 1, 3),
    "contiguous": lambda x: x.contiguous().repeat_interleave(GROUPS, dim=1).contiguous(),
    "no-op cast": lambda x: x.to(torch.float32).repeat_interleave(GROUPS, dim=1),
    "whole slice": lambda x: x[:, :, : x.shape[2]].repeat_interleave(GROUPS, dim=1),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", [sdpa, eager])
@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_head_repeats(repeat, attend, dynamic):
    inputs = step_inputs()
    if dynamic:
        for x in inputs[3:]:
            torch._dynamo.mark_dynamic(x, 2)
    read = (lambda q, k, v: sdpa(q, repeat(k), repeat(v))) if attend is sdpa else None
    site = one_site(with_cache(read or (lambda q, k, v: eager(q, repeat(k), repeat(v)))), *inputs)
    assert site.reads[0].groups == GROUPS
    assert site.key.past.name == "l_pk_" and site.value.past.name == "l_pv_"
    assert site.name == site.reads[0].attention.output.name and not site.born


def test_enable_gqa():
    assert (
        one_site(with_cache(lambda q, k, v: sdpa(q, k, v, enable_gqa=True)), *step_inputs()).reads[0].groups == GROUPS
    )


def test_enable_gqa_on_top_of_a_repeat():
    def read(q, k, v):
        return sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), enable_gqa=True)

    assert one_site(with_cache(read), query(heads=H * 6), *step_inputs()[1:]).reads[0].groups == 6


def test_no_groups_in_a_fully_symbolic_graph():
    inputs = (query(heads=H), *step_inputs()[1:])
    assert one_site(with_cache(lambda q, k, v: sdpa(q, k, v, scale=1.0)), *inputs, dynamic=True).reads[0].groups == 1


def test_single_head_broadcasts():
    q, k, v, pk, pv = step_inputs()
    one = [x[:, :1].clone() for x in (k, v, pk, pv)]
    assert one_site(with_cache(eager), q, *one).reads[0].groups == HQ


def test_packed_groups():
    def read(q, k, v):
        return eager(q.reshape(B, H, GROUPS, D), k, v).reshape(B, HQ, 1, D)

    assert one_site(with_cache(read), *step_inputs()).reads[0].groups == 1


def test_born_with_causal():
    def prefill(q, k, v):
        keys = torch.cat([torch.tensor([]), k + 1], -2)
        values = torch.cat([torch.tensor([]), v + 1], -2)
        return sdpa(q, keys, values, is_causal=True, enable_gqa=True), keys, values

    site = one_site(prefill, query(3), new(3), new(3))
    assert site.born and site.reads[0].groups == GROUPS and site.reads[0].attention.is_causal
    site = one_site(prefill, query(1), new(1), new(1))
    assert site.reads[0].groups == GROUPS


def test_value_head_dim_may_differ():
    q, k, _, pk, _ = step_inputs()
    v, pv = torch.randn(B, H, 1, 6), torch.randn(B, H, 5, 6)
    assert (
        one_site(with_cache(lambda q, k, v: sdpa(q, k, v, enable_gqa=True)), q, k, v, pk, pv).reads[0].groups == GROUPS
    )


def test_tiled_heads_decline():
    tile = lambda x: x.repeat(1, GROUPS, 1, 1)  # noqa: E731
    refused("tiled", with_cache(lambda q, k, v: sdpa(q, tile(k), tile(v))), *step_inputs())


def test_wrong_expand_dim_declines():
    tile = lambda x: x.unsqueeze(1).expand(-1, GROUPS, -1, -1, -1).reshape(B, HQ, -1, D)  # noqa: E731
    refused("tiled", with_cache(lambda q, k, v: sdpa(q, tile(k), tile(v))), *step_inputs())


def test_repeated_tokens_decline():
    twice = lambda x: x.repeat_interleave(2, dim=2)  # noqa: E731
    refused(
        "holds T x repeat", with_cache(lambda q, k, v: sdpa(q, twice(k), twice(v), enable_gqa=True)), *step_inputs()
    )


def test_reshape_that_mixes_declines():
    mix = lambda x: x.reshape(B, HQ, x.shape[2], D // GROUPS)  # noqa: E731
    q = query()[..., : D // GROUPS].clone()
    refused("cannot be followed", with_cache(lambda q, k, v: sdpa(q, mix(k), mix(v))), q, *step_inputs()[1:])


def test_different_repeats_of_key_and_value_decline():
    def read(q, k, v):
        return torch.softmax(q @ k.repeat_interleave(2, 1).mT, -1) @ v

    q, k, _, pk, _ = step_inputs()
    refused("number of heads", with_cache(read), q, k, torch.randn(B, HQ, 1, D), pk, torch.randn(B, HQ, 5, D))


def test_crossed_layers_decline():
    def step(q, k, v, cache):
        ks = [grow(layer["k"], k) for layer in cache]
        vs = [grow(layer["v"], v) for layer in cache]
        return sdpa(q, ks[0], vs[1], enable_gqa=True) + sdpa(q, ks[1], vs[0], enable_gqa=True), ks, vs

    cache = [{"k": past(), "v": past()} for _ in range(2)]
    refused("crossed", step, *step_inputs()[:3], cache)


def test_straight_layers_of_the_same_model_pair():
    def step(q, k, v, cache):
        ks = [grow(layer["k"], k) for layer in cache]
        vs = [grow(layer["v"], v) for layer in cache]
        return sdpa(q, ks[0], vs[0], enable_gqa=True) + sdpa(q, ks[1], vs[1], enable_gqa=True), ks, vs

    cache = [{"k": past(), "v": past()} for _ in range(2)]
    analysis = analyze(capture(step, *step_inputs()[:3], cache))
    assert len(analysis.sites) == 2 and analysis.declined == ()


def test_crossed_lists_decline():
    def step(q, k, v, key_cache, value_cache):
        keys = [grow(p, k) for p in key_cache]
        values = [grow(p, v) for p in value_cache]
        return sdpa(q, keys[0], values[1]), sdpa(q, keys[1], values[0]), keys, values

    q = query(heads=H)
    refused("crossed", step, q, new(), new(), [past(), past()], [past(), past()])


def test_caches_of_different_lengths_decline():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return torch.softmax(q @ keys.mT, -1)[..., :6] @ values, keys, values

    analysis = analyze(capture(step, query(heads=H), new(), new(), past(7), past()))
    assert analysis.sites == ()


def test_one_empty_and_one_filled_cache_decline():
    def step(q, k, v, pv):
        keys, values = torch.cat([torch.tensor([]), k + 1], -2), grow(pv, v)
        return sdpa(q, keys, values), keys, values

    refused("crossed", step, query(heads=H), new(6), new(1), past())


def test_same_cache_for_key_and_value_declines():
    def step(q, k, pk):
        keys = grow(pk, k)
        return sdpa(q, keys, keys), keys

    refused("same cached tensor", step, query(heads=H), new(), past())


def test_cast_of_the_cache_declines():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return sdpa(q, keys.float(), values.float()), keys, values

    half = [x.bfloat16() for x in (new(), new(), past(), past())]
    refused("cast", step, query(heads=H), *half)


def test_arithmetic_on_the_cache_declines():
    refused("not a recognized", with_cache(lambda q, k, v: sdpa(q, k * 2, v)), query(heads=H), *step_inputs()[1:])


def test_slice_of_the_cache_declines():
    read = with_cache(lambda q, k, v: sdpa(q, k[:, :, 1:], v[:, :, 1:]))
    refused("slice", read, query(heads=H), *step_inputs()[1:])


def test_another_user_of_the_result_declines():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return sdpa(q, keys, values), keys, values, keys.sum()

    refused("`sum_1`", step, query(heads=H), *step_inputs()[1:])


def test_another_user_of_the_repeated_heads_declines():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        wide = keys.repeat_interleave(GROUPS, 1)
        return sdpa(q, wide, values.repeat_interleave(GROUPS, 1)), keys, values, wide

    refused("also read", step, *step_inputs())


def test_two_attentions_on_one_cache():
    def read(q, k, v):
        return sdpa(q, k, v, enable_gqa=True) + sdpa(q + 1, k, v, enable_gqa=True)

    assert len(one_site(with_cache(read), *step_inputs()).reads) == 2


def test_causal_with_past_declines():
    read = with_cache(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True))
    refused("top left", read, *step_inputs(3))


def test_more_query_heads_without_gqa_decline():
    graph = capture(with_cache(lambda q, k, v: sdpa(q, k, v, enable_gqa=True)), *step_inputs())
    analysis = analyze(graph)
    node = analysis.attentions[0].output
    node.kwargs = {**node.kwargs, "enable_gqa": False}
    assert any("without enable_gqa" in (site.dense or "") for site in analyze(graph).sites)


def test_unequal_batch_declines():
    read = with_cache(lambda q, k, v: sdpa(q, k, v))
    one = [x[:1].clone() for x in (new(), new(), past(), past())]
    refused("batch size", read, query(heads=H), *one)


def test_different_numbers_of_new_tokens_decline():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return sdpa(q, keys, values), keys, values

    refused("new tokens", step, query(heads=H), new(1), new(2), past(5), past(4))


def test_new_tokens_overwritten_later_decline():
    def step(q, k, v, pk, pv):
        k = k + 1
        keys, values = torch.cat([pk, k], -2), grow(pv, v)
        k.transpose(1, 2).zero_()
        return sdpa(q, keys, values), keys, values

    refused("zero_", step, query(heads=H), *step_inputs()[1:])


def test_cross_attention_where_its_cache_is_born():
    def prefill(q, k, v):
        keys = torch.cat([torch.tensor([]), k + 1], -2)
        values = torch.cat([torch.tensor([]), v + 1], -2)
        return sdpa(q, keys, values), keys, values

    assert one_site(prefill, query(3, H), new(6), new(6)).born


def test_cross_attention_that_reads_a_compressed_cache():
    gm = capture(lambda q, pk, pv: sdpa(q, pk, pv, enable_gqa=True), query(), past(), past())
    caches = {node: "BHTD" for node in gm.graph.find_nodes(op="placeholder")[1:]}
    (site,) = analyze(gm, caches).sites
    assert (site.key.kind, len(site.reads)) == ("read", 1)
    assert analyze(gm).sites == ()  # a dense tensor may be anything


def test_a_compressed_cache_that_something_else_reads_is_left_alone():
    gm = capture(lambda q, pk, pv: (sdpa(q, pk, pv, enable_gqa=True), pk.sum()), query(), past(), past())
    caches = {node: "BHTD" for node in gm.graph.find_nodes(op="placeholder")[1:]}
    assert analyze(gm, caches).sites == ()


def test_attention_without_a_cache_declines():
    refused("not read from a cache", lambda q, k, v: sdpa(q, k * 2, v * 2), *(query(3) for _ in range(3)))


def test_update_without_attention_is_reported():
    refused("no attention in this graph", lambda p, k: torch.cat([p, k + 1], -2), past(), new())


def test_the_graph_is_not_changed():
    gm = capture(with_cache(lambda q, k, v: sdpa(q, k, v, enable_gqa=True)), *step_inputs())
    before = str(gm.graph)
    analyze(gm)
    assert str(gm.graph) == before


def test_no_guards_are_added():
    inputs = step_inputs()
    gm = capture(with_cache(lambda q, k, v: sdpa(q, k, v, scale=1.0)), query(heads=H), *inputs[1:], dynamic=True)
    shape_env = gm.graph.find_nodes(op="placeholder")[0].meta["example_value"].node.shape_env
    before = len(shape_env.guards)
    assert len(analyze(gm).sites) == 1
    assert len(shape_env.guards) == before


def test_odd_graphs_do_not_raise():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.cat, (x, "odd")))
    analysis = analyze(torch.fx.GraphModule({}, graph))
    assert analysis.sites == ()


def test_a_failing_recognizer_is_reported(monkeypatch):
    def broken(node):
        raise ValueError("boom")

    monkeypatch.setattr("mikv_compile.passes.attention.ATTENTION_RECOGNIZERS", (broken,))
    analysis = analyze(capture(lambda x: x + 1, torch.randn(2)))
    assert analysis.declined and all("boom" in d.reason for d in analysis.declined)


# Sites that are read as dense tensors.


def dense_site(text, fn, *inputs, **kwargs):
    analysis = analyze(capture(fn, *inputs, **kwargs))
    (site,) = analysis.sites
    assert site.reads == () and text in site.dense, site.dense
    assert (site.key.past.name, site.value.past.name) == ("l_pk_", "l_pv_")
    return site


def test_values_that_are_also_chunked_are_read_densely():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        first, second = values.chunk(2, -1)
        return sdpa(q, keys, values), first * second, keys, values

    site = dense_site("`chunk`", step, query(heads=H), *step_inputs()[1:])
    assert site.name == site.key.result.name


def test_latent_caches_are_read_densely():
    def step(q, c, r, pk, pv, up):
        latent, rope = grow(pk, c), grow(pv, r)
        keys = torch.cat([latent @ up, rope.expand(-1, H, -1, -1)], -1)
        return sdpa(q, keys, latent @ up), latent, rope

    inputs = (torch.randn(B, 1, 1, 6), torch.randn(B, 1, 1, D), torch.randn(B, 1, 5, 6), torch.randn(B, 1, 5, D))
    site = dense_site(
        "not read from a cache", step, query(heads=H)[..., :1].expand(-1, -1, -1, 10), *inputs, torch.randn(H, 6, 6)
    )
    assert site.key.new.meta["example_value"].shape[-1] == 6


def test_buffers_filled_by_latent_caches_are_read_densely():
    def step(q, c, r, pk, pv):
        latent, rope = grow(pk, c), grow(pv, r)
        keys = torch.empty(B, H, 6, 2 * D)
        keys[..., :D] = latent
        keys[..., D:] = rope
        return torch.softmax(q @ keys.mT, -1), latent, rope

    dense_site("", step, torch.randn(B, H, 1, 2 * D), *step_inputs()[1:])


def test_caches_read_before_they_are_written_are_read_densely():
    def step(q, k, v, pk, pv, i):
        out = sdpa(q, pk, pv)
        pk.index_copy_(2, i, k + 1)
        pv.index_copy_(2, i, v + 1)
        return out

    dense_site("before the new tokens are written", step, query(heads=H), *step_inputs()[1:], torch.tensor([3]))


def other_cat(p, x, dim=1):
    return torch.cat([p, x * 2], dim)


def test_skip_connections_are_not_caches():
    def unet(q, image, other, skip, more):
        attended = sdpa(q, q + 1, q + 2)
        return attended, other_cat(skip, image), other_cat(more, other)

    images = [torch.randn(B, 4, 8, 8) for _ in range(4)]
    analysis = analyze(capture(unet, query(3), *images))
    assert analysis.sites == () and len(analysis.updates) == 2
    assert all("no attention" in d.reason for d in analysis.declined if d.site.startswith("cat"))


def test_convolution_states_are_not_caches():
    def step(q, x, y, state, other, weight):
        one, two = other_cat(state, x, 3), other_cat(other, y, 3)
        mixed = F.conv2d(one, weight) + F.conv2d(two, weight)
        return torch.softmax(q * mixed.mean(), -1), one, two

    states = [torch.randn(B, 4, 1, n) for n in (1, 1, 3, 3)]
    assert analyze(capture(step, query(), *states, torch.randn(4, 4, 1, 2))).sites == ()


def pair_of_caches(one, other):
    """Sites of a graph in which two caches flow into a softmax by unsupported arithmetic."""

    def step(a, b, pa, pb):
        left, right = grow(pa, a), grow(pb, b)
        return torch.softmax(left.sum((1, 2, 3)) + right.sum((1, 2, 3)), -1), left, right

    (a, pa), (b, pb) = one, other
    return analyze(capture(step, a, b, pa, pb)).sites


def test_only_caches_that_grow_in_step_belong_together():
    def both(tokens, length, heads=H, channels=D):
        return torch.randn(B, heads, tokens, channels), torch.randn(B, heads, length, channels)

    assert len(pair_of_caches(both(1, 5), both(1, 5))) == 1
    assert len(pair_of_caches(both(1, 5), both(1, 5, channels=6))) == 1
    assert pair_of_caches(both(1, 5), both(1, 6)) == ()
    assert pair_of_caches(both(1, 5), both(2, 5)) == ()
    assert pair_of_caches(both(1, 5), both(1, 5, heads=H + 1)) == ()
    assert pair_of_caches(both(1, 5), both(1, 5, channels=1)) == (), "scales of one channel"


def test_caches_without_a_softmax_need_other_evidence():
    def step(k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return keys @ values.mT, keys, values

    gm = capture(step, *step_inputs()[1:])
    assert analyze(gm).sites == ()
    caches = {node: "BHTD" for node in gm.graph.find_nodes(op="placeholder") if node.name in ("l_pk_", "l_pv_")}
    (site,) = analyze(gm, caches).sites
    assert site.reads == () and "something else" in site.dense
    assert analyze(gm, dict(list(caches.items())[:1])).sites == (), "one handle is not enough"


# Preallocated caches and windows.

CAPACITY = 8


def written(p, x, at=3):
    p[:, :, at : at + x.shape[2]] = x + 1
    return p


def preallocated(read, at=3):
    def step(q, k, v, pk, pv, *mask):
        return read(q, written(pk, k, at), written(pv, v, at), *mask)

    return step


def preallocated_inputs(tokens=1):
    return query(tokens), new(tokens), new(tokens), past(CAPACITY), past(CAPACITY)


def gqa(q, k, v, mask=None, **kwargs):
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True, **kwargs)


def test_a_preallocated_cache_with_a_mask():
    site = one_site(preallocated(gqa), *preallocated_inputs(), torch.zeros(1, 1, 1, CAPACITY))
    (read,) = site.reads
    assert read.whole and site.key.position == 3 and site.key.capacity == CAPACITY and not site.starts_empty


def test_several_reads_of_a_preallocated_cache():
    step = preallocated(lambda q, k, v, mask: gqa(q, k, v, mask) + gqa(q * 2, k, v, mask))
    site = one_site(step, *preallocated_inputs(), torch.zeros(1, 1, 1, CAPACITY))
    assert len(site.reads) == 2


def test_unwritten_columns_without_a_mask_are_read_densely():
    dense_site("not written yet", preallocated(gqa), *preallocated_inputs())


def test_a_slice_that_ends_with_the_new_tokens():
    site = one_site(preallocated(lambda q, k, v: gqa(q, k[:, :, :5], v[:, :, :5])), *preallocated_inputs(2))
    assert not site.reads[0].whole
    site = one_site(preallocated(lambda q, k, v: gqa(q, k.narrow(2, 0, 4), v.narrow(2, 0, 4))), *preallocated_inputs())
    assert not site.reads[0].whole


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_slice_that_ends_elsewhere_is_read_densely(stop):
    step = preallocated(lambda q, k, v: gqa(q, k[:, :, :stop], v[:, :, :stop]))
    dense_site("does not end with the new tokens", step, *preallocated_inputs())


def test_a_slice_behind_unknown_columns_is_read_densely():
    def step(q, k, v, pk, pv, i):
        keys, values = pk.index_copy_(2, i, k + 1), pv.index_copy_(2, i, v + 1)
        return gqa(q, keys[:, :, :4], values[:, :, :4])

    dense_site("does not tell where", step, *preallocated_inputs(), torch.tensor([3]))


def test_keys_and_values_sliced_differently_are_read_densely():
    def read(q, k, v):
        return torch.softmax((q[:, :H] @ k.mT)[..., :4], -1) @ v[:, :, :4]

    dense_site("", preallocated(read), *preallocated_inputs())


def test_causal_at_the_start_of_a_preallocated_cache():
    step = preallocated(lambda q, k, v: gqa(q, k[:, :, :3], v[:, :, :3], is_causal=True), at=0)
    site = one_site(step, *preallocated_inputs(3))
    assert site.starts_empty and not site.born and site.reads[0].attention.is_causal


def test_causal_behind_the_start_is_read_densely():
    step = preallocated(lambda q, k, v: gqa(q, k[:, :, :5], v[:, :, :5], is_causal=True), at=2)
    dense_site("top left", step, *preallocated_inputs(3))


def test_causal_over_the_whole_cache_is_read_densely():
    step = preallocated(lambda q, k, v: gqa(q, k, v, is_causal=True), at=0)
    dense_site("", step, *preallocated_inputs(3))


def test_two_masks_with_a_finite_fill_are_read_densely():
    def read(q, k, v, mask):
        scores = q[:, :H] @ k.mT + mask
        return torch.softmax(scores.masked_fill(mask > 1, -1e9), -1) @ v

    dense_site("two masks", preallocated(read), *preallocated_inputs(), torch.zeros(1, 1, 1, CAPACITY))


def test_sliding_windows():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return gqa(q, keys, values), keys[:, :, -5:], values[:, :, -5:]

    site = one_site(step, *step_inputs())
    assert (site.key.keep, site.value.keep, site.key.tail) == (5, 5, False)


def test_windows_of_different_sizes_do_not_pair():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k), grow(pv, v)
        return gqa(q, keys, values), keys[:, :, -5:], values[:, :, -4:]

    assert analyze(capture(step, *step_inputs())).sites == ()


def test_attention_that_reads_only_the_window_is_no_read_of_all():
    def step(q, k, v, pk, pv):
        keys, values = grow(pk, k)[:, :, -5:], grow(pv, v)[:, :, -5:]
        return gqa(q, keys, values), keys, values

    assert not any(site.reads for site in analyze(capture(step, *step_inputs())).sites)
