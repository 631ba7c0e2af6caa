"""The end of `paged_decode`: partial results of a sequence that several CTAs had, combined by log-sum-exp in float32.

The CTA with a sequence's last unit does it, after its own run of units, once it has heard from the CTAs before it that
theirs are in global memory: `Plan.signals` has a counter for each sequence and KV head. Partial results come by TMA
through a small ring; their sum runs in the order of the sequence. Bound by latency, a microsecond or two; a kernel of
its own cost 2 to 6.
"""

from functools import partial

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .decode_producer import DecodeBuffers, DecodeProducer
from .decode_work import Parts, Plan, for_each_cut
from .mosaic import MASKED, PER_COLUMN, WGMMA, full, i32, signal, wait_for_signals


class DecodeCombiner(DecodeProducer):
    def store_part(self, acc_ref, stat_ref, signals_ref, buffers: DecodeBuffers, head, segment, sums) -> None:
        """A segment's sums into its slot; a later CTA is told."""
        acc, top, total = sums
        buffers.part[0] = acc
        buffers.part_stat[0, 0], buffers.part_stat[0, 1] = top, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.part.at[0], acc_ref.at[segment.slot])
        plgpu.copy_smem_to_gmem(buffers.part_stat.at[0], stat_ref.at[segment.slot])
        if not self.interpret:

            @pl.when(segment.open)
            def _():
                plgpu.wait_smem_to_gmem(0)
                signal(self.counter(signals_ref, segment.row, head))

    def counter(self, signals_ref, row, head):
        return signals_ref.at[pl.ds(row * self.work.num_kv_heads + head, 1)]

    def combine_all(self, refs, plan: Plan, buffers: DecodeBuffers, head, cta) -> None:
        """A CTA's share; `refs` are the outputs of the kernel."""
        for_each_cut(self.work, plan, cta, partial(self.combine, refs, plan.signals, buffers, head), i32(0))

    def combine(self, refs, signals_ref, buffers: DecodeBuffers, head, parts: Parts, combined):
        """One sequence to its output; so many came before."""
        out_ref, acc_ref, stat_ref = refs
        ring = self.parts_in_flight

        def slot(i):
            return jnp.where(i == 0, parts.first_slot, parts.second_slot + (i - 1) * parts.stride)

        def fetch(i):
            at = lax.rem(i, i32(ring))
            plgpu.copy_gmem_to_smem(acc_ref.at[slot(i)], buffers.part.at[at], buffers.part_full.at[at])
            plgpu.copy_gmem_to_smem(stat_ref.at[slot(i)], buffers.part_stat.at[at], buffers.part_full.at[at])

        def fold(i, carry):
            acc, top, total = carry
            at = lax.rem(i, i32(ring))
            plgpu.barrier_wait(buffers.part_full.at[at])
            part = plgpu.load(buffers.part.at[at], layout=WGMMA, optimized=False)
            stat = [plgpu.load(buffers.part_stat.at[at, j], layout=PER_COLUMN, optimized=False) for j in (0, 1)]
            new_top = jnp.maximum(top, stat[0])
            old, new = jnp.exp2(top - new_top), jnp.exp2(stat[0] - new_top)
            pl.when(i + ring < parts.count)(lambda: fetch(i + ring))
            return acc * per_query(old, acc) + part * per_query(new, acc), new_top, total * old + stat[1] * new

        plgpu.wait_smem_to_gmem(0)
        if not self.interpret:

            @pl.when(parts.foreign > 0)
            def _():
                wait_for_signals(self.counter(signals_ref, parts.row, head), parts.foreign)

        pl.loop(0, jnp.minimum(parts.count, ring))(fetch)
        empty = [full((self.width,), value, jnp.float32, PER_COLUMN) for value in (MASKED, 0)]
        sums = lax.fori_loop(0, parts.count, fold, (full((self.head_dim, self.width), 0, jnp.float32), *empty))
        self.store_out(out_ref, buffers, parts.row, head, sums)
        return combined + 1

    def store_out(self, out_ref, buffers: DecodeBuffers, row, head, sums) -> None:
        acc, _, total = sums
        buffers.out.transpose((1, 0))[...] = (acc / per_query(total, acc)).astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.out, out_ref.at[row, head, pl.ds(0, self.width)])


def per_query(value, like):
    """[N] to the shape of `like` [M, N]."""
    return lax.broadcast_in_dim(value, like.shape, [1])
