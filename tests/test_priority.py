"""Priorities: who is served sooner, who loses pages, and that outputs do not depend on it."""

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run
from simulated_requests import Job, make_request
from test_scheduler import make, step, work

from pagedjax import LLM
from pagedjax.request import Status


def add(scheduler, prompt_len, priority, max_tokens=8):
    request = make_request(scheduler._num_added, Job(prompt_len, max_tokens, priority=priority))
    scheduler.add(request)
    return request


def test_less_is_admitted_sooner_and_equals_first_come_first_served():
    scheduler = make(max_num_seqs=2)
    later, first, second, soonest = (add(scheduler, 4, priority) for priority in (1, 0, 0, -1))
    assert list(scheduler.waiting) == [soonest, first, second, later]
    assert work(step(scheduler)) == [(soonest, 4), (first, 4)]
    urgent = add(scheduler, 4, -5)
    assert scheduler.waiting[0] is urgent and work(step(scheduler)) == [(soonest, 1), (first, 1)]  # no row is taken


def test_prompts_of_a_higher_priority_are_computed_first():
    scheduler = make(budget=10)
    long = add(scheduler, 30, 0)
    assert work(step(scheduler)) == [(long, 10)]
    urgent = add(scheduler, 12, -1)
    assert work(step(scheduler)) == [(long, 10)]  # the budget was the running one's
    scheduler.abort(long)
    assert work(step(scheduler)) == [(urgent, 10)]


def test_the_lowest_priority_loses_its_pages_first():
    scheduler = make(num_usable=4)
    low, high = add(scheduler, 7, 1, max_tokens=9), add(scheduler, 7, 0, max_tokens=9)
    for _ in range(3):
        step(scheduler)
    assert low.status is Status.WAITING and high.status is Status.RUNNING
    assert low.metrics.num_preemptions == 1


def test_a_row_that_decodes_gives_its_pages_to_a_prompt_of_a_higher_priority():
    """In the step in which it was to have a token, which it loses."""
    scheduler = make(num_usable=7, budget=8, mixed=8)
    low = add(scheduler, 3, 1, max_tokens=20)
    step(scheduler)
    high = add(scheduler, 20, 0, max_tokens=4)  # 5 pages; 6 are free
    seen = []
    while high.status is not Status.FINISHED:
        num_tokens = low.num_tokens
        schedule = step(scheduler)
        scheduler.check_integrity()
        if low.status is Status.WAITING and not seen:
            seen = [s.request for s in schedule.sequences]
            assert low not in seen and low.num_tokens == num_tokens and low.num_in_flight == 0
    assert seen
    while low.status is not Status.FINISHED:
        step(scheduler)
    assert len(low.output_token_ids) == 20


def test_tokens_do_not_depend_on_priorities():
    model, params = load_tiny("gqa")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n in (30, 5, 41, 17, 8, 26)]
    expected = [r.output_token_ids for r in run(make_engine(model, params), prompts, greedy(20))]
    engine = make_engine(model, params, num_pages=27, max_num_batched_tokens=16, max_num_seqs=3)
    priorities = (3, 0, 2, 0, 1, -1)
    requests = [
        engine.add_request(str(i), prompt, greedy(20), priority=priority)[0]
        for i, (prompt, priority) in enumerate(zip(prompts, priorities, strict=True))
    ]
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert [r.output_token_ids for r in requests] == expected
    began = [r.metrics.first_scheduled or 0.0 for r in requests]
    assert sorted(range(6), key=lambda i: began[i]) == [5, 1, 3, 4, 2, 0]


@pytest.mark.parametrize("priority", [[1], [1, 2, 3], ["a", "b"], [0.5, 1]])
def test_priorities_that_do_not_fit_the_prompts_are_refused(priority):
    llm = LLM.__new__(LLM)
    llm.default_sampling_params = greedy(1)
    with pytest.raises(ValueError, match="an integer for each of the 2 prompts"):
        llm.generate([[1], [2]], priority=priority, use_tqdm=False)
