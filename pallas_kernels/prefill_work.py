"""How prefill is cut into tiles of queries, on the device, and handed to persistent CTAs.

A tile is `block_q` rows of q, all of one sequence, for one query head. Its first row is a multiple of 8, as a TMA copy
into swizzled shared memory wants, so a sequence's first tile may begin with rows of the sequence before it: they are
computed and not stored. A column is a tile of all heads, or two. CTAs take (column, head) back and forth (0 1 2, 2 1 0,
...). A tile's result depends on its own sequence alone, so there is one schedule for both modes.

Columns are two tiles of a sequence, its last and its first, or the last but one and the second: equal work for all
columns of a sequence, and at any moment long tiles, which compute, beside short ones, which wait for memory. A KV
head's columns go out together, one head after the other, so that the CTAs of a moment read the K and V of a few heads:
where no query heads share them, any other order has every CTA read its own, 5 TB/s.

Where query heads share and sequences are long (`max_paired`), a column is one tile, those with the most KV first, all
heads together. That evens out the CTAs' sums, and they do not all read the same K and V at once. So it is where tiles
are fewer than CTAs.
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
    group: int  # query heads per KV head
    block_q: int
    block_kv: int
    num_ctas: int
    max_paired: int  # tiles of the longest sequence up to which they go in pairs
    sliding_window: int | None


class Tile(NamedTuple):
    """A tile of queries; all scalars."""

    seq: Any
    eighth: Any  # its first row of q, over 8
    begin: Any  # the sequence's rows of q: [begin, end)
    end: Any
    position: Any  # of its first row in its sequence; negative in rows of the sequence before
    kv_len: Any

    @property
    def row(self):
        """A multiple of 8, as the compiler can see."""
        return self.eighth * 8


class Columns(NamedTuple):
    """The dynamic side, made once a step."""

    fields: jax.Array  # i32 [9, N]: a sequence as its first Tile, its first column, its number of columns, a tile
    count: jax.Array  # i32 [2]: columns, and the tiles of one


def make_columns(work: PrefillWork, cu_q_lens: jax.Array, kv_lens: jax.Array, num_tokens: int) -> Columns:
    """The columns of a step."""
    begin, end = cu_q_lens[:-1], cu_q_lens[1:]
    row = begin // 8 * 8
    position = kv_lens - end + row
    tiles = jnp.where(end > begin, (end - row + work.block_q - 1) // work.block_q, 0)
    many = tiles.sum(dtype=jnp.int32) * work.num_q_heads > work.num_ctas
    width = jnp.where(many & (tiles.max() <= work.max_paired), 2, 1)
    columns = (tiles + width - 1) // width
    ends = jnp.cumsum(columns, dtype=jnp.int32)
    seqs = min(kv_lens.size, num_tokens)
    nth = jnp.arange(num_tokens // work.block_q + seqs + cdiv(7 * seqs, work.block_q), dtype=jnp.int32)
    seq = jnp.minimum((ends <= nth[:, None]).sum(axis=1, dtype=jnp.int32), kv_lens.size - 1)
    first = (ends - columns)[seq]
    last = position[seq] + jnp.where(width == 2, tiles[seq] - 1, nth - first) * work.block_q  # most KV of the column
    order = jnp.argsort(-jnp.where(nth < ends[-1], last, -64))  # a position is at least -7; equal ones stay in order
    of_seq = [x[seq][order] for x in (row // 8, begin, end, position, kv_lens)]
    alone = [nth, jnp.ones_like(nth), (nth - first)[order]]
    paired = [jnp.argsort(order)[first[order]], columns[seq][order], tiles[seq][order] - 1]
    where = [jnp.where(width == 2, a, b) for a, b in zip(paired, alone, strict=True)]
    return Columns(jnp.stack([seq[order], *of_seq, *where]), jnp.stack([ends[-1], width]))


def for_each_tile(work: PrefillWork, columns: Columns, cta, body: Callable, carry):
    """Inside a kernel: `carry = body(tile, head, carry)` over a CTA's tiles. `columns` holds refs here."""

    def step(i, carry):
        items, width = columns.count[0] * work.num_q_heads, columns.count[1]
        nth, part = _divide(i, width)
        item = nth * work.num_ctas + jnp.where(lax.rem(nth, i32(2)) == 1, work.num_ctas - 1 - cta, cta)
        column = jnp.minimum(lax.div(item, i32(work.num_q_heads)), columns.fields.shape[1] - 1)
        *seq, first, of_head, top = (columns.fields[field, column] for field in range(columns.fields.shape[0]))
        tile = Tile(*seq)
        kv_head, rest = _divide(item - first * work.num_q_heads, of_head * work.group)
        down, head = _divide(rest, i32(work.group))
        nth = jnp.where(part == 0, top - down, down)
        eighth, position = tile.eighth + nth * (work.block_q // 8), tile.position + nth * work.block_q

        def run(carry):
            return body(tile._replace(eighth=eighth, position=position), kv_head * work.group + head, carry)

        there = (item < items) & ((part == 0) | (nth != top - down))
        return lax.cond(there, run, lambda carry: carry, carry)

    steps = lax.div(columns.count[0] * work.num_q_heads + work.num_ctas - 1, i32(work.num_ctas)) * columns.count[1]
    return lax.fori_loop(0, steps, step, carry)


def _divide(a, b):
    return lax.div(a, b), lax.rem(a, b)


def kv_blocks(work: PrefillWork, tile: Tile):
    """First block and block past the end that a tile's queries see."""
    stop = jnp.minimum(tile.position + work.block_q, tile.kv_len)
    last = lax.div(stop + work.block_kv - 1, i32(work.block_kv))
    if work.sliding_window is None:
        return i32(0), last
    return lax.div(jnp.maximum(tile.position - work.sliding_window + 1, 0), i32(work.block_kv)), last
