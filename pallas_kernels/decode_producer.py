"""The memory side of `paged_decode`: what lies in shared memory, and the warpgroup that fills it."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .decode_work import DecodeWork
from .mosaic import i32, swizzled
from .tuning import DecodeTiles


def stat_rows(width: int) -> int:
    """Rows of a partial result's maxima and sums: a TMA's end in shared memory wants 128 bytes."""
    return max(2, 32 // width)


class DecodeBuffers(NamedTuple):
    q: Any  # [2, N, D]
    k: Any  # [stages, block_kv, D]
    v: Any  # [stages, block_kv, D]
    p: Any  # [N, block_kv]
    out: Any  # [N, D]
    acc: Any  # f32 [D, N]
    stat: Any  # f32 [stat_rows, N]
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any


@dataclass(frozen=True)
class DecodeProducer:
    """The kernel's static facts, and its producer."""

    work: DecodeWork
    tiles: DecodeTiles
    page_size: int
    head_dim: int
    width: int  # N
    dtype: Any
    scale: float
    soft_cap: float | None
    interpret: bool

    @property
    def copy_rows(self) -> int:
        """Tokens that one TMA copy brings."""
        return min(self.page_size, self.tiles.block_kv)

    def scratch(self) -> list[Any]:
        block, stages, copies = self.tiles.block_kv, self.tiles.stages, self.tiles.block_kv // self.copy_rows
        ring = swizzled((stages, block, self.head_dim), self.dtype)
        filled, freed = plgpu.Barrier(num_arrivals=copies, num_barriers=stages), plgpu.Barrier(num_barriers=stages)
        return [
            swizzled((2, self.width, self.head_dim), self.dtype),
            ring,
            ring,
            swizzled((self.width, block), self.dtype),
            swizzled((self.width, self.head_dim), self.dtype),
            plgpu.SMEM((self.head_dim, self.width), jnp.float32),
            plgpu.SMEM((stat_rows(self.width), self.width), jnp.float32),
            *(plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2)),
            *(filled, freed, filled, freed),
        ]

    def produce(self, refs, buffers: DecodeBuffers, head, segment, carry):
        """Copies a segment's query and its blocks of K and V into the ring."""
        q_ref, _, table_ref = refs
        blocks, segments = carry
        q_slot = lax.rem(segments, i32(2))

        @pl.when(segments >= 2)
        def _():
            plgpu.barrier_wait(buffers.q_free.at[q_slot])

        query = q_ref.at[segment.row, head, pl.ds(0, self.width)]
        plgpu.copy_gmem_to_smem(query, buffers.q.at[q_slot], buffers.q_full.at[q_slot])
        last_page = lax.div(segment.kv_len - 1, i32(self.page_size))

        def block(i, blocks):
            slot = lax.rem(blocks, i32(self.tiles.stages))
            page = lax.div(i * self.tiles.block_kv, i32(self.page_size))
            copies = self.tiles.block_kv // self.copy_rows
            pages = [table_ref[segment.row, jnp.minimum(page + j, last_page)] for j in range(copies)]
            for which, ring, filled, freed in (
                (0, buffers.k, buffers.k_full, buffers.k_free),
                (1, buffers.v, buffers.v_full, buffers.v_free),
            ):

                @pl.when(blocks >= self.tiles.stages)
                def _(freed=freed):
                    plgpu.barrier_wait(freed.at[slot])

                self.copy_block(refs[1], pages, which, head, segment, i, ring.at[slot], filled.at[slot])
            return blocks + 1

        return lax.fori_loop(segment.first, segment.last, block, blocks), segments + 1

    def copy_block(self, kv_ref, pages, which, head, segment, i, to, filled):
        """One block of K (`which` 0) or V; pages without a live token are skipped, and counted as arrived."""
        begin, rows = i * self.tiles.block_kv, self.copy_rows
        offset = pl.multiple_of(lax.rem(begin, i32(self.page_size)), 8) if self.page_size > rows else 0
        whole = (begin + self.tiles.block_kv <= segment.kv_len) & (begin >= segment.first_live)

        def copy(j):
            source = kv_ref.at[pages[j], which, head, pl.ds(offset, rows)]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(j * rows, rows)], filled)

        @pl.when(whole)
        def _():
            for j in range(len(pages)):
                copy(j)

        @pl.when(jnp.logical_not(whole))
        def _():
            for j in range(len(pages)):
                first = begin + j * rows
                live = (first < segment.kv_len) & (first + rows > segment.first_live)
                pl.when(live)(partial(copy, j))
                pl.when(jnp.logical_not(live))(partial(plgpu.barrier_arrive, filled))

    def drain(self, buffers: DecodeBuffers, blocks, segments):
        """Sees the last releases, so that no barrier ends with an unseen one."""

        @pl.loop(jnp.maximum(blocks - self.tiles.stages, 0), blocks)
        def _(i):
            slot = lax.rem(i, i32(self.tiles.stages))
            plgpu.barrier_wait(buffers.k_free.at[slot])
            plgpu.barrier_wait(buffers.v_free.at[slot])

        @pl.loop(jnp.maximum(segments - 2, 0), segments)
        def _(i):
            plgpu.barrier_wait(buffers.q_free.at[lax.rem(i, i32(2))])
