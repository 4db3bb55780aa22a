"""An error at any place of a call: the cache goes on as if nothing had happened, or says that it is unusable."""

import contextlib
import copy
import threading

import interrupts
import pytest
import torch
from decoder import Decoder, inputs, run
from test_preallocated import B, C, D, H, Prefix, fill, new_store, pair

from mikv_compile import UnusableCacheError
from mikv_compile.kernels import dispatch
from mikv_compile.preallocated import PreallocatedKV, give_back, take_over

SMALL = {"quantizer": "mikv", "window": 4, "sinks": 2}
THREE = {**SMALL, "tiers": "int8:0.1,int4:0.3,int2", "flush_every": 8}
CALLS = {
    # options, tokens of the calls before, tokens of the call that fails, how many tokens are left after a crop
    "prompt": ({}, [], 80, None),
    "prompt, evicting": ({**SMALL, "tiers": "int8:0.1,int4:0.3"}, [], 80, None),
    "append": ({"budget": 1.0}, [40], 1, None),
    "append and grow": ({"budget": 1.0}, [40, 40], 33, None),
    "append a chunk": ({}, [80], 5, None),
    "watched": ({**SMALL, "tiers": "fp:0.2,int4", "policy": "h2o", "flush_every": 64}, [40, 1], 1, None),
    "watched, averaged": ({**SMALL, "tiers": "fp:0.3", "policy": "tova", "flush_every": 8}, [40, 1], 1, None),
    "cropped": ({}, [80], 1, 60),
    "cropped, compressed again": (THREE, [40, 1, 1], 1, 20),
    "evicting": ({**SMALL, "tiers": "fp:0.3", "flush_every": 4}, [40, 1], 1, None),
    "demoting": ({"preset": "mikv-paper"}, [40, 1], 1, None),
    "demoting in blocks": (THREE, [40, *[1] * 7], 1, None),
    "evicting now": ({**SMALL, "tiers": "fp:0.3", "flush_every": 1}, [40, 1], 1, None),
    "recycling": ({**SMALL, "tiers": "int8:0.1,int4:8", "flush_every": 2}, [40, 1, 1, 1], 1, None),
    "a long chunk": (THREE, [40, 1], 90, None),
}
MOVING = ("demoting", "demoting in blocks", "evicting now", "recycling", "a long chunk")
"""Calls that move tokens between tiers: interrupted there, a cache is unusable."""

CROPPING = ("cropped", "rewind", "start over")
"""Calls that drop tokens first, which a few lines do: interrupted there, a cache is unusable as well."""


class Case:
    """A cache before a call, and what that call and later ones give if nothing fails."""

    tolerance = 0.0

    def __init__(self, options, before, tokens, crop, backend="cpp"):
        self.backend, self.crop = backend, crop
        self.model = Decoder(heads=2, kv_heads=1)
        self.fast = torch.compile(self.model, backend="mikv", options={"lower": "eager", **options})
        self.cache = self.model.new_cache()
        with dispatch.use(backend):
            run(self.fast, self.cache, inputs(before, width=32))
        (self.x,) = inputs([tokens], width=32, seed=2)
        self.later = inputs([1, 3, 1, 1], width=32, seed=3)
        self.want = self.go_on(self.copy())

    def copy(self):
        cache = copy.deepcopy(self.cache)
        if self.crop is not None:
            cache.keys = [key[:, :, : self.crop] for key in cache.keys]
            cache.values = [value[:, :, : self.crop] for value in cache.values]
        return cache

    @torch.no_grad()
    def call(self, cache, injection=None):
        with dispatch.use(self.backend), injection or contextlib.nullcontext():
            return self.fast(self.x, cache)

    def go_on(self, cache):
        """Outputs of the call and of the later ones, and what the stores hold then."""
        outputs = [self.call(cache)]
        with dispatch.use(self.backend):
            outputs += run(self.fast, cache, self.later)
        return torch.cat(outputs, 1), [held for key in cache.keys for held in contents(key.store)]

    def moments(self, injection):
        """How many places there are at which the call can fail."""
        self.call(self.copy(), injection)
        return injection.count

    def goes_on_after(self, injection, error):
        """Fail the call. True if the cache goes on as if nothing had happened, False if it says that it is unusable.

        None if the error was not raised, or where nobody sees it, as in a callback of the garbage collector.
        """
        cache = self.copy()
        try:
            self.call(cache, injection)
            return None
        except error as failed:
            assert "injected" in str(failed)
        try:
            got = self.go_on(cache)
        except UnusableCacheError as failed:
            assert "start again from the prompt" in str(failed)
            return False
        torch.testing.assert_close(got, self.want, rtol=0, atol=self.tolerance)
        return True


def contents(store):
    """Positions and scores of each tier's tokens, in the order of positions: slots may be in another order."""
    stored = store.typed()
    for number, (tier, count) in enumerate(zip(stored.tiers, store.counts, strict=True)):
        positions, order = tier.positions[:, :, :count].sort(dim=2)
        yield positions
        if not number and store.plan.format.has_scores:
            yield stored.scores[:, :, :count].gather(2, order)


def check(case, name, injections, error):
    """Each error leaves the cache as it was, or in the calls that move tokens unusable."""
    outcomes = [case.goes_on_after(injection, error) for injection in injections]
    assert True in outcomes or name in MOVING
    assert name in CROPPING or (False in outcomes) == (name in MOVING)


@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_any_kernel(name):
    """Before and after each of them."""
    case = Case(*CALLS[name])
    moments = case.moments(interrupts.Kernels(None, torch.OutOfMemoryError))
    assert moments >= 4
    injections = (interrupts.Kernels(at, torch.OutOfMemoryError) for at in range(moments))
    check(case, name, injections, torch.OutOfMemoryError)


@pytest.mark.parametrize("name", ["watched", "recycling"])
def test_an_error_in_any_reference_kernel(name):
    case = Case(*CALLS[name], "reference")
    moments = case.moments(interrupts.Kernels(None, RuntimeError))
    check(case, name, (interrupts.Kernels(at, RuntimeError) for at in range(moments)), RuntimeError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_lines_all_over_a_call(name):
    """As ctrl-C: anywhere in Python. A dozen of the lines that a call runs; see the slow test for all."""
    case = Case(*CALLS[name])
    lines = case.moments(interrupts.Lines())
    check(case, name, map(interrupts.Lines, range(7, lines, lines // 12)), KeyboardInterrupt)


class Preallocated(Case):
    """The same with a cache of 24 columns that the model keeps; a call that begins at an earlier column rewinds."""

    tolerance = 1e-5  # the second try of a prompt finds a cache that was taken over, and is added up in another order

    def __init__(self, options, before, call, later):
        torch.manual_seed(0)
        self.backend, self.later, (self.start, tokens) = "cpp", later, call
        self.model = Prefix(rows=2)
        self.fast = torch.compile(self.model, backend="mikv", options={"lower": "eager", **options})
        for start, count in before:
            self.step(start, count)
        self.x = torch.randn(2, tokens, H, D)
        self.cache = (self.model.k, self.model.v)
        self.want = self.go_on(self.copy())

    @torch.no_grad()
    def step(self, start, count):
        return self.fast(torch.randn(2, count, H, D, generator=torch.Generator().manual_seed(start)), start)

    def copy(self):
        return copy.deepcopy(self.cache)

    @torch.no_grad()
    def call(self, cache, injection=None):
        self.model.k, self.model.v = cache
        with injection or contextlib.nullcontext():
            return self.fast(self.x, self.start)

    def go_on(self, cache):
        outputs = [self.call(cache), *(self.step(start, 1) for start in self.later)]
        return torch.cat(outputs, 2), [self.model.k + 0, self.model.v + 0]


PREALLOCATED = {
    # options, calls before (first column, tokens), the call that fails, columns of later calls
    "prompt": ({"budget": 1.0}, [], (0, 12), [12, 13]),
    "append": ({**SMALL, "tiers": "int8:0.2,int4", "flush_every": 8}, [(0, 12)], (12, 1), [13, 14]),
    "rewind": ({"budget": 1.0}, [(0, 12)], (8, 2), [10, 11]),
    "start over": ({**SMALL, "tiers": "int8:0.2,int4", "flush_every": 2}, [(0, 12)], (0, 9), [9, 10]),
    "demoting": ({**SMALL, "tiers": "int8:0.2,int4", "flush_every": 1}, [(0, 12)], (12, 1), [13, 14]),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", PREALLOCATED)
def test_preallocated_caches(name):
    """Kernels that fail, and interrupts at some lines."""
    case = Preallocated(*PREALLOCATED[name])
    moments = case.moments(interrupts.Kernels(None, RuntimeError))
    check(case, name, (interrupts.Kernels(at, RuntimeError) for at in range(moments)), RuntimeError)
    lines = case.moments(interrupts.Lines())
    check(case, name, map(interrupts.Lines, range(7, lines, lines // 12)), KeyboardInterrupt)


def interrupted(function, injection):
    """Call it in a thread of its own, which takes torch's flags with it.

    A tracer can strike between the last line of a ``with`` and its end, so that a flag stays set; a signal cannot.
    """

    def call():
        with contextlib.suppress(KeyboardInterrupt), injection:
            function()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def interrupted_everywhere(work):
    """What ``work(injection)`` returns, with an interrupt at each line that it runs."""
    counting = interrupts.Lines()
    work(counting)
    assert counting.count > 5
    return {work(interrupts.Lines(at)) for at in range(counting.count)}


def has_memory(tensor):
    return tensor.untyped_storage().nbytes() == B * H * C * D * 4


def test_a_tensor_that_is_being_taken_over_is_dense_or_a_whole_handle():
    def work(injection):
        tensor, store = torch.ones(B, H, C, D), new_store()
        interrupted(lambda: take_over(tensor, store, "key"), injection)
        whole = isinstance(tensor, PreallocatedKV)
        assert whole or has_memory(tensor)
        assert torch.equal(tensor + 0, torch.full((B, H, C, D), 0.0 if whole else 1.0))
        if whole:
            assert tensor.store is store and (tensor.role, tensor.kv_layout) == ("key", "BHTD")
        return whole

    assert interrupted_everywhere(work) == {False, True}


def test_a_tensor_that_is_being_given_back_is_dense_or_a_whole_handle():
    torch.manual_seed(0)

    def work(injection):
        caches = pair()
        tokens = fill(caches)
        interrupted(lambda: give_back(caches[0]), injection)
        whole = isinstance(caches[0], PreallocatedKV)
        assert whole or has_memory(caches[0])
        assert torch.equal((caches[0] + 0)[:, :, :5], tokens[0]) and not (caches[0] + 0)[:, :, 5:].any()
        if whole:  # goes on as one
            (key, _) = fill(caches, 1, first=5)
            assert torch.equal((caches[0] + 0)[:, :, 5:6], key)
        return whole

    assert interrupted_everywhere(work) == {False, True}


SLIDING = {"tiers": "fp:0.2,fp", "quantizer": "mikv", "window": 3, "flush_every": 4, "sliding": True}


@pytest.mark.parametrize(
    ("options", "cut", "start"),
    [({}, lambda store: store.crop(90), 0), (SLIDING, lambda store: store.drop_before(80), 80)],
    ids=["the end", "the front"],
)
def test_tokens_that_are_being_dropped_are_all_there_or_the_store_is_unusable(options, cut, start):
    torch.manual_seed(0)

    def work(injection):
        store, tokens = new_store(**options), torch.randn(B, H, 120, D)
        store.append(tokens, tokens)
        for buffer in store.buffers[:7]:  # tier 0 may have its slots in any order
            buffer[:, :, : store.counts[0]] = buffer[:, :, : store.counts[0]].flip(2)
        before = store.bookkeeping
        interrupted(lambda: cut(store), injection)
        if not store.is_spoiled:
            assert torch.equal(store.dequantize("key", start), tokens[:, :, start : store.end])
        return "unusable" if store.is_spoiled else "as before" if store.bookkeeping == before else "done"

    assert interrupted_everywhere(work) == {"as before", "unusable", "done"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", PREALLOCATED)
def test_an_interrupt_at_any_line_with_a_preallocated_cache(name):
    case = Preallocated(*PREALLOCATED[name])
    check(case, name, map(interrupts.Lines, range(case.moments(interrupts.Lines()))), KeyboardInterrupt)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name):
    case = Case(*CALLS[name])
    check(case, name, map(interrupts.Lines, range(case.moments(interrupts.Lines()))), KeyboardInterrupt)
