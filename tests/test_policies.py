"""Policies: each against a plain formula, what later calls mean against a simulation over steps, and the options."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mikv_compile
from mikv_compile import OptionError, Options, cache_report
from mikv_compile.config import parse_size
from mikv_compile.kernels import attention, dispatch, ranking, scoring
from mikv_compile.kernels.formats import LayerFormat, Rank, Watch, buffer_shapes
from mikv_compile.kernels.scoring import AttentionArgs
from mikv_compile.plan import GROWTH, CacheShape, pyramid
from mikv_compile.planner import Planner
from mikv_compile.policies import POLICIES, Policy, register
from tests import tiny_models
from tests.decoder import Decoder, inputs
from tests.kernels.test_reference_kernels import dense_case

BATCH, GROUP, KV_HEADS, TOKENS, DIM = 2, 3, 2, 63, 80
HEADS = GROUP * KV_HEADS
ALL = sorted(POLICIES)
SHAPE = CacheShape(1, 2, 64, 64, torch.float32)


def prompt_case(tokens=TOKENS, padding=0, additive=False, seed=0, dtype=torch.float32):
    """Queries, keys and values of a prompt whose second row starts with padding, and how it is attended."""
    torch.manual_seed(seed)
    q = torch.randn(BATCH, HEADS, tokens, DIM).to(dtype)
    k, v = (torch.randn(BATCH, KV_HEADS, tokens, DIM).to(dtype) for _ in range(2))
    if not padding:
        return q, k, v, AttentionArgs(None, 0.2, True)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1).clone()
    mask[1, :, :, :padding] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return q, k, v, AttentionArgs(mask, 0.2, False)


def shown_rows(args, tokens):
    """Which of R rows may attend to which of T tokens: [B, 1, T, T] bool, from the arguments alone."""
    if args.mask is None:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    return args.mask if args.mask.dtype == torch.bool else args.mask > -1


def weights(q, k, args):
    """The prompt's attention, head by head: [B, H_q, T, T] in float64; rows that see nothing get 0."""
    scores = q.double() @ k.double().repeat_interleave(GROUP, dim=1).transpose(2, 3) * args.scale
    if args.mask is not None and args.mask.dtype != torch.bool:
        return (scores + args.mask.double()).softmax(-1)
    return scores.masked_fill(~shown_rows(args, q.shape[2]), -math.inf).softmax(-1).nan_to_num(0.0)


def over_group(x, heads):
    """[B, H_q, T] to [B, H_kv, T]."""
    x = x.unflatten(1, (KV_HEADS, GROUP))
    return x.sum(2) if heads == "sum" else x.amax(2)


def formula(policy, heads, q, k, v, args):
    """What each policy says, written out."""
    p, tokens = weights(q, k, args), q.shape[2]
    if policy == "h2o-age":  # rows of padding do not count, and padding delays a token's first reader
        shown = shown_rows(args, tokens)
        ages = shown.sum(2)
        p = p * shown.any(-1, keepdim=True) * ((tokens - torch.arange(tokens)) / ages.clamp(min=1))[:, :, None]
    last = shown_rows(args, tokens)[:, :, -1]
    if policy in ("h2o", "h2o-age"):
        return over_group(p.sum(2), heads)
    if policy == "snapkv":
        return F.max_pool1d(over_group(p[:, :, -32:].sum(2), heads), 7, 1, 3)
    if policy == "tova":
        row = p[:, :, -1]
        row = row.mean(1, keepdim=True) if heads == "sum" else row.amax(1, keepdim=True)
        return row.expand(-1, KV_HEADS, -1)
    if policy == "recent":
        return torch.zeros(BATCH, KV_HEADS, tokens)
    if policy == "knorm":
        found = 1 / (k.double() ** 2).sum(-1).sqrt()
    if policy == "keydiff":
        found = torch.empty(BATCH, KV_HEADS, tokens, dtype=torch.float64)
        for b in range(BATCH):
            unit = k[b].double() / k[b].double().norm(dim=-1, keepdim=True)
            mean = unit[:, last[b, 0]].mean(1, keepdim=True)
            found[b] = 1 - (unit * mean).sum(-1) / mean.norm(dim=-1)
    if policy == "expected":
        found = torch.empty(BATCH, HEADS, tokens, dtype=torch.float64)
        for b in range(BATCH):
            for h in range(HEADS):
                rows = q[b, h, last[b, 0]].double()
                key, mu = k[b, h // GROUP].double(), rows.mean(0)
                sigma = torch.cov(rows.T, correction=0).reshape(DIM, DIM)
                z = args.scale * (key @ mu) + args.scale**2 / 2 * ((key @ sigma) * key).sum(-1)
                found[b, h] = z.masked_fill(~last[b, 0], -math.inf).softmax(-1)
        found = found.unflatten(1, (KV_HEADS, GROUP))
        found = found.mean(2) if heads == "sum" else found.amax(2)
    return found.masked_fill(~last, -math.inf)


@pytest.mark.parametrize(("padding", "additive"), [(0, False), (9, False), (9, True)])
@pytest.mark.parametrize("heads", ["sum", "max"])
@pytest.mark.parametrize("policy", ALL)
def test_scores_of_a_prompt(policy, heads, padding, additive):
    if heads == "max" and not POLICIES[policy].attention:
        pytest.skip("looks at no heads")
    case = prompt_case(padding=padding, additive=additive)
    found = scoring.score(policy if heads == "sum" else f"{policy}+max", *case)
    assert found.dtype == torch.float32 and found.shape == (BATCH, KV_HEADS, TOKENS)
    torch.testing.assert_close(found.double(), formula(policy, heads, *case).double(), atol=1e-5, rtol=1e-5)
    if padding and policy not in ("recent", "snapkv"):
        assert (found[1, :, :padding] <= found[1].amin(dim=1, keepdim=True)).all()


def test_expected_attention_of_many_queries():
    """The formula says what attention to unseen queries of the same kind is, on average."""
    torch.manual_seed(0)
    mu, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 30, 16)
    mix = torch.randn(16, 16) * 0.5

    def queries(n):
        return mu + torch.randn(1, 1, n, 16) @ mix

    args = AttentionArgs(None, 0.25, False)
    found = scoring.score("expected", queries(512), k, k, args)
    exponentials = ((queries(200_000) @ k.transpose(2, 3)) * 0.25).double().exp().mean(2)
    torch.testing.assert_close(found.double(), exponentials / exponentials.sum(-1, keepdim=True), atol=0.02, rtol=0.25)


def test_expected_attention_with_softcap_sinks_and_bias():
    q, k, v, _ = prompt_case(padding=0)
    bias, sinks = torch.randn(1, HEADS, 1, TOKENS), torch.randn(1, HEADS, 1, 2)
    q = q[:, :, :1]  # one row: nothing is spread, so it is attention itself
    found = scoring.score("expected", q, k, v, AttentionArgs(bias, 0.2, False, 1.5, sinks))
    raw = 1.5 * torch.tanh(q @ k.repeat_interleave(GROUP, 1).transpose(2, 3) * 0.2 / 1.5) + bias
    want = torch.cat([raw, sinks.expand(BATCH, -1, -1, -1)], -1).softmax(-1)[:, :, 0, :TOKENS]
    torch.testing.assert_close(found, want.unflatten(1, (KV_HEADS, GROUP)).mean(2))


def test_maximum_with_masks_and_sinks_of_each_head():
    q, k, v, _ = prompt_case(tokens=20)
    mask, sinks = torch.rand(BATCH, HEADS, 20, 20) < 0.5, torch.randn(1, HEADS, 1, 1)
    found = scoring.score("h2o+max", q, k, v, AttentionArgs(mask, 0.2, False, 0.0, sinks))
    logits = (q @ k.repeat_interleave(GROUP, 1).transpose(2, 3) * 0.2).masked_fill(~mask, -math.inf)
    p = torch.cat([logits, sinks.expand(BATCH, -1, 20, -1)], -1).softmax(-1)[..., :20]
    torch.testing.assert_close(found, over_group(p.sum(2), "max"))


def test_age_counts_the_rows_that_could_attend():
    """An encoder's rows see all tokens, so dividing by age later must not favour its last tokens."""
    q, k, v, _ = prompt_case()
    everywhere = AttentionArgs(None, 0.2, False)
    found = scoring.score("h2o-age", q, k, v, everywhere)
    means = ranking.ranks(found, Rank(by_age=True), torch.arange(TOKENS), TOKENS, None)
    full = (q.double() @ k.double().repeat_interleave(GROUP, 1).transpose(2, 3) * 0.2).softmax(-1)
    torch.testing.assert_close(means.double(), over_group(full.mean(2), "sum"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("shape", [(2, 1), (2, 0), (0, 5)])
def test_prompts_of_one_token_or_none_and_empty_batches(policy, shape):
    batch, tokens = shape
    q, k = torch.randn(batch, HEADS, tokens, DIM), torch.randn(batch, KV_HEADS, tokens, DIM)
    found = scoring.score(policy, q, k, k, AttentionArgs(None, 1.0, True))
    assert found.shape == (batch, KV_HEADS, tokens) and found.isfinite().all()


@pytest.mark.parametrize("policy", ["knorm", "keydiff"])
def test_a_broken_key_spoils_no_other(policy):
    q, k, v, args = prompt_case()
    want = scoring.score(policy, q, k, v, args)
    k[0, 1, 5] = math.nan
    found = scoring.score(policy, q, k, v, args)
    others = torch.arange(TOKENS) != 5
    assert found[0, 1, 5].isnan()  # which ranks highest: nothing is known of it
    torch.testing.assert_close(found[:, :, others], want[:, :, others], atol=0.02, rtol=0.1)


def test_keys_of_zeros_are_no_low_norm():
    q, k, v, args = prompt_case()
    k[0, 1, 5] = 0.0
    found = scoring.score("knorm", q, k, v, args)
    assert found[0, 1].argmin() == 5 and found.isfinite().all()


@pytest.mark.parametrize("value_norm", [None, True, False])
@pytest.mark.parametrize("policy", ALL)
def test_ranks_of_a_prompt(policy, value_norm):
    """What decides who stays: scores, divided by age and weighed by values as policy and options say."""
    if policy == "recent" and value_norm:
        pytest.skip("refused")
    case = prompt_case(padding=7)
    case[2][1, :, 2] = 0.0  # a value of padding that weighs nothing
    made = planned(policy=policy, value_norm=value_norm)
    scores = scoring.score(policy, *case)
    found = ranking.prompt_ranks(scores, case[2], made.format)
    want = scores.double()
    if policy == "h2o-age":
        want = want / (TOKENS - torch.arange(TOKENS))
    if value_norm or (value_norm is None and policy == "expected"):
        want = (want + (0.02 if policy == "expected" else 0)) * (case[2].double() ** 2).sum(-1).sqrt()
        if policy == "tova":
            want = want.mean(1, keepdim=True).expand_as(want)
    want = torch.where(scores == -math.inf, -math.inf, want)
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)


def planned(layer=0, layers=4, **options):
    options = {"tiers": "int8:0.25", "quantizer": "mikv", **options}
    return Planner(Options(**options)).layer(layer, CacheShape(1, 2, 80, 80, torch.float32, layers))


def test_formats_as_text():
    for watch in (
        Watch(),
        Watch(32, 7, 2),
        Watch(1, 1, 1, 1, True),
        Watch(heads="max"),
        Watch(0, 1, 1, 9, False, "max"),
    ):
        assert Watch.parse(str(watch)) == watch
        for rank in (
            None,
            Rank(True),
            Rank(False, True, 0.02),
            Rank(True, True, 0.0, True, "a-b_c"),
            Rank(anew="keydiff"),
        ):
            fmt = LayerFormat(LayerFormat.parse("fp,fp").tiers, True, watch, rank)
            assert LayerFormat.parse(str(fmt)) == fmt
    for text in ("fp,fp+wach:r0p1n1", "fp,fp+watch:r0p1", "fp,fp+watch:r0p1n1,min", "fp,fp+rank:size"):
        with pytest.raises(ValueError, match="not a"):
            LayerFormat.parse(text)


def test_the_default_preset_stays_on_the_plain_path():
    text = str(Planner(Options()).layer(0, CacheShape(1, 2, 64, 64, torch.float16)).format)
    assert text.endswith("+watch:r32p7n2+rotate:v")
    assert planned(policy="snapkv").format.rank is None and planned(policy="snapkv").format.watch.is_plain


# Later calls, op by op


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("own", [1, 5])
@pytest.mark.parametrize(
    "watch",
    [
        Watch(heads="max"),
        Watch(rows=1, memory=1, joint=True),
        Watch(rows=3, memory=4),
        Watch(rows=2, memory=20, heads="max"),
    ],
    ids=str,
)
def test_scores_of_later_calls(watch, own, backend):
    torch.manual_seed(3)
    group = 3
    fmt, store, length, q, k, v, keys, values = dense_case("8:t1c16b,4:t1c8|fp,fp", [21, 9], own, group)
    positions = store.tiers[0].positions[:, :, :21]
    if watch.joint:  # all heads hold the same tokens then
        positions.copy_(positions[:, :1].expand_as(positions))
        fmt = LayerFormat.parse("fp,fp|fp,fp")
        fmt, store, length, q, k, v, keys, values = joint_case(own, group)
        positions = store.tiers[0].positions[:, :, :21]
    fmt = LayerFormat(fmt.tiers, True, watch)
    mask = (torch.rand(2, 2 * group, own, length + own) < 0.8).tril(length)
    mask[..., length] = True
    before = torch.rand(2, 2, 21)
    before[1, 0, 3] = -math.inf  # hidden tokens stay hidden
    store.scores[:, :, :21] = before
    _, lse = attention.attend(q, k, v, mask, 0.3, 0.0, store, fmt, (21, 9), length)
    with dispatch.use(backend):
        got = ranking.observe(q, k, lse, mask, 0.3, 0.0, store, fmt, 21, length)

    scores = q.double() @ keys.double().repeat_interleave(group, 1).transpose(2, 3) * 0.3
    rows = min(watch.rows or own, own)
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)[:, :, -rows:].sum(2).unflatten(1, (2, group))
    p = p.amax(2) if watch.heads == "max" else p.sum(2) / (group if watch.memory else 1)
    if watch.joint:
        p = p.mean(1, keepdim=True).expand_as(p)
    old, new = p[:, :, :length].gather(2, positions.long()), p[:, :, length:]
    if watch.memory:
        new = new / torch.tensor([min(rows, own - j) for j in range(own)])
        share = torch.tensor(rows) / (length + own - positions).clamp(max=max(watch.memory, rows))
        old = before * (1 - share) + share * old / rows
    else:
        old = before + old
    old = torch.where(before == -math.inf, before, old)
    torch.testing.assert_close(store.scores[:, :, :21].double(), old.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.double(), new.double(), atol=1e-5, rtol=1e-5)


def joint_case(own, group):
    """A store of two tiers whose heads hold the same tokens."""
    from mikv_compile.kernels import tokens
    from tests.kernels.test_reference_kernels import empty_store

    fmt = LayerFormat.parse("fp,fp|fp,fp")
    store = empty_store(fmt, 16, 24, [37, 25])
    keys, values = torch.randn(2, 2, 30 + own, 16), torch.randn(2, 2, 30 + own, 24)
    order = torch.rand(2, 1, 30).argsort(dim=2).expand(-1, 2, -1)
    for tier, tier_fmt, index in zip(store.tiers, fmt.tiers, order.split([21, 9], 2), strict=True):
        tokens.write_tokens(tier, tier_fmt, 0, keys, values, index, 0, None, store.balancer)
    q = torch.randn(2, 2 * group, own, 16)
    return fmt, store, 30, q, keys[:, :, 30:], values[:, :, 30:], keys, values


# Whole generations against a simulation

GENERATIONS = [(name, {}) for name in ALL] + [
    ("h2o", {"heads": "max"}),
    ("h2o", {"value_norm": True}),
    ("h2o-age", {"value_norm": True, "heads": "max"}),
    ("snapkv", {"heads": "max", "value_norm": True}),
    ("tova", {"value_norm": True}),
    ("tova", {"heads": "max"}),
    ("expected", {"value_norm": False}),
    ("expected", {"heads": "max"}),
    ("keydiff", {"value_norm": True}),
]


class Simulation:
    """One layer that evicts, in plain loops: what is kept, and the scores of it, by head."""

    def __init__(self, policy, options, kept):
        self.policy, self.heads, self.kept = policy, options.get("heads", "sum"), kept
        self.by_value = options.get("value_norm", policy == "expected")
        self.tokens: list[list[int]] = []
        self.scores: list[dict[int, float]] = []
        self.length = 0

    def attend(self, q, keys, h, group):
        """Attention of a call's rows of one query head to what its KV head keeps and to the own tokens."""
        own = range(self.length - q.shape[1], self.length)
        rows = []
        for i, position in enumerate(own):
            seen = [t for t in self.tokens[h // group] if t <= position]
            logits = torch.stack([q[h, i] @ keys[h // group, t] for t in seen]) * q.shape[2] ** -0.5
            rows.append(dict(zip(seen, logits.softmax(0).tolist(), strict=True)))
        return rows

    def call(self, q, keys, values):
        """q [H_q, S, D] of the call; keys and values [H_kv, T, D] of all tokens so far."""
        new, group = q.shape[1], q.shape[0] // keys.shape[0]
        fresh = not self.length
        self.length += new
        if fresh:
            self.tokens = [[] for _ in keys]
            self.scores = [{} for _ in keys]
        for kept in self.tokens:
            kept += range(self.length - new, self.length)
        self.score([self.attend(q, keys, h, group) for h in range(q.shape[0])], q, keys, group, new, fresh)
        excess = max(len(self.tokens[0]) - self.kept, 0)
        for h, ranks in enumerate(self.ranks(keys, values)):
            order = sorted(self.tokens[h], key=lambda t: (ranks[t], t))
            self.tokens[h] = sorted(order[excess:])

    def score(self, rows, q, keys, group, new, fresh):
        watched = {"snapkv": 32, "tova": 1, "expected": 512}.get(self.policy, new)
        if self.policy in ("recent", "knorm", "keydiff"):
            return
        if fresh and self.policy == "expected":
            args = AttentionArgs(None, q.shape[2] ** -0.5, True)
            found = scoring.score("expected" + "+max" * (self.heads == "max"), q[None], keys[None], keys[None], args)[0]
            self.scores = [dict(enumerate(x.tolist())) for x in found]
            return
        for h, scores in enumerate(self.scores):
            group_rows = rows[h * group : (h + 1) * group]
            if self.policy == "tova":
                group_rows = rows
            n = min(watched, new)
            got = {}
            for t in self.tokens[h]:
                each = [sum(row.get(t, 0.0) for row in r[-n:]) for r in group_rows]
                got[t] = max(each) if self.heads == "max" else sum(each)
            own = list(range(self.length - new, self.length))
            if self.policy == "snapkv":
                pooled = {t: max(got[u] for u in own if abs(u - t) <= 3) for t in own}
                got |= pooled
            count = len(group_rows) if self.heads == "sum" else 1
            for t in self.tokens[h]:
                if self.policy == "tova":
                    scores[t] = got[t] / count
                elif self.policy == "expected":
                    if t in own:
                        scores[t] = got[t] / count / min(n, self.length - t)
                    else:
                        part = n / min(self.length - t, max(128, n))
                        scores[t] = scores[t] * (1 - part) + part * got[t] / count / n
                else:
                    scores[t] = scores.get(t, 0.0) + got[t]

    def ranks(self, keys, values):
        found = []
        for h, kept in enumerate(self.tokens):
            if self.policy == "knorm":
                ranks = {t: 1 / keys[h, t].norm().item() for t in kept}
            elif self.policy == "keydiff":
                unit = F.normalize(keys[h, kept], dim=-1)
                mean = unit.mean(0)
                ranks = dict(zip(kept, (1 - F.cosine_similarity(unit, mean[None])).tolist(), strict=True))
            elif self.policy == "recent":
                ranks = dict.fromkeys(kept, 0.0)
            else:
                ranks = dict(self.scores[h])
            for t in kept:
                if self.policy == "h2o-age":
                    ranks[t] /= self.length - t
                if self.by_value:
                    ranks[t] = (ranks[t] + 0.02 * (self.policy == "expected")) * values[h, t].norm().item()
            found.append(ranks)
        if self.policy == "tova" and self.by_value:
            found = [{t: sum(r[t] for r in found) / len(found) for t in found[0]}] * len(found)
        return found


class Recording(Decoder):
    """The decoder, which also hands out its first layer's projections."""

    def projections(self, x):
        q, k, v = self.q[0](x), self.k[0](x), self.v[0](x)
        return (y.view(x.shape[1], -1, self.dim).transpose(0, 1) for y in (q, k, v))


@pytest.mark.parametrize(("policy", "options"), GENERATIONS, ids=str)
@torch.no_grad()
def test_what_a_generation_keeps(policy, options):
    """Prompt, single tokens, a chunk and single tokens again: the same tokens stay as in the simulation."""
    calls = [41, *[1] * 9, 6, *[1] * 5]
    model, xs = Recording(layers=1, heads=6, kv_heads=2, dim=16), inputs(calls, width=96, seed=4)
    given = {
        "lower": "eager", "tiers": "fp:24", "policy": policy, "window": 0, "sinks": 0, "recent_share": 0.0,
        "flush_every": 1, **options,
    }  # fmt: skip
    compiled, cache = torch.compile(model, backend="mikv", options=given), model.new_cache()
    simulation, keys, values = Simulation(policy, options, 24), torch.empty(2, 0, 16), torch.empty(2, 0, 16)
    for number, x in enumerate(xs):
        compiled(x * 3, cache)
        q, k, v = model.projections(x[0][None] * 3)
        keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        simulation.call(q, keys, values)
        store = cache.keys[0].store
        kept = store.typed().tiers[0].positions[0, :, : store.counts[0]].sort(dim=-1).values.tolist()
        assert kept == simulation.tokens, f"call {number}"
    if policy == "tova":
        assert kept[0] == kept[1]


@pytest.mark.parametrize("policy", ["knorm", "keydiff", "expected", "h2o-age", "tova"])
@torch.no_grad()
def test_kept_tokens_of_a_padded_batch(policy):
    """In Llama, with a row that is padded on the left: padding leaves first, whatever its keys look like."""
    options = {"tiers": "fp:40", "window": 4, "sinks": 0, "flush_every": 1, "lower": "eager", "policy": policy}
    ids, shown = tiny_models.prompt(2, 48), torch.ones(2, 48, dtype=torch.long)
    shown[1, :8] = 0
    model = torch.compile(tiny_models.model("llama"), backend="mikv", options=options)
    out = model.generate(
        ids, attention_mask=shown, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    for layer in out.past_key_values.layers:
        kept = layer.keys.store.typed().tiers[0].positions[:, :, :40]
        assert (kept[1] >= 8).all()
        assert (kept[0] < 8).any()


@pytest.mark.parametrize("policy", ["knorm", "keydiff"])
@torch.no_grad()
def test_hidden_tokens_of_a_later_chunk(policy):
    """A chunk whose first tokens are padding for one row of the batch: these leave first, in all later calls too."""
    model, xs = Decoder(layers=1), inputs([20, 12, 1, 1, 1, 1], batch=2)
    options = {"tiers": "fp:26", "policy": policy, "window": 0, "sinks": 0, "flush_every": 1, "lower": "eager"}
    compiled, cache, length = torch.compile(model, backend="mikv", options=options), model.new_cache(), 0
    for x in xs:
        rows, length = x.shape[1], length + x.shape[1]
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows).expand(2, 1, -1, -1).clone()
        mask[1, :, :, 20:24] = False
        compiled(x, cache, mask)
    store = cache.keys[0].store
    kept = store.typed().tiers[0].positions[:, :, :26]
    assert store.counts == (26,) and not ((kept[1] >= 20) & (kept[1] < 24)).any()
    assert ((kept[0] >= 20) & (kept[0] < 24)).any()


@pytest.mark.parametrize("policy", ["knorm", "keydiff", "snapkv"])
@torch.no_grad()
def test_tokens_that_come_without_queries(policy):
    """Keys and values are enough for some policies; for the others such tokens are new ones without scores."""
    from mikv_compile.store import LayerStore

    torch.manual_seed(0)
    shape = CacheShape(1, 2, 16, 16, torch.float32)
    plan = Planner(Options(tiers="fp:16", policy=policy, window=0, sinks=0, flush_every=1)).layer(0, shape)
    store, k = LayerStore(plan, shape, torch.device("cpu")), torch.randn(1, 2, 44, 16)
    for part in k.split([40, 1, 3], dim=2):
        store.append(part, part)
    kept = store.typed().tiers[0].positions[0, :, :16].sort(dim=-1).values
    if policy == "snapkv":
        assert kept.tolist() == [list(range(28, 44))] * 2
    elif policy == "knorm":
        assert torch.equal(kept.long(), k[0].norm(dim=-1).argsort(dim=-1)[:, :16].sort(dim=-1).values)
    else:
        assert kept.tolist() != [list(range(28, 44))] * 2
        assert (kept < 28).any()


@pytest.mark.parametrize("preset", ["mikv", "evict"])
@pytest.mark.parametrize("policy", ALL)
@torch.no_grad()
def test_backends_agree_on_what_stays(policy, preset):
    """The C++ step with its short cuts, and plain PyTorch: the same tokens in each tier after a generation."""
    found = []
    for backend in ("cpp", "reference"):
        model, xs = Decoder(layers=1, dim=64), inputs([150, *[1] * 30, 9, *[1] * 40], width=256)
        options = {"preset": preset, "policy": policy, "quantizer": "mikv", "window": 8, "flush_every": 8,
                   "lower": "eager", "value_norm": None if policy == "recent" else True}  # fmt: skip
        torch._dynamo.reset()
        with dispatch.use(backend):
            compiled, cache = torch.compile(model, backend="mikv", options=options), model.new_cache()
            for x in xs:
                compiled(x, cache)
        store = cache.keys[0].store
        found.append(
            [
                t.positions[:, :, :n].sort(-1).values.tolist()
                for t, n in zip(store.typed().tiers, store.counts, strict=True)
            ]
        )
    assert found[0] == found[1]


# Budgets of layers


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 31])
def test_pyramid_of_token_counts(layers):
    """PyramidKV, section 4: a line from 2 - 1/20 to 1/20 of the mean, and the same total as without."""
    (tier,) = Planner(Options(tiers="int4:1000")).layer(0, SHAPE).tiers
    counts = [pyramid((tier,), i, layers)[0].share for i in range(layers)]
    assert sum(counts) == 1000 * layers and counts == sorted(counts, reverse=True)
    if layers > 1:
        least = 1000 / 20
        most = 2 * 1000 - least
        for i, count in enumerate(counts):
            assert abs(count - (most - i * (most - least) / (layers - 1))) <= 1


def test_pyramid_of_shares():
    plans = [planned(i, 4, tiers="int8:0.05,k4v2:0.2", layer_budget="pyramid", quantizer="kivi") for i in range(4)]
    for number, share in ((0, 0.05), (1, 0.2)):
        factors = [plan.tiers[number].share / share for plan in plans]
        assert factors == pytest.approx([1.95, 1.95 - 1.9 / 3, 1.95 - 3.8 / 3, 0.05])
    steep = [planned(i, 4, tiers="int8:0.8", layer_budget="pyramid") for i in range(4)]
    assert [plan.tiers[0].share for plan in steep] == pytest.approx([1.0, 1 - 0.4 / 3, 1 - 0.8 / 3, 0.6])
    assert not steep[0].evicts and steep[3].evicts
    kept = [plan.fill(1000).counts for plan in steep]
    assert kept[0] == (1000,) and kept[3] == (668,)
    rest = [planned(i, 2, tiers="int8:0.1,int4", layer_budget="pyramid") for i in range(2)]
    assert [plan.tiers[0].share for plan in rest] == pytest.approx([0.195, 0.005])
    assert not rest[1].evicts and sum(rest[1].fill(777).counts) == 777
    few = planned(3, 4, tiers="int8:20", layer_budget="pyramid")
    assert few.tiers[0].share == 1 and few.evicts


@pytest.mark.parametrize("budget", ["1 MB", "2800 KB"])
def test_pyramid_keeps_to_a_budget_in_bytes(budget):
    """Also with a flush and a block waiting, and the low tier grown: all layers together never take more."""
    shape = CacheShape(1, 3, 64, 64, torch.float16, layers=6)
    sizes = []
    for i in range(6):
        plan = Planner(Options(budget=budget, layer_budget="pyramid")).layer(i, shape)
        high, low = plan.fill(10**6).counts
        slots = plan.capacities((high + plan.flush_every + 64, low + low // GROWTH))
        buffers = buffer_shapes(plan.format, 1, 3, 64, 64, slots, torch.float16)
        sizes.append(sum(math.prod(size) * dtype.itemsize for size, dtype in buffers))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[5]
    assert 0.9 * parse_size(budget) < sum(sizes) <= parse_size(budget)


@pytest.mark.parametrize("budget", [0.06, 0.12, 0.2, 0.24, 0.3, 0.5])
@pytest.mark.parametrize("layers", [4, 30])
def test_pyramid_keeps_to_a_fraction(budget, layers):
    """What window and sinks take is the same in each layer; it comes off each layer's tokens in proportion."""
    shape = CacheShape(1, 3, 64, 64, torch.bfloat16, layers)
    plans = [Planner(Options(budget=budget, layer_budget="pyramid")).layer(i, shape) for i in range(layers)]
    for length, least, most in ((2048, 0.96, 1.05), (4096, 0.97, 1.01), (32768, 0.97, 1.01)):
        total = sum(plan.nbytes(length, 1, 3, 64, 64, torch.bfloat16) for plan in plans)
        part = total / (layers * shape.dense_nbytes(length))
        assert least * budget < part <= most * budget


def test_layers_that_are_named_and_windows_take_no_part_in_a_pyramid():
    options = Options(tiers="int8:0.2", layers="0=fp; 2=int4:0.2", layer_budget="pyramid", quantizer="mikv")
    plans = [Planner(options).layer(i, CacheShape(1, 2, 80, 80, torch.float32, 4)) for i in range(4)]
    assert [plan.tiers[0].share for plan in plans] == [
        None,
        pytest.approx(0.2 * (1.95 - 1.9 / 3)),
        0.2,
        pytest.approx(0.01),
    ]
    sliding = Options(tiers="int8:0.2,int4", layer_budget="pyramid", policy="knorm", value_norm=True, quantizer="mikv")
    plan = Planner(sliding).layer(0, CacheShape(1, 2, 80, 80, torch.float32, 4), sliding=True)
    assert plan.is_fifo and plan.tiers[0].share == 0.2 and plan.policy == "recent"


@pytest.mark.parametrize("regional", [False, True])
@torch.no_grad()
def test_pyramid_in_a_model(regional):
    """Each layer of the model keeps its own number of tokens, the whole model compiled or layer by layer."""
    options = {"tiers": "fp:16", "window": 0, "sinks": 0, "flush_every": 1, "layer_budget": "pyramid", "lower": "eager"}
    model = mikv_compile.compile(tiny_models.build("llama", num_hidden_layers=3), regional=regional, **options)
    out = model.generate(
        tiny_models.prompt(1, 40), max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    counts = [layer.keys.store.counts[0] for layer in out.past_key_values.layers]
    assert counts == [31, 16, 1] and "policy snapkv" in str(cache_report(out.past_key_values))


# Options and registration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "mean"}, "'sum' or 'max'"),
        ({"heads": True}, "'sum' or 'max'"),
        ({"value_norm": "yes"}, "True or False"),
        ({"value_norm": 1}, "True or False"),
        ({"layer_budget": "cone"}, "'uniform' or 'pyramid'"),
        ({"policy": "knorm", "heads": "max"}, "does not look at the query heads"),
        ({"policy": "recent", "value_norm": True}, "no scores to weigh"),
        ({"tiers": "int4", "layer_budget": "pyramid"}, "no tier has a share"),
        ({"preset": "full", "layer_budget": "pyramid"}, "no tier has a share"),
        ({"policy": "keydif"}, "did you mean 'keydiff'"),
        ({"layer_budgets": "pyramid"}, "did you mean 'layer_budget'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(options)


def test_options_reach_the_ops():
    made = planned(policy="tova", heads="max", value_norm=True)
    assert made.policy == "tova+max"
    assert str(made.format).endswith("+scored+watch:r1p1n1m1,joint,max+rank:value,joint")
    assert str(planned(policy="expected").format).endswith("+watch:r512p1n1m128+rank:value0.02")
    assert str(planned(policy="expected", value_norm=False).format).endswith("+watch:r512p1n1m128")
    assert str(planned(policy="keydiff").format).endswith("+scored+rank:anew=keydiff")
    assert str(planned(tiers="fp", policy="keydiff").format) == "fp,fp"
    assert planned(policy="h2o-age").recent_share == 0.5


def test_names_that_cannot_be_registered():
    for name, message in (("h2o", "built in"), ("a+b", "not made of"), ("", "not made of")):
        with pytest.raises(ValueError, match=message):
            register(name, Policy(lambda q, k, v, args: k.sum(-1)))
    assert "a+b" not in POLICIES


def example_policy():
    """The first example of CONTRIBUTING.md's section about policies."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    return text.split("## A policy\n")[1].split("```python\n")[1].split("```")[0]


@torch.no_grad()
def test_a_policy_from_a_file_of_its_own(tmp_path):
    """All that a new policy takes: one short file with one line that registers it."""
    path = tmp_path / "value_length.py"
    path.write_text(example_policy())
    lines = path.read_text().splitlines()
    assert len(lines) < 80 and sum("register(" in line for line in lines) == 1
    with pytest.raises(OptionError, match="unknown policy 'value-length'"):
        Options(policy="value-length")
    spec = importlib.util.spec_from_file_location("value_length", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        model, xs = Recording(layers=1, heads=6, kv_heads=2, dim=16), inputs([40, *[1] * 6], width=96)
        options = {
            "tiers": "fp:16",
            "policy": "value-length",
            "window": 0,
            "sinks": 0,
            "flush_every": 1,
            "lower": "eager",
        }
        compiled, cache, values = torch.compile(model, backend="mikv", options=options), model.new_cache(), []
        for x in xs:
            compiled(x, cache)
            values.append(list(model.projections(x))[2])
        kept = cache.keys[0].store.typed().tiers[0].positions[0, :, :16].sort(dim=-1).values
        norms = torch.cat(values, 1).norm(dim=-1)
        assert torch.equal(kept.long(), norms.argsort(dim=-1)[:, -16:].sort(dim=-1).values)
    finally:
        del POLICIES["value-length"]
