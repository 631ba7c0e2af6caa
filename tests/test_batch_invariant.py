"""With `batch_invariant` a request's tokens and log-probabilities are the same bits, whatever shares its batch."""

from typing import Any

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine

from pagedjax.config import EngineConfig
from pagedjax.engine import Engine
from pagedjax.request import Request, Status
from pagedjax.sampling_params import SamplingParams

RNG = np.random.default_rng(5)
SUBJECTS = [
    (RNG.integers(0, 128, 21).tolist(), SamplingParams(temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)),
    (RNG.integers(0, 128, 5).tolist(), SamplingParams(n=2, temperature=1.3, seed=8, max_tokens=20, ignore_eos=True)),
    (RNG.integers(0, 128, 13).tolist(), SamplingParams(seed=4, top_p=0.9, max_tokens=9, ignore_eos=True)),
    (RNG.integers(0, 128, 9).tolist(), greedy(17)),
]


def make(**config: Any) -> Engine:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 48, "num_pages": 31}
    return make_engine(*load_tiny("gqa"), batch_invariant=True, **{**sizes, **config})


def add(engine: Engine, number: int) -> list[Request]:
    prompt, params = SUBJECTS[number]
    return engine.add_request(f"subject {number}", prompt, params, recorded=True)


def results(requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and log-probabilities to the last bit."""
    assert all(r.status is Status.FINISHED for r in requests)
    return [(r.output_token_ids, r.recorded_logprobs) for r in requests]


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[list[int], list[float]]]]:
    """Every subject in an engine of its own for the time, with neither shared prefixes nor steps ahead."""
    engine, found = make(lookahead=0, enable_prefix_caching=False), []
    for number in range(len(SUBJECTS)):
        requests = add(engine, number)
        while engine.has_unfinished:
            engine.step()
        found.append(results(requests))
    return found


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Of another's request; what it asks of the sampler changes what is compiled for the batch."""
    more = [{}, {"top_k": 5, "repetition_penalty": 1.2}, {"logprobs": 2}, {"temperature": 0.0}]
    return SamplingParams(max_tokens=int(rng.integers(1, 25)), **more[rng.integers(len(more))])


def crowd(engine: Engine, rng: np.random.Generator) -> dict[int, list[Request]]:
    """Subjects among random others, some of which begin as a subject does; all come at random times."""
    subjects: dict[int, list[Request]] = {}
    waiting = [*rng.permutation(len(SUBJECTS)).tolist(), *(["other"] * int(rng.integers(1, 10)))]
    rng.shuffle(waiting)
    while waiting or engine.has_unfinished:
        while waiting and rng.random() < 0.4:
            who = waiting.pop()
            if who != "other":
                subjects[int(who)] = add(engine, int(who))
                continue
            prompt, _ = SUBJECTS[rng.integers(len(SUBJECTS))]
            start = prompt[: rng.integers(0, len(prompt))] if rng.random() < 0.5 else []
            rest = rng.integers(0, 128, int(rng.integers(1, 12))).tolist()
            engine.add_request("other", [*start, *rest], random_params(rng), priority=int(rng.integers(-1, 2)))
        engine.step()
    engine.check_integrity()
    return subjects


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_no_crowd_changes_a_bit(alone, count: int):
    engine, rng, hits = make(lookahead=2), np.random.default_rng(count), 0
    for _ in range(count):
        if rng.random() < 0.3:
            engine.reset_prefix_cache()
        for number, requests in crowd(engine, rng).items():
            assert results(requests) == alone[number]
            hits += sum(r.num_cached_tokens for r in requests)
    assert hits > 0 and engine.scheduler.stats.num_preemptions > count / 10


@pytest.mark.slow
def test_neither_swapping_nor_larger_pools_change_a_bit(alone):
    rng = np.random.default_rng(0)
    for config in ({"swap_space": 0.01, "preemption_mode": "swap"}, {"num_pages": 400, "lookahead": 0}):
        engine = make(**config)
        for _ in range(10):
            for number, requests in crowd(engine, rng).items():
                assert results(requests) == alone[number]
        assert bool(engine.scheduler.stats.num_swap_ins) == ("swap_space" in config)


def test_a_prompt_s_logprobs_are_the_bits_that_decoding_gave():
    engine = make()
    prompt, _ = SUBJECTS[0]
    (decoded,) = engine.add_request("decoded", prompt, greedy(12, logprobs=0), recorded=True)
    while engine.has_unfinished:
        engine.step()
    tokens = prompt + decoded.output_token_ids
    (scored,) = engine.add_request("scored", tokens, greedy(1, prompt_logprobs=0))
    add(engine, 1)
    while engine.has_unfinished:
        engine.step()
    expected = [found[token].logprob for found, token in zip(decoded.logprobs, tokens[len(prompt) :], strict=True)]
    pairs = zip(scored.prompt_logprobs[len(prompt) :], tokens[len(prompt) :], strict=True)
    assert [found[token].logprob for found, token in pairs] == expected == decoded.recorded_logprobs


def test_there_is_one_forward_function():
    engine = make()
    add(engine, 0)
    add(engine, 3)
    while engine.has_unfinished:
        engine.step()
    forward = [name for name in engine.runner.compilations if name.startswith(("forward", "decode"))]
    assert forward == ["forward mixed-16"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"decode_steps": 4}, "decode_steps=4; accepted: 1 or None with batch_invariant=True"),
        ({"max_num_seqs": 300}, "max_num_seqs=300; accepted: up to 256, or a multiple"),
        ({"batch_invariant": 1}, "batch_invariant=1; accepted: True or False"),
    ],
)
def test_settings_that_contradict_it_are_refused(config: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        EngineConfig(model="x", **{"batch_invariant": True, **config})
