"""Changes to a row's logits before sampling: bias, allowed tokens, bad words, min_tokens and the three penalties.

Most batches need none of this, so its state, as large as the vocabulary times the rows, is made when a first request
asks for it. A request that does gets its row written once, at admission, by `write_row`; a step updates only the counts
and the recent tokens of the rows that sampled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .request import Request
from .row_params import Sampling

MAX_BANS = 256  # end and stop ids under min_tokens, and bad words of several tokens, per request
MAX_BAD_WORD_TOKENS = 16
ANY_TOKEN = -1
MAX_LOGIT_BIAS = 100.0


class Adjustments(NamedTuple):
    """State by row, R rows and the null row.

    A ban forbids its token while fewer than `ban_until` tokens are out, where the row's recent output ends in
    `ban_prefix` (right-aligned, padded with ANY_TOKEN).
    """

    bias: jax.Array  # f32 [R + 1, V], -inf where a token is never allowed
    prompt_mask: jax.Array  # bool [R + 1, V], tokens of the prompt
    output_counts: jax.Array  # i32 [R + 1, V]
    num_outputs: jax.Array  # i32 [R + 1]
    recent: jax.Array  # i32 [R + 1, MAX_BAD_WORD_TOKENS - 1], the last output tokens, right-aligned
    ban_token: jax.Array  # i32 [R + 1, MAX_BANS], -1 where unused
    ban_prefix: jax.Array  # i32 [R + 1, MAX_BANS, MAX_BAD_WORD_TOKENS - 1]
    ban_until: jax.Array  # i32 [R + 1, MAX_BANS]


class AdjustmentRows(NamedTuple):
    """The rows of `Adjustments` that a batch samples, in its order; fields as there, with S for R + 1."""

    bias: jax.Array
    prompt_mask: jax.Array
    output_counts: jax.Array
    num_outputs: jax.Array
    recent: jax.Array
    ban_token: jax.Array
    ban_prefix: jax.Array
    ban_until: jax.Array


def make_adjustments(num_rows: int, vocab_size: int) -> Adjustments:
    """Neutral state for `num_rows` rows (the null row among them)."""
    prefix = MAX_BAD_WORD_TOKENS - 1
    return Adjustments(
        bias=jnp.zeros((num_rows, vocab_size), jnp.float32),
        prompt_mask=jnp.zeros((num_rows, vocab_size), bool),
        output_counts=jnp.zeros((num_rows, vocab_size), jnp.int32),
        num_outputs=jnp.zeros((num_rows,), jnp.int32),
        recent=jnp.full((num_rows, prefix), ANY_TOKEN, jnp.int32),
        ban_token=jnp.full((num_rows, MAX_BANS), -1, jnp.int32),
        ban_prefix=jnp.full((num_rows, MAX_BANS, prefix), ANY_TOKEN, jnp.int32),
        ban_until=jnp.zeros((num_rows, MAX_BANS), jnp.int32),
    )


def gather_rows(state: Adjustments, rows: Int[Array, "S"]) -> AdjustmentRows:
    return AdjustmentRows(*(getattr(state, name)[rows] for name in AdjustmentRows._fields))


def adjust(logits: Float[Array, "S V"], sampling: Sampling, rows: AdjustmentRows) -> Float[Array, "S V"]:
    """Applies bias, bans and penalties; rows whose parameters ask for none come back as they were."""
    original = logits
    logits = logits + rows.bias
    matches = (rows.ban_prefix == ANY_TOKEN) | (rows.ban_prefix == rows.recent[:, None])
    active = matches.all(axis=-1) & (rows.num_outputs[:, None] < rows.ban_until) & (rows.ban_token >= 0)
    banned = jnp.where(active, rows.ban_token, logits.shape[1])
    logits = logits.at[jnp.arange(logits.shape[0])[:, None], banned].set(-jnp.inf, mode="drop")
    logits = penalize(logits, sampling, rows.prompt_mask, rows.output_counts)
    return jnp.where((sampling.adjusted > 0)[:, None], logits, original)


def penalize(
    logits: Float[Array, "S V"],
    sampling: Sampling,
    prompt_mask: Bool[Array, "S V"],
    output_counts: Int[Array, "S V"],
) -> Float[Array, "S V"]:
    """Repetition penalty (arXiv 1909.05858) over prompt and output; frequency and presence over output."""
    seen = prompt_mask | (output_counts > 0)
    repetition = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits -= sampling.frequency_penalty[:, None] * output_counts
    return logits - sampling.presence_penalty[:, None] * (output_counts > 0)


def record(
    state: Adjustments, rows: Int[Array, "S"], tokens: Int[Array, "S"], samples: Bool[Array, "S"]
) -> Adjustments:
    """Counts the sampled tokens of the rows that sampled."""
    rows = jnp.where(samples, rows, state.num_outputs.shape[0])  # out of range is dropped
    shifted = jnp.concatenate([state.recent.at[rows].get(mode="clip")[:, 1:], tokens[:, None]], axis=1)
    return Adjustments(
        bias=state.bias,
        prompt_mask=state.prompt_mask,
        output_counts=state.output_counts.at[rows, tokens].add(1, mode="drop"),
        num_outputs=state.num_outputs.at[rows].add(1, mode="drop"),
        recent=state.recent.at[rows].set(shifted, mode="drop"),
        ban_token=state.ban_token,
        ban_prefix=state.ban_prefix,
        ban_until=state.ban_until,
    )


def write_row(state: Adjustments, row: Int[Array, ""], values: dict[str, Array]) -> Adjustments:
    """Replaces one row by what `row_values` made."""
    return Adjustments(**{name: getattr(state, name).at[row].set(value) for name, value in values.items()})


def row_values(request: Request, vocab_size: int) -> dict[str, np.ndarray]:
    """A row of `Adjustments` for a request at (re-)admission, its outputs so far counted."""
    params, outputs = request.params, request.output_token_ids
    prefix = MAX_BAD_WORD_TOKENS - 1
    recent = np.full(prefix, ANY_TOKEN, np.int32)
    if outputs:
        recent[-min(prefix, len(outputs)) :] = outputs[-prefix:]
    prompt_mask = np.zeros(vocab_size, bool)
    prompt_mask[request.prompt_token_ids] = True
    bans = ban_entries(request)
    values: dict[str, Any] = {
        "bias": bias_row(params, request.bad_words, vocab_size),
        "prompt_mask": prompt_mask,
        "output_counts": np.bincount(np.asarray(outputs, np.int64), minlength=vocab_size).astype(np.int32),
        "num_outputs": np.array(len(outputs), np.int32),
        "recent": recent,
        "ban_token": np.full(MAX_BANS, -1, np.int32),
        "ban_prefix": np.full((MAX_BANS, prefix), ANY_TOKEN, np.int32),
        "ban_until": np.zeros(MAX_BANS, np.int32),
    }
    for i, (words, until) in enumerate(bans):
        values["ban_token"][i], values["ban_until"][i] = words[-1], until
        if len(words) > 1:
            values["ban_prefix"][i, -(len(words) - 1) :] = words[:-1]
    return values


def ban_entries(request: Request) -> list[tuple[tuple[int, ...], int]]:
    """(tokens, until) of each ban: the last token is forbidden after the others, before `until` outputs."""
    early: list[tuple[tuple[int, ...], int]] = [((token,), request.params.min_tokens) for token in request.banned_until]
    return early + [(words, 2**31 - 1) for words in request.bad_words if len(words) > 1]


def bias_row(params: Any, bad_words: tuple[tuple[int, ...], ...], vocab_size: int) -> np.ndarray:
    """logit_bias (clamped to +-100), and -inf for tokens not allowed and bad words of one token; f32 [V]."""
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0.0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += np.clip(value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    bias[[words[0] for words in bad_words if len(words) == 1]] = -np.inf
    return bias
