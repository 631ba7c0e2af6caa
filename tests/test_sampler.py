"""The sampler draws from the distributions that its parameters define, each row by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sampling_helpers import (
    LOGITS,
    VOCAB,
    assert_drawn_from,
    draw,
    exact_probabilities,
    jitted_sample,
    jitted_write_row,
    kept_tokens,
    make_request,
    pack,
    softmax,
)

from pagedjax.adjustments import AdjustmentRows, gather_rows, make_adjustments, row_values
from pagedjax.batch import SAMPLING_FLOATS, pack_sampling
from pagedjax.row_params import Sampling, unpack_sampling
from pagedjax.sampler import Features, sample, token_logprobs, truncate
from pagedjax.sampling_params import SamplingParams

HYPOTHESIS_VOCAB = 12
RANDOM = Features(random=True)
EVERYTHING = Features(random=True, truncated=True, adjusted=True, num_logprobs=3)

jitted_truncate = jax.jit(lambda logits, packed: truncate(logits, unpack_sampling(packed)))
jitted_logprobs = jax.jit(token_logprobs, static_argnums=2)
unpack = jax.jit(unpack_sampling)
gather = jax.jit(gather_rows)


def run(
    logits: np.ndarray,
    rows: list[tuple[SamplingParams, int]],
    positions: np.ndarray,
    features: Features,
    adjustments: AdjustmentRows | None = None,
) -> Any:
    """`Sampled` of one step, in numpy."""
    packed = np.concatenate([pack(row, adjusted=row[0].penalized) for row in rows])
    sampling = unpack(packed)
    sampled = jitted_sample(logits, sampling, np.asarray(positions, np.int32), adjustments, features)
    return jax.tree.map(np.asarray, sampled)


def truncated(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    return np.asarray(jitted_truncate(logits[None], pack((params, 0))))[0]


def tokens_of_seed(seed: int) -> list[int]:
    """What one seed draws at 64 positions of equal logits."""
    logits = np.zeros((64, VOCAB), np.float32)
    return run(logits, [(SamplingParams(), seed)] * 64, np.arange(64), RANDOM).tokens.tolist()


@pytest.mark.parametrize(
    "params",
    [
        *({"temperature": t} for t in (0.3, 0.7, 1.0, 2.0)),
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": VOCAB + 1},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 1.5, "min_p": 0.3, "top_k": 20},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.3, "top_p": 0.7},
        {"temperature": 1.7, "min_p": 0.02, "top_k": 12, "top_p": 0.85},
        {"temperature": 1.7, "min_p": 0.3, "top_k": 12, "top_p": 0.85},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_that_the_parameters_define(params):
    params = SamplingParams(**params)
    assert_drawn_from(draw(LOGITS, make_request(params)), exact_probabilities(LOGITS, params))


def test_tokens_of_logit_minus_infinity_are_never_drawn():
    logits = np.where(np.arange(VOCAB) % 2, LOGITS, -np.inf).astype(np.float32)
    for params in (SamplingParams(temperature=2.0), SamplingParams(temperature=2.0, top_k=30, top_p=0.999)):
        assert_drawn_from(draw(logits, make_request(params)), exact_probabilities(logits, params))


def test_tokens_of_neighbouring_seeds_and_positions_are_independent():
    tokens = draw(np.zeros(8, np.float32), make_request())
    pairs = [  # no token is in two of the same kind
        (tokens[::2], tokens[1::2]),  # the children of a request have seeds in a row
        (tokens[:, ::2], tokens[:, 1::2]),
        (tokens[1::2, :-1], tokens[::2, 1:]),  # the same sum of seed and position
    ]
    for left, right in pairs:
        assert_drawn_from(left * 8 + right, np.full(64, 1 / 64))


ties = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 3.0, -np.inf])
distinct = st.floats(-30, 30, width=32, allow_subnormal=False)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    logits=st.lists(ties | distinct, min_size=HYPOTHESIS_VOCAB, max_size=HYPOTHESIS_VOCAB),
    top_k=st.sampled_from([0, 0, 1, 2, 5, HYPOTHESIS_VOCAB - 1, HYPOTHESIS_VOCAB, 2**40]),
    top_p=st.just(1.0) | st.floats(0, 1, exclude_min=True) | st.sampled_from([1e-300, 1e-40, 1e-6, 0.999999]),
    min_p=st.just(0.0) | st.floats(0, 1) | st.sampled_from([1e-300, 1e-6, 1.0]),
)
@example([0.0] * HYPOTHESIS_VOCAB, 3, 0.5, 0.5)
@example([0.0, -0.0] * (HYPOTHESIS_VOCAB // 2), 1, 1.0, 0.0)
@example([0.0, -0.0] * (HYPOTHESIS_VOCAB // 2), 0, 0.3, 0.0)
@example([1.0, 0.0] * (HYPOTHESIS_VOCAB // 2), 0, 1e-300, 0.0)
@example([1.0, float(np.nextafter(np.float32(1), np.float32(2)))] * (HYPOTHESIS_VOCAB // 2), 1, 1.0, 0.0)
@example([1.0] + [-np.inf] * (HYPOTHESIS_VOCAB - 1), 5, 0.5, 0.1)
def test_truncation_keeps_exactly_the_tokens_of_the_definition(logits, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    assume(np.isfinite(logits).any())
    want = kept_tokens(logits, top_k, top_p, min_p)
    assume(not want.unsure.any())
    got = truncated(logits, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))
    np.testing.assert_array_equal(got, np.where(want.kept, logits, -np.inf))


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.95},
        {"top_k": 50},
        {"top_k": 31_999},
        {"min_p": 0.001},
        {"min_p": 1e-4, "top_k": 200, "top_p": 0.9},
    ],
    ids=str,
)
def test_truncation_of_a_large_vocabulary_is_exact_but_for_rounding(params):
    logits = np.random.default_rng(1).normal(0.0, 2.0, 32_000).astype(np.float32)
    kept, unsure = kept_tokens(logits, **params)
    got = truncated(logits, SamplingParams(**params))
    assert unsure.sum() <= 2  # of thousands of tokens near the threshold
    assert ((np.isfinite(got) == kept) | unsure).all()
    np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])


def test_a_row_that_is_not_truncated_passes_through_unchanged():
    logits = np.stack([LOGITS, LOGITS, LOGITS])
    logits[1, :4] = -np.inf, -0.0, 1e-30, -500.0  # the last has weight 0 in float32
    truncated_row = SamplingParams(top_k=2, top_p=0.5, min_p=0.3)
    packed = pack(
        (truncated_row, 0), (SamplingParams(), 0), (SamplingParams(temperature=0, top_k=2, top_p=0.5, min_p=0.5), 0)
    )
    out = np.asarray(jitted_truncate(logits, packed))
    assert np.isfinite(out[0]).sum() < 3
    np.testing.assert_array_equal(out[1:].view(np.int32), logits[1:].view(np.int32))


def test_greedy_rows_of_a_random_batch_give_the_argmax():
    logits = np.random.default_rng(2).normal(size=(8, VOCAB)).astype(np.float32)
    greedy = SamplingParams(temperature=0.0, top_k=5, top_p=0.1, min_p=0.9)
    rows = [(greedy if i % 2 else SamplingParams(temperature=2.0, top_p=0.9), i) for i in range(8)]
    for features in (Features(random=True, truncated=True), RANDOM):
        tokens = run(logits, rows, np.arange(8), features).tokens
        assert (tokens[1::2] == logits.argmax(axis=-1)[1::2]).all()
        assert (tokens[::2] != logits.argmax(axis=-1)[::2]).any()
    tokens = run(logits, [(greedy, 0)] * 8, np.arange(8), Features()).tokens
    assert (tokens == logits.argmax(axis=-1)).all()


@pytest.mark.slow
def test_a_sample_depends_neither_on_the_other_rows_nor_on_its_place_nor_on_their_number():
    logits = np.random.default_rng(3).normal(size=(8, VOCAB)) + 3 * np.arange(8)[:, None]
    logits = logits.astype(np.float32)
    params = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=2.0, top_p=0.9)]
    params += [SamplingParams(top_k=9, presence_penalty=2.0), SamplingParams(min_p=0.1)]
    params += [SamplingParams(temperature=1.5)] * 3
    penalized = row_values(make_request(params[3], outputs=range(VOCAB // 2)), VOCAB)
    state = jitted_write_row(make_adjustments(9, VOCAB), np.int32(3), penalized)

    def run_some(chosen, position, features=EVERYTHING):
        adjustments = gather(state, np.array(chosen)) if features.adjusted else None
        rows = [(params[i], 1000 - i) for i in chosen]
        return run(logits[chosen], rows, position + np.array(chosen), features, adjustments)

    for position in range(0, 100, 10):
        together = run_some(list(range(8)), position)
        for chosen in [[i] for i in range(8)] + [[4, 1, 7], [7, 4, 2], [5, 6, 0, 3, 1, 2, 7, 4]]:
            some = run_some(chosen, position)
            for name in ("tokens", "ranks", "top_tokens"):
                np.testing.assert_array_equal(getattr(some, name), getattr(together, name)[chosen])
            np.testing.assert_allclose(some.logprobs, together.logprobs[chosen], rtol=1e-6)  # another order of sums
        random_only = [0, 1, 5]  # rows that need no more of the sampler: what others need does not matter
        assert (run_some(random_only, position, RANDOM).tokens == together.tokens[random_only]).all()


def test_every_bit_of_the_seed_counts():
    seeds = [7, 7 + 2**32, 7 + 2**62, 7 - 2**63, -7, -(2**63), 2**63 - 1, *(1 << bit for bit in range(63)), 0]
    drawn = [tuple(tokens_of_seed(seed)) for seed in seeds]
    assert len(set(drawn)) == len(seeds)  # 64 equal draws from 32 tokens do not happen by chance


def test_the_same_seed_and_position_repeat_and_another_position_does_not():
    tokens = tokens_of_seed(-(2**40))
    assert tokens == tokens_of_seed(-(2**40))
    assert len(set(tokens)) > VOCAB // 2
    shifted = run(np.zeros((64, VOCAB), np.float32), [(SamplingParams(), -(2**40))] * 64, np.arange(64) + 1, RANDOM)
    assert shifted.tokens.tolist()[:-1] == tokens[1:]


def test_unpacking_is_the_inverse_of_packing():
    params = SamplingParams(
        temperature=0.3,
        top_p=0.4,
        min_p=0.5,
        top_k=6,
        presence_penalty=-0.7,
        frequency_penalty=1.8,
        repetition_penalty=0.9,
    )
    packed = pack_sampling(params, -(2**33) + 5, adjusted=True)
    sampling = Sampling(*(x.item() for x in unpack(packed[None])))
    for name in SAMPLING_FLOATS:
        assert getattr(sampling, name) == np.float32(getattr(params, name))
    assert (sampling.top_k, sampling.adjusted) == (6, 1)
    assert (sampling.seed_high, sampling.seed_low) == (-2, 5)


@pytest.mark.parametrize("num_logprobs", [0, 1, VOCAB])
@pytest.mark.parametrize("processed", [False, True])
def test_logprobs_are_raw_or_of_the_distribution_drawn_from(processed, num_logprobs):
    logits = np.random.default_rng(4).normal(size=(3, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=1.5), SamplingParams(temperature=0.4, top_k=VOCAB - 1)]
    params.append(
        SamplingParams(temperature=0.0, top_k=2, top_p=0.5, min_p=0.5)
    )  # greedy: neither divided nor truncated
    features = Features(True, True, False, num_logprobs, processed)
    sampled = run(logits, list(zip(params, range(3), strict=True)), np.arange(3), features)
    neutral = SamplingParams()
    judged = [p if processed and not p.greedy else neutral for p in params]
    with np.errstate(divide="ignore"):
        want = np.log([exact_probabilities(x, p) for x, p in zip(logits, judged, strict=True)])
    chosen = np.take_along_axis(want, sampled.tokens[:, None], axis=1)
    np.testing.assert_allclose(sampled.logprobs, chosen[:, 0], rtol=1e-5)
    assert (sampled.ranks == (want > chosen).sum(axis=1) + 1).all()
    assert sampled.top_tokens.shape == sampled.top_logprobs.shape == (3, num_logprobs)
    np.testing.assert_allclose(sampled.top_logprobs, -np.sort(-want)[:, :num_logprobs], rtol=1e-5)
    np.testing.assert_array_equal(sampled.top_tokens, np.argsort(-want, kind="stable")[:, :num_logprobs])
    if num_logprobs == VOCAB:
        np.testing.assert_allclose(np.exp(sampled.top_logprobs).sum(axis=1), 1.0, rtol=1e-5)


def test_tokens_that_tie_share_the_better_rank():
    logits = np.array([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]], np.float32)
    ranks = [int(jitted_logprobs(logits, np.array([token], np.int32), 2).ranks[0]) for token in range(6)]
    assert ranks == [3, 1, 3, 2, 3, 6]


def test_logprobs_of_large_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 1e4, 0.0]], np.float32)
    sampled = jitted_logprobs(logits, np.array([1], np.int32), 4)
    np.testing.assert_allclose(sampled.logprobs, [-2e4 - np.log(2)])
    np.testing.assert_allclose(np.exp(sampled.top_logprobs[0]), -np.sort(-softmax(logits[0])), atol=1e-6)


def test_annotated_shapes_are_checked():
    sampling = unpack(pack((SamplingParams(), 0), (SamplingParams(), 0)))
    with pytest.raises(TypeError, match="positions"):
        sample(jnp.zeros((2, VOCAB)), sampling, jnp.zeros(3, jnp.int32), None, Features())
