"""From logits to token ids and log-probabilities, on the device.

Each row has sampling parameters of its own. What a batch needs is known to the host and static (`Features`), so that a
batch without the costly parts does not pay for them; a row that does not use a feature passes through it unchanged.

Order, as in vLLM: raw log-probabilities; bias and bans; penalties; masks; temperature; min-p; top-k; top-p; sampling.
A token is sampled by the Gumbel-max trick with noise from fold_in(key(request's seed), position): batch, order and
preemption do not enter.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from .adjustments import AdjustmentRows, adjust
from .request import SamplerNeeds
from .row_params import Sampling

COMMON_LOGPROBS = 20, 256  # batches that ask for no more alternatives than one of these share a compilation


@dataclass(frozen=True)
class Features:
    """What a batch needs of the sampler; static. `num_logprobs`: None, or how many alternatives to return. `recorded`:
    the log-probabilities of the sampled tokens under the distribution that they came from."""

    random: bool = False
    truncated: bool = False
    adjusted: bool = False
    num_logprobs: int | None = None
    processed_logprobs: bool = False
    masked: bool = False
    recorded: bool = False

    @staticmethod
    def of(needs: set[SamplerNeeds], processed_logprobs: bool, vocab_size: int) -> "Features":
        """For a batch of requests with these needs."""
        wanted = [n.logprobs for n in needs if n.logprobs is not None]
        return Features(
            random=any(n.random for n in needs),
            truncated=any(n.truncated for n in needs),
            adjusted=any(n.adjusted for n in needs),
            masked=any(n.masked for n in needs),
            num_logprobs=num_alternatives(wanted, vocab_size) if wanted else None,
            processed_logprobs=bool(wanted) and processed_logprobs,
            recorded=any(n.recorded for n in needs),
        )


def num_alternatives(wanted: list[int], vocab_size: int) -> int:
    """How many are returned where so many are wanted, -1 for all."""
    most = vocab_size if -1 in wanted else max(wanted)
    return min([*(count for count in COMMON_LOGPROBS if count >= most), vocab_size])


class Sampled(NamedTuple):
    """What one step sampled; the log-probability fields are None unless asked for."""

    tokens: jax.Array  # i32 [S]
    logprobs: jax.Array | None = None  # f32 [S], of the sampled tokens
    ranks: jax.Array | None = None  # i32 [S], 1 is the likeliest
    top_tokens: jax.Array | None = None  # i32 [S, num_logprobs]
    top_logprobs: jax.Array | None = None  # f32 [S, num_logprobs]
    recorded: jax.Array | None = None  # f32 [S], after temperature, truncation and all else; of greedy rows, before


def sample(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    positions: Int[Array, "S"],
    adjustments: AdjustmentRows | None,
    features: Features,
    masks: Int[Array, "S words"] | None = None,
) -> Sampled:
    """Samples one token per row. `positions` are those that the sampled tokens will have; `masks`: bits of the tokens
    that may be sampled."""
    raw = logits
    if features.adjusted:
        assert adjustments is not None
        logits = adjust(logits, sampling, adjustments)
    if features.masked:
        assert masks is not None
        logits = mask_logits(logits, raw, masks)
    greedy = sampling.temperature == 0.0
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if features.random:
        logits = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
        if features.truncated:
            logits = truncate(logits, sampling)
        noisy = logits + _gumbel(sampling, positions, logits.shape[-1])
        tokens = jnp.where(greedy, tokens, jnp.argmax(noisy, axis=-1).astype(jnp.int32))
    sampled = Sampled(tokens)
    if features.num_logprobs is not None:
        sampled = token_logprobs(logits if features.processed_logprobs else raw, tokens, features.num_logprobs)
    return sampled._replace(recorded=chosen_logprobs(logits, tokens)) if features.recorded else sampled


def chosen_logprobs(logits: Float[Array, "S V"], tokens: Int[Array, "S"]) -> Float[Array, "S"]:
    """Log-probabilities of the tokens given, alone."""
    # Apart from what made the logits, which depends on the batch: sums fused with that could have another order.
    logits, tokens = lax.optimization_barrier((logits, tokens))
    greatest = logits.max(axis=-1)  # as `log_softmax` has it, so that a prompt's are the same bits
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - greatest
    return chosen - jnp.log(jnp.exp(logits - greatest[:, None]).sum(axis=-1))


def mask_logits(
    logits: Float[Array, "S V"], raw: Float[Array, "S V"], masks: Int[Array, "S words"]
) -> Float[Array, "S V"]:
    """-inf for tokens whose bit is not set. Where bias and bans leave none of the others, they do not count."""
    bits = masks[:, :, None] >> jnp.arange(32) & 1
    allowed = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] > 0
    left = (allowed & (logits > -jnp.inf)).any(axis=1, keepdims=True)
    return jnp.where(allowed, jnp.where(left, logits, raw), -jnp.inf)


def make_masks(num_rows: int, vocab_size: int) -> Int[Array, "S words"]:
    """That allow everything."""
    return jnp.full((num_rows, -(-vocab_size // 32)), -1, jnp.int32)


def token_logprobs(logits: Float[Array, "S V"], tokens: Int[Array, "S"], num_logprobs: int) -> Sampled:
    """Log-probability and rank of the tokens given, and of the likeliest `num_logprobs`."""
    logprobs = jax.nn.log_softmax(lax.optimization_barrier(logits), axis=-1)  # as in `chosen_logprobs`
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    ranks = (logprobs > chosen).sum(axis=-1) + 1
    top_logprobs, top_tokens = lax.top_k(logprobs, num_logprobs)
    return Sampled(tokens, chosen[:, 0], ranks, top_tokens, top_logprobs)


def truncate(logits: Float[Array, "S V"], sampling: Sampling) -> Float[Array, "S V"]:
    """min-p (arXiv 2407.01082), then top-k, then top-p (arXiv 1904.09751): what is dropped becomes -inf.

    Each is a threshold on the logits: tokens that tie with the last one kept are kept too.
    """
    highest = logits.max(axis=-1)
    floor = highest + jnp.log(sampling.min_p)  # log 0 is -inf: nothing dropped
    logits = jnp.where(logits >= floor[:, None], logits, -jnp.inf)
    k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    logits = _keep_from_threshold(logits, jnp.ones_like(logits), k.astype(jnp.float32))
    weights = jnp.exp(logits - highest[:, None])
    mass = jnp.where(sampling.top_p < 1.0, sampling.top_p, jnp.inf) * weights.sum(axis=-1)
    mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)  # a top_p that underflows keeps the likeliest too
    return _keep_from_threshold(logits, weights, mass)


def _keep_from_threshold(
    logits: Float[Array, "S V"], weights: Float[Array, "S V"], wanted: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """Keeps the largest logits until their weights sum to `wanted`; all of them if the sum falls short.

    Bisection over the bits of a float: 32 passes give the exact threshold, without sorting the vocabulary.
    """
    order = _ordered_bits(logits)

    def narrow(i, low):  # the largest threshold whose tokens weigh enough, from the highest bit down
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.where(order >= candidate[:, None], weights, 0.0).sum(axis=-1) >= wanted
        return jnp.where(enough, candidate, low)

    threshold = lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "S V"]) -> UInt[Array, "S V"]:
    """Unsigned integers in the order of the floats; 0.0 and -0.0 tie."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _gumbel(sampling: Sampling, positions: Int[Array, "S"], vocab_size: int) -> Float[Array, "S V"]:
    def row(high, low, position):
        key = jax.random.wrap_key_data(jnp.stack([high, low]).astype(jnp.uint32), impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)

    return jax.vmap(row)(sampling.seed_high, sampling.seed_low, positions)
