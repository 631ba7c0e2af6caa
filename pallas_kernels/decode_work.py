"""How decoding is cut among CTAs: two schedules, found on the device from the lengths.

Work is counted in units: runs of `unit_blocks` KV blocks of one sequence. CTA number c serves KV head c % Hkv; the
CTAs of one head share its units, in order of sequences, in equal runs. The CTAs of a group (c // Hkv) so read the same
pages at the same time, a head each, and DRAM sees whole pages.

- Balanced (`split_blocks` 0): a unit is one block. A CTA folds all blocks that it has of a sequence into one partial
  result; only the first and the last sequence of its run can be shared with a neighbour, so two slots hold its partial
  results. A sequence's order of reduction depends on its neighbours.
- Batch-invariant: a unit is `split_blocks` blocks, each unit has a slot, and its partial result depends on its own
  sequence alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .mosaic import cdiv, i32


@dataclass(frozen=True)
class DecodeWork:
    """The static side of a schedule."""

    batch: int
    num_kv_heads: int
    block_kv: int
    split_blocks: int  # 0: balanced
    max_units: int  # of one KV head
    num_groups: int
    sliding_window: int | None

    @classmethod
    def make(cls, batch, num_kv_heads, tokens_per_seq, sliding_window, tiles) -> "DecodeWork":
        max_units = batch * cdiv(cdiv(tokens_per_seq, tiles.block_kv), tiles.split_blocks or 1)
        groups = max(1, tiles.num_ctas // num_kv_heads)
        return cls(batch, num_kv_heads, tiles.block_kv, tiles.split_blocks, max_units, groups, sliding_window)

    @property
    def num_ctas(self) -> int:
        return self.num_groups * self.num_kv_heads

    @property
    def num_slots(self) -> int:
        """Partial results that may exist at once."""
        return self.num_kv_heads * self.max_units if self.split_blocks else 2 * self.num_ctas

    def first_live(self, kv_len):
        """The first token that a sequence's query sees."""
        return i32(0) if self.sliding_window is None else jnp.maximum(kv_len - self.sliding_window, 0)


class Plan(NamedTuple):
    """The dynamic side, made once a step: it depends on the lengths alone.

    A kernel counts in `signals` and leaves zeros, so that the layers of a step can share a plan, one after the other.
    """

    rows: jax.Array  # i32 [B], the sequences that have units, in order
    ends: jax.Array  # i32 [B + 1], units of one head before each of them, and of all
    first: jax.Array  # i32 [num_groups + 1], place in `rows` of each group's first unit
    signals: jax.Array  # i32 [B * Hkv], zeros


class Segment(NamedTuple):
    """A run of blocks of one sequence that one CTA folds together; all scalars."""

    row: Any
    first: Any  # block
    last: Any  # block past the end
    first_live: Any  # token
    kv_len: Any
    whole: Any  # whether the segment is all of its sequence
    slot: Any  # of its partial result, if not
    open: Any  # whether a later CTA will combine that


class Parts(NamedTuple):
    """Partial results of one sequence and KV head, which one CTA combines; all scalars."""

    row: Any
    count: Any
    foreign: Any  # signals to wait for: other CTAs' partial results
    first_slot: Any
    second_slot: Any
    stride: Any  # from the second on


def make_plan(work: DecodeWork, kv_lens: jax.Array) -> Plan:
    """The plan for these lengths, i32 [B]; a sequence of length 0 has no units."""
    blocks = (kv_lens + work.block_kv - 1) // work.block_kv - work.first_live(kv_lens) // work.block_kv
    units = (blocks + (work.split_blocks or 1) - 1) // (work.split_blocks or 1)
    sums, count = jnp.cumsum(units, dtype=jnp.int32), jnp.cumsum(units > 0, dtype=jnp.int32)
    nth = jnp.arange(work.batch, dtype=jnp.int32)
    rows = jnp.minimum((count <= nth[:, None]).sum(axis=1, dtype=jnp.int32), work.batch - 1)
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), sums[rows]])
    starts = run_start(work, ends[-1], jnp.arange(work.num_groups + 1, dtype=jnp.int32))
    first = (ends[1:] <= starts[:, None]).sum(axis=1, dtype=jnp.int32)
    # A constant might be shared with other code, so these are zeros that the compiler does not see.
    signals = jnp.full(work.batch * work.num_kv_heads, jnp.minimum(ends[-1], 0))
    return Plan(rows, ends, jnp.minimum(first, count[-1]), signals)


def run_start(work: DecodeWork, total, group):
    """The first unit of a group's run: runs differ by one unit at most."""
    share, extra = lax.div(total, i32(work.num_groups)), lax.rem(total, i32(work.num_groups))
    return group * share + jnp.minimum(group, extra)


def group_of(work: DecodeWork, total, unit):
    """The group whose run holds a unit."""
    share, extra = lax.div(total, i32(work.num_groups)), lax.rem(total, i32(work.num_groups))
    longer = extra * (share + 1)  # units in runs that have one more
    late = extra + lax.div(unit - longer, jnp.maximum(share, 1))
    return jnp.where(unit < longer, lax.div(unit, share + 1), late)


def for_each_segment(work: DecodeWork, plan: Plan, lens_ref, cta, body: Callable, carry):
    """Inside a kernel: `carry = body(segment, carry)` over the segments of a CTA. `plan` holds refs here."""
    group, head = lax.div(cta, i32(work.num_kv_heads)), lax.rem(cta, i32(work.num_kv_heads))
    total = plan.ends[work.batch]
    start, stop = run_start(work, total, group), run_start(work, total, group + 1)
    first, after = plan.first[group], plan.first[group + 1]
    unit = work.split_blocks or 1

    def step(i, state):
        place, carry = state
        if work.split_blocks:
            at = start + i
            place = place + jnp.where(plan.ends[place + 1] <= at, 1, 0)
        else:
            place = first + i
            at = jnp.maximum(plan.ends[place], start)
        base, end, row = plan.ends[place], plan.ends[place + 1], plan.rows[place]
        count = i32(1) if work.split_blocks else jnp.minimum(end, stop) - at
        kv_len = lens_ref[row]
        first_live = work.first_live(kv_len)
        first_block = lax.div(first_live, i32(work.block_kv)) + (at - base) * unit
        last = jnp.minimum(first_block + count * unit, lax.div(kv_len + work.block_kv - 1, i32(work.block_kv)))
        slot = head * work.max_units + at if work.split_blocks else 2 * cta + jnp.where(at == start, 0, 1)
        segment = Segment(row, first_block, last, first_live, kv_len, count == end - base, slot, end > stop)
        return place, body(segment, carry)

    # A group's last sequence is the next one's first, if the border is inside it.
    segments = after + jnp.where(plan.ends[after] < stop, 1, 0) - first
    return lax.fori_loop(0, stop - start if work.split_blocks else segments, step, (first, carry))[1]


def for_each_cut(work: DecodeWork, plan: Plan, cta, body: Callable, carry):
    """Inside a kernel: `carry = body(parts, carry)` over the cut sequences whose last unit a CTA has.

    Their other parts are those of CTAs with lower numbers, which a GPU starts first: to wait for them ends even where
    not all CTAs run at once.
    """
    group, head = lax.div(cta, i32(work.num_kv_heads)), lax.rem(cta, i32(work.num_kv_heads))
    total = plan.ends[work.batch]
    start, stop = run_start(work, total, group), run_start(work, total, group + 1)
    first, after = plan.first[group], plan.first[group + 1]

    def step(place, carry):
        base, end = plan.ends[place], plan.ends[place + 1]
        if work.split_blocks:
            slot = head * work.max_units + base
            count, foreign, slots = end - base, jnp.maximum(start - base, 0), (slot, slot + 1, 1)
        else:
            opening = group_of(work, total, base)
            second = jnp.where(base > run_start(work, total, opening), 1, 0)  # of its CTA's two slots
            slot, foreign = 2 * (opening * work.num_kv_heads + head), group - opening
            count, slots = foreign + 1, (slot + second, slot + 2 * work.num_kv_heads, 2 * work.num_kv_heads)
        parts = Parts(plan.rows[place], count, foreign, *slots)
        return lax.cond((end <= stop) & (count > 1), lambda carry: body(parts, carry), lambda carry: carry, carry)

    # In the balanced schedule only a run's first sequence can be one that earlier CTAs share.
    return lax.fori_loop(first, after if work.split_blocks else jnp.minimum(first + 1, after), step, carry)
