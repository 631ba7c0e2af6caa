"""Samples of one prompt: it is computed once, its pages are shared, and a page is copied for its first writer alone."""

import numpy as np
import pytest
from helpers import load_tiny, make_engine, run
from simulated_requests import Job, make_request

from pagedjax.page_pool import PagePool
from pagedjax.request import Status
from pagedjax.sampling_params import SamplingParams
from pagedjax.scheduler import Scheduler

PAGE = 4


def forked(prompt_len: int, samples: int, *, max_tokens: int = 9, rows: int = 8, pages: int = 40):
    """A scheduler after the step that computed a prompt, its requests, and that step's schedule."""
    scheduler = Scheduler(PagePool(pages + 1, PAGE), rows, 64)
    job = Job(prompt_len, max_tokens)
    requests = [make_request(0, job, i) for i in range(samples)]
    scheduler.add(requests[0], requests[1:])
    return scheduler, requests, step(scheduler)


def step(scheduler: Scheduler):
    schedule = scheduler.schedule()
    scheduler.update(schedule, [7] * len(schedule.sequences))
    scheduler.check_integrity()
    return schedule


def test_a_prompt_is_computed_once_and_all_sample_from_it():
    scheduler, requests, schedule = forked(10, 4)
    assert [s.num_tokens for s in schedule.sequences] == [10, 0, 0, 0]
    assert schedule.num_tokens == 10 and all(s.samples for s in schedule.sequences)
    assert all(r.pages == requests[0].pages and r.output_token_ids == [7] for r in requests)
    assert scheduler.pool.num_used == 3 and scheduler.pool.stats(10).saved == 9


def test_the_last_page_is_copied_for_all_but_one_when_they_write_and_not_before():
    scheduler, requests, schedule = forked(10, 4)
    last = requests[0].pages[-1]
    assert schedule.copies == []
    then = step(scheduler)
    assert [source for source, _ in then.copies] == [last] * 3
    assert [r.pages[-1] for r in requests] == [*(target for _, target in then.copies), last]
    assert all(r.pages[:2] == requests[0].pages[:2] for r in requests)
    assert [pages for _, pages in then.tables] == [r.pages for r in requests[:3]]
    assert step(scheduler).copies == []


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(8, 9), (10, 1)])
def test_what_nobody_writes_to_is_not_copied(prompt_len: int, max_tokens: int):
    """A prompt that ends with its page, and samples of one token."""
    scheduler, _, _ = forked(prompt_len, 3, max_tokens=max_tokens)
    for _ in range(3):
        assert step(scheduler).copies == []


def test_samples_without_a_row_compute_their_prompt_when_there_is_one():
    scheduler, requests, schedule = forked(10, 5, rows=3)
    assert len(schedule.sequences) == 3
    assert list(scheduler.waiting) == requests[3:4] and requests[3].forks == requests[4:]
    scheduler.abort(requests[0])
    scheduler.abort(requests[1])
    assert [s.num_tokens for s in step(scheduler).sequences] == [1, 10, 0]
    assert all(r.status is Status.RUNNING for r in requests[2:])


def test_samples_outlive_the_one_that_was_to_compute_their_prompt():
    scheduler = Scheduler(PagePool(41, PAGE), 8, 8)
    requests = [make_request(0, Job(20, 5), i) for i in range(4)]
    scheduler.add(requests[0], requests[1:])
    step(scheduler)  # 8 tokens of 20
    scheduler.abort(requests[2])
    scheduler.abort(requests[0])
    assert list(scheduler.waiting) == [requests[1]] and requests[1].forks == [requests[3]]
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert [len(r.output_token_ids) for r in requests] == [0, 5, 0, 5]


def test_a_copy_takes_its_page_from_the_newest_request():
    scheduler, requests, _ = forked(10, 3, max_tokens=5, pages=4)  # three are the prompt's
    schedule = step(scheduler)
    assert len(schedule.copies) == 1 and requests[2].status is Status.WAITING
    assert requests[0].pages[-1] != requests[1].pages[-1]


def sampled_logprobs(request):
    return [found[token].logprob for token, found in zip(request.output_token_ids, request.logprobs, strict=True)]


LENGTHS = [(1, 3), (4, 2), (7, 4), (16, 3), (33, 5)]  # of prompts, and how many samples


PENALISED = {"presence_penalty": 0.5, "logprobs": 1}
ROOMY, TIGHT = {"decode_steps": 4}, {"num_pages": 27, "max_num_batched_tokens": 16}
CONFIGS = [ROOMY, {}, {"enable_prefix_caching": False}, TIGHT, {"max_num_seqs": 3, "lookahead": 3}]
QUICK = [({}, ROOMY), ({}, TIGHT), (PENALISED, ROOMY)]
CASES = [
    (kind, config) if (kind, config) in QUICK else pytest.param(kind, config, marks=pytest.mark.slow)
    for kind in ({}, PENALISED)
    for config in CONFIGS
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_samples_equal_requests_of_their_own(kind, config):
    """Seeded seed + i; penalties need rows of their own."""
    model, params = load_tiny("gqa")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n, _ in LENGTHS]
    settings = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, **kind}
    engine = make_engine(model, params, **config)
    each = [SamplingParams(n=n, seed=10 * i, **settings) for i, (_, n) in enumerate(LENGTHS)]
    together = run(engine, prompts, each)
    alone = make_engine(model, params, enable_prefix_caching=False)
    expected = [
        run(alone, [prompt], SamplingParams(seed=10 * i + j, **settings))[0]
        for i, (prompt, (_, n)) in enumerate(zip(prompts, LENGTHS, strict=True))
        for j in range(n)
    ]
    assert [r.output_token_ids for r in together] == [r.output_token_ids for r in expected]
    if kind:
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(sampled_logprobs(a), sampled_logprobs(b), atol=1e-4)


def test_a_prompt_costs_its_tokens_once_and_pages_show_it():
    engine = make_engine(*load_tiny("gqa"), enable_prefix_caching=False)
    engine.add_request("n", list(range(30)), SamplingParams(n=4, max_tokens=8, ignore_eos=True))
    engine.step()
    assert engine.scheduler.stats.num_scheduled_tokens == 30
    assert engine.page_stats()[:2] == (8, 8) and engine.page_stats().waste == 2 / 32
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert engine.pool.num_used == 0


def test_more_samples_than_a_bucket_has_tokens():
    engine = make_engine(*load_tiny("gqa"), max_num_seqs=32, max_num_batched_tokens=64)
    requests = run(engine, [[5]], SamplingParams(n=30, seed=1, max_tokens=4, ignore_eos=True))
    assert len({tuple(r.output_token_ids) for r in requests}) > 20
