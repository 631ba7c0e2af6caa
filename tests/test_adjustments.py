"""Bias, bans and penalties change the rows that ask for them, as defined, and no others."""

import jax
import numpy as np
import pytest
from sampling_helpers import (
    LOGITS,
    NUM_ROWS,
    ROW,
    VOCAB,
    assert_drawn_from,
    draw,
    exact_probabilities,
    jitted_write_row,
    make_request,
    pack,
    state_with,
)

from pagedjax.adjustments import (
    MAX_BAD_WORD_TOKENS,
    MAX_BANS,
    Adjustments,
    adjust,
    gather_rows,
    make_adjustments,
    record,
    row_values,
)
from pagedjax.request import Request
from pagedjax.row_params import unpack_sampling
from pagedjax.sampling_params import SamplingParams

NULL_ROW = NUM_ROWS - 1
PROMPT, OUTPUTS = (3, 4, 4, 5, 6), (5, 7, 7, 7, 8, 9)
BUSY = SamplingParams(  # every kind of adjustment at once
    logit_bias={9: 1.0, 12: -3.0},
    allowed_token_ids=tuple(range(30)),
    repetition_penalty=1.4,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    stop_token_ids=(5,),
    min_tokens=20,
    max_tokens=None,
)
BUSY_WORDS = ((10,), (5, 6), (7, 8, 9))

jitted_adjust = jax.jit(
    lambda logits, packed, state, rows: adjust(logits, unpack_sampling(packed), gather_rows(state, rows))
)
jitted_record = jax.jit(record)


def adjusted_logits(request: Request) -> np.ndarray:
    """LOGITS as the request's row changes them."""
    packed = pack((request.params, 0), adjusted=request.adjusted)
    rows = np.array([ROW], np.int32)
    return np.asarray(jitted_adjust(LOGITS[None], packed, state_with(request), rows))[0]


def defined_logits(logits: np.ndarray, request: Request) -> np.ndarray:
    """What the parameters mean: bias, then bans, then penalties, token by token, in float64."""
    params, outputs = request.params, request.output_token_ids
    out = logits.astype(np.float64)
    for token in range(out.size):
        out[token] += max(-100.0, min(100.0, (params.logit_bias or {}).get(token, 0.0)))
        early = len(outputs) < params.min_tokens
        stops = token in request.eos_ids or token in (params.stop_token_ids or ())
        ends_word = any([*outputs, token][-len(word) :] == list(word) for word in request.bad_words)
        forbidden = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        if (early and stops) or ends_word or forbidden:
            out[token] = -np.inf
        if token in request.prompt_token_ids or token in outputs:
            penalty = params.repetition_penalty
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        out[token] -= params.frequency_penalty * outputs.count(token)
        out[token] -= params.presence_penalty * (token in outputs)
    return out


def recorded(state: Adjustments, tokens: list[int]) -> Adjustments:
    """The state after steps in which the row samples these tokens; its neighbour and the null row do not."""
    rows, samples = np.array([0, ROW, NULL_ROW], np.int32), np.array([False, True, False])
    for token in tokens:
        state = jitted_record(state, rows, np.array([11, token, 12], np.int32), samples)
    return state


def assert_same(left: Adjustments, right: Adjustments) -> None:
    for name in Adjustments._fields:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


CASES = {
    "logit_bias": make_request(SamplingParams(logit_bias={0: 3.0, 1: -100.0, 2: -0.5, 31: 2})),
    "logit_bias_beyond_100": make_request(SamplingParams(logit_bias={0: 1000.0, 1: 100.0, 2: 99.0})),
    "repetition_penalty": make_request(SamplingParams(repetition_penalty=1.8), PROMPT, OUTPUTS),
    "repetition_reward": make_request(SamplingParams(repetition_penalty=0.6), PROMPT, OUTPUTS),
    "presence_penalty": make_request(SamplingParams(presence_penalty=-1.5), PROMPT, OUTPUTS),
    "frequency_penalty": make_request(SamplingParams(frequency_penalty=-0.9), PROMPT, OUTPUTS),
    "allowed_token_ids": make_request(SamplingParams(allowed_token_ids=(0, 9, 4, 30))),
    "bad_word_of_one_token": make_request(bad_words=((int(LOGITS.argmax()),), (7,)), outputs=OUTPUTS),
    "bad_word_begun": make_request(bad_words=((8, 9, 0), (9, 2), (7, 8, 9, 4)), outputs=OUTPUTS),
    "bad_word_not_begun": make_request(bad_words=((7, 9, 0), (8, 2)), outputs=OUTPUTS),
    "min_tokens_not_reached": make_request(
        SamplingParams(min_tokens=7, stop_token_ids=(9,)), outputs=OUTPUTS, eos_ids=(0, 4)
    ),
    "min_tokens_reached": make_request(
        SamplingParams(min_tokens=6, stop_token_ids=(9,)), outputs=OUTPUTS, eos_ids=(0, 4)
    ),
    "everything": make_request(BUSY, PROMPT, OUTPUTS, eos_ids=(0,), bad_words=(*BUSY_WORDS, (8, 9, 4))),
    "everything_then_truncated": make_request(
        SamplingParams(
            temperature=1.3,
            top_k=9,
            top_p=0.9,
            min_p=0.01,
            logit_bias={int(LOGITS.argmin()): 9.0},
            repetition_penalty=1.4,
            presence_penalty=0.6,
        ),
        PROMPT,
        OUTPUTS,
        bad_words=((9, int(LOGITS.argmax())),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_drawn_from_the_adjusted_distribution(name):
    request = CASES[name]
    assert request.adjusted
    probabilities = exact_probabilities(defined_logits(LOGITS, request), request.params)
    assert_drawn_from(draw(LOGITS, request), probabilities)


@pytest.mark.parametrize("name", CASES)
def test_adjusted_logits_are_those_of_the_definition(name):
    np.testing.assert_allclose(adjusted_logits(CASES[name]), defined_logits(LOGITS, CASES[name]), rtol=1e-5)


def test_rows_that_ask_for_nothing_pass_through_unchanged():
    request = make_request(BUSY, PROMPT, OUTPUTS, bad_words=BUSY_WORDS)
    state = state_with(request)  # the last request of a row may have left it busy
    logits = np.stack([LOGITS] * 3)
    logits[:, :2] = -np.inf, -0.0
    rows = np.array([ROW, ROW, NULL_ROW], np.int32)
    packed = np.concatenate([pack((BUSY, 0), adjusted=True), pack((BUSY, 0)), pack((SamplingParams(), 0))])
    out = np.asarray(jitted_adjust(logits, packed, state, rows))
    assert (out[0] != logits[0]).sum() > 5
    np.testing.assert_array_equal(out[1:].view(np.int32), logits[1:].view(np.int32))
    packed[:, -1] = 1  # a row that is adjusted, but by nothing
    out = np.asarray(jitted_adjust(logits, packed, state, rows))
    np.testing.assert_array_equal(out[2], logits[2])


def test_each_sequence_is_adjusted_by_its_own_row():
    params = [SamplingParams(logit_bias={0: 1.0}), SamplingParams(presence_penalty=1.0)]
    requests = [make_request(p, outputs=[i + 1]) for i, p in enumerate(params)]
    state = make_adjustments(NUM_ROWS, VOCAB)
    for row, request in enumerate(requests):
        state = jitted_write_row(state, np.int32(row), row_values(request, VOCAB))
    for order in ([0, 1], [1, 0], [1], [0, 0, 1]):
        packed = pack(*((params[i], 0) for i in order), adjusted=True)
        out = jitted_adjust(np.stack([LOGITS] * len(order)), packed, state, np.array(order, np.int32))
        want = [defined_logits(LOGITS, requests[i]) for i in order]
        np.testing.assert_allclose(out, want, rtol=1e-6)


@pytest.mark.parametrize("num_outputs", [0, 1, MAX_BAD_WORD_TOKENS - 2, MAX_BAD_WORD_TOKENS - 1, 40])
def test_a_row_written_after_preemption_equals_one_that_was_recorded(num_outputs):
    outputs = np.random.default_rng(5).integers(0, VOCAB, num_outputs).tolist()
    fresh = make_request(BUSY, PROMPT, eos_ids=(0,), bad_words=BUSY_WORDS)
    resumed = make_request(BUSY, PROMPT, outputs, eos_ids=(0,), bad_words=BUSY_WORDS)
    assert_same(recorded(state_with(fresh), outputs), state_with(resumed))


def test_min_tokens_masks_end_and_stop_ids_before_and_never_after():
    params = SamplingParams(min_tokens=3, stop_token_ids=(9, 11))
    state = state_with(make_request(params, eos_ids=(0, 31)))
    for num_outputs in range(6):
        out = jitted_adjust(LOGITS[None], pack((params, 0), adjusted=True), state, np.array([ROW], np.int32))
        masked = np.flatnonzero(np.isinf(np.asarray(out)[0])).tolist()
        assert masked == ([0, 9, 11, 31] if num_outputs < 3 else [])
        state = recorded(state, [7])


def test_a_bad_word_is_banned_where_the_output_ends_in_its_prefix_and_nowhere_else():
    longest = (*range(MAX_BAD_WORD_TOKENS - 1), 30)
    words = (longest, (4, 4, 20), (4, 21), (22,))
    prefix = list(longest[:-1])
    cases = [
        ([], {22}),  # the prompt does not count: it ends in 4, 4
        ([4], {21, 22}),
        ([4, 4], {20, 21, 22}),
        ([4, 4, 5], {22}),
        (prefix, {30, 22}),
        ([9, *prefix], {30, 22}),
        (prefix[1:], {22}),
        ([*prefix[:-1], 0], {22}),
    ]
    for outputs, banned in cases:
        request = make_request(prompt=(4, 4), outputs=outputs, bad_words=words)
        assert set(np.flatnonzero(np.isinf(adjusted_logits(request)))) == banned, outputs


def test_every_ban_up_to_the_limit_holds():
    words = tuple((i % VOCAB, (i + i // VOCAB) % VOCAB) for i in range(MAX_BANS))  # 8 a prefix
    for last in range(VOCAB):
        request = make_request(outputs=[last], bad_words=words)
        banned = {word[-1] for word in words if word[0] == last}
        assert set(np.flatnonzero(np.isinf(adjusted_logits(request)))) == banned and len(banned) == 8


def test_writing_a_row_replaces_that_row_alone_and_all_of_it():
    busy = make_request(BUSY, PROMPT, OUTPUTS, eos_ids=(0,), bad_words=BUSY_WORDS)
    values, state = row_values(busy, VOCAB), make_adjustments(NUM_ROWS, VOCAB)
    for row in range(NUM_ROWS):
        state = jitted_write_row(state, np.int32(row), values)
    neutral = make_adjustments(NUM_ROWS, VOCAB)
    replaced = jitted_write_row(state, np.int32(ROW), row_values(make_request(prompt=()), VOCAB))
    for name in Adjustments._fields:
        before, after = np.asarray(getattr(state, name)), np.asarray(getattr(replaced, name))
        assert (before[ROW] != after[ROW]).any(), name
        np.testing.assert_array_equal(after[ROW], getattr(neutral, name)[ROW])
        np.testing.assert_array_equal(np.delete(after, ROW, 0), np.delete(before, ROW, 0))


def test_values_of_a_row_have_the_shapes_and_types_of_the_state():
    values, state = row_values(make_request(BUSY), VOCAB), make_adjustments(NUM_ROWS, VOCAB)
    assert set(values) == set(Adjustments._fields)
    for name, value in values.items():
        row = getattr(state, name)[ROW]
        assert isinstance(value, np.ndarray)
        assert (value.shape, value.dtype) == (row.shape, row.dtype), name


def test_record_ignores_rows_that_do_not_sample_and_the_null_row():
    state = state_with(make_request(BUSY, PROMPT, OUTPUTS, bad_words=BUSY_WORDS))
    rows = np.array([0, ROW, NULL_ROW, NULL_ROW], np.int32)
    tokens = np.array([3, 4, 5, 6], np.int32)
    assert_same(jitted_record(state, rows, tokens, np.zeros(4, bool)), state)
    after = jitted_record(state, rows, tokens, np.array([True, False, False, False]))
    assert np.asarray(after.num_outputs - state.num_outputs).tolist() == [1, 0, 0]
    counted = np.argwhere(np.asarray(after.output_counts != state.output_counts))
    assert counted.tolist() == [[0, 3]]
    moved = np.asarray(after.recent != state.recent).any(axis=1)
    assert moved.tolist() == [True, False, False] and after.recent[0, -1] == 3
