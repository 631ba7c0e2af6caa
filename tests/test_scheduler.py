"""Scheduler: its rules one by one, then whole lives of requests under random pools, budgets and aborts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from simulated_requests import Case, Job, cases, make_request
from simulation import Simulation

from pagedjax.page_pool import PagePool
from pagedjax.request import Request, Status
from pagedjax.schedule import Schedule
from pagedjax.scheduler import Scheduler

PAGE_SIZE = 4


def make(num_usable: int = 100, max_num_seqs: int = 4, budget: int = 64, mixed: int | None = None) -> Scheduler:
    return Scheduler(PagePool(num_usable + 1, PAGE_SIZE), max_num_seqs, budget, mixed)


def add(scheduler: Scheduler, prompt_len: int, max_tokens: int = 8, end_after: int | None = None) -> Request:
    request = make_request(scheduler._num_added, Job(prompt_len, max_tokens, end_after))
    scheduler.add(request)
    return request


def land(scheduler: Scheduler, schedule: Schedule) -> list[Request]:
    """Hands a step's tokens over: each request's next ones."""
    tokens = [s.request.prompt_token_ids[-1] + 1 + len(s.request.output_token_ids) for s in schedule.sequences]
    return scheduler.update(schedule, tokens)


def step(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    land(scheduler, schedule)
    return schedule


def work(schedule: Schedule) -> list[tuple[Request, int]]:
    return [(s.request, s.num_tokens) for s in schedule.sequences]


def test_decoding_rows_come_before_prompts_and_take_their_tokens_from_the_budget():
    scheduler = make(budget=10)
    old, young = add(scheduler, 4), add(scheduler, 12)
    assert work(scheduler.schedule()) == [(old, 4), (young, 6)]
    newest = add(scheduler, 3)
    schedule = scheduler.schedule()
    assert work(schedule) == [(old, 1), (young, 6), (newest, 3)]
    assert [s.decode for s in schedule.sequences] == [True, False, False]
    assert work(scheduler.schedule()) == [(old, 1), (young, 1), (newest, 1)]


def test_a_long_prompt_beside_rows_that_decode_comes_in_small_chunks():
    scheduler = make(budget=64, mixed=8)
    decoding = add(scheduler, 4, max_tokens=20)
    step(scheduler)
    prompt = add(scheduler, 60)
    assert work(step(scheduler)) == [(decoding, 1), (prompt, 7)]
    scheduler.abort(decoding)
    assert work(step(scheduler)) == [(prompt, 53)]  # nobody waits


def test_more_than_two_waiting_prompts_have_the_whole_budget():
    scheduler = make(budget=64, mixed=8)
    decoding = add(scheduler, 4, max_tokens=20)
    step(scheduler)
    prompts = [add(scheduler, 25) for _ in range(3)]
    assert work(step(scheduler)) == [(decoding, 1), *zip(prompts, (25, 25, 13), strict=True)]
    assert work(step(scheduler)) == [(decoding, 1), (prompts[0], 1), (prompts[1], 1), (prompts[2], 5)]  # one is left


@pytest.mark.parametrize(("num_decodes", "left"), [(1, 7), (6, 2), (7, 9), (12, 4), (13, 19)])
def test_prompts_get_at_least_a_quarter_of_a_mixed_step(num_decodes: int, left: int):
    scheduler = make(max_num_seqs=20, budget=200, mixed=8)
    requests = [add(scheduler, 2, max_tokens=9) for _ in range(num_decodes)]
    step(scheduler)
    prompt = add(scheduler, 100)
    assert work(step(scheduler)) == [*((r, 1) for r in requests), (prompt, left)]


def test_requests_are_admitted_first_come_first_served():
    scheduler = make(max_num_seqs=2, budget=64)
    first, second, third = (add(scheduler, 4, max_tokens=n) for n in (3, 9, 9))
    assert scheduler.schedule().admitted == [first, second]
    assert list(scheduler.waiting) == [third]


def test_a_large_request_at_the_head_of_the_queue_is_not_overtaken():
    scheduler = make(num_usable=6)
    running, large, small = add(scheduler, 12), add(scheduler, 16, 4), add(scheduler, 1)
    step(scheduler)
    assert scheduler.running == [running] and list(scheduler.waiting) == [large, small]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    scheduler = make(budget=6)
    request = add(scheduler, 15)
    chunks = [step(scheduler).sequences[0] for _ in range(3)]
    assert [(s.start, s.num_tokens, s.samples) for s in chunks] == [(0, 6, False), (6, 6, False), (12, 3, True)]
    assert [s.new_pages for s in chunks] == [
        [(0, request.pages[0]), (1, request.pages[1])],
        [(2, request.pages[2])],
        [(3, request.pages[3])],
    ]


def test_the_newest_request_is_preempted_and_computed_again_from_the_head_of_the_queue():
    scheduler = make(num_usable=5)
    old, young = add(scheduler, 8, 12), add(scheduler, 8, 12)
    later = add(scheduler, 8, 12)
    assert work(step(scheduler)) == [(old, 8), (young, 8)]
    schedule = step(scheduler)  # both need a third page, and one is left
    assert work(schedule) == [(old, 1)]
    assert list(scheduler.waiting) == [young, later]
    assert (young.pages, young.row, young.num_computed_tokens) == ([], None, 0)
    assert young.output_token_ids == [young.prompt_token_ids[-1] + 1]
    assert young.metrics.num_preemptions == scheduler.stats.num_preemptions == 1
    scheduler.abort(old)
    again = step(scheduler).sequences[0]
    assert (again.request, again.start, again.num_tokens, again.decode) == (young, 0, 9, False)


def test_nothing_is_admitted_in_a_step_that_preempted():
    scheduler = make(num_usable=5)
    old, young = add(scheduler, 8, 12), add(scheduler, 8, 12)
    step(scheduler)
    small = add(scheduler, 1, 1)
    schedule = scheduler.schedule()
    assert young.status is Status.WAITING
    assert scheduler.pool.num_free == 2 and schedule.admitted == []  # the small one would fit
    assert work(schedule) == [(old, 1)] and list(scheduler.waiting) == [young, small]


@pytest.mark.parametrize(("prompt_len", "admitted"), [(16, True), (17, False)])
def test_a_prompt_is_admitted_only_when_all_of_it_fits(prompt_len: int, admitted: bool):
    scheduler = make(num_usable=5, budget=4)  # four pages are free, and the first chunk is a single token
    add(scheduler, 3)
    request = add(scheduler, prompt_len, 3)
    assert (request in dict(work(scheduler.schedule()))) == admitted


def test_a_prompt_computed_in_part_keeps_the_pages_that_it_has_yet_to_fill():
    scheduler = make(num_usable=6, budget=6)
    first, second = add(scheduler, 17, 3), add(scheduler, 8, 2)  # five pages and two
    assert [work(step(scheduler)) for _ in range(3)] == [[(first, 6)], [(first, 6)], [(first, 5)]]
    assert scheduler.stats.num_preemptions == 0 and second.status is Status.WAITING


@pytest.mark.parametrize(("prompt_len", "admitted"), [(4 * 194, True), (4 * 194 + 1, False)])
def test_admission_leaves_the_watermark_free_while_others_run(prompt_len: int, admitted: bool):
    scheduler = make(num_usable=200, budget=2000)  # two pages are the watermark
    add(scheduler, 16, 4)
    request = add(scheduler, prompt_len, 1)
    scheduler.schedule()
    assert (request.status is Status.RUNNING) == admitted


def test_a_request_alone_may_take_the_watermark():
    scheduler = make(num_usable=200, budget=2000)
    request = add(scheduler, 799, 1)
    assert work(scheduler.schedule()) == [(request, 799)]


def test_what_can_never_fit_is_refused_with_its_size():
    scheduler = make(num_usable=5)
    add(scheduler, 8, 12)
    with pytest.raises(ValueError, match="'request-1' may reach 21 tokens, 6 pages of 4; the pool has 5"):
        add(scheduler, 9, 12)
    assert len(scheduler.waiting) == 1


def test_a_budget_below_the_number_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=7; accepted: at least max_num_seqs=8"):
        make(max_num_seqs=8, budget=7)
    make(max_num_seqs=8, budget=8)


def test_the_length_limit_holds_with_tokens_in_flight():
    scheduler = make()
    request = add(scheduler, 4, max_tokens=3)
    schedules = [scheduler.schedule() for _ in range(5)]
    assert [len(s.sequences) for s in schedules] == [1, 1, 1, 0, 0]
    assert request.num_computed_tokens == 6  # the last token's KV is never needed
    for schedule in schedules[:3]:
        land(scheduler, schedule)
    assert (request.finish_reason, len(request.output_token_ids)) == ("length", 3)
    assert scheduler.pool.num_used == 0


def test_a_token_past_the_end_is_dropped_and_costs_one_row_step():
    scheduler = make()
    request = add(scheduler, 4, end_after=1)
    first, past = scheduler.schedule(), scheduler.schedule()
    assert land(scheduler, first) == [request]
    assert request.finish_reason == "stop" and scheduler.pool.num_used == 0
    assert work(past) == [(request, 1)] and work(scheduler.schedule()) == []
    assert land(scheduler, past) == []
    assert len(request.output_token_ids) == 1


@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding", "in flight", "preempted in flight"])
def test_abort_frees_everything_at_any_moment_and_drops_tokens_in_flight(moment: str):
    scheduler = make(num_usable=5, budget=16)
    other = add(scheduler, 8, 12)
    request = add(scheduler, 17 if moment == "prefilling" else 8, 3)
    if moment != "waiting":
        scheduler.schedule() if moment == "prefilling" else step(scheduler)
    in_flight = [scheduler.schedule()] if "in flight" in moment else []
    if moment == "preempted in flight":
        assert request.status is Status.WAITING
    num_outputs = len(request.output_token_ids)
    scheduler.abort(request)
    assert (request.status, request.finish_reason) == (Status.FINISHED, "abort")
    assert request.metrics.finished is not None
    assert request.pages == [] and request.row is None and request not in scheduler.waiting
    scheduler.check_integrity()
    for schedule in in_flight:
        assert request not in land(scheduler, schedule)
    assert len(request.output_token_ids) == num_outputs
    scheduler.abort(request)  # a second time changes nothing
    scheduler.abort(other)
    assert scheduler.pool.num_used == 0


def test_a_preempted_request_waits_for_its_tokens_in_flight_and_keeps_them():
    scheduler = make(num_usable=4)
    old, young = add(scheduler, 7, 9), add(scheduler, 7, 9)
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    in_flight.append(scheduler.schedule())  # the ninth token of each needs a third page
    assert work(in_flight[-1]) == [(old, 1)] and young.num_in_flight == 2
    scheduler.abort(old)
    assert work(scheduler.schedule()) == []
    land(scheduler, in_flight[0])
    assert work(scheduler.schedule()) == []
    land(scheduler, in_flight[1])
    assert work(scheduler.schedule()) == [(young, 9)]
    assert young.output_token_ids == [young.prompt_token_ids[-1] + 1, young.prompt_token_ids[-1] + 2]


def test_a_freed_row_is_given_to_the_next_request():
    scheduler = make(max_num_seqs=2)
    first, second, third = (add(scheduler, 4) for _ in range(3))
    step(scheduler)
    assert [r.row for r in (first, second, third)] == [0, 1, None]
    scheduler.abort(first)
    assert step(scheduler).admitted == [third] and third.row == 0


def test_the_first_admission_alone_is_a_request_s_first_schedule():
    scheduler = make(num_usable=5)
    old, young = add(scheduler, 8, 12), add(scheduler, 8, 12)
    assert young.metrics.first_scheduled is None
    step(scheduler)
    first = young.metrics.first_scheduled
    assert first is not None and first >= young.metrics.arrival
    step(scheduler)
    scheduler.abort(old)
    assert scheduler.schedule().admitted == [young]
    assert young.metrics.first_scheduled == first


def check_life(case: Case) -> None:
    simulation = Simulation(case)
    simulation.run()
    simulation.check_outputs()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(cases())
def test_every_request_ends_with_its_own_tokens_in_pages_of_its_own(case: Case):
    check_life(case)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=5_000)
@given(cases())
def test_five_thousand_times_every_request_ends_with_its_own_tokens(case: Case):
    check_life(case)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cases(aborts=False))
def test_outputs_do_not_depend_on_pool_budget_rows_or_lookahead(case: Case):
    roomy = replace(case, num_pages=500, max_num_seqs=10, max_num_batched_tokens=500, lookahead=0)
    simulations = [Simulation(roomy), Simulation(case)]
    plain, pressed = ([r.output_token_ids for r in simulation.run()] for simulation in simulations)
    assert plain == pressed
    assert simulations[0].scheduler.stats.num_preemptions == 0


def test_the_simulation_preempts_with_tokens_in_flight():
    case = Case(tuple(Job(4, 30) for _ in range(6)), 1 + 12, 4, max_num_seqs=6, max_num_batched_tokens=8, lookahead=2)
    waits = []
    simulation = Simulation(case, observe=lambda _: waits.extend(r for r in simulation.scheduler.waiting))
    simulation.run()
    simulation.check_outputs()
    assert simulation.scheduler.stats.num_preemptions > 6
    assert any(simulation.num_sampled[r] for r in waits)
