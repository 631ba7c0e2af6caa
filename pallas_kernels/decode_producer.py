"""The memory side of `paged_decode`: what lies in shared memory, and the two warps that fill it."""

from dataclasses import dataclass
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
    part: Any  # f32 [parts_in_flight, D, N]
    part_stat: Any  # f32 [parts_in_flight, stat_rows, N]
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    part_full: Any


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

    @property
    def parts_in_flight(self) -> int:
        """Partial results on their way to be combined: some 32 KB."""
        return max(2, 64 // self.width)

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
            plgpu.SMEM((self.parts_in_flight, self.head_dim, self.width), jnp.float32),
            plgpu.SMEM((self.parts_in_flight, stat_rows(self.width), self.width), jnp.float32),
            *(plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2)),
            *(filled, freed, filled, freed),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.parts_in_flight),
        ]

    def release_all(self, buffers: DecodeBuffers):
        """The consumer's word, before its first segment, that nothing is in use."""
        for slot in range(2):
            plgpu.barrier_arrive(buffers.q_free.at[slot])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            plgpu.barrier_arrive(buffers.v_free.at[slot])

    def produce(self, refs, buffers: DecodeBuffers, which: int, head, segment, carry):
        """A segment's blocks of K (`which` 0), its query ahead of them, or of V; so many blocks and segments came
        before."""
        q_ref, kv_ref, table_ref = refs
        blocks, segments = carry
        if which == 0:
            q_slot = lax.rem(segments, i32(2))
            plgpu.barrier_wait(buffers.q_free.at[q_slot])
            query = q_ref.at[segment.row, head, pl.ds(0, self.width)]
            plgpu.copy_gmem_to_smem(query, buffers.q.at[q_slot], buffers.q_full.at[q_slot])
        ring = (buffers.k, buffers.v)[which]
        filled, freed = ((buffers.k_full, buffers.k_free), (buffers.v_full, buffers.v_free))[which]
        rows, copies = self.copy_rows, self.tiles.block_kv // self.copy_rows
        first_page = lax.div(segment.first_live, i32(self.page_size))
        last_page = lax.div(segment.kv_len - 1, i32(self.page_size))

        def block(i, blocks):
            page = lax.div(i * self.tiles.block_kv, i32(self.page_size))
            # In place of a page without a live token comes the nearest that has one: nothing of it counts.
            pages = [table_ref[segment.row, jnp.clip(page + j, first_page, last_page)] for j in range(copies)]
            offset = (i & (self.page_size // rows - 1)) * rows  # a page may be several blocks
            slot = lax.rem(blocks, i32(self.tiles.stages))
            plgpu.barrier_wait(freed.at[slot])
            for j, page in enumerate(pages):
                source = kv_ref.at[page, which, head, pl.ds(offset, rows)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(j * rows, rows)], filled.at[slot])
            return blocks + 1

        return lax.fori_loop(segment.first, segment.last, block, blocks), segments + 1

    def drain(self, buffers: DecodeBuffers, which: int):
        """Sees the last releases, so that no barrier ends with an unseen one."""
        for slot in range(self.tiles.stages):
            plgpu.barrier_wait((buffers.k_free, buffers.v_free)[which].at[slot])
        for slot in range(2 * (1 - which)):
            plgpu.barrier_wait(buffers.q_free.at[slot])
