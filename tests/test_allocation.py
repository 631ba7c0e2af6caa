"""Allocations: pages on demand, and reserved runs; what each wastes, and a policy of one's own."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run
from simulated_requests import Job, make_request

from pagedjax.allocation import ALLOCATIONS, Reserved
from pagedjax.engine import Engine
from pagedjax.page_pool import PagePool
from pagedjax.request import Request, Status
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import Schedule
from pagedjax.scheduler import Scheduler
from pagedjax.slots import Slots

PAGE_SIZE, MAX_MODEL_LEN = 4, 40
RESERVED = ["max", "pow2", "oracle"]


def make(name: str, num_usable: int, max_num_seqs: int = 8) -> Scheduler:
    pool = PagePool(num_usable + 1, PAGE_SIZE)
    return Scheduler(pool, max_num_seqs, 64, allocation=ALLOCATIONS[name](pool, MAX_MODEL_LEN))


def add(scheduler: Scheduler, prompt_len: int, max_tokens: int, samples: int = 1) -> list[Request]:
    number = scheduler._num_added
    requests = [make_request(number, Job(prompt_len, max_tokens), i) for i in range(samples)]
    scheduler.add(requests[0], requests[1:])
    return requests


def step(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    scheduler.update(schedule, [7] * len(schedule.sequences))
    scheduler.check_integrity()
    return schedule


@pytest.mark.parametrize(
    ("name", "first", "fourth"),
    [
        # 15 tokens at most, in pages of 4. A page on demand: 3, then 4, whose last slot is never filled.
        ("paged", Slots(10, 2, 0, 0, 116), Slots(13, 2, 1, 0, 112)),
        ("oracle", Slots(10, 5, 1, 0, 112), Slots(13, 2, 1, 0, 112)),  # 15 tokens: 4 pages, a run of 4
        ("pow2", Slots(10, 5, 17, 0, 96), Slots(13, 2, 17, 0, 96)),  # 10 + 8 tokens: 5 pages, a run of 8
        ("max", Slots(10, 5, 49, 0, 64), Slots(13, 2, 49, 0, 64)),  # 40 tokens: 10 pages, a run of 16
    ],
)
def test_slots_of_one_request(name: str, first: Slots, fourth: Slots):
    scheduler = make(name, num_usable=32)
    assert scheduler.slots() == Slots(0, 0, 0, 0, 128)
    add(scheduler, prompt_len=10, max_tokens=5)
    seen = []
    for _ in range(4):
        schedule = scheduler.schedule()
        seen.append(scheduler.slots())
        scheduler.update(schedule, [7])
    assert (seen[0], seen[3]) == (first, fourth)
    assert scheduler.stats.mean_slots == pytest.approx([sum(kind) / 4 for kind in zip(*seen, strict=True)])
    step(scheduler)
    assert scheduler.slots() == Slots(0, 0, 0, 0, 128)


def test_free_slots_are_external_while_the_first_to_wait_finds_no_run():
    scheduler = make("oracle", num_usable=16)
    first, *_ = [add(scheduler, 10, n)[0] for n in (6, 2, 2, 6)]  # runs of 4 pages
    step(scheduler)
    assert scheduler.slots() == Slots(40, 16, 8, 0, 0)
    step(scheduler)
    assert scheduler.slots() == Slots(22, 10, 0, 0, 32)  # the second run and the third, which are no buddies
    (waits,) = add(scheduler, 12, 8)  # 5 pages: a run of 8
    assert scheduler.slots() == Slots(22, 10, 0, 32, 0)
    step(scheduler)
    assert waits.status is Status.WAITING and scheduler.slots() == Slots(24, 8, 0, 32, 0)
    scheduler.abort(first)
    assert scheduler.slots() == Slots(12, 4, 0, 0, 48)
    step(scheduler)
    assert waits.status is Status.RUNNING and scheduler.slots() == Slots(25, 11, 12, 0, 16)


def test_nothing_is_external_while_a_row_is_what_is_missing():
    scheduler = make("oracle", num_usable=16, max_num_seqs=1)
    for _ in range(2):
        add(scheduler, 10, 5)
    step(scheduler)
    assert scheduler.slots() == Slots(10, 5, 1, 0, 48) and len(scheduler.waiting) == 1


def test_a_page_that_samples_share_counts_once():
    scheduler = make("paged", num_usable=32)
    add(scheduler, 10, 2, samples=3)
    scheduler.schedule()
    assert scheduler.slots() == scheduler.stats.mean_slots == Slots(10, 2, 0, 0, 116)
    scheduler = make("oracle", num_usable=32)
    add(scheduler, 10, 2, samples=3)
    scheduler.schedule()
    assert scheduler.slots() == Slots(30, 6, 12, 0, 80)


def test_a_shared_page_that_is_never_filled_counts_until_its_last_user_goes():
    scheduler = make("paged", num_usable=32)
    requests = add(scheduler, 10, 1, samples=3)
    scheduler.schedule()
    for request in requests:
        assert scheduler.slots() == Slots(10, 1, 1, 0, 116)
        scheduler.abort(request)
        scheduler.check_integrity()
    assert scheduler.slots() == Slots(0, 0, 0, 0, 128)


def test_several_steps_in_one_dispatch_take_pages_of_the_run_where_none_is_free():
    scheduler = make("oracle", num_usable=8)
    (request,) = add(scheduler, 6, 24)
    step(scheduler)
    assert scheduler.pool.num_free == 0
    schedule = scheduler.extend(scheduler.schedule(), 4)
    assert schedule.num_steps == 4 and len(request.pages) == 3


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_run_is_contiguous_and_its_pages_follow_each_other(name: str):
    scheduler = make(name, num_usable=64)
    requests = [add(scheduler, n, 9)[0] for n in (3, 9, 14)]
    for _ in range(8):
        step(scheduler)
        assert all(r.pages == [*range(r.pages[0], r.pages[0] + len(r.pages))] for r in requests)
    assert [len(r.pages) for r in requests] == [3, 4, 6]


@pytest.mark.parametrize("name", RESERVED)
def test_whoever_has_a_run_is_never_preempted_and_the_others_wait(name: str):
    scheduler = make(name, num_usable=32)
    requests = [add(scheduler, 8, 24)[0] for _ in range(8)]  # 8 pages, or 16
    step(scheduler)
    assert len(scheduler.running) == (4 if name == "oracle" else 2)
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert scheduler.stats.num_preemptions == 0 and all(r.finish_reason == "length" for r in requests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max", "'request-0' reserves 40 tokens, a run of 10 pages of 4; the longest in a pool of 15 has 8"),
        ("pow2", "'request-0' reserves 34 tokens, a run of 9 pages of 4; the longest in a pool of 15 has 8"),
        ("oracle", "'request-0' reserves 33 tokens, a run of 9 pages of 4; the longest in a pool of 15 has 8"),
    ],
)
def test_a_reservation_that_can_never_fit_is_refused(name: str, message: str):
    scheduler = make(name, num_usable=15)
    prompt_len, max_tokens = (2, 31) if name != "pow2" else (2, 30)
    with pytest.raises(ValueError, match=message):
        add(scheduler, prompt_len, max_tokens)
    assert not scheduler.waiting


@pytest.mark.parametrize(("num_outputs", "tokens"), [(1, 4), (2, 5), (8, 11), (9, 19), (16, 19), (17, 35), (33, 40)])
def test_powers_of_two_are_of_the_output_and_end_with_the_context(num_outputs: int, tokens: int):
    allocation = ALLOCATIONS["pow2"](PagePool(65, PAGE_SIZE), MAX_MODEL_LEN)
    assert isinstance(allocation, Reserved)
    assert allocation.tokens(make_request(0, Job(3, num_outputs))) == tokens


@pytest.mark.parametrize("name", RESERVED)
def test_samples_with_runs_of_their_own_compute_the_prompt_each(name: str):
    scheduler = make(name, num_usable=64)
    requests = add(scheduler, 10, 5, samples=3)
    schedule = step(scheduler)
    assert [(s.request, s.num_tokens) for s in schedule.sequences] == [(r, 10) for r in requests]


LENGTHS = [(1, 20), (7, 30), (33, 12), (4, 40), (50, 8), (16, 16)]


def generate(**config: Any) -> tuple[list[list[int]], Engine]:
    """Greedy tokens, and those of three samples of a prompt, in a pool that holds only some of them at once."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n, _ in LENGTHS]
    sampled = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    engine = make_engine(*load_tiny("gqa"), num_pages=65, **config)
    requests = run(engine, [*prompts, prompts[1]], [*(greedy(n) for _, n in LENGTHS), sampled])
    return [r.output_token_ids for r in requests], engine


@pytest.fixture(scope="module")
def paged_tokens() -> list[list[int]]:
    return generate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESERVED)
def test_tokens_do_not_depend_on_the_allocation(name: str, paged_tokens: list[list[int]]):
    tokens, engine = generate(allocation=name)
    assert tokens == paged_tokens
    assert engine.prefix_cache is None and engine.config.enable_prefix_caching is False
    slots = engine.scheduler.stats.mean_slots
    assert sum(slots) == pytest.approx(64 * 4) and slots.internal > 0
    assert (slots.external > 0) == (name != "max")  # whose runs are all alike


class Halves(Reserved):
    """Half of the context, or all of it."""

    def tokens(self, request: Request) -> int:
        half = self.max_model_len // 2
        return half if request.max_len <= half else self.max_model_len


class Newest:
    """The page that was used last goes first."""

    made: ClassVar[list["Newest"]] = []

    def __init__(self) -> None:
        self.pages: dict[int, None] = {}
        self.made.append(self)

    def add(self, page: int) -> None:
        self.pages[page] = None

    def remove(self, page: int) -> None:
        del self.pages[page]

    def pop(self) -> int:
        return self.pages.popitem()[0]

    def __len__(self) -> int:
        return len(self.pages)

    def __contains__(self, page: object) -> bool:
        return page in self.pages


def test_an_allocation_of_one_s_own(paged_tokens: list[list[int]]):
    tokens, engine = generate(allocation=Halves)
    assert tokens == paged_tokens and isinstance(engine.scheduler.allocation, Halves)
    with pytest.raises(ValueError, match=r"enable_prefix_caching=True; accepted: .* with allocation=.*Halves"):
        make_engine(*load_tiny("gqa"), allocation=Halves, enable_prefix_caching=True)


def test_an_eviction_of_one_s_own(paged_tokens: list[list[int]]):
    tokens, engine = generate(eviction=Newest)
    assert tokens == paged_tokens
    assert len(Newest.made) == 1 and len(Newest.made[0]) == engine.pool.num_cached > 0


class TooLittle(Reserved):
    def tokens(self, request: Request) -> int:
        return request.max_len - 1


def test_a_reservation_below_the_length_limit_is_refused():
    pool = PagePool(33, PAGE_SIZE)
    scheduler = Scheduler(pool, 8, 64, allocation=TooLittle(pool, MAX_MODEL_LEN))
    with pytest.raises(ValueError, match=r"TooLittle\.tokens is 14 for request 'request-0', which may reach 15"):
        add(scheduler, 10, 5)


def damage(allocation: Reserved, running: Sequence[Request], kind: str) -> None:
    if kind == "lost run":
        allocation._runs.pop(running[0])
    elif kind == "free and used":
        allocation._free.give_back(allocation._runs[running[0]])
    elif kind == "foreign page":
        running[0].pages[0] += 1
    else:
        allocation.pool.free([running[0].pages[-1]])


@pytest.mark.parametrize("kind", ["lost run", "free and used", "foreign page", "pool"])
def test_check_integrity_sees_each_kind_of_damage(kind: str):
    scheduler = make("oracle", num_usable=32)
    add(scheduler, 10, 5)
    step(scheduler)
    allocation = scheduler.allocation
    assert isinstance(allocation, Reserved)
    damage(allocation, scheduler.running, kind)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()
