"""Paged prefill as a Mosaic GPU kernel (Hopper, whose wgmma it uses), after FlashAttention-3 (arXiv 2407.08608).

What one program does. A CTA runs once per SM and takes tiles from `prefill_work`: 128 queries of one sequence and one
head, against the sequence's pages. Two warps, one for K and the queries and one for V, copy blocks into shared memory,
page by page, and run ahead into the next tile. Two consumer warpgroups own 64 queries each: scores = Q K^T, the causal
mask from each query's own position (only in blocks that the diagonal crosses), the running softmax (arXiv 1805.02867),
out += P V with P in registers. The products of one block's scores and of the block before with V are queued together,
and the softmax of the first runs beside the second. What has been summed is scaled anew only where a maximum has grown
by more than 2^8; that leaves float32 sums and P as exact as before.

Where bytes wait. Two blocks of K and of V in rings (128 KB at head size 128), queries once, freed for the next tile
after their last product. A tile that lies within its sequence leaves by one TMA store of 64 rows; a ragged one goes
through an unswizzled buffer and leaves row by row.

What bounds it: a consumer's chain of instructions. A block takes it some 3000 cycles, 1024 of them of the tensor cores:
two consumers keep those busy for two thirds of the time. A third one of 64 queries has registers for blocks of 64 only,
and loses more. Turns at the tensor cores (FlashAttention-3's other device) gain nothing here. In a long run the card's
power bounds it too (`experiments/LOG.md`).

Dead slots: scores past a query's position and past the sequence's end are masked, so K needs nothing; the consumers
zero the rows of V past the end in the one block that has some, for 0 x NaN is NaN. Rows of q of no sequence get zeros.
"""

import operator
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .mosaic import LOG2E, MASKED, PER_ROW, WG_ROWS, WGMMA, cdiv, fold_columns, full, i32, larger, product, scale_rows
from .prefill_producer import CONSUMERS, PrefillBuffers, PrefillProducer
from .prefill_work import Columns, PrefillWork, Tile, for_each_tile, kv_blocks, make_columns
from .tuning import PrefillTiles, Shape, prefill_tiles

SLACK = 8.0  # log2 of how far a weight may exceed 1 before all are scaled anew
REGISTERS = {64: (216, 72), 128: (240, 24)}  # of a consumer's thread, and of a producer's; at launch all have 168


def paged_prefill_mosaic(
    q: Float[Array, "T Hq D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    cu_q_lens: Int[Array, "B1"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    tiles: PrefillTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "T Hq D"]:
    """`dispatch.paged_prefill`; `tiles` default to the measured ones."""
    num_tokens, num_q_heads, head_dim = q.shape
    group, page_size = num_q_heads // kv.shape[2], kv.shape[3]
    tiles = tiles or prefill_tiles(Shape(head_dim, group, page_size))
    rows = cdiv(num_tokens, 8) * 8
    block_q = WG_ROWS * CONSUMERS
    work = PrefillWork(num_q_heads, group, block_q, tiles.block_kv, tiles.num_ctas, tiles.max_paired, sliding_window)
    plan = make_columns(work, cu_q_lens, kv_lens, num_tokens)
    # A TMA fills what lies past the end with zeros; the interpreter does not.
    padding = rows - num_tokens + (work.block_q if interpret else 0)
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    kernel = _Kernel(work, tiles, page_size, head_dim, rows, q.dtype, scale, soft_cap, bool(interpret))
    out = plgpu.kernel(
        kernel.body,
        out_type=jax.ShapeDtypeStruct((rows, num_q_heads, head_dim), q.dtype),
        scratch_types=kernel.scratch(),
        grid=(tiles.num_ctas,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
    )(q, kv, page_table, *plan, cu_q_lens)
    return out[:num_tokens]


class _Kernel(PrefillProducer):
    def body(self, q_ref, kv_ref, table_ref, columns_ref, count_ref, cu_q_lens_ref, out_ref, *scratch):
        buffers = PrefillBuffers(*scratch)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        walk = partial(for_each_tile, self.work, Columns(columns_ref, count_ref), cta)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(REGISTERS[self.head_dim][0], action="increase")
            self.release_all(buffers)
            pl.when(warpgroup == 0)(lambda: self.zero_other_rows(cu_q_lens_ref, out_ref, buffers, cta))
            walk(partial(self.consume, out_ref, buffers, warpgroup), i32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(REGISTERS[self.head_dim][1], action="decrease")
            self.start_producers((q_ref, kv_ref, table_ref), buffers, walk)

    def start_producers(self, refs, buffers: PrefillBuffers, walk):
        """A warp for K and the queries and one for V: neither waits for the other's slots."""

        @plgpu.warp_map
        def _(warp):
            for which in (0, 1):

                @pl.when(warp == which)
                def _(which=which):
                    walk(partial(self.produce, refs, buffers, which), i32(0))
                    self.drain(buffers, which)

    def zero_other_rows(self, cu_q_lens_ref, out_ref, buffers: PrefillBuffers, cta):
        """Zeros for the rows before the first sequence and after the last, shared among the CTAs."""
        buffers.ragged[0] = full((WG_ROWS, self.head_dim), 0, self.dtype)
        plgpu.commit_smem()
        begin, end = cu_q_lens_ref[0], cu_q_lens_ref[cu_q_lens_ref.shape[0] - 1]
        num_ctas, num_heads = self.tiles.num_ctas, self.work.num_q_heads

        @pl.loop(0, lax.div(self.num_rows - (end - begin) - cta + num_ctas - 1, i32(num_ctas)))
        def _(i):
            nth = cta + i * num_ctas
            row = jnp.where(nth < begin, nth, nth - begin + end)
            for head in range(0, num_heads, WG_ROWS):
                heads = min(WG_ROWS, num_heads - head)
                plgpu.copy_smem_to_gmem(buffers.ragged.at[0, pl.ds(0, heads)], out_ref.at[row, pl.ds(head, heads)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def consume(self, out_ref, buffers: PrefillBuffers, consumer, tile: Tile, head, blocks):
        """Attention of 64 queries of a tile."""
        first, last = kv_blocks(self.work, tile)
        position = tile.position + consumer * WG_ROWS
        unmasked = first  # the block after those that every query sees whole; with a window none is taken for such
        if self.work.sliding_window is None:
            unmasked = lax.div(position + 1, i32(self.tiles.block_kv))
        plgpu.barrier_wait(buffers.q_full)
        slot = self.slot(blocks)
        plgpu.barrier_wait(buffers.k_full.at[slot])
        scores = product(buffers.q.at[consumer], buffers.k.at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(buffers.k_free.at[slot])
        top, total = full((WG_ROWS,), MASKED, jnp.float32, PER_ROW), full((WG_ROWS, 8), 0, jnp.float32)
        p, top, total, _ = self.softmax(scores, top, total, (position, tile.kv_len), first, masked=True)
        plgpu.barrier_wait(buffers.v_full.at[slot])
        acc = full((WG_ROWS, self.head_dim), 0, jnp.float32)
        fold = partial(self.fold, buffers, consumer, (position, tile.kv_len), blocks - first)
        middle = jnp.clip(unmasked, first + 1, last)
        carry = lax.fori_loop(first + 1, middle, partial(fold, masked=False), (p.astype(self.dtype), acc, top, total))
        weights, acc, _, total = lax.fori_loop(middle, last, partial(fold, masked=True), carry)
        plgpu.barrier_arrive(buffers.q_free)
        slot = self.slot(blocks + last - 1 - first)
        self.zero_dead_rows(buffers, consumer, slot, (last - 1) * self.tiles.block_kv, tile.kv_len)
        acc = self.add_product(acc, buffers, consumer, weights, slot)
        plgpu.barrier_arrive(buffers.v_free.at[slot])
        out = (acc * lax.broadcast_in_dim(1 / total.sum(axis=1), acc.shape, [0])).astype(self.dtype)
        self.store(out_ref, buffers, consumer, tile, head, out)
        return blocks + last - first

    def slot(self, blocks):
        return lax.rem(blocks, i32(self.tiles.stages))

    def fold(self, buffers: PrefillBuffers, consumer, bounds, offset, i, carry, *, masked: bool):
        """acc + P V of block i - 1, whose weights are there, while the softmax takes in block i."""
        weights, acc, top, total = carry
        before, slot = self.slot(offset + i - 1), self.slot(offset + i)
        plgpu.barrier_wait(buffers.k_full.at[slot])

        def softmax(scores):
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            result = lax.optimization_barrier(self.softmax(scores, top, total, bounds, i, masked=masked))
            plgpu.barrier_wait(buffers.v_full.at[slot])
            return result

        acc, (p, top, total, keep) = self.products(acc, buffers, consumer, weights, before, slot, softmax)
        plgpu.barrier_arrive(buffers.v_free.at[before])
        return p.astype(self.dtype), scale_rows(acc, keep, interpret=self.interpret), top, total

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

    def products(self, acc, buffers: PrefillBuffers, consumer, weights, before, slot, softmax):
        """Queues Q K^T of one block and acc + P V of the block before; `softmax` runs when the first has ended."""
        q, k_t, v = buffers.q.at[consumer], buffers.k.at[slot].transpose((1, 0)), buffers.v.at[before]
        if self.interpret:  # it has no accumulator that begins with a value
            scores, acc = product(q, k_t), self.add_product(acc, buffers, consumer, weights, before)
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

    def add_product(self, acc, buffers: PrefillBuffers, consumer, weights, slot):
        """acc + P V."""
        v = buffers.v.at[slot]
        if not self.interpret:
            return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, weights, v))(plgpu.WGMMAAccumulatorRef.init(acc))
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

    def store(self, out_ref, buffers: PrefillBuffers, consumer, tile: Tile, head, out):
        """The rows of these 64 that belong to the tile's sequence."""
        row = tile.row + consumer * WG_ROWS
        low, high = jnp.maximum(tile.begin - row, 0), jnp.minimum(tile.end - row, WG_ROWS)
        whole = (low == 0) & (high == WG_ROWS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(whole)
        def _():
            buffers.out[consumer] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers.out.at[consumer], out_ref.at[pl.ds(row, WG_ROWS), head])

        @pl.when(jnp.logical_not(whole))
        def _():
            buffers.ragged[consumer] = out
            plgpu.commit_smem()

            @pl.loop(low, high)
            def _(r):
                plgpu.copy_smem_to_gmem(buffers.ragged.at[consumer, pl.ds(r, 1)], out_ref.at[pl.ds(row + r, 1), head])
