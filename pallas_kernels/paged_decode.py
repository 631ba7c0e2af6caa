"""Paged decode as a Mosaic GPU kernel (Hopper, whose wgmma it uses).

What one program does. A CTA runs once per SM slot (persistent): `decode_work` gives it one KV head and a run of KV
blocks, sequence after sequence. Two warps, one for K and one for V, read page ids and start one TMA copy per page into
rings of `stages` blocks in shared memory; they run ahead over the ends of sequences, so that the memory system never
drains. A consumer warpgroup folds each block into a running softmax (arXiv 1805.02867), with the operands swapped: K is
the left side of the product, `scores [block_kv, N] = K Q^T`, and so is V^T, `out [D, N] += V^T P^T`, where N is the
group's queries rounded up to 8. Tensor cores want 64 rows on the left and only 8 on the right; padding queries to 64
would need five times the registers. P goes through shared memory, transposed.

Where bytes wait. K and V in the rings, 2 x 64 KB an SM: some 17 MB in flight on the card, several times bandwidth x
latency. Queries are double-buffered beside them. Output goes out by TMA, clipped where the group is not a multiple of
8. A sequence that one CTA has alone is normalised and stored at once; else its sums go in float32 to a slot in global
memory, and the last of its CTAs combines them (`combine_partials`).

What bounds it: the bytes of K and V. Dead slots: scores are masked, and rows of V past the end are zeroed in shared
memory, for 0 x NaN is NaN; pages past the end are not read at all. A row of length 0 gets zeros.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .combine_partials import DecodeCombiner, per_query
from .decode_producer import DecodeBuffers, stat_rows
from .decode_work import DecodeWork, Plan, for_each_segment, make_plan
from .mosaic import LOG2E, MASKED, PER_COLUMN, WG_ROWS, WGMMA, cdiv, full, i32, product
from .tuning import DecodeTiles, Shape, decode_tiles

TILE = 8  # rows of a tile in shared memory, and the least that a product takes on its right side


def paged_decode_mosaic(
    q: Float[Array, "B Hq D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    **options: Any,
) -> Float[Array, "B Hq D"]:
    """`dispatch.paged_decode`; `options` are `decode_packed_mosaic`'s."""
    batch, num_q_heads, head_dim = q.shape
    group = num_q_heads // kv.shape[2]
    return decode_packed_mosaic(q.reshape(batch, -1, group, head_dim), group, kv, page_table, kv_lens, **options)


def decode_packed_mosaic(
    q: Float[Array, "B Hkv R D"],
    group: int,
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
    tiles: DecodeTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B Hq D"]:
    """The same of the first `group` of each KV head's R rows. Others may be read, as queries whose output is clipped
    away. `tiles` default to the measured ones."""
    batch, num_kv_heads, _, head_dim = q.shape
    page_size = kv.shape[3]
    width = cdiv(group, TILE) * TILE
    shape = Shape(head_dim, group, page_size)
    tiles = tiles or decode_tiles(shape, page_table.shape[1] * page_size, batch_invariant)
    work = DecodeWork.make(batch, num_kv_heads, page_table.shape[1] * page_size, sliding_window, tiles)
    plan = make_plan(work, kv_lens)
    rows = group if group <= TILE or group == width else width  # of the output
    if q.shape[2] > TILE and q.shape[2] % TILE:  # a TMA in tiles clips within one tile only
        q = jnp.pad(q[:, :, :group], ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    if interpret:  # the interpreter does not clip copies as a TMA does
        rows, q = width, jnp.pad(q[:, :, :width], ((0, 0), (0, 0), (0, max(width - q.shape[2], 0)), (0, 0)))
    kernel = _Kernel(work, tiles, page_size, head_dim, width, q.dtype, scale, soft_cap, bool(interpret))
    slots = work.num_slots
    launch = partial(
        plgpu.kernel,
        scratch_types=kernel.scratch(),
        grid=(work.num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4096),
        interpret=interpret,
    )
    out, acc, stat = launch(
        kernel.paged_decode,
        out_type=[
            jax.ShapeDtypeStruct((batch, num_kv_heads, rows, head_dim), q.dtype),
            jax.ShapeDtypeStruct((slots, head_dim, width), jnp.float32),
            jax.ShapeDtypeStruct((slots, stat_rows(width), width), jnp.float32),
        ],
    )(q, kv, page_table, kv_lens, *plan)
    if interpret:  # it has no signals between CTAs: the end of the kernel comes as a kernel of its own
        out_ref = jax.new_ref(out)
        launch(kernel.combine_body, out_type=())(acc, stat, *plan, out_ref)
        out = jax.freeze(out_ref)
    return out[:, :, :group].reshape(batch, -1, head_dim)


class _Kernel(DecodeCombiner):
    """Its method's name is the kernel's in a profile."""

    def paged_decode(self, q_ref, kv_ref, table_ref, lens_ref, *refs):
        plan, outputs, buffers = Plan(*refs[:4]), refs[4:7], DecodeBuffers(*refs[7:])
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        walk = partial(for_each_segment, self.work, plan, lens_ref, cta)
        head = lax.rem(cta, i32(self.work.num_kv_heads))

        @pl.when(warpgroup == 0)
        def _():
            self.release_all(buffers)
            self.zero_empty_rows(lens_ref, outputs[0], buffers, cta)
            walk(partial(self.consume, outputs, plan.signals, buffers, head), (i32(0), i32(0)))  # blocks, segments
            if not self.interpret:
                self.combine_all(outputs, plan, buffers, head, cta)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _():
            self.start_producers((q_ref, kv_ref, table_ref), buffers, head, walk)

    def combine_body(self, acc_ref, stat_ref, *refs):
        """The end of `paged_decode` alone, for the interpreter."""
        plan, out_ref, buffers, cta = Plan(*refs[:4]), refs[4], DecodeBuffers(*refs[5:]), lax.axis_index("cta")

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            head = lax.rem(cta, i32(self.work.num_kv_heads))
            self.combine_all((out_ref, acc_ref, stat_ref), plan, buffers, head, cta)
            plgpu.wait_smem_to_gmem(0)

    def start_producers(self, refs, buffers: DecodeBuffers, head, walk):
        """A warp for K and the queries and one for V: neither waits for the other's slots."""

        @plgpu.warp_map
        def _(warp):
            for which in (0, 1):

                @pl.when(warp == which)
                def _(which=which):
                    walk(partial(self.produce, refs, buffers, which, head), (i32(0), i32(0)))
                    self.drain(buffers, which)

    def zero_empty_rows(self, lens_ref, out_ref, buffers: DecodeBuffers, cta):
        """Zeros for the rows of length 0, shared among the CTAs; the first copies are on their way meanwhile."""
        buffers.out.transpose((1, 0))[...] = full((self.head_dim, self.width), 0, self.dtype)
        plgpu.commit_smem()
        batch, num_ctas = self.work.batch, self.work.num_ctas

        @pl.loop(0, lax.div(batch - cta + num_ctas - 1, i32(num_ctas)))
        def _(i):
            row = cta + i * num_ctas

            @pl.when(lens_ref[row] == 0)
            def _():
                @pl.loop(0, self.work.num_kv_heads)
                def _(head):
                    plgpu.copy_smem_to_gmem(buffers.out, out_ref.at[row, head, pl.ds(0, self.width)])

    def consume(self, refs, signals_ref, buffers: DecodeBuffers, head, segment, carry):
        """Attention of one segment, from the ring to its output or its partial result."""
        blocks, segments = carry
        q_slot = lax.rem(segments, i32(2))
        plgpu.barrier_wait(buffers.q_full.at[q_slot])
        acc = full((self.head_dim, self.width), 0, jnp.float32)
        top = full((self.width,), MASKED, jnp.float32, PER_COLUMN)
        total = full((self.width,), 0, jnp.float32, PER_COLUMN)
        fold = partial(self.fold, buffers, segment, q_slot)
        acc, top, total, blocks = lax.fori_loop(segment.first, segment.last, fold, (acc, top, total, blocks))
        plgpu.barrier_arrive(buffers.q_free.at[q_slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_ref, acc_ref, stat_ref = refs
        sums = acc, top, total
        pl.when(segment.whole)(partial(self.store_out, out_ref, buffers, segment.row, head, sums))
        pl.when(jnp.logical_not(segment.whole))(
            partial(self.store_part, acc_ref, stat_ref, signals_ref, buffers, head, segment, sums)
        )
        return blocks, segments + 1

    def fold(self, buffers: DecodeBuffers, segment, q_slot, i, carry):
        """One block into the running softmax; maxima are in units of log2."""
        acc, top, total, blocks = carry
        block_kv = self.tiles.block_kv
        slot = lax.rem(blocks, i32(self.tiles.stages))
        plgpu.barrier_wait(buffers.k_full.at[slot])
        k, query = buffers.k.at[slot], buffers.q.at[q_slot]
        scores = product(k, query.transpose((1, 0)))  # [block_kv, N]
        plgpu.barrier_arrive(buffers.k_free.at[slot])
        if self.soft_cap is None:
            scores = scores * (self.scale * LOG2E)
        else:
            scores = jnp.tanh(scores * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)
        scores = jnp.where(self.live(segment, i * block_kv, scores.shape), scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=0))
        keep = jnp.exp2(top - new_top)
        p = jnp.exp2(scores - per_query(new_top, scores))
        total = total * keep + p.sum(axis=0)
        acc = acc * per_query(keep, acc)
        buffers.p.transpose((1, 0))[...] = p.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(buffers.v_full.at[slot])
        v = buffers.v.at[slot]
        self.zero_dead_rows(segment, i * block_kv, v)
        acc = acc + product(v.transpose((1, 0)), buffers.p.transpose((1, 0)))  # [D, N]
        plgpu.barrier_arrive(buffers.v_free.at[slot])
        return acc, new_top, total, blocks + 1

    def live(self, segment, begin, shape):
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + begin
        live = token < segment.kv_len
        return live if self.work.sliding_window is None else live & (token >= segment.first_live)

    def zero_dead_rows(self, segment, begin, v):
        for row in range(0, self.tiles.block_kv, WG_ROWS):
            first = begin + row

            @pl.when((first + WG_ROWS > segment.kv_len) | (first < segment.first_live))
            def _(row=row, first=first):
                part = v.at[pl.ds(row, WG_ROWS)]
                value = plgpu.load(part, layout=WGMMA)
                part[...] = jnp.where(self.live(segment, first, value.shape), value, jnp.zeros_like(value))
                plgpu.commit_smem()
