"""Prefix caching: what is found, what goes first, and that nothing wrong is ever found."""

import hashlib
import time
from typing import Any

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run
from simulated_requests import Job, make_request

from pagedjax.page_pool import LeastRecentlyUsed, PagePool, PageStats
from pagedjax.prefix_cache import PrefixCache, sha256
from pagedjax.sampling_params import SamplingParams
from pagedjax.scheduler import Scheduler

PAGE = 4


def make_scheduler(num_usable: int, digest=sha256, eviction=None) -> Any:
    pool = PagePool(num_usable + 1, PAGE, eviction)
    return Scheduler(pool, 8, 64, cache=PrefixCache(pool, digest))


def prompt_of(number: int, token_ids: list[int], max_tokens: int = 20, salt: str | None = None, **params):
    request = make_request(number, Job(prompt_len=len(token_ids), max_tokens=max_tokens))
    request.prompt_token_ids[:] = token_ids
    request.params = SamplingParams(max_tokens=max_tokens, **params)
    request.cache_salt = salt
    return request


def step(scheduler: Scheduler, token: int = 7):
    schedule = scheduler.schedule()
    scheduler.update(schedule, [token] * len(schedule.sequences))
    scheduler.check_integrity()
    return schedule


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_vllms_documented_example():
    """https://docs.vllm.ai/en/latest/design/prefix_caching.html, pages numbered from 1. One difference: a page that
    holds nothing worth keeping goes before any that does, so that the third request evicts nothing."""
    idle = LeastRecentlyUsed()
    scheduler = make_scheduler(10, eviction=idle)
    pool, cache = scheduler.pool, scheduler.cache
    first = prompt_of(0, letters("ABCDEFGHIJKLMNO"))
    scheduler.add(first)
    step(scheduler, ord("P"))
    assert first.pages == [1, 2, 3, 4] and first.num_published == 3  # 15 tokens: the fourth page lacks one
    step(scheduler, ord("Q"))
    step(scheduler, ord("R"))
    assert first.pages == [1, 2, 3, 4, 5]
    second = prompt_of(1, letters("ABCDEFGHIJ") + letters("wxyz"))
    scheduler.add(second)
    schedule = scheduler.schedule()
    assert schedule.tables == [(second.row, [1, 2])]  # of the third page two tokens of four agree
    assert (second.num_cached_tokens, second.pages) == (8, [1, 2, 6, 7])
    assert pool.num_references - pool.num_used == 2
    scheduler.update(schedule, [ord("S"), ord("v")])
    scheduler.abort(first)
    assert pool.num_used == 4 and list(idle) == [4, 3]  # its last page first; pages 1 and 2 are in use
    scheduler.abort(second)
    assert list(idle) == [4, 3, 6, 2, 1]
    third = prompt_of(2, letters("ABCDEFGHIJKL") + list(range(17)), max_tokens=4)
    scheduler.add(third)
    step(scheduler)
    assert third.num_cached_tokens == 12 and third.pages[:3] == [1, 2, 3]
    assert list(idle) == [4, 6] and cache.stats.hit_rate == pytest.approx((8 + 12) / (15 + 14 + 29))


def test_evictions_take_no_longer_the_more_there_were():
    idle = LeastRecentlyUsed()
    for page in range(100_000):
        idle.add(page)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(2000):
            idle.add(idle.pop())
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds[10:]) < 5 * np.median(seconds[:3])  # a plain dict: 8 times


def test_pages_that_nobody_has_used_for_longest_go_first_and_the_last_of_a_sequence_before_its_first():
    scheduler = make_scheduler(6)
    for number, start in enumerate((100, 200)):
        request = prompt_of(number, list(range(start, start + 12)), max_tokens=4)
        scheduler.add(request)
        step(scheduler)
        scheduler.abort(request)
    assert scheduler.pool.num_free == scheduler.pool.num_cached == 6
    again = prompt_of(2, list(range(100, 112)), max_tokens=4)  # of its three pages two, for a token must be computed
    scheduler.add(again)
    step(scheduler)
    scheduler.abort(again)
    other = prompt_of(3, list(range(300, 316)), max_tokens=4)
    scheduler.add(other)
    step(scheduler)
    assert [len(scheduler.cache.find(prompt_of(9, list(range(s, s + 13))))) for s in (100, 200)] == [2, 0]


def test_one_token_is_always_computed_and_prompt_logprobs_want_all():
    scheduler = make_scheduler(20)
    tokens = list(range(8))
    cases: list[tuple[dict[str, Any], int]] = [({}, 0), ({}, 4), ({"prompt_logprobs": 0}, 0)]
    for params, cached in cases:
        request = prompt_of(0, tokens, **params)
        scheduler.add(request)
        step(scheduler)
        assert request.num_cached_tokens == cached
        scheduler.abort(request)


def test_salts_separate_tenants():
    scheduler = make_scheduler(40)
    salts = [None, "a", "b", "a", None]
    for salt, cached in zip(salts, (0, 0, 0, 8, 8), strict=True):
        request = prompt_of(0, list(range(10)), salt=salt)
        scheduler.add(request)
        step(scheduler)
        assert request.num_cached_tokens == cached, salt
        scheduler.abort(request)


def test_requests_of_one_step_share_and_a_reset_forgets():
    scheduler = make_scheduler(40)
    requests = [prompt_of(i, list(range(10))) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    schedule = step(scheduler)
    assert [s.num_tokens for s in schedule.sequences] == [10, 2, 2]
    assert scheduler.pool.num_used == 2 + 3
    scheduler.cache.reset()
    late = prompt_of(3, list(range(10)))
    scheduler.add(late)
    step(scheduler)
    assert late.num_cached_tokens == 0
    for request in [*requests, late]:
        scheduler.abort(request)
    scheduler.check_integrity()
    again = prompt_of(4, list(range(10)))
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 8  # of the late one


def test_what_was_computed_before_a_reset_is_never_found_after_it():
    """Nothing of this request can be found yet when the weights change under it."""
    scheduler = make_scheduler(40)
    request = prompt_of(0, [1, 2, 3])
    scheduler.add(request)
    step(scheduler)
    scheduler.cache.reset()
    for _ in range(8):
        step(scheduler)
    tokens = request.prompt_token_ids + request.output_token_ids
    scheduler.abort(request)
    assert len(tokens) == 12 and scheduler.cache.find(prompt_of(1, tokens)) == []


def test_a_preempted_request_finds_its_own_pages_again():
    scheduler = make_scheduler(7)
    older, newer = (prompt_of(i, list(range(start, start + 11)), max_tokens=17) for i, start in enumerate((100, 200)))
    for request in (older, newer):
        scheduler.add(request)
    while not scheduler.stats.num_preemptions:
        step(scheduler)
    computed = len(newer.prompt_token_ids) + len(newer.output_token_ids)
    scheduler.abort(older)
    schedule = step(scheduler)
    (sequence,) = schedule.sequences
    assert sequence.request is newer and sequence.start == computed // PAGE * PAGE - (computed % PAGE == 0) * PAGE > 0
    assert newer.num_cached_tokens == 0  # what its first admission found


BROKEN = {
    "all collide": lambda data: b"same",
    "half collide": lambda data: bytes([hashlib.sha256(data).digest()[0] & 1]),
}


@pytest.mark.parametrize("digest", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_hash_loses_hits_and_never_gives_a_wrong_one(digest):
    rng = np.random.default_rng(0)
    scheduler = make_scheduler(60, digest)
    for number in range(40):
        tokens = rng.integers(0, 2, 13).tolist()  # few different pages
        request = prompt_of(number, tokens)
        found = scheduler.cache.find(request)
        content = [scheduler.cache._by_page[page].content for page in found]
        assert content == [np.array(tokens[i * PAGE : (i + 1) * PAGE]).tobytes() for i in range(len(found))]
        scheduler.add(request)
        step(scheduler)
        if number % 3:
            scheduler.abort(request)
        if len(scheduler.running) == 8:
            scheduler.abort(scheduler.running[0])


@pytest.fixture(scope="module")
def model():
    return load_tiny("gqa")


def mixed_run(model, digest=sha256, **config):
    """Prompts that begin alike, in waves, greedy, random and with logprobs of the prompt."""
    rng = np.random.default_rng(1)
    engine = make_engine(*model, **config)
    del engine.runner.buckets.decode[:-1], engine.runner.buckets.mixed[:-1]  # fewer compilations
    if engine.prefix_cache:
        engine.prefix_cache._digest = digest
    beginnings = [rng.integers(0, 64, n).tolist() for n in (9, 21, 40)]
    outputs, cached = [], 0
    for _ in range(3):
        prompts = [beginnings[rng.integers(3)] + rng.integers(0, 64, rng.integers(1, 12)).tolist() for _ in range(12)]
        random = SamplingParams(temperature=0.7, seed=3, n=2, max_tokens=12, ignore_eos=True)
        params = [greedy(9), random, greedy(7, prompt_logprobs=0)]
        requests = run(engine, prompts, [params[i % 3] for i in range(12)])
        outputs += [r.output_token_ids for r in requests]
        cached += sum(r.num_cached_tokens for r in requests)
    return outputs, cached, engine


@pytest.fixture(scope="module")
def uncached(model):
    return mixed_run(model, enable_prefix_caching=False)


@pytest.mark.parametrize("num_pages", [400, 40])
def test_caching_changes_no_token(model, uncached, num_pages):
    """In float32; the small pool preempts and evicts."""
    expected, none, _ = uncached
    found, cached, engine = mixed_run(model, num_pages=num_pages)
    assert found == expected and none == 0 < cached
    assert engine.prefix_cache is not None and 0 < engine.prefix_cache.stats.hit_rate < 1
    assert (engine.scheduler.stats.num_preemptions > 0) == (num_pages == 40)


def test_a_broken_hash_changes_no_token(model, uncached):
    assert mixed_run(model, BROKEN["half collide"])[0] == uncached[0]


@pytest.mark.slow
def test_a_long_cached_prompt_needs_no_room_in_the_batch(model):
    """More shared pages than any batch has room for, of more rows than one call writes."""
    engine = make_engine(*model, max_num_seqs=20, max_num_batched_tokens=32, max_model_len=96)
    prompt = list(range(60)) * 2
    first = run(engine, [prompt[:80]], greedy(4))[0].output_token_ids
    requests = run(engine, [prompt[:80]] * 20, greedy(4))
    assert all(r.output_token_ids == first and r.num_cached_tokens == 76 for r in requests)


def test_samples_share_their_prompts_full_pages(model):
    engine = make_engine(*model)
    requests = engine.add_request("n", list(range(18)), SamplingParams(n=4, max_tokens=4, temperature=1.0, seed=1))
    engine.step()
    assert all(r.pages == requests[0].pages for r in requests)  # the last one too, which is filled in part
    stats = engine.page_stats()
    assert (stats.used, stats.shared, stats.saved, stats.cached) == (5, 5, 4 * 5 - 5, 0)
    assert stats.free == 399 - 5 and stats.waste == pytest.approx(1 - 18 / 20)
    engine.abort(requests)
    assert engine.page_stats() == PageStats(used=0, shared=0, cached=4, free=395, waste=0.0, saved=0)
    assert engine.page_bytes == sum(layer.nbytes for layer in engine.runner._kv.layers) // 400
