"""How attention is cut among CTAs: whatever the lengths, all work is done, and once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedjax.pallas_kernels.decode_work import DecodeWork, Parts, for_each_cut, for_each_segment, make_plan
from pagedjax.pallas_kernels.prefill_work import PrefillWork, for_each_tile, make_columns
from pagedjax.pallas_kernels.tuning import DecodeTiles

BATCH, TOKENS, BLOCK = 6, 512, 64
lengths = st.lists(st.sampled_from([0, 0, 1, 63, 64, 65, 128, 200, 511]), min_size=BATCH, max_size=BATCH)


def decode_work(num_kv_heads, num_ctas, split_blocks, window):
    return DecodeWork.make(BATCH, num_kv_heads, TOKENS, window, DecodeTiles(BLOCK, 2, num_ctas, split_blocks))


@pytest.mark.parametrize("split_blocks", [0, 2])
@pytest.mark.parametrize(
    ("num_kv_heads", "num_ctas", "window"), [(1, 5, None), (2, 6, None), (3, 40, None), (2, 9, 70)]
)
def test_decode_computes_each_block_once_and_combines_what_was_cut(num_kv_heads, num_ctas, window, split_blocks):
    work = decode_work(num_kv_heads, num_ctas, split_blocks, window)
    blocks_per_seq, slots = TOKENS // BLOCK, work.num_slots

    @jax.jit
    def walk(lens):
        plan = make_plan(work, lens)

        def of_cta(cta):
            def segment(segment, carry):
                blocks, held, whole, told = carry
                head = cta % num_kv_heads
                nth = jnp.arange(blocks_per_seq)
                blocks = blocks.at[segment.row, head].add((nth >= segment.first) & (nth < segment.last))
                slot = jnp.where(segment.whole, slots, segment.slot)
                held = held.at[slot].add(1 + segment.row * num_kv_heads + head, mode="drop")
                told = told.at[segment.row, head].add(segment.open)
                return blocks, held, whole.at[segment.row, head].add(segment.whole), told

            shape = (BATCH, num_kv_heads)
            empty = jnp.zeros((*shape, blocks_per_seq), int), jnp.zeros(slots, int), jnp.zeros(shape, int)
            return for_each_segment(work, plan, lens, cta, segment, (*empty, jnp.zeros(shape, int)))

        return jax.tree.map(lambda x: x.sum(axis=0), jax.vmap(of_cta)(jnp.arange(work.num_ctas))), plan

    @jax.jit
    def cuts(plan):
        def of_cta(cta):
            def cut(parts, carry):
                count, found = carry
                return count + 1, found.at[count].set(jnp.array(parts))

            return for_each_cut(work, plan, cta, cut, (0, jnp.zeros((BATCH, len(Parts._fields)), jnp.int32)))

        return jax.vmap(of_cta)(jnp.arange(work.num_ctas))

    @given(lengths)
    @settings(max_examples=60, deadline=None)
    def check(lens):
        results, plan = walk(jnp.array(lens, jnp.int32))
        blocks, held, whole, told = jax.tree.map(np.array, results)
        kv_lens = np.array(lens)[:, None]
        first = 0 if window is None else np.maximum(kv_lens - window, 0)
        nth = np.arange(blocks_per_seq)
        live = (nth * BLOCK < kv_lens) & ((nth + 1) * BLOCK > first)
        np.testing.assert_array_equal(blocks, np.broadcast_to(live[:, None], blocks.shape))
        assert (np.asarray(plan.signals) == 0).all()
        for cta, (count, found) in enumerate(zip(*map(np.asarray, cuts(plan)), strict=True)):
            for parts in map(Parts._make, found[:count]):
                head = cta % num_kv_heads
                places = [parts.first_slot, *(parts.second_slot + i * parts.stride for i in range(parts.count - 1))]
                assert (held[places] == 1 + parts.row * num_kv_heads + head).all()
                assert told[parts.row, head] == parts.foreign
                held[places] = 0
                whole[parts.row, head] += 1
        assert (held == 0).all()  # every partial result is combined
        np.testing.assert_array_equal(whole, np.broadcast_to(kv_lens > 0, whole.shape))  # and every output written

    check()


chunks = st.lists(st.tuples(st.sampled_from([0, 1, 7, 8, 64, 130, 300]), st.integers(0, 400)), min_size=3, max_size=3)


@pytest.mark.parametrize(
    ("num_q_heads", "group", "num_ctas", "max_paired"),
    [(4, 1, 5, 9), (4, 2, 5, 9), (4, 2, 5, 1), (2, 1, 132, 9), (3, 3, 7, 0)],
)
def test_prefill_computes_each_row_of_each_head_once(num_q_heads, group, num_ctas, max_paired):
    work = PrefillWork(num_q_heads, group, 128, BLOCK, num_ctas, max_paired, None)
    num_tokens = 1000

    @jax.jit
    def walk(cu_q_lens, kv_lens):
        columns = make_columns(work, cu_q_lens, kv_lens, num_tokens)

        def of_cta(cta):
            def count(tile, head, counts):
                nth = jnp.arange(num_tokens)
                mine = (nth >= tile.row) & (nth < tile.row + 128) & (nth >= tile.begin) & (nth < tile.end)
                fine = (tile.row % 8 == 0) & (tile.position + tile.end - tile.row == tile.kv_len)
                fine &= tile.kv_len == kv_lens[tile.seq]
                return counts.at[:, head].add(mine * jnp.where(fine, 1, 100))

            return for_each_tile(work, columns, cta, count, jnp.zeros((num_tokens, num_q_heads), jnp.int32))

        return jax.vmap(of_cta)(jnp.arange(num_ctas)).sum(axis=0)

    @given(chunks, st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def check(seqs, first):
        cu_q_lens = np.cumsum([first, *(q_len for q_len, _ in seqs)])
        kv_lens = [q_len + before if q_len else 0 for q_len, before in seqs]
        counts = np.asarray(walk(jnp.array(cu_q_lens, jnp.int32), jnp.array(kv_lens, jnp.int32)))
        nth = np.arange(num_tokens)[:, None]
        live = (nth >= first) & (nth < cu_q_lens[-1])
        np.testing.assert_array_equal(counts, np.broadcast_to(live, counts.shape))

    check()
