"""The arithmetic of `paged_prefill`: what a consumer warpgroup does with 64 queries of each tile."""

import operator
from functools import partial

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic import (
    LOG2E,
    MASKED,
    PER_ROW,
    WG_ROWS,
    WGMMA,
    fold_columns,
    full,
    i32,
    larger,
    product,
    scale_rows,
    store_rows,
)
from .prefill_producer import CONSUMERS, NO_HEAD, PrefillBuffers, PrefillFacts
from .prefill_work import kv_blocks

SLACK = 8.0  # log2 of how far a weight may exceed 1 before all are scaled anew


class PrefillConsumer(PrefillFacts):
    def release_all(self, buffers: PrefillBuffers):
        """Each consumer's word, before its first tile, that nothing is in use: but the last slot of V, for its first
        step multiplies what lies there with no weights, and throws the product away."""
        for slot in range(2):
            plgpu.barrier_arrive(buffers.q_free.at[slot])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            if slot < self.tiles.stages - 1:
                plgpu.barrier_arrive(buffers.v_free.at[slot])

    def consume_all(self, out_ref, buffers: PrefillBuffers, consumer):
        """64 queries of every tile that arrives.

        From tile to tile go the blocks so far, the weights of the last one, which await their product with V, and what
        has been summed before it.
        """

        def arrived(nth):
            plgpu.barrier_wait(buffers.q_full.at[lax.rem(nth, i32(2))])
            return nth, self.tile(buffers, nth)[1]

        def step(state):
            (nth, _), carry = state
            carry = self.consume(out_ref, buffers, consumer, nth, carry)
            return arrived(nth + 1), carry

        p, acc = full((WG_ROWS, self.tiles.block_kv), 0, self.dtype), full((WG_ROWS, self.head_dim), 0, jnp.float32)
        carry = i32(self.tiles.stages), p, acc, full((WG_ROWS, 8), 0, jnp.float32)
        (nth, _), carry = lax.while_loop(lambda state: state[0][1] != NO_HEAD, step, (arrived(i32(0)), carry))
        self.end(out_ref, buffers, consumer, nth, carry)

    def consume(self, out_ref, buffers: PrefillBuffers, consumer, nth, carry):
        """Attention of 64 queries of a tile, up to the last block's product with V; ends the tile before."""
        blocks, p, acc, ended_total = carry
        tile, _ = self.tile(buffers, nth)
        first, last = kv_blocks(self.work, tile)
        position = tile.position + consumer * WG_ROWS
        unmasked = first  # the block after those that every query sees whole; with a window none is taken for such
        if self.work.sliding_window is None:
            unmasked = lax.div(position + 1, i32(self.tiles.block_kv))
        slot = lax.rem(nth, i32(2))
        q = buffers.q.at[slot, consumer], buffers.q_free.at[slot]
        step = partial(self.step, buffers, q, (position, tile.kv_len), blocks - first, last)
        top, total = full((WG_ROWS,), MASKED, jnp.float32, PER_ROW), full((WG_ROWS, 8), 0, jnp.float32)
        acc, (p, top, total, _) = step(first, (p, acc, top, total), masked=True)
        p = p.astype(self.dtype)
        self.store(out_ref, buffers, consumer, nth - 1, acc, ended_total)
        fold = partial(self.fold, step)
        middle = jnp.clip(unmasked, first + 1, last)
        carry = p, full(acc.shape, 0, jnp.float32), top, total
        carry = lax.fori_loop(first + 1, middle, partial(fold, masked=False), carry)
        p, acc, _, total = lax.fori_loop(middle, last, partial(fold, masked=True), carry)
        blocks = blocks + last - first
        self.zero_dead_rows(buffers, consumer, self.slot(blocks - 1), (last - 1) * self.tiles.block_kv, tile.kv_len)
        return blocks, p, acc, total

    def end(self, out_ref, buffers: PrefillBuffers, consumer, nth, carry):
        """The last tile's last product."""
        blocks, p, acc, total = carry
        slot = self.slot(blocks - 1)
        acc = self.add_product(acc, buffers, p, slot)
        plgpu.barrier_arrive(buffers.v_free.at[slot])
        self.store(out_ref, buffers, consumer, nth - 1, acc, total)
        plgpu.wait_smem_to_gmem(0)

    def fold(self, step, i, carry, *, masked: bool):
        """A step within a tile: both products belong to it."""
        acc, (p, top, total, keep) = step(i, carry, masked=masked)
        return p.astype(self.dtype), scale_rows(acc, keep, interpret=self.interpret), top, total

    def step(self, buffers: PrefillBuffers, queries, bounds, offset, last, i, carry, *, masked: bool):
        """acc + P V of the block before i, whose weights are there, while the softmax takes in block i."""
        q, q_free = queries
        p, acc, top, total = carry
        before, slot = self.slot(offset + i - 1), self.slot(offset + i)
        plgpu.barrier_wait(buffers.k_full.at[slot])

        def softmax(scores):
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            pl.when(i == last - 1)(lambda: plgpu.barrier_arrive(q_free))
            result = lax.optimization_barrier(self.softmax(scores, top, total, bounds, i, masked=masked))
            plgpu.barrier_wait(buffers.v_full.at[slot])
            return result

        acc, folded = self.products(acc, buffers, q, p, before, slot, softmax)
        plgpu.barrier_arrive(buffers.v_free.at[before])
        return acc, folded

    def softmax(self, scores, top, total, bounds, i, *, masked: bool):
        """Weights of block i, the maxima and sums with it, and what they scale earlier sums by; maxima are in units of
        log2."""
        if self.soft_cap is not None:
            scores = jnp.tanh(scores * (self.scale / self.soft_cap))
        factor = LOG2E * (self.scale if self.soft_cap is None else self.soft_cap)
        if masked:
            scores = jnp.where(self.visible(scores.shape, bounds, i), scores, MASKED)
        new_top = fold_columns(larger, scores, interpret=self.interpret).max(axis=1) * factor
        new_top = jnp.where(new_top > top + SLACK, new_top, top)
        keep = jnp.exp2(top - new_top)
        p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        total = scale_rows(total, keep, interpret=self.interpret)
        return p, new_top, total + fold_columns(operator.add, p, interpret=self.interpret), keep

    def visible(self, shape, bounds, i):
        """Which tokens of block i a query sees: none past its own position, nor past the sequence's end."""
        position, kv_len = bounds
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + i * self.tiles.block_kv
        last = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=PER_ROW) + position
        last = jnp.minimum(last, kv_len - 1)
        seen = token <= lax.broadcast_in_dim(last, shape, [0])
        if self.work.sliding_window is None:
            return seen
        return seen & (token > lax.broadcast_in_dim(last - self.work.sliding_window, shape, [0]))

    def products(self, acc, buffers: PrefillBuffers, q, weights, before, slot, softmax):
        """Queues Q K^T of one block and acc + P V of the block before; `softmax` runs when the first has ended."""
        k_t, v = buffers.k.at[slot].transpose((1, 0)), buffers.v.at[before]
        if self.interpret:  # it has no accumulator that begins with a value
            scores, acc = product(q, k_t), self.add_product(acc, buffers, weights, before)
            return acc, softmax(scores)

        def run(scores_ref, acc_ref):
            acc_ref[...] = acc
            plgpu.wgmma(scores_ref, q, k_t)
            plgpu.wgmma(acc_ref, weights, v)
            # The barriers keep the compiler from moving the softmax out of the time that the second product takes.
            scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
            folded = softmax(scores)
            return lax.optimization_barrier(acc_ref[...]), folded

        accumulators = ((WG_ROWS, self.tiles.block_kv), acc.shape)
        return pl.run_scoped(run, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in accumulators))

    def add_product(self, acc, buffers: PrefillBuffers, weights, slot):
        """acc + P V."""
        v = buffers.v.at[slot]
        if not self.interpret:
            return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v))(plgpu.WGMMAAccumulatorRef.init(acc))
        consumer = lax.axis_index("warpgroup")
        buffers.p[consumer] = weights
        plgpu.commit_smem()
        return acc + product(buffers.p.at[consumer], v)

    def zero_dead_rows(self, buffers: PrefillBuffers, consumer, slot, begin, kv_len):
        """Zeros in the rows of V past the sequence's end, every other 64 by each consumer; only a tile's last block has
        any."""

        @pl.when(begin + self.tiles.block_kv > kv_len)
        def _():
            for row in range(0, self.tiles.block_kv, WG_ROWS):
                pl.when(consumer == row // WG_ROWS % CONSUMERS)(
                    partial(self.keep_rows, buffers.v.at[slot, pl.ds(row, WG_ROWS)], kv_len - begin - row)
                )
            plgpu.commit_smem()
            plgpu.barrier_arrive(buffers.v_zeroed)
            plgpu.barrier_wait(buffers.v_zeroed)

    def keep_rows(self, v, count):
        live = plgpu.broadcasted_iota(jnp.int32, (WG_ROWS,), 0, layout=PER_ROW) < count
        for column in range(0, self.head_dim, 64):  # few registers are free here
            part = v.at[:, pl.ds(column, 64)]
            value = plgpu.load(part, layout=WGMMA)
            part[...] = jnp.where(lax.broadcast_in_dim(live, value.shape, [0]), value, jnp.zeros_like(value))

    def store(self, out_ref, buffers: PrefillBuffers, consumer, nth, acc, total):
        """acc over its sums, in the rows of these 64 that belong to the tile's sequence."""
        tile, head = self.tile(buffers, nth)
        row = tile.row + consumer * WG_ROWS
        low, high = jnp.maximum(tile.begin - row, 0), jnp.minimum(tile.end - row, WG_ROWS)
        out = (acc * lax.broadcast_in_dim(1 / total.sum(axis=1), acc.shape, [0])).astype(self.dtype)
        whole = (low == 0) & (high == WG_ROWS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(whole)
        def _():
            buffers.out[consumer] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers.out.at[consumer], out_ref.at[pl.ds(row, WG_ROWS), head])

        @pl.when(jnp.logical_not(whole))
        def _():
            self.store_rows(out_ref.at[:, head], buffers, consumer, out, row, low, high)

    def store_rows(self, ref, buffers: PrefillBuffers, consumer, out, first, low, high):
        """Rows [low, high) of out to ref [R, D], from its row first + low on."""
        if not self.interpret:
            store_rows(ref, out, first, low, high)
            return
        buffers.rows[consumer] = out
        plgpu.commit_smem()

        @pl.loop(low, high)
        def _(r):
            plgpu.copy_smem_to_gmem(buffers.rows.at[consumer, pl.ds(r, 1)], ref.at[pl.ds(first + r, 1)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def zero_other_rows(self, cu_q_lens_ref, out_ref, buffers: PrefillBuffers, cta):
        """Zeros for the rows before the first sequence and after the last, shared among the CTAs."""
        begin, end = cu_q_lens_ref[0], cu_q_lens_ref[cu_q_lens_ref.shape[0] - 1]
        num_ctas, num_heads = self.tiles.num_ctas, self.work.num_q_heads
        zeros = full((WG_ROWS, self.head_dim), 0, self.dtype)

        @pl.loop(0, lax.div(self.num_rows - (end - begin) - cta + num_ctas - 1, i32(num_ctas)))
        def _(i):
            nth = cta + i * num_ctas
            row = jnp.where(nth < begin, nth, nth - begin + end)
            for head in range(0, num_heads, WG_ROWS):
                count = min(WG_ROWS, num_heads - head)
                self.store_rows(out_ref.at[row], buffers, 0, zeros, head, 0, count)
