"""Paged prefill as a Mosaic GPU kernel (Hopper, whose wgmma it uses), after FlashAttention-3 (arXiv 2407.08608).

What one program does. A CTA runs once per SM and takes tiles from `prefill_work`: 128 queries of one sequence and one
head, against the sequence's pages. Three warps, for K, V and queries, copy into shared memory, K and V page by page and
run ahead into the next tile (`prefill_producer`). Two consumer warpgroups own 64 queries each (`prefill_consumer`):
scores = Q K^T, the causal mask from each query's own position (only in blocks that the diagonal crosses, and a tile's
first), the running softmax (arXiv 1805.02867), out += P V with P in registers. The products of one block's scores and
of the block before with V are queued together, and the softmax of the first runs beside the second; so it is across
tiles: a tile's first scores are queued with the last product of the tile before, which is then stored. What has been
summed is scaled anew only where a maximum has grown by more than 2^8; that leaves float32 sums and P as exact as
before.

Where bytes wait. Two blocks of K and of V in rings (128 KB at head size 128), the queries of two tiles (64 KB), 128
rows of output (32 KB). Without the second tile of queries a consumer waits for memory at every tile, and queueing
across tiles loses. Rows of a tile that lies within its sequence leave by one TMA store of 64; others straight from
registers.

What bounds it: a consumer's chain of instructions. A block takes it some 3000 cycles, 1024 of them of the tensor cores:
two consumers keep those busy for two thirds of the time. A third one of 64 queries has registers for blocks of 64 only,
and loses more. Turns at the tensor cores (FlashAttention-3's other device) gain nothing here. In a long run the card's
power bounds it too (`experiments/LOG.md`).

Dead slots: scores past a query's position and past the sequence's end are masked, so K needs nothing; the consumers
zero the rows of V past the end in the one block that has some, for 0 x NaN is NaN. Rows of q of no sequence get zeros.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .mosaic import WG_ROWS, cdiv
from .prefill_consumer import PrefillConsumer
from .prefill_producer import CONSUMERS, PrefillBuffers, PrefillProducer
from .prefill_work import Columns, PrefillWork, for_each_tile, make_columns
from .tuning import PrefillTiles, Shape, prefill_tiles

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
        kernel.paged_prefill,
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


class _Kernel(PrefillProducer, PrefillConsumer):
    """Its method's name is the kernel's in a profile."""

    def paged_prefill(self, q_ref, kv_ref, table_ref, columns_ref, count_ref, cu_q_lens_ref, out_ref, *scratch):
        buffers = PrefillBuffers(*scratch)
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        walk = partial(for_each_tile, self.work, Columns(columns_ref, count_ref), cta)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(REGISTERS[self.head_dim][0], action="increase")
            self.release_all(buffers)
            pl.when(warpgroup == 0)(lambda: self.zero_other_rows(cu_q_lens_ref, out_ref, buffers, cta))
            self.consume_all(out_ref, buffers, warpgroup)

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(REGISTERS[self.head_dim][1], action="decrease")
            self.start_producers((q_ref, kv_ref, table_ref), buffers, walk)

    def start_producers(self, refs, buffers: PrefillBuffers, walk):
        """A warp for K, one for V and one for the queries: none waits for another's slots."""
        q_ref, *kv_refs = refs
        copies = [partial(self.copy_kv, *kv_refs, buffers, which) for which in (0, 1)]
        copies.append(partial(self.copy_queries, q_ref, buffers))

        @plgpu.warp_map
        def _(warp):
            for index, copy in enumerate(copies):
                pl.when(warp == index)(partial(copy, walk))
