"""How prefill is cut into tiles of queries, on the device, and handed to persistent CTAs.

A tile is `block_q` rows of q, all of one sequence, for one query head. Its first row is a multiple of 8, as a TMA copy
into swizzled shared memory wants, so a sequence's first tile may begin with rows of the sequence before it: they are
computed and not stored. Tiles go out most work first, all heads of a tile in a row, so that heads that share K and V
run at the same time and read them from L2; CTAs take them back and forth (0 1 2, 2 1 0, ...), which evens out the sum
of a sorted list. A tile's result depends on its own sequence alone, so there is one schedule for both modes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .mosaic import cdiv, i32


@dataclass(frozen=True)
class PrefillWork:
    """The static side."""

    num_q_heads: int
    block_q: int
    block_kv: int
    num_ctas: int
    sliding_window: int | None


class Tile(NamedTuple):
    """A tile of queries; all scalars."""

    seq: Any
    row: Any  # of q, a multiple of 8
    begin: Any  # the sequence's rows of q: [begin, end)
    end: Any
    position: Any  # of `row` in its sequence; negative in rows of the sequence before
    kv_len: Any


class Tiles(NamedTuple):
    """The dynamic side, made once a step."""

    columns: jax.Array  # i32 [6, N], fields of Tile
    num_tiles: jax.Array  # i32 [1]


def make_tiles(work: PrefillWork, cu_q_lens: jax.Array, kv_lens: jax.Array, num_tokens: int) -> Tiles:
    """The tiles of a step, those with the most KV first."""
    begin, end = cu_q_lens[:-1], cu_q_lens[1:]
    start = begin // 8 * 8
    count = jnp.where(end > begin, (end - start + work.block_q - 1) // work.block_q, 0)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    seqs = min(kv_lens.size, num_tokens)
    most = num_tokens // work.block_q + seqs + cdiv(7 * seqs, work.block_q)
    nth = jnp.arange(most, dtype=jnp.int32)
    seq = jnp.minimum((ends <= nth[:, None]).sum(axis=1, dtype=jnp.int32), kv_lens.size - 1)
    row = start[seq] + (nth - (ends - count)[seq]) * work.block_q
    position = kv_lens[seq] - end[seq] + row
    order = jnp.argsort(-jnp.where(nth < ends[-1], position, -8))  # a position is at least -7
    columns = jnp.stack([seq, row, begin[seq], end[seq], position, kv_lens[seq]])
    return Tiles(columns[:, order], ends[-1:])


def for_each_tile(work: PrefillWork, tiles: Tiles, cta, body: Callable, carry):
    """Inside a kernel: `carry = body(tile, head, carry)` over a CTA's tiles. `tiles` holds refs here."""
    items = tiles.num_tiles[0] * work.num_q_heads

    def step(nth, carry):
        place = jnp.where(lax.rem(nth, i32(2)) == 1, work.num_ctas - 1 - cta, cta)
        item = nth * work.num_ctas + place

        def run(carry):
            at, head = lax.div(item, i32(work.num_q_heads)), lax.rem(item, i32(work.num_q_heads))
            return body(Tile(*(tiles.columns[field, at] for field in range(len(Tile._fields)))), head, carry)

        return lax.cond(item < items, run, lambda carry: carry, carry)

    return lax.fori_loop(0, lax.div(items + work.num_ctas - 1, i32(work.num_ctas)), step, carry)


def kv_blocks(work: PrefillWork, tile: Tile):
    """First block and block past the end that a tile's queries see."""
    stop = jnp.minimum(tile.position + work.block_q, tile.kv_len)
    last = lax.div(stop + work.block_kv - 1, i32(work.block_kv))
    if work.sliding_window is None:
        return i32(0), last
    return lax.div(jnp.maximum(tile.position - work.sliding_window + 1, 0), i32(work.block_kv)), last
