"""What an engine compiles: once each, before the first request, without copies of the pool, and no longer than it
lives."""

import gc
import weakref

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine, run

from pagedjax.sampling_params import SamplingParams


def test_no_pool_sized_temporary_in_any_compiled_step():
    model, params = load_tiny("gqa")
    engine = make_engine(model, params, num_pages=40_000)
    pool = sum(layer.nbytes for layer in engine.runner._kv.layers)
    for name, memory in engine.runner.memory_analysis():
        assert memory.alias_size_in_bytes >= pool, name
        assert memory.temp_size_in_bytes < pool / 20, name


def test_warming_up_changes_no_result_and_wants_an_engine_without_requests():
    model, params = load_tiny("gqa")
    prompts, sampling = [[5, 6, 7], [8, 9]], greedy(6)
    cold, warm = make_engine(model, params), make_engine(model, params)
    warm.warm_up(progress=False)
    tokens = [[r.output_token_ids for r in run(engine, prompts, sampling)] for engine in (warm, cold)]
    assert tokens[0] == tokens[1]
    warm.add_request("0", prompts[0], sampling)
    with pytest.raises(ValueError, match="unfinished"):
        warm.warm_up(progress=False)


def test_an_engine_that_ends_takes_its_compiled_functions_along():
    engine = make_engine(*load_tiny("gqa"))
    run(engine, [[1, 2, 3]], greedy(2))
    functions = [weakref.ref(function) for function in engine.runner._step.functions.values()]
    assert functions
    del engine
    gc.collect()
    assert not any(function() for function in functions)


@pytest.mark.slow
def test_compilations_do_not_grow_over_a_long_mixed_run():
    model, params = load_tiny("gqa")
    engine = make_engine(model, params, num_pages=27, max_num_batched_tokens=16)
    engine.warm_up(progress=False)
    rng = np.random.default_rng(0)

    def long_run(seed):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 40, (60, 2)).tolist()
        prompts = [rng.integers(0, 128, n).tolist() for n, _ in lengths]
        run(
            engine,
            prompts,
            [SamplingParams(temperature=float(i % 2), max_tokens=n) for i, (_, n) in enumerate(lengths)],
        )

    warm = engine.num_compilations
    for seed in rng.integers(0, 1000, 3):
        long_run(seed)
    assert engine.num_compilations == warm
    assert max(engine.runner.compilations.values()) == 1
    assert len(engine.runner.buckets.decode) + len(engine.runner.buckets.mixed) == 4 + 1
