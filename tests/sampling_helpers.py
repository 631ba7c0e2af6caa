"""Shared by the tests of the sampler: the distributions it must draw from, by definition and in float64, and draws."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chisquare

from pagedjax.adjustments import Adjustments, gather_rows, make_adjustments, row_values, write_row
from pagedjax.batch import pack_sampling
from pagedjax.request import Request
from pagedjax.row_params import unpack_sampling
from pagedjax.sampler import Features, sample
from pagedjax.sampling_params import SamplingParams

VOCAB = 32
LOGITS = np.random.default_rng(0).normal(0.0, 2.0, VOCAB).astype(np.float32)  # both signs
SEEDS, POSITIONS = 64, 64  # a distribution is drawn from once for each pair
ROW, NUM_ROWS = 1, 3  # the adjusted row, of rows of which the last is the null row
# Seeds are fixed, so a test that passes keeps passing. Were the noise drawn anew, any of the 35 distributions would
# fail with probability 1e-4, and one of them with 35e-4.
SMALLEST_P_VALUE = 1e-4
SMALLEST_EXPECTED_COUNT = 5  # below, counts are not near enough to normal: such tokens share a bin

jitted_sample = jax.jit(sample, static_argnames="features")
jitted_write_row = jax.jit(write_row)


class Kept(NamedTuple):
    """Tokens that truncation keeps, and those that float32 may decide either way."""

    kept: np.ndarray  # bool [V]
    unsure: np.ndarray  # bool [V]


def make_request(params=None, prompt=(1, 2), outputs=(), eos_ids=(), bad_words=()) -> Request:
    params, eos_ids = params or SamplingParams(), frozenset(eos_ids)
    request = Request("r", list(prompt), params, max_len=1000, eos_ids=eos_ids, bad_words=bad_words)
    request.output_token_ids = list(outputs)
    return request


def pack(*rows: tuple[SamplingParams, int], adjusted: bool = False) -> np.ndarray:
    """Packed sampling parameters of rows of (params, seed)."""
    return np.stack([pack_sampling(params, seed, adjusted) for params, seed in rows])


def state_with(request: Request, vocab_size: int = VOCAB) -> Adjustments:
    """Neutral state but for the request's row."""
    neutral = make_adjustments(NUM_ROWS, vocab_size)
    return jitted_write_row(neutral, np.int32(ROW), row_values(request, vocab_size))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def kept_tokens(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Kept:
    """min-p, then top-k, then top-p on what these leave, renormalised; ties with the last token kept are kept."""
    top_p, min_p = float(np.float32(top_p)), float(np.float32(min_p))
    probabilities = softmax(logits)
    floor = min_p * probabilities.max()
    kept = probabilities >= floor
    unsure = (abs(probabilities - floor) < 1e-5 * floor) & (logits < logits.max())
    if top_k > 0:
        kept &= logits >= np.sort(logits[kept])[::-1][:top_k][-1]
    if top_p < 1.0:
        rest = np.where(kept, probabilities, 0.0)
        order = np.argsort(-logits)
        sums = np.concatenate([[0.0], np.cumsum(rest[order]) / rest.sum()])
        mass_above = sums[np.searchsorted(-logits[order], -logits, side="left")]  # of tokens that are likelier
        unsure |= kept & (abs(mass_above - top_p) < 1e-6) & (mass_above > 0)
        kept &= (mass_above == 0) | (mass_above < top_p)
    return Kept(kept, unsure)


def exact_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What a token drawn from these logits, adjusted already, must be distributed as; float64."""
    scaled = logits.astype(np.float64) / params.temperature
    kept, unsure = kept_tokens(scaled, params.top_k, params.top_p, params.min_p)
    assert not unsure.any(), "choose parameters for which rounding decides nothing"
    return softmax(np.where(kept, scaled, -np.inf))


@partial(jax.jit, static_argnames="features")
def _draw(logits, packed, positions, state, features):
    num_draws = positions.size
    rows = None if state is None else gather_rows(state, jnp.full(num_draws, ROW))
    logits = jnp.broadcast_to(logits, (num_draws, logits.size))
    return sample(logits, unpack_sampling(packed), positions, rows, features).tokens


def draw(logits: np.ndarray, request: Request) -> np.ndarray:
    """A token for each pair of a seed and a position, int [SEEDS, POSITIONS], as a step would sample them."""
    packed = pack(*((request.params, seed) for seed in range(SEEDS)), adjusted=request.adjusted)
    packed = np.repeat(packed, POSITIONS, axis=0)
    positions = np.tile(np.arange(POSITIONS, dtype=np.int32), SEEDS)
    features = Features(random=True, truncated=request.params.truncated, adjusted=request.adjusted)
    state = state_with(request, logits.size) if request.adjusted else None
    return np.asarray(_draw(logits, packed, positions, state, features)).reshape(SEEDS, POSITIONS)


def assert_drawn_from(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """Tokens of zero probability never occur, and the others as often as chi-square allows."""
    counts = np.bincount(tokens.ravel(), minlength=probabilities.size)
    assert not counts[probabilities == 0].any()
    order = np.argsort(probabilities)
    counts, expected = counts[order], probabilities[order] * counts.sum()
    first = max(int((expected < SMALLEST_EXPECTED_COUNT).sum()) - 1, 0)
    first = max(first, int(np.argmax(np.cumsum(expected) >= SMALLEST_EXPECTED_COUNT)))
    bins = np.concatenate([[0], np.arange(first + 1, expected.size)])  # the rarest share the first bin
    observed, expected = np.add.reduceat(counts, bins), np.add.reduceat(expected, bins)
    if bins.size > 1:
        assert chisquare(observed, expected).pvalue > SMALLEST_P_VALUE
