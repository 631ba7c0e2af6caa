"""Paged prefill as a Mosaic GPU kernel (Hopper, whose wgmma it uses), after FlashAttention-3 (arXiv 2407.08608).

What one program does. A CTA runs once per SM and takes tiles from `prefill_work`: `block_q` queries of one sequence and
one head, against the sequence's pages. A producer warpgroup copies the tile's queries and, page by page, blocks of K
and V into shared memory, and runs ahead into the next tile. Two consumer warpgroups own 64 queries each:
scores = Q K^T, the causal mask from each query's own position (only in blocks that the diagonal crosses), the running
softmax (arXiv 1805.02867), out += P V with P in registers. They take turns
(`ping_pong`): while one has the tensor cores, the other computes its softmax or stores its output.

Where bytes wait. Two blocks of K and of V in a ring (128 KB at head size 128), queries once, freed for the next tile
after their last product. A tile that lies within its sequence leaves by one TMA store of 64 rows; a ragged one goes
through an unswizzled buffer and leaves row by row.

What bounds it: the tensor cores, and next to them L2, for a block of 64 KB serves only 128 queries. Registers: 168 a
thread at launch, 224 for a consumer, no spills; 128 queries a warpgroup would spill.

Dead slots: scores past a query's position are masked, so K needs nothing; the producer zeroes the rows of V past the
sequence's end in the one block that has some, for 0 x NaN is NaN. Rows of q of no sequence get zeros.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .mosaic import LOG2E, MASKED, WG_ROWS, WGMMA, cdiv, full, i32
from .prefill_producer import CONSUMERS, PrefillBuffers, PrefillProducer
from .prefill_work import PrefillWork, Tile, Tiles, for_each_tile, kv_blocks, make_tiles
from .tuning import PrefillTiles, prefill_tiles

PER_QUERY = WGMMA.reduce(1)


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
    tiles = tiles or prefill_tiles()
    rows = cdiv(num_tokens, 8) * 8
    work = PrefillWork(num_q_heads, WG_ROWS * CONSUMERS, tiles.block_kv, tiles.num_ctas, sliding_window)
    plan = make_tiles(work, cu_q_lens, kv_lens, num_tokens)
    # A TMA fills what lies past the end with zeros; the interpreter does not.
    padding = rows - num_tokens + (work.block_q if interpret else 0)
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    group = num_q_heads // kv.shape[2]
    kernel = _Kernel(work, tiles, kv.shape[3], head_dim, group, rows, q.dtype, scale, soft_cap, bool(interpret))
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
        walk = partial(for_each_tile, self.work, Tiles(columns_ref, count_ref), cta)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(224, action="increase")
            pl.when(warpgroup == 0)(lambda: self.zero_other_rows(cu_q_lens_ref, out_ref, buffers, cta))
            pl.when(warpgroup == 1)(lambda: self.take_turns(buffers))
            walk(partial(self.consume, out_ref, buffers, warpgroup), i32(0))
            pl.when(warpgroup == 0)(lambda: self.take_turns(buffers))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(56, action="decrease")
            blocks, tiles = walk(partial(self.produce, (q_ref, kv_ref, table_ref), buffers), (i32(0), i32(0)))
            self.drain(buffers, blocks, tiles)

    def take_turns(self, buffers: PrefillBuffers):
        """Gives the tensor cores to the other consumer and waits for its word. The second one starts with this."""
        if self.tiles.ping_pong:
            plgpu.barrier_arrive(buffers.turn)
            plgpu.barrier_wait(buffers.turn)

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
        """Attention of 64 queries of a tile. Both consumers take as many turns."""
        first, last = kv_blocks(self.work, tile)
        position = tile.position + consumer * WG_ROWS
        diagonal = first  # with a window every block is masked
        if self.work.sliding_window is None:
            below = jnp.minimum(lax.div(position + 1, i32(self.tiles.block_kv)), last)
            diagonal = jnp.maximum(below, first)
        plgpu.barrier_wait(buffers.q_full)
        plgpu.barrier_wait(buffers.k_full.at[lax.rem(blocks, i32(self.tiles.stages))])
        fold = partial(self.fold, buffers, consumer, position, blocks - first, last)
        acc = full((WG_ROWS, self.head_dim), 0, jnp.float32)
        top, total = (full((WG_ROWS,), value, jnp.float32, PER_QUERY) for value in (MASKED, 0))
        carry = lax.fori_loop(first, diagonal, partial(fold, masked=False), (acc, top, total))
        acc, _, total = lax.fori_loop(diagonal, last, partial(fold, masked=True), carry)
        self.take_turns(buffers)
        out = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(self.dtype)
        self.store(out_ref, buffers, consumer, tile, head, out)
        self.take_turns(buffers)
        return blocks + last - first

    def fold(self, buffers: PrefillBuffers, consumer, position, offset, last, i, carry, *, masked: bool):
        """One block into the running softmax; maxima are in units of log2."""
        acc, top, total = carry
        slot = lax.rem(offset + i, i32(self.tiles.stages))
        scores = self.scores(buffers, consumer, slot)
        plgpu.barrier_arrive(buffers.k_free.at[slot])
        pl.when(i == last - 1)(partial(plgpu.barrier_arrive, buffers.q_free))
        if self.soft_cap is not None:
            scores = jnp.tanh(scores * (self.scale / self.soft_cap))
        factor = LOG2E * (self.scale if self.soft_cap is None else self.soft_cap)
        if masked:
            scores = jnp.where(self.visible(scores.shape, position, i), scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        keep = jnp.exp2(top - new_top)
        p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        acc = acc * lax.broadcast_in_dim(keep, acc.shape, [0])
        total = total * keep + p.sum(axis=1)
        weights = p.astype(self.dtype)
        # Else the compiler moves parts of the softmax past the wait, into this consumer's turn.
        acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
        if self.tiles.ping_pong:
            plgpu.barrier_arrive(buffers.turn)
        plgpu.barrier_wait(buffers.v_full.at[slot])
        if self.tiles.ping_pong:
            plgpu.barrier_wait(buffers.turn)

        def next_k():
            following = lax.rem(offset + i + 1, i32(self.tiles.stages))
            pl.when(i + 1 < last)(lambda: plgpu.barrier_wait(buffers.k_full.at[following]))

        acc = self.add_product(acc, buffers, consumer, weights, slot, next_k)
        plgpu.barrier_arrive(buffers.v_free.at[slot])
        return acc, new_top, total

    def scores(self, buffers: PrefillBuffers, consumer, slot):
        def run(acc_ref):
            plgpu.wgmma(acc_ref, buffers.q.at[consumer], buffers.k.at[slot].transpose((1, 0)))
            self.take_turns(buffers)
            return acc_ref[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((WG_ROWS, self.tiles.block_kv), jnp.float32))

    def visible(self, shape, position, i):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + position
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + i * self.tiles.block_kv
        if self.work.sliding_window is None:
            return token <= row
        return (token <= row) & (token > row - self.work.sliding_window)

    def add_product(self, acc, buffers: PrefillBuffers, consumer, weights, slot, meanwhile):
        """acc + P V; `meanwhile` runs while the tensor cores do."""
        v = buffers.v.at[slot]
        if not self.interpret:

            def run(acc_ref):
                plgpu.wgmma(acc_ref, weights, v)
                meanwhile()

            return pl.run_state(run)(plgpu.WGMMAAccumulatorRef.init(acc))
        buffers.p[consumer] = weights
        plgpu.commit_smem()

        def interpreted(acc_ref):
            plgpu.wgmma(acc_ref, buffers.p.at[consumer], v)
            meanwhile()
            return acc_ref[...]

        return acc + pl.run_scoped(interpreted, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))

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
            rows = pl.ds(pl.multiple_of(row, 8), WG_ROWS)
            plgpu.copy_smem_to_gmem(buffers.out.at[consumer], out_ref.at[rows, head])

        @pl.when(jnp.logical_not(whole))
        def _():
            buffers.ragged[consumer] = out
            plgpu.commit_smem()

            @pl.loop(low, high)
            def _(r):
                plgpu.copy_smem_to_gmem(buffers.ragged.at[consumer, pl.ds(r, 1)], out_ref.at[pl.ds(row + r, 1), head])
