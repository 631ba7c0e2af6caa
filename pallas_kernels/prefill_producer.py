"""The memory side of `paged_prefill`: what lies in shared memory, and the two warps that fill it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic import WG_ROWS, i32, swizzled
from .prefill_work import PrefillWork, Tile, kv_blocks
from .tuning import PrefillTiles

CONSUMERS = 2  # warpgroups of 64 queries


class PrefillBuffers(NamedTuple):
    q: Any  # [CONSUMERS, 64, D]
    k: Any  # [stages, block_kv, D]
    v: Any  # [stages, block_kv, D]
    out: Any  # [CONSUMERS, 64, D]
    ragged: Any  # [CONSUMERS, 64, D], rows one after the other
    p: Any  # [CONSUMERS, 64, block_kv] in the interpreter, which has no product from registers; else unused
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    v_zeroed: Any


@dataclass(frozen=True)
class PrefillProducer:
    """The kernel's static facts, and its producer."""

    work: PrefillWork
    tiles: PrefillTiles
    page_size: int
    head_dim: int
    num_rows: int  # of q, padding included
    dtype: Any
    scale: float
    soft_cap: float | None
    interpret: bool

    @property
    def copy_rows(self) -> int:
        """Tokens that one TMA copy brings."""
        return min(self.page_size, self.tiles.block_kv)

    @property
    def copies(self) -> int:
        return self.tiles.block_kv // self.copy_rows

    def scratch(self) -> list[Any]:
        stages, block = self.tiles.stages, self.tiles.block_kv
        queries, ring = (CONSUMERS, WG_ROWS, self.head_dim), swizzled((stages, block, self.head_dim), self.dtype)
        p = swizzled((CONSUMERS, WG_ROWS, block), self.dtype) if self.interpret else plgpu.SMEM((8,), self.dtype)
        by_consumer = plgpu.Barrier(num_arrivals=CONSUMERS)
        filled = plgpu.Barrier(num_arrivals=self.copies, num_barriers=stages)
        freed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        return [
            *(swizzled(queries, self.dtype), ring, ring, swizzled(queries, self.dtype)),
            *(plgpu.SMEM(queries, self.dtype), p),
            *(by_consumer, by_consumer, filled, freed, filled, freed),
            by_consumer,
        ]

    def release_all(self, buffers: PrefillBuffers):
        """Each consumer's word, before its first tile, that nothing is in use."""
        plgpu.barrier_arrive(buffers.q_free)
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(buffers.k_free.at[slot])
            plgpu.barrier_arrive(buffers.v_free.at[slot])

    def produce(self, refs, buffers: PrefillBuffers, which: int, tile: Tile, head, blocks):
        """A tile's blocks of K (`which` 0), its queries ahead of them, or of V; `blocks` came before."""
        q_ref, kv_ref, table_ref = refs
        if which == 0:
            plgpu.barrier_wait(buffers.q_free)
            for consumer in range(CONSUMERS):
                rows = pl.ds(tile.row + consumer * WG_ROWS, WG_ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[rows, head], buffers.q.at[consumer], buffers.q_full)
        ring = (buffers.k, buffers.v)[which]
        filled, freed = ((buffers.k_full, buffers.k_free), (buffers.v_full, buffers.v_free))[which]
        kv_head = lax.div(head, i32(self.work.group))
        last_page = lax.div(tile.kv_len - 1, i32(self.page_size))

        def block(i, blocks):
            page = lax.div(i * self.tiles.block_kv, i32(self.page_size))
            # In place of a page past the end comes the last one again: nothing of it counts.
            pages = [table_ref[tile.seq, jnp.minimum(page + j, last_page)] for j in range(self.copies)]
            offset = (i & (self.page_size // self.copy_rows - 1)) * self.copy_rows  # a page may be two blocks
            slot = lax.rem(blocks, i32(self.tiles.stages))
            plgpu.barrier_wait(freed.at[slot])
            for j, page in enumerate(pages):
                source = kv_ref.at[page, which, kv_head, pl.ds(offset, self.copy_rows)]
                target = ring.at[slot, pl.ds(j * self.copy_rows, self.copy_rows)]
                plgpu.copy_gmem_to_smem(source, target, filled.at[slot])
            return blocks + 1

        return lax.fori_loop(*kv_blocks(self.work, tile), block, blocks)

    def drain(self, buffers: PrefillBuffers, which: int):
        """Sees the last releases, so that no barrier ends with an unseen one."""
        for slot in range(self.tiles.stages):
            plgpu.barrier_wait((buffers.k_free, buffers.v_free)[which].at[slot])
        if which == 0:
            plgpu.barrier_wait(buffers.q_free)
