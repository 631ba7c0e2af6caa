"""Combines the partial results of sequences that several CTAs decoded, by their log-sum-exp, in float32.

One warpgroup serves one (sequence, KV head) whose work was cut. In the balanced schedule cuts are few, one per border
between two runs, and a CTA of this kernel has one border: it works if the border is the first within its sequence. In
the batch-invariant schedule it has one (sequence, head). Partial results come by TMA through a small ring; the sum runs
in the order of the sequence. Bound by latency: a few microseconds, mostly the launch.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .decode_work import DecodeWork, Plan, group_of, run_start
from .mosaic import MASKED, WGMMA, full, i32, swizzled

RING = 8
PER_QUERY = WGMMA.reduce(0)


def combine_partials(
    out: jax.Array, acc: jax.Array, stat: jax.Array, work: DecodeWork, plan: Plan, *, interpret: Any = None
) -> jax.Array:
    """`out` [B, Hkv, G, D] with the sequences in `acc` f32 [slots, D, N] and `stat` f32 [slots, rows, N] filled in.

    `stat` holds the maxima of the scores, times log2(e), and the sums of the weights below them.
    """
    borders = work.num_groups - 1
    grid = (work.batch if work.split_blocks else borders) * work.num_kv_heads
    if grid == 0:
        return out
    dtype, (head_dim, width) = out.dtype, acc.shape[1:]

    def body(acc_ref, stat_ref, ends_ref, first_row_ref, out_ref, acc_s, stat_s, out_s, filled):
        nth, head = (f(lax.axis_index("cta"), i32(work.num_kv_heads)) for f in (lax.div, lax.rem))
        find = _split_of_row if work.split_blocks else _split_at_border
        row, parts, slot_of = find(work, Plan(ends_ref, first_row_ref), nth, head)

        def fetch(i):
            at = lax.rem(i, i32(RING))
            plgpu.copy_gmem_to_smem(acc_ref.at[slot_of(i)], acc_s.at[at], filled.at[at])
            plgpu.copy_gmem_to_smem(stat_ref.at[slot_of(i)], stat_s.at[at], filled.at[at])

        def fold(i, carry):
            acc, top, total = carry
            at = lax.rem(i, i32(RING))
            plgpu.barrier_wait(filled.at[at])
            part = plgpu.load(acc_s.at[at], layout=WGMMA, optimized=False)
            part_top, part_total = (plgpu.load(stat_s.at[at, j], layout=PER_QUERY, optimized=False) for j in (0, 1))
            new_top = jnp.maximum(top, part_top)
            old, new = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
            wide_old, wide_new = (lax.broadcast_in_dim(x, acc.shape, [1]) for x in (old, new))
            pl.when(i + RING < parts)(lambda: fetch(i + RING))
            return acc * wide_old + part * wide_new, new_top, total * old + part_total * new

        if not interpret:
            plgpu.griddepcontrol_wait()

        @pl.when(parts > 1)
        def _():
            pl.loop(0, jnp.minimum(parts, RING))(fetch)
            empty = [full((width,), value, jnp.float32, PER_QUERY) for value in (MASKED, 0)]
            acc, _, total = lax.fori_loop(0, parts, fold, (full((head_dim, width), 0, jnp.float32), *empty))
            out_s.transpose((1, 0))[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [1])).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_ref.at[row, head, pl.ds(0, width)])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=(),
        scratch_types=[
            plgpu.SMEM((RING, head_dim, width), jnp.float32),
            plgpu.SMEM((RING, *stat.shape[1:]), jnp.float32),
            swizzled((width, head_dim), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=RING),
        ],
        grid=(grid,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    out_ref = jax.new_ref(out)
    run(acc, stat, *plan, out_ref)
    return jax.freeze(out_ref)


def _split_of_row(work: DecodeWork, plan: Plan, row, head):
    """Row, number of parts, and each part's slot in the batch-invariant schedule."""
    base = plan.ends[row]
    return row, plan.ends[row + 1] - base, lambda i: head * work.max_units + base + i


def _split_at_border(work: DecodeWork, plan: Plan, group, head):
    """The same for the sequence cut by the border after `group`; no parts if an earlier border cut it."""
    total = plan.ends[work.batch]
    start, border = run_start(work, total, group), run_start(work, total, group + 1)
    row = plan.first_row[group + 1]
    base, end = plan.ends[row], plan.ends[row + 1]
    cut = (base < border) & (border < end) & (base >= start)
    parts = jnp.where(cut, group_of(work, total, end - 1) - group + 1, 0)

    def slot(i):
        cta = (group + i) * work.num_kv_heads + head
        return 2 * cta + jnp.where((i == 0) & (base > start), 1, 0)

    return row, parts, slot
