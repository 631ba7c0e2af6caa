"""The Mosaic GPU kernels behind `linear` (Hopper, whose wgmma they use).

What one program does. A CTA runs once per SM and takes tiles of `block_n` columns (of gate and of up), all rows of x.
A warp copies chunks of `block_k` rows of the weight, and of as many columns of x, into a ring; a consumer warpgroup
per 64 rows multiplies. Rows past the last are products of whatever lies in shared memory, and are not stored.

Where bytes wait. In the ring, some 200 KB: what one SM must have on its way to keep memory busy. x comes from the L2
cache once for every tile, so narrow tiles cost traffic there; wide ones leave SMs idle.

What bounds it: memory, and some 3 us of a launch, the first copies' way and the last results' (the weights of a product
of LLaMA-3.2-1B take 3 to 24 us). From 128 rows on it would be the L2 cache's rate, for every tile reads all of x (by
arithmetic; not measured). Tiles shared by several CTAs, a part of K each, lose as much at their end as they win before
(`experiments/LOG.md`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic import PER_COLUMN, PER_ROW, WG_ROWS, WGMMA, cdiv, full, i32, swizzled
from .tuning import LinearTiles

UNROLL = 8
NUM_SMS = 132
SHARED_MEMORY = 224 << 10  # of a CTA's 227 KB; barriers and reductions take some


class Buffers(NamedTuple):
    x: Any  # [stages, padded rows, block_k]
    weight: Any  # [stages, parts, block_k, block_n]
    filled: Any
    freed: Any
    squares: Any  # of project: [shares, padded rows]
    squares_filled: Any
    residual: Any  # of add: [padded rows, block_n]
    residual_filled: Any
    residual_freed: Any
    out: Any  # [1 or 2, padded rows, block_n]


@dataclass(frozen=True)
class LinearKernel:
    """Its methods' names are the kernels' in a profile."""

    rows: int
    k: int
    n: int
    parts: int  # gate and up, or one
    dtype: Any
    tiles: LinearTiles
    shares: int  # of sums of squares; 0: the kernel is `add`
    eps: float
    interpret: Any

    @classmethod
    def make(cls, x, weight, tiles: LinearTiles, interpret: Any, shares: int = 0, eps: float = 0.0) -> "LinearKernel":
        """For x [M, K] and weight [K, parts, N], with as much of `tiles` as fits."""
        (rows, k), (_, parts, n) = x.shape, weight.shape
        tiles = tiles._replace(block_k=min(tiles.block_k, k & -k))
        kernel = cls(rows, k, n, parts, x.dtype, tiles, shares, eps, interpret)
        stages = min(tiles.stages, (SHARED_MEMORY - kernel.bytes_beside_ring) // kernel.bytes_of_stage)
        return replace(kernel, tiles=tiles._replace(stages=stages))

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.n), self.dtype)

    @property
    def consumers(self) -> int:
        return cdiv(self.rows, WG_ROWS)

    @property
    def padded_rows(self) -> int:
        return self.consumers * WG_ROWS

    @property
    def num_tiles(self) -> int:
        return self.n // self.tiles.block_n

    @property
    def num_ctas(self) -> int:
        return min(NUM_SMS, self.num_tiles)

    @property
    def num_chunks(self) -> int:
        return self.k // self.tiles.block_k

    @property
    def bytes_of_stage(self) -> int:
        return (self.padded_rows + self.parts * self.tiles.block_n) * self.tiles.block_k * self.dtype.itemsize

    @property
    def bytes_beside_ring(self) -> int:
        """Results, and either the residual or the shares."""
        tile = self.tiles.block_n * self.dtype.itemsize
        return self.padded_rows * (tile + 4 * self.shares if self.shares else 3 * tile)

    def scratch(self) -> Buffers:
        (block_n, block_k, stages), rows = self.tiles, self.padded_rows
        columns, adds = min(block_n, 64), self.shares == 0
        return Buffers(
            swizzled((stages, rows, block_k), self.dtype, columns),  # wgmma wants both its operands swizzled alike
            swizzled((stages, self.parts, block_k, block_n), self.dtype, columns),
            plgpu.Barrier(num_arrivals=1 + self.parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=self.consumers, num_barriers=stages),
            None if adds else plgpu.SMEM((self.shares, rows), jnp.float32),
            None if adds else plgpu.Barrier(),
            swizzled((rows, block_n), self.dtype, columns) if adds else None,
            plgpu.Barrier() if adds else None,
            plgpu.Barrier(num_arrivals=self.consumers) if adds else None,
            swizzled((1 + adds, rows, block_n), self.dtype, columns),
        )

    def launch(self, body, args: tuple[Any, ...], outs: list[Any]) -> list[jax.Array]:
        return plgpu.kernel(
            body,
            out_type=outs,
            scratch_types=self.scratch(),
            grid=(self.num_ctas,),
            grid_names=("cta",),
            num_threads=self.consumers + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
            interpret=self.interpret,
        )(*args)

    def project(self, x_ref, weight_ref, squares_ref, out_ref, *scratch):
        buffers = Buffers(*scratch)
        copy = partial(plgpu.copy_gmem_to_smem, squares_ref, buffers.squares, buffers.squares_filled)

        def prepare(consumer):
            scale = self.scale(buffers, consumer)
            return lambda tile: partial(self.store_projected, buffers, out_ref, consumer, scale, tile)

        self.run((x_ref, weight_ref), buffers, copy, prepare)

    def add(self, y_ref, weight_ref, x_ref, norm_ref, out_ref, scaled_ref, squares_ref, *scratch):
        buffers = Buffers(*scratch)

        def prepare(consumer):
            def begin(tile):
                columns = pl.ds(tile * self.tiles.block_n, self.tiles.block_n)
                norm = plgpu.load(norm_ref.at[columns], layout=PER_COLUMN, optimized=False)
                return partial(self.store_added, buffers, (out_ref, scaled_ref, squares_ref), consumer, norm, tile)

            return begin

        self.run((y_ref, weight_ref), buffers, lambda: None, prepare, x_ref)

    def run(self, refs, buffers: Buffers, first_copy, prepare, residual_ref=None):
        """`prepare(consumer)(tile)(product)` ends a tile: what needs no product is fetched while weights are on their
        way."""
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        count = lax.div(self.num_tiles - cta + self.num_ctas - 1, i32(self.num_ctas))

        @pl.when(warpgroup < self.consumers)
        def _():
            for slot in range(self.tiles.stages):
                plgpu.barrier_arrive(buffers.freed.at[slot])
            if residual_ref is not None:
                plgpu.barrier_arrive(buffers.residual_freed)
            begin = prepare(warpgroup)

            @pl.loop(0, count)
            def _(i):
                finish = begin(cta + i * self.num_ctas)
                finish(self.product(buffers, warpgroup, i))

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == self.consumers)
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    first_copy()
                    pl.loop(0, count)(lambda i: self.produce(refs, residual_ref, buffers, i, cta + i * self.num_ctas))
                    for slot in range(self.tiles.stages):
                        plgpu.barrier_wait(buffers.freed.at[slot])
                    if residual_ref is not None:
                        plgpu.barrier_wait(buffers.residual_freed)

    def produce(self, refs, residual_ref, buffers: Buffers, i, tile):
        """Copies of one tile: chunks of x and weight, and at the end the residual, which is wanted last."""
        x_ref, weight_ref = refs
        block_n, block_k, stages = self.tiles
        columns = pl.ds(tile * block_n, block_n)

        @pl.loop(0, self.num_chunks)
        def _(chunk):
            slot, k = lax.rem(i * self.num_chunks + chunk, i32(stages)), pl.ds(chunk * block_k, block_k)
            filled = buffers.filled.at[slot]
            plgpu.barrier_wait(buffers.freed.at[slot])
            for part in range(self.parts):
                plgpu.copy_gmem_to_smem(weight_ref.at[k, part, columns], buffers.weight.at[slot, part], filled)
            plgpu.copy_gmem_to_smem(x_ref.at[:, k], buffers.x.at[slot, pl.ds(0, self.rows)], filled)

        if residual_ref is not None:
            plgpu.barrier_wait(buffers.residual_freed)
            to = buffers.residual.at[pl.ds(0, self.rows)]
            plgpu.copy_gmem_to_smem(residual_ref.at[:, columns], to, buffers.residual_filled)

    def product(self, buffers: Buffers, consumer, i):
        """64 rows of x with a tile's columns, of each part."""
        stages = i32(self.tiles.stages)
        begin = i * self.num_chunks

        def run(*acc_refs):
            @pl.loop(0, self.num_chunks)
            def _(chunk):
                slot = lax.rem(begin + chunk, stages)
                plgpu.barrier_wait(buffers.filled.at[slot])
                x = buffers.x.at[slot, pl.ds(consumer * WG_ROWS, WG_ROWS)]
                for part, acc_ref in enumerate(acc_refs):
                    plgpu.wgmma(acc_ref, x, buffers.weight.at[slot, part])
                plgpu.wgmma_wait(self.parts)

                @pl.when(chunk > 0)
                def _():
                    plgpu.barrier_arrive(buffers.freed.at[lax.rem(begin + chunk - 1, stages)])

            acc = [acc_ref[...] for acc_ref in acc_refs]
            plgpu.barrier_arrive(buffers.freed.at[lax.rem(begin + self.num_chunks - 1, stages)])
            return acc

        acc = plgpu.WGMMAAccumulatorRef((WG_ROWS, self.tiles.block_n), jnp.float32)
        return pl.run_scoped(run, *[acc] * self.parts)

    def scale(self, buffers: Buffers, consumer):
        """1 / the root mean square of each of 64 rows."""
        rows = pl.ds(consumer * WG_ROWS, WG_ROWS)
        unroll = UNROLL if self.shares % UNROLL == 0 else 1

        def fold(i, total):
            for j in range(unroll):
                share = buffers.squares.at[i * unroll + j, rows]
                total = total + plgpu.load(share, layout=PER_ROW, optimized=False)
            return total

        plgpu.barrier_wait(buffers.squares_filled)
        total = lax.fori_loop(0, self.shares // unroll, fold, full((WG_ROWS,), 0, jnp.float32, PER_ROW))
        return lax.rsqrt(total / self.k + self.eps)

    def store_projected(self, buffers: Buffers, out_ref, consumer, scale, tile, acc):
        acc = [part * lax.broadcast_in_dim(scale, part.shape, [0]) for part in acc]
        out = acc[0] if self.parts == 1 else acc[0] / (1 + jnp.exp(-acc[0])) * acc[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.store(buffers, 0, out_ref, consumer, tile, out.astype(self.dtype))

    def store_added(self, buffers: Buffers, refs, consumer, norm, tile, acc):
        out_ref, scaled_ref, squares_ref = refs
        rows = pl.ds(consumer * WG_ROWS, WG_ROWS)
        plgpu.barrier_wait(buffers.residual_filled)
        residual = plgpu.load(buffers.residual.at[rows], layout=WGMMA)
        plgpu.barrier_arrive(buffers.residual_freed)
        rounded = (residual.astype(jnp.float32) + acc[0]).astype(self.dtype)
        value = rounded.astype(jnp.float32)
        scaled = value * lax.broadcast_in_dim(norm.astype(jnp.float32), value.shape, [1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.store(buffers, 0, out_ref, consumer, tile, rounded)
        self.store(buffers, 1, scaled_ref, consumer, tile, scaled.astype(self.dtype))
        squares_ref[tile, rows] = (value * value).sum(axis=1)

    def store(self, buffers: Buffers, which: int, out_ref, consumer, tile, value):
        """The rows that exist, by way of shared memory."""
        first, count = consumer * WG_ROWS, min(self.rows, WG_ROWS)
        buffers.out[which, pl.ds(first, WG_ROWS)] = value
        plgpu.commit_smem()
        columns = pl.ds(tile * self.tiles.block_n, self.tiles.block_n)
        source = buffers.out.at[which, pl.ds(first, count)]
        plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(first, count), columns])
