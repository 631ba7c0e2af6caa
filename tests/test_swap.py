"""Swapping: who goes to host memory and comes back, and what that costs."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import pytest
from helpers import load_tiny
from simulated_requests import Case, Job, make_request
from simulation import Simulation

from pagedjax.config import EngineConfig
from pagedjax.host_pages import make_swap_space
from pagedjax.models.llama import Llama
from pagedjax.page_pool import NULL_PAGE, PagePool
from pagedjax.prefix_cache import PrefixCache
from pagedjax.request import Request, Status
from pagedjax.schedule import Schedule, SchedulerStats, Swaps
from pagedjax.scheduler import Scheduler
from pagedjax.swap import SwapCosts, SwapSpace, pages_per_copy, swap_is_faster

PAGE_SIZE = 4
COPY = pages_per_copy(PAGE_SIZE)
PAGE_BYTES = 10


def make(num_usable: int, *, copies: int = 4, caching: bool = False) -> Scheduler:
    pool = PagePool(num_usable + 1, PAGE_SIZE)
    swap = SwapSpace(copies * COPY, PAGE_SIZE, PAGE_BYTES)
    return Scheduler(pool, 4, 64, cache=PrefixCache(pool) if caching else None, swap=swap)


def add(scheduler: Scheduler, prompt_len: int, max_tokens: int = 12, **job) -> Request:
    request = make_request(scheduler._num_added, Job(prompt_len, max_tokens, **job))
    scheduler.add(request)
    return request


def land(scheduler: Scheduler, schedule: Schedule) -> None:
    tokens = [s.request.prompt_token_ids[-1] + 1 + len(s.request.output_token_ids) for s in schedule.sequences]
    scheduler.update(schedule, tokens)
    scheduler.check_integrity()


def step(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    land(scheduler, schedule)
    return schedule


def preempted(scheduler: Scheduler) -> tuple[Request, Request, list[int], Schedule]:
    """Two requests of 8 tokens in a pool of five pages: both need a third, and the younger one loses its two."""
    old, young = add(scheduler, 8), add(scheduler, 8)
    step(scheduler)
    pages = young.pages
    schedule = step(scheduler)
    assert young.status is Status.WAITING
    return old, young, pages, schedule


def test_a_preempted_request_s_pages_are_read_before_the_step_that_may_write_to_them_and_come_back():
    scheduler = make(5)
    old, young, pages, schedule = preempted(scheduler)
    assert schedule.swaps is not None and schedule.swaps.ins == []
    ((swapped, read),) = schedule.swaps.outs
    assert (swapped.num_tokens, read) == (8, pages)
    assert (young.pages, young.row, young.num_computed_tokens) == ([], None, 0)
    assert step(scheduler).swaps is None
    scheduler.abort(old)
    schedule = scheduler.schedule()
    assert schedule.swaps == Swaps([], [(swapped, young.pages[:2])], [])
    assert schedule.tables == [(young.row, young.pages[:2])]
    (again,) = schedule.sequences
    assert (again.start, again.num_tokens, again.decode, again.new_pages) == (8, 1, False, [(2, young.pages[2])])
    stats = scheduler.stats
    assert (stats.num_swap_outs, stats.num_swap_ins) == (1, 1)
    assert (stats.swapped_out_bytes, stats.swapped_in_bytes) == (2 * PAGE_BYTES, 2 * PAGE_BYTES)


def test_pages_come_back_while_a_step_of_others_runs():
    scheduler = make(7)
    short, long, young = add(scheduler, 8, 3), add(scheduler, 8), add(scheduler, 8)
    step(scheduler)
    schedule = step(scheduler)  # the ninth token of each needs a third page
    assert schedule.swaps is not None and [len(pages) for _, pages in schedule.swaps.outs] == [2]
    while short.status is not Status.FINISHED:
        step(scheduler)
    schedule = step(scheduler)
    assert schedule.swaps is not None and schedule.swaps.ins == []
    assert [pages for _, pages in schedule.swaps.late] == [young.pages] and len(young.pages) == 2
    assert [s.request for s in schedule.sequences] == [long] and schedule.admitted == [young]
    (mine,) = [s for s in step(scheduler).sequences if s.request is young]
    assert (mine.start, mine.num_tokens, mine.decode) == (8, 1, False)


def test_tokens_in_flight_at_the_preemption_are_a_short_prompt():
    scheduler = make(4)
    old, young = add(scheduler, 7, 9), add(scheduler, 7, 9)
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    in_flight.append(scheduler.schedule())  # the ninth token of each needs a third page
    assert in_flight[-1].swaps is not None
    assert young.status is Status.WAITING and young.num_in_flight == 2
    scheduler.abort(old)
    for schedule in in_flight[:2]:
        assert scheduler.schedule().sequences == []
        land(scheduler, schedule)
    assert [(s.request, s.start, s.num_tokens) for s in scheduler.schedule().sequences] == [(young, 8, 1)]


@pytest.mark.parametrize(("copies", "swapped"), [(0, False), (1, True)])
def test_a_request_for_which_the_host_has_no_room_is_computed_again(copies: int, swapped: bool):
    scheduler = make(5, copies=copies)
    old, young, _, schedule = preempted(scheduler)
    assert (schedule.swaps is not None) == swapped
    scheduler.abort(old)
    (again,) = step(scheduler).sequences
    assert (again.request, again.start) == (young, 8 if swapped else 0)


def test_host_pages_are_taken_in_whole_copies():
    scheduler = make(5)
    preempted(scheduler)
    assert scheduler.swap is not None and scheduler.swap.num_used == COPY


def test_a_request_that_ends_on_the_host_frees_its_pages():
    """By an abort, or by a token that was in flight."""
    for end_after in (None, 2):
        scheduler = make(4)
        add(scheduler, 7, 9)
        young = add(scheduler, 7, 9, end_after=end_after)
        in_flight = [scheduler.schedule() for _ in range(3)]
        assert scheduler.swap is not None and scheduler.swap.num_used == COPY
        scheduler.abort(young) if end_after is None else [land(scheduler, schedule) for schedule in in_flight[:2]]
        assert young.status is Status.FINISHED and scheduler.swap.num_used == 0
        scheduler.check_integrity()


def test_pages_that_the_prefix_cache_still_has_do_not_come_back():
    scheduler = make(6, caching=True)
    old, young = add(scheduler, 12), add(scheduler, 9)
    step(scheduler)  # six pages
    first = young.pages[0]
    schedule = step(scheduler)
    assert schedule.swaps is not None and [len(pages) for _, pages in schedule.swaps.outs] == [3]
    while not scheduler.pool.num_used > 4:
        step(scheduler)  # takes the page that was filled in part, which nobody keeps, and then the second one
    scheduler.abort(old)
    schedule = scheduler.schedule()
    assert schedule.swaps is not None
    ((_, pages),) = schedule.swaps.ins
    assert pages == [NULL_PAGE, *young.pages[1:3]] and young.pages[0] == first
    assert schedule.sequences[0].start == 9
    assert (scheduler.stats.swapped_out_bytes, scheduler.stats.swapped_in_bytes) == (3 * PAGE_BYTES, 2 * PAGE_BYTES)


def test_what_the_prefix_cache_has_whole_is_not_swapped_in():
    scheduler = make(5, caching=True)
    old, young, pages, _ = preempted(scheduler)
    scheduler.abort(old)
    schedule = step(scheduler)
    assert schedule.swaps is None and young.pages[:2] == pages
    assert schedule.sequences[0].start == 8 and scheduler.swap is not None and scheduler.swap.num_used == 0


def test_what_was_computed_before_the_prefix_cache_was_reset_is_computed_anew():
    """The weights may be others."""
    scheduler = make(5, caching=True)
    old, young, _, _ = preempted(scheduler)
    assert scheduler.cache is not None
    scheduler.cache.reset()
    scheduler.abort(old)
    schedule = step(scheduler)
    assert schedule.swaps is None and schedule.sequences[0].start == 0 and schedule.sequences[0].request is young


def test_a_page_that_is_yet_to_be_copied_is_read_where_it_comes_from():
    swap, pool = SwapSpace(COPY, PAGE_SIZE, PAGE_BYTES), PagePool(9, PAGE_SIZE)
    request = make_request(0, Job(7, 9))
    request.pages, request.num_computed_tokens = [3, 5], 7
    swap.take_out(request, pool, [(4, 5)])
    assert swap.hand_over(SchedulerStats()) == Swaps([(swap._swapped[request], [3, 4])], [], [])


def test_pages_go_out_with_the_next_step_that_computes_something():
    """Nothing is dispatched where nothing can be computed, and nothing is written to the pages before."""
    scheduler = make(2)
    old, young = add(scheduler, 4, 1), add(scheduler, 3, 5)
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    pages = young.pages
    empty = scheduler.schedule()  # the old one's last token is in flight, and the young one preempts itself
    assert (empty.sequences, empty.swaps, young.status) == ([], None, Status.WAITING)
    for schedule in in_flight:
        land(scheduler, schedule)
    assert old.status is Status.FINISHED
    schedule = scheduler.schedule()
    assert schedule.swaps is not None
    ((out, read),), ((back, written),), _ = schedule.swaps
    assert out is back and (read, written) == (pages, young.pages[:1])
    assert [(s.request, s.start, s.num_tokens) for s in schedule.sequences] == [(young, 4, 1)]


SHAPES = {  # hidden, intermediate, layers, query heads, KV heads, head size
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64),
    "LLaMA-3.2-1B": (2048, 8192, 16, 32, 8, 64),
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32, 128),
    "LLaMA-3-8B": (4096, 14336, 32, 32, 8, 128),
}


@cache
def model_of(shape: str) -> Llama:
    names = "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim"
    config = replace(load_tiny("gqa")[0].config, **dict(zip(names, SHAPES[shape], strict=True)))
    return Llama(config, dtype=jnp.bfloat16)


def swaps(shape: str, num_tokens: int, page_size: int = 16) -> bool:
    config = EngineConfig(model="test", swap_space=64, page_size=page_size).resolve("gpu", 8192, 2)
    space = make_swap_space(config, model_of(shape))
    assert space is not None and space.costs is not None
    return swap_is_faster(space.costs, page_size, num_tokens)


@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_few_kv_heads_and_long_contexts_are_swapped_and_small_models_computed(page_size: int):
    assert [swaps("LLaMA-3-8B", n, page_size) for n in (100, 1000, 8000)] == [True] * 3
    assert [swaps("LLaMA-3.2-1B", n, page_size) for n in (128, 1024, 32768)] == [False, False, True]
    assert [swaps("SmolLM2-135M", n, page_size) for n in (128, 1024)] == [False] * 2
    assert [swaps("LLaMA-2-7B", n, page_size) for n in (1024, 32768)] == [False, True]


def test_a_few_tokens_are_computed_again():
    """A copy takes 0.3 ms and moves whole pages of many tokens, however few of them count."""
    assert not swaps("LLaMA-3-8B", 8) and not swaps("LLaMA-3-8B", 64)


def test_the_rule_decides_request_by_request():
    costs = SwapCosts(page_bytes=0, token_operations=0, pair_operations=1e9)
    num_tokens = next(n for n in range(1, 100) if swap_is_faster(costs, PAGE_SIZE, n))
    space, pool = SwapSpace(100 * COPY, PAGE_SIZE, PAGE_BYTES, costs), PagePool(99, PAGE_SIZE)
    for n in (num_tokens - 1, num_tokens):
        request = make_request(n, Job(n, 1))
        request.num_computed_tokens, request.pages = n, pool.allocate(pool.pages_for(n))
        space.take_out(request, pool, [])
    assert [swapped.num_tokens for swapped in space._swapped.values()] == [num_tokens]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_space": -1}, "swap_space=-1; accepted: GiB"),
        ({"swap_space": float("nan")}, "swap_space=nan"),
        ({"swap_space": True}, "swap_space=True"),
        ({"swap_space": 1, "preemption_mode": "drop"}, "preemption_mode='drop'; accepted: recompute, swap, or None"),
        (
            {"preemption_mode": "swap"},
            "preemption_mode='swap'; accepted: recompute, or None; swapping needs swap_space",
        ),
    ],
)
def test_a_bad_setting_names_its_field(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="test", **settings)


CROWD = Case(
    tuple(Job(4, 30, samples=1 + i % 2) for i in range(6)), 1 + 12, 4, max_num_seqs=6, max_num_batched_tokens=8,
    lookahead=2, swap_copies=100,
)  # fmt: skip


@pytest.mark.parametrize("caching", [False, True])
def test_the_simulation_swaps_with_tokens_in_flight(caching: bool):
    waits, partly = [], []

    def observe(schedule: Schedule) -> None:
        waits.extend(r for r in simulation.scheduler.waiting if r.num_in_flight and schedule.swaps)
        partly.extend(pages for _, pages in (schedule.swaps.ins if schedule.swaps else []) if NULL_PAGE in pages)

    simulation = Simulation(replace(CROWD, caching=caching), observe=observe)
    simulation.run()
    simulation.check_outputs()
    stats = simulation.scheduler.stats
    assert stats.num_swap_outs == stats.num_preemptions > 6 and stats.num_swap_ins > 3
    assert waits and bool(partly) == caching
