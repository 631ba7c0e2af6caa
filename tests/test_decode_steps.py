"""Several decode steps in one dispatch change no token, and compile nothing on the way."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run

from pagedjax.config import SMALL_MODEL, EngineConfig
from pagedjax.request import Status
from pagedjax.sampling_params import SamplingParams

LENGTHS = [(1, 20), (7, 30), (33, 1), (4, 40), (50, 8), (16, 16), (2, 60), (25, 25), (12, 3), (40, 30)]
TIGHT = {"num_pages": 27, "max_num_batched_tokens": 16}

slow = partial(pytest.param, marks=pytest.mark.slow)


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, n).tolist() for n, _ in lengths]


def dispatches(engine):
    """Counts them by their number of steps, from now on."""
    counts, dispatch = Counter(), engine.runner.dispatch

    def counted(schedule, make_masks):
        counts[schedule.num_steps] += 1
        return dispatch(schedule, make_masks)

    engine.runner.dispatch = counted
    return counts


@pytest.mark.parametrize("config", [{}, slow(TIGHT), slow({"lookahead": 0}), slow({"lookahead": 3})], ids=str)
def test_tokens_are_those_of_single_steps(config):
    """Greedy and random, ended by length, by a stop id and by end-of-sequence."""
    model, params = load_tiny("gqa")
    kinds = [
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0, "stop_token_ids": list(range(0, 128, 9))},
    ]
    each = [SamplingParams(max_tokens=n, **kinds[i % 3]) for i, (_, n) in enumerate(LENGTHS)]
    single = run(make_engine(model, params, decode_steps=1, **config), prompts_of(LENGTHS), each)
    engine = make_engine(model, params, decode_steps=4, **config)
    counts = dispatches(engine)
    several = run(engine, prompts_of(LENGTHS), each)
    assert [r.output_token_ids for r in several] == [r.output_token_ids for r in single]
    assert [r.finish_reason for r in several] == [r.finish_reason for r in single]
    assert counts[4] > 5 and counts[1] > 2


def test_one_request_takes_as_few_dispatches_as_its_tokens_need():
    engine = make_engine(*load_tiny("gqa"), decode_steps=4)
    counts = dispatches(engine)
    (request,) = run(engine, [[1, 2, 3]], greedy(22))
    assert len(request.output_token_ids) == 22
    assert counts == {4: 5, 1: 2}  # the prompt and its token, five times four, and the last one
    assert engine.scheduler.stats.num_steps == 22


@pytest.mark.parametrize("features", [{"logprobs": 1}, {"presence_penalty": 1.0}, {"top_k": 3}], ids=str)
def test_what_is_not_compiled_beforehand_goes_step_by_step(features):
    engine = make_engine(*load_tiny("gqa"), decode_steps=4)
    counts = dispatches(engine)
    run(engine, [[1, 2, 3]], SamplingParams(max_tokens=10, **features))
    assert set(counts) == {1}


def test_a_request_that_comes_or_goes_meanwhile_changes_nothing():
    """Beside one that decodes in fours: another is added, a third aborted, between dispatches."""
    model, params = load_tiny("gqa")
    (alone,) = run(make_engine(model, params, decode_steps=1), [[5, 6]], greedy(40))
    engine = make_engine(model, params, decode_steps=4)
    counts = dispatches(engine)
    (first,) = engine.add_request("first", [5, 6], greedy(40))
    (gone,) = engine.add_request("gone", [9], greedy(60))
    for _ in range(4):
        engine.step()
    engine.abort([gone])
    (late,) = engine.add_request("late", [7, 8, 9], greedy(10))
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert first.output_token_ids == alone.output_token_ids
    assert gone.status is Status.FINISHED and len(late.output_token_ids) == 10
    assert counts[4] > 5 and engine.pool.num_used == 0


@pytest.mark.slow
def test_nothing_compiles_after_warm_up():
    engine = make_engine(*load_tiny("gqa"), decode_steps=4)
    engine.warm_up(progress=False)
    warm, counts = engine.num_compilations, dispatches(engine)
    for temperature in (0.0, 1.0):
        run(engine, prompts_of(LENGTHS), SamplingParams(temperature=temperature, max_tokens=20))
    assert engine.num_compilations == warm and counts[4] > 5
    assert max(engine.runner.compilations.values()) == 1


def test_small_models_on_a_gpu_take_several_steps():
    config = EngineConfig(model="test")
    assert [config.resolve("gpu", 64, 9, size).decode_steps for size in (0, SMALL_MODEL + 1)] == [4, 1]
    assert config.resolve("cpu", 64, 9).decode_steps == 1
    assert EngineConfig(model="test", decode_steps=8).resolve("cpu", 64, 9, SMALL_MODEL + 1).decode_steps == 8
    assert EngineConfig(model="test", page_size=2).resolve("gpu", 64, 9).decode_steps == 2


@pytest.mark.parametrize("steps", [0, 17, 1.5])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"decode_steps={steps}; accepted"):
        EngineConfig(model="test", decode_steps=steps)
