"""The engine end to end on tiny models: paged tokens are dense tokens, whatever the crowd, the pool and the budget."""

import numpy as np
import pytest
from helpers import (
    assert_equal_up_to_near_tie,
    causal_logits,
    dense_greedy,
    golden,
    greedy,
    load_tiny,
    make_engine,
    run,
)

from pagedjax.sampling_params import SamplingParams

QUICK = ["gqa", "mqa", "llama3_rope", "bias"]
OTHERS = ["mha", "tied", "linear_rope", "dynamic_rope", "explicit_head_dim"]  # over a dense cache in test_models too
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
TIGHT = {"num_pages": 27, "max_num_batched_tokens": 16}  # little more than one request of max_model_len
LENGTHS = [(1, 20), (7, 30), (33, 12), (4, 40), (50, 8), (16, 16), (2, 60), (25, 25), (12, 3), (40, 30)]


@pytest.fixture(scope="module")
def mixed_batch():
    """Prompts of very different lengths, with the dense cache's greedy tokens and margins."""
    model, params = load_tiny("gqa")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n, _ in LENGTHS]
    expected = [dense_greedy(model, params, p, n) for p, (_, n) in zip(prompts, LENGTHS, strict=True)]
    return prompts, expected


def assert_dense(requests, expected):
    compared = [
        assert_equal_up_to_near_tie(r.output_token_ids, tokens, margins)
        for r, (tokens, margins) in zip(requests, expected, strict=True)
    ]
    assert [len(r.output_token_ids) for r in requests] == [len(tokens) for tokens, _ in expected]
    assert sum(compared) > 0.8 * sum(len(tokens) for tokens, _ in expected)  # near-ties are rare


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name):
    model, params = load_tiny(name)
    prompts = golden(name)["prompts"]
    max_model_len = model.config.max_position_embeddings if name == "dynamic_rope" else 96
    engine = make_engine(model, params, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=max_model_len)
    requests = run(engine, [p["prompt_ids"] for p in prompts], greedy(len(prompts[0]["tokens"])))
    assert [r.output_token_ids for r in requests] == [p["tokens"] for p in prompts]


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_paged_tokens_equal_dense_tokens_at_any_prefill_budget(budget, mixed_batch):
    prompts, expected = mixed_batch
    engine = make_engine(*load_tiny("gqa"), max_num_batched_tokens=budget)
    requests = run(engine, prompts, [greedy(n) for _, n in LENGTHS])
    assert_dense(requests, expected)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("lookahead", [pytest.param(0, marks=pytest.mark.slow), 1, 3])
def test_paged_tokens_equal_dense_tokens_while_requests_are_preempted(lookahead, caching, mixed_batch):
    """Those that find their own pages again are fewer steps away from their end."""
    prompts, expected = mixed_batch
    engine = make_engine(*load_tiny("gqa"), lookahead=lookahead, enable_prefix_caching=caching, **TIGHT)
    requests = run(engine, prompts, [greedy(n) for _, n in LENGTHS])
    assert_dense(requests, expected)
    assert engine.scheduler.stats.num_preemptions >= (3 if caching else 5)


SLOW_PAGE_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 16, 96)]


@pytest.mark.parametrize("page_size", [3, *SLOW_PAGE_SIZES])
def test_page_size_does_not_change_tokens(page_size, mixed_batch):
    prompts, expected = mixed_batch
    engine = make_engine(*load_tiny("gqa"), page_size=page_size)
    assert_dense(run(engine, prompts, [greedy(n) for _, n in LENGTHS]), expected)


@pytest.mark.slow
def test_fused_projections_do_not_change_tokens(mixed_batch):
    prompts, expected = mixed_batch
    engine = make_engine(*load_tiny("gqa", fused=True))
    assert_dense(run(engine, prompts, [greedy(n) for _, n in LENGTHS]), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_alone_and_in_a_crowd_gives_the_same_tokens(temperature, mixed_batch):
    """Exact: one row bucket and one token bucket, so that every product has the same shape alone and in the crowd."""
    prompts, _ = mixed_batch
    config = {"max_num_seqs": 16, "max_num_batched_tokens": 16}
    params = [
        SamplingParams(temperature=temperature, top_p=0.95, seed=i, max_tokens=n, ignore_eos=True)
        for i, (_, n) in enumerate(LENGTHS)
    ]
    engine = make_engine(*load_tiny("gqa"), **config)
    engine.runner.buckets.decode[:-1] = []
    crowd = run(engine, prompts, params)
    for prompt, param, request in zip(prompts, params, crowd, strict=True):
        alone = run(engine, [prompt], param)[0]
        assert alone.output_token_ids == request.output_token_ids


def test_seeded_samples_survive_preemption_and_depend_on_the_seed(mixed_batch):
    prompts, _ = mixed_batch
    model, params = load_tiny("gqa")

    def sampled(seed, **config):
        sampling = [SamplingParams(temperature=1.0, seed=seed, max_tokens=n, ignore_eos=True) for _, n in LENGTHS]
        engine = make_engine(model, params, **config)
        return [r.output_token_ids for r in run(engine, prompts, sampling)], engine.scheduler.stats.num_preemptions

    free, _ = sampled(7)
    tight, preemptions = sampled(7, **TIGHT)
    other, _ = sampled(8)
    assert preemptions > 0 and free != other
    assert tight == free


def test_unseeded_requests_follow_the_engine_seed_and_their_number():
    model, params = load_tiny("gqa")
    prompt = [[1, 2, 3]] * 3
    sampling = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    first, again, other = (
        [r.output_token_ids for r in run(make_engine(model, params, seed=seed), prompt, sampling)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({tuple(tokens) for tokens in first}) == 3


def test_the_children_of_a_seeded_request_are_seeded_seed_plus_i():
    engine = make_engine(*load_tiny("gqa"))
    together = run(engine, [[5, 6, 7]], SamplingParams(n=3, temperature=1.0, seed=10, max_tokens=12, ignore_eos=True))
    for i, request in enumerate(together):
        params = SamplingParams(temperature=1.0, seed=10 + i, max_tokens=12, ignore_eos=True)
        assert run(engine, [[5, 6, 7]], params)[0].output_token_ids == request.output_token_ids


def test_logprobs_are_those_of_the_raw_logits():
    model, params = load_tiny("gqa")
    engine = make_engine(model, params)
    sampling = SamplingParams(temperature=0.7, top_k=5, max_tokens=10, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    prompt = np.random.default_rng(3).integers(0, 128, 80).tolist()
    request = run(engine, [prompt], sampling)[0]
    logits = np.asarray(causal_logits(model, params, prompt + request.output_token_ids), np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert request.prompt_logprobs[0] is None and len(request.prompt_logprobs) == 80
    everything = list(enumerate(request.prompt_logprobs))[1:] + list(enumerate(request.logprobs, start=80))
    for position, found in everything:
        token = (prompt + request.output_token_ids)[position]
        wanted = 2 if position < 80 else 3
        order = np.argsort(-expected[position - 1])
        assert found is not None and set(found) == {token, *order[:wanted].tolist()}
        for other, value in found.items():
            assert value.logprob == pytest.approx(expected[position - 1, other], abs=1e-3)
            assert value.rank == order.tolist().index(other) + 1


def test_prompt_logprobs_survive_chunks_and_preemption():
    model, params = load_tiny("gqa")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 128, n).tolist() for n in (30, 41, 22, 37)]
    sampling = greedy(20, prompt_logprobs=1)
    expected = run(make_engine(model, params), prompts, sampling)
    tight = make_engine(model, params, **TIGHT)
    requests = run(tight, prompts, sampling)
    assert tight.scheduler.stats.num_preemptions > 0
    for actual, reference in zip(requests, expected, strict=True):
        assert len(actual.prompt_logprobs) == len(actual.prompt_token_ids)
        for a, b in zip(actual.prompt_logprobs[1:], reference.prompt_logprobs[1:], strict=True):
            assert {t: round(v.logprob, 3) for t, v in a.items()} == pytest.approx(
                {t: round(v.logprob, 3) for t, v in b.items()}, abs=2e-3
            )


def test_adjusted_rows_survive_preemption_beside_plain_ones(mixed_batch):
    """Penalties, bans and bias are rebuilt when a request comes back."""
    prompts, expected = mixed_batch
    model, params = load_tiny("gqa")
    sampling = [
        greedy(n, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=2, logit_bias={3: 2.0})
        if i % 2
        else greedy(n)
        for i, (_, n) in enumerate(LENGTHS)
    ]
    free = run(make_engine(model, params), prompts, sampling)
    tight_engine = make_engine(model, params, **TIGHT)
    tight = run(tight_engine, prompts, sampling)
    assert tight_engine.scheduler.stats.num_preemptions > 0
    assert [r.output_token_ids for r in tight] == [r.output_token_ids for r in free]
    assert_dense(tight[::2], expected[::2])
    assert free[1].output_token_ids != expected[1][0]


def test_eos_ends_a_request_and_the_token_computed_past_it_is_dropped():
    model, params = load_tiny("gqa")
    prompt = [9, 8, 7]
    engine = make_engine(model, params)
    free = run(engine, [prompt], greedy(20))[0].output_token_ids
    stop = free[6]
    steps = engine.scheduler.stats.num_steps
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    request = run(engine, [prompt], sampling)[0]
    assert request.output_token_ids == free[: free.index(stop) + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", stop)
    assert engine.scheduler.stats.num_steps - steps == free.index(stop) + 1 + engine.config.lookahead


def test_abort_at_any_moment_frees_everything_and_leaves_others_alone(mixed_batch):
    prompts, expected = mixed_batch
    engine = make_engine(*load_tiny("gqa"), **TIGHT)
    requests = [
        r
        for i, (p, (_, n)) in enumerate(zip(prompts, LENGTHS, strict=True))
        for r in engine.add_request(str(i), p, greedy(n))
    ]
    for step in range(12):
        engine.step()
        if step % 3 == 0:
            engine.abort([requests[step // 3 * 2 + 1]])
            engine.check_integrity()
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_used == 0
    kept = [i for i, r in enumerate(requests) if r.finish_reason != "abort"]
    assert len(kept) == len(requests) - 4
    assert_dense([requests[i] for i in kept], [expected[i] for i in kept])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt_token_ids is empty"),
        ([1, 128], {}, "prompt_token_ids has token id 128; accepted: 0 to 127"),
        ([-1], {}, "prompt_token_ids has token id -1"),
        ([1] * 96, {}, "96 tokens; accepted: fewer than max_model_len=96"),
        ([1], {"stop_token_ids": [500]}, "stop_token_ids has token id 500"),
        ([1], {"logit_bias": {128: 1.0}}, "logit_bias has token id 128"),
        ([1], {"allowed_token_ids": [4, 999]}, "allowed_token_ids has token id 999"),
        ([1], {"logprobs": 21}, "logprobs=21; accepted: at most max_logprobs=20"),
        ([1], {"prompt_logprobs": -1}, "prompt_logprobs=-1; accepted: at most max_logprobs=20"),
    ],
)
def test_a_bad_request_is_refused_where_it_enters(prompt, params, message):
    engine = make_engine(*load_tiny("gqa"))
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    assert not engine.has_unfinished


def test_too_many_or_too_long_bad_words_are_refused():
    engine = make_engine(*load_tiny("gqa"))
    with pytest.raises(ValueError, match="300 bans; accepted: at most 256"):
        engine.add_request("a", [1], SamplingParams(), bad_words=[[1, 2]] * 300)
    with pytest.raises(ValueError, match="a word of 17 tokens; accepted: at most 16"):
        engine.add_request("a", [1], SamplingParams(), bad_words=[[1] * 17])


def test_a_pool_too_small_for_one_request_is_refused_when_the_engine_is_built():
    model, params = load_tiny("gqa")
    with pytest.raises(ValueError, match="max_model_len=96 needs 24 pages of 4 tokens and the pool has 23"):
        make_engine(model, params, num_pages=24)
    assert make_engine(model, params, num_pages=25).config.max_model_len == 96
    assert make_engine(model, params, num_pages=24, max_model_len=None).config.max_model_len == 92


def test_allowed_tokens_that_are_all_banned_are_refused():
    engine = make_engine(*load_tiny("gqa"))
    with pytest.raises(ValueError, match="are all excluded by bad_words"):
        engine.add_request("a", [1], SamplingParams(allowed_token_ids=[4, 5]), bad_words=[[4], [5]])
    with pytest.raises(ValueError, match="or by min_tokens=2"):
        engine.add_request("a", [1], SamplingParams(allowed_token_ids=[2], min_tokens=2))  # 2 is end-of-sequence
