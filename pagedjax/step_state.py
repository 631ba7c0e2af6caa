"""What a step reads: the state of rows that stays on the device, and a packed batch taken apart."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .batch import DEVICE_TOKEN, NUM_SAMPLING, Bucket, layout
from .models.llama import Llama


class Rows(NamedTuple):
    """State of the requests that run, by row; the last row is the null row, which padding uses."""

    page_table: jax.Array  # i32 [R + 1, pages_per_seq]
    positions: jax.Array  # i32 [R + 1], tokens whose KV is in the pool
    last_token: jax.Array  # i32 [R + 1]
    sampling: jax.Array  # i32 [R + 1, NUM_SAMPLING]


class Sequences(NamedTuple):
    """A step's sequences, as the sampler needs them."""

    row: jax.Array  # i32 [S]
    positions: jax.Array  # i32 [S], which the sampled tokens will have
    samples: jax.Array  # bool [S], whether the sequence samples in this step


class StepTokens(NamedTuple):
    """A step's tokens and sequences, unpacked."""

    tokens: jax.Array  # i32 [T]
    positions: jax.Array  # i32 [T]
    slots: jax.Array  # i32 [T]
    page_table: jax.Array  # i32 [S, pages_per_seq]; where all attend as if they decoded, [T, pages_per_seq]
    kv_lens: jax.Array  # i32 [S] or [T], the same
    cu_q_lens: jax.Array | None  # i32 [S + 1]; None in a decode step
    num_decodes: jax.Array | None  # i32 []; None where all attend as if they decoded


def make_rows(max_num_seqs: int, pages_per_seq: int) -> Rows:
    """Empty rows, on the null page."""
    rows = max_num_seqs + 1
    return Rows(
        page_table=jnp.zeros((rows, pages_per_seq), jnp.int32),
        positions=jnp.zeros((rows,), jnp.int32),
        last_token=jnp.zeros((rows,), jnp.int32),
        sampling=jnp.zeros((rows, NUM_SAMPLING), jnp.int32),
    )


def sample_shapes(model: Llama, num_seqs: int) -> tuple[Any, Sequences]:
    """Of the hidden states and sequences that the sampler takes."""

    def make() -> tuple[jax.Array, Sequences]:
        integers = jnp.zeros(num_seqs, jnp.int32)
        return jnp.zeros((num_seqs, model.config.hidden_size), model.dtype), Sequences(integers, integers, integers > 0)

    return jax.eval_shape(make)


def unpack(packed: jax.Array, bucket: Bucket) -> dict[str, jax.Array]:
    """The sections of a packed step, by name (`batch.layout`)."""
    sections, offset = {}, 0
    for name, shape in layout(bucket).items():
        size = math.prod(shape)
        sections[name] = packed[offset : offset + size].reshape(shape)
        offset += size
    return sections


def decode_tokens(sections: dict[str, jax.Array], rows: Rows, page_size: int) -> tuple[StepTokens, Sequences, Rows]:
    """Of a decode step; the rows' positions move on."""
    null_row = rows.positions.size - 1
    row = sections["row"]
    live = row != null_row
    positions, table = rows.positions[row], rows.page_table[row]
    kv_lens = jnp.where(live, positions + 1, 0)
    slots = _slots(rows.page_table, row, positions, page_size)
    rows = rows._replace(positions=rows.positions.at[row].set(kv_lens))
    tokens = StepTokens(rows.last_token[row], positions, slots, table, kv_lens, None, None)
    return tokens, Sequences(row, kv_lens, live), rows


def mixed_tokens(
    sections: dict[str, jax.Array], rows: Rows, page_size: int, by_token: bool = False
) -> tuple[StepTokens, Sequences, Rows]:
    """The same of a mixed step, which writes the sampling parameters of its prompts' rows too. `by_token`: each token
    attends for itself, to what stands before it, as if it decoded."""
    null_row = rows.positions.size - 1
    row, start, end = sections["row"], sections["start"], sections["end"]
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    kv_lens = start + (end - begin)  # of a fork, which has no tokens in the step, `start`
    token = jnp.arange(sections["tokens"].size)
    live = token < end[-1]
    seq = jnp.minimum((token[:, None] >= end).sum(axis=1), end.size - 1)
    positions = jnp.where(live, (start - begin)[seq] + token, 0)
    token_row = jnp.where(live, row[seq], null_row)
    ids = jnp.where(sections["tokens"] == DEVICE_TOKEN, rows.last_token[token_row], sections["tokens"])
    decodes = jnp.arange(row.size) < sections["num_decodes"]
    sampling = jnp.where(decodes[:, None], rows.sampling[row], sections["sampling"])
    rows = rows._replace(positions=rows.positions.at[row].set(kv_lens), sampling=rows.sampling.at[row].set(sampling))
    tokens = StepTokens(
        ids,
        positions,
        _slots(rows.page_table, token_row, positions, page_size),
        rows.page_table[row],
        kv_lens,
        jnp.concatenate([jnp.zeros(1, jnp.int32), end]),
        sections["num_decodes"][0],
    )
    if by_token:
        lens = jnp.where(live, positions + 1, 0)
        tokens = tokens._replace(page_table=rows.page_table[token_row], kv_lens=lens, num_decodes=None)
    return tokens, Sequences(row, kv_lens, sections["samples"] > 0), rows


def _slots(page_table: jax.Array, row: jax.Array, positions: jax.Array, page_size: int) -> jax.Array:
    page = page_table[row, positions // page_size]
    return page * page_size + positions % page_size
