"""Pages in host memory: copies out and back, what a step waits for, and that tokens do not depend on any of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run

from pagedjax import host_pages
from pagedjax.config import EngineConfig
from pagedjax.host_pages import HostPages
from pagedjax.kv_cache import bytes_per_page
from pagedjax.page_pool import NULL_PAGE
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import Swapped, Swaps
from pagedjax.swap import pages_per_copy

PAGE_SIZE = 4
COPY = pages_per_copy(PAGE_SIZE)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("host", [host_pages.PINNED, "numpy"])
def test_pages_come_back_as_they_went_and_no_other_is_touched(host: str, late: bool, monkeypatch):
    """Also where more copies are on their way than may lie beside the pool."""
    monkeypatch.setattr(host_pages, "PINNED", host)
    monkeypatch.setattr(host_pages, "MAX_STAGED", 1)
    engine = make_engine(*load_tiny("gqa"), num_pages=500)
    kv, pages = engine.runner._kv, HostPages(engine.runner._step, PAGE_SIZE)
    rng = np.random.default_rng(0)
    kv = replace(kv, layers=tuple(jnp.asarray(rng.standard_normal(layer.shape), layer.dtype) for layer in kv.layers))
    before = [np.array(layer) for layer in kv.layers]
    sources = rng.permutation(np.arange(1, 250))[: 2 * COPY + 1].tolist()
    targets = [NULL_PAGE] * (COPY + 3) + rng.permutation(np.arange(250, 500))[: COPY - 2].tolist()
    swapped = Swapped(len(sources) * PAGE_SIZE, len(sources))
    kv = pages.swap(kv, Swaps([(swapped, sources)], [], []))
    back = [(swapped, targets)]
    kv = pages.swap(kv, Swaps([], [] if late else back, []))
    pages.begin(back if late else [])
    kv = pages.finish(kv)
    pages.wait()
    moved = [(source, target) for source, target in zip(sources, targets, strict=True) if target != NULL_PAGE]
    for layer, old in zip(kv.layers, before, strict=True):
        expected = old.copy()
        for source, target in moved:
            expected[target] = old[source]
        np.testing.assert_array_equal(np.asarray(layer)[1:], expected[1:])
    assert not pages._copies


def test_pages_that_nobody_wants_any_more_leave_the_host():
    engine = make_engine(*load_tiny("gqa"))
    pages, swapped = HostPages(engine.runner._step, PAGE_SIZE), Swapped(4, 1)
    pages.swap(engine.runner._kv, Swaps([(swapped, [3])], [], []))
    assert len(pages._copies) == 1
    del swapped
    assert len(pages._copies) == 0


def test_gather_and_scatter_make_no_pool_sized_temporary():
    engine = make_engine(*load_tiny("gqa"), num_pages=40_000)
    kv = engine.runner._kv
    pool = sum(layer.nbytes for layer in kv.layers)
    (gather, gather_args), (scatter, scatter_args) = engine.runner._host_pages.functions(kv)
    for function, args in ((gather, gather_args), (scatter, scatter_args)):
        function.ready(*args)
    assert scatter.memory_analysis().alias_size_in_bytes >= pool
    assert scatter.memory_analysis().temp_size_in_bytes < pool / 20
    assert gather.memory_analysis().temp_size_in_bytes + gather.memory_analysis().output_size_in_bytes < pool / 20


ROOMY, TIGHT = {}, {"num_pages": 27, "max_num_batched_tokens": 16}
SWAP = {"swap_space": 0.01, "preemption_mode": "swap"}
LENGTHS = [(1, 20), (7, 30), (33, 12), (4, 40), (50, 8), (16, 16), (2, 60), (25, 25), (12, 3), (40, 30)]


@pytest.mark.parametrize(
    ("caching", "lookahead"), [(False, 1), (True, 1), pytest.param(False, 3, marks=pytest.mark.slow)]
)
def test_tokens_are_those_of_recomputation_and_of_a_roomy_pool(caching: bool, lookahead: int):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n, _ in LENGTHS]
    each = [greedy(n) for _, n in LENGTHS]
    tokens, engines = [], []
    for settings in (ROOMY, TIGHT, TIGHT | SWAP):
        engines.append(make_engine(*load_tiny("gqa"), enable_prefix_caching=caching, lookahead=lookahead, **settings))
        tokens.append([r.output_token_ids for r in run(engines[-1], prompts, each)])
    assert tokens[0] == tokens[1] == tokens[2]
    recompute, swap = (engine.scheduler.stats for engine in engines[1:])
    assert recompute.num_preemptions and not recompute.num_swap_outs
    assert swap.num_swap_outs == swap.num_preemptions >= 3 and swap.num_swap_ins >= 3 - caching
    assert swap.num_scheduled_tokens < recompute.num_scheduled_tokens
    assert not engines[2].runner._host_pages._copies and not engines[2].runner._host_pages._late


def test_what_a_step_reads_is_sent_before_the_pages_that_it_does_not_wait_for(monkeypatch):
    """Else it would wait for these as well."""
    rng = np.random.default_rng(0)
    engine = make_engine(*load_tiny("gqa"), **TIGHT | SWAP)
    runner, begun, ahead = engine.runner, [], []
    begin = runner._host_pages.begin

    def note(late):
        begun.append(len(late))
        begin(late)

    def forward(function):
        def call(*args):
            if len(begun) > len(ahead):
                ahead.append([isinstance(arg, jax.Array) for arg in jax.tree.leaves(args[-1])])
            return function(*args)

        return call

    monkeypatch.setattr(runner._host_pages, "begin", note)
    step = runner._step
    for name in ("forward", "decode"):
        make = getattr(step, name)
        monkeypatch.setattr(type(step), name, lambda self, *args, make=make: forward(make(*args)))
    run(engine, [rng.integers(0, 128, n).tolist() for n, _ in LENGTHS], [greedy(n) for _, n in LENGTHS])
    assert sum(begun) >= 3 and len(ahead) == len(begun) and all(map(all, ahead))


@pytest.mark.parametrize("caching", [False, True])
def test_samples_that_share_pages_are_swapped_each_with_its_own(caching: bool):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 128, n).tolist() for n in (9, 14, 23)]
    each = [SamplingParams(n=3, seed=10 * i, temperature=1.0, max_tokens=20, ignore_eos=True) for i in range(3)]
    tokens = []
    for settings in (ROOMY, TIGHT | SWAP):
        engine = make_engine(*load_tiny("gqa"), enable_prefix_caching=caching, **settings)
        tokens.append([r.output_token_ids for r in run(engine, prompts, each)])
    assert tokens[0] == tokens[1]
    assert engine.scheduler.stats.num_swap_ins >= 3 - 2 * caching


@pytest.mark.slow
def test_log_probabilities_and_penalties_survive_swapping():
    """Of a prompt too, which is computed in part before and in part after."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 128, n).tolist() for n in (30, 41, 50, 44)]
    params = greedy(20, presence_penalty=0.5, logprobs=1, prompt_logprobs=1)
    results = []
    for settings in (ROOMY, TIGHT | SWAP):
        engine = make_engine(*load_tiny("gqa"), enable_prefix_caching=False, **settings)
        results.append(run(engine, prompts, params))
    assert engine.scheduler.stats.num_swap_ins > 0
    for roomy, tight in zip(*results, strict=True):
        assert roomy.output_token_ids == tight.output_token_ids
        for name in ("logprobs", "prompt_logprobs"):
            pairs = [(a, b) for a, b in zip(getattr(roomy, name), getattr(tight, name), strict=True) if a and b]
            assert len(pairs) == (20 if name == "logprobs" else len(roomy.prompt_token_ids) - 1)
            for a, b in pairs:
                token = next(iter(a))
                np.testing.assert_allclose(a[token].logprob, b[token].logprob, atol=1e-4)


def test_warming_up_readies_what_swapping_needs():
    engine = make_engine(*load_tiny("gqa"), **TIGHT, **SWAP)
    engine.warm_up(progress=False)
    compiled = engine.num_compilations
    run(engine, [[1, 2, 3]] * 6, greedy(60))
    assert engine.scheduler.stats.num_swap_outs and engine.num_compilations == compiled


def test_the_pool_leaves_room_for_copies_on_their_way():
    config = EngineConfig(model="test", page_size=16)
    assert host_pages.staged_bytes(config, 1 << 20) == 0
    assert host_pages.staged_bytes(replace(config, swap_space=1), 1 << 20) == 128 << 20


def test_host_memory_is_pinned_where_the_backend_has_it():
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    engine = make_engine(*load_tiny("gqa"))
    pages, swapped = engine.runner._host_pages, Swapped(4, 1)
    pages.swap(engine.runner._kv, Swaps([(swapped, [3])], [], []))
    pages.wait()
    (copy,) = pages._copies[swapped]
    if host_pages.PINNED in kinds:
        assert copy.pages.sharding.memory_kind == host_pages.PINNED
    else:
        assert isinstance(copy.pages, np.ndarray)


def test_space_for_less_than_one_copy_is_refused():
    model, params = load_tiny("gqa")
    least = COPY * bytes_per_page(model.config, PAGE_SIZE, model.dtype) / 2**30
    with pytest.raises(ValueError, match=rf"swap_space=1e-06; accepted: 0, or at least {least:.3g} GiB for one copy"):
        make_engine(model, params, swap_space=1e-6)
    swap = make_engine(model, params, swap_space=least * 1.01).scheduler.swap
    assert swap is not None and swap.num_pages == COPY


def test_nothing_is_swapped_by_default_or_where_recomputation_is_asked_for():
    assert make_engine(*load_tiny("gqa")).scheduler.swap is None
    assert make_engine(*load_tiny("gqa"), swap_space=1, preemption_mode="recompute").scheduler.swap is None
