"""The memory side of `paged_prefill`: what lies in shared memory, and the warpgroup that fills it."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic import WG_ROWS, WGMMA, i32, swizzled
from .prefill_work import PrefillWork, Tile, kv_blocks
from .tuning import PrefillTiles

CONSUMERS = 2  # warpgroups of 64 queries; a third spills registers and gains nothing


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
    v_raw: Any  # a block of V that still needs zeros
    turn: Any


@dataclass(frozen=True)
class PrefillProducer:
    """The kernel's static facts, and its producer."""

    work: PrefillWork
    tiles: PrefillTiles
    page_size: int
    head_dim: int
    group: int
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
            *(plgpu.Barrier(num_arrivals=self.copies), plgpu.Barrier(num_arrivals=2)),
        ]

    def produce(self, refs, buffers: PrefillBuffers, tile: Tile, head, carry):
        """Copies a tile's queries and its blocks of K and V."""
        q_ref, kv_ref, table_ref = refs
        blocks, tiles = carry

        @pl.when(tiles >= 1)
        def _():
            plgpu.barrier_wait(buffers.q_free)

        for consumer in range(CONSUMERS):
            rows = pl.ds(pl.multiple_of(tile.row + consumer * WG_ROWS, 8), WG_ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[rows, head], buffers.q.at[consumer], buffers.q_full)
        kv_head = lax.div(head, i32(self.group))
        last_page = lax.div(tile.kv_len - 1, i32(self.page_size))

        def block(i, blocks):
            slot, begin = lax.rem(blocks, i32(self.tiles.stages)), i * self.tiles.block_kv
            page = lax.div(begin, i32(self.page_size))
            pages = [table_ref[tile.seq, jnp.minimum(page + j, last_page)] for j in range(self.copies)]
            offset = 0
            if self.page_size > self.copy_rows:
                offset = pl.multiple_of(lax.rem(begin, i32(self.page_size)), 8)
            source = [(kv_ref.at[page, :, kv_head, pl.ds(offset, self.copy_rows)]) for page in pages]
            for which, freed in ((0, buffers.k_free), (1, buffers.v_free)):

                @pl.when(blocks >= self.tiles.stages)
                def _(freed=freed):
                    plgpu.barrier_wait(freed.at[slot])

                self.copy_block(buffers, which, [s.at[which] for s in source], slot, begin, tile.kv_len)
            return blocks + 1

        return lax.fori_loop(*kv_blocks(self.work, tile), block, blocks), tiles + 1

    def copy_block(self, buffers: PrefillBuffers, which: int, source, slot, begin, kv_len):
        """One block of K (`which` 0) or V. In the last block of a sequence dead pages are skipped and V's dead rows
        zeroed."""
        to = (buffers.k, buffers.v)[which].at[slot]
        filled = (buffers.k_full, buffers.v_full)[which].at[slot]

        def copy(j, barrier):
            plgpu.copy_gmem_to_smem(source[j], to.at[pl.ds(j * self.copy_rows, self.copy_rows)], barrier)

        @pl.when(begin + self.tiles.block_kv <= kv_len)
        def _():
            for j in range(self.copies):
                copy(j, filled)

        @pl.when(begin + self.tiles.block_kv > kv_len)
        def _():
            barrier = buffers.v_raw if which else filled
            for j in range(self.copies):
                live = begin + j * self.copy_rows < kv_len
                pl.when(live)(partial(copy, j, barrier))
                pl.when(jnp.logical_not(live))(partial(plgpu.barrier_arrive, barrier))
            if which:
                plgpu.barrier_wait(buffers.v_raw)
                self.zero_dead_rows(to, begin, kv_len)
                for _ in range(self.copies):
                    plgpu.barrier_arrive(filled)

    def zero_dead_rows(self, v, begin, kv_len):
        @pl.loop(lax.div(kv_len - begin, i32(WG_ROWS)), self.tiles.block_kv // WG_ROWS)
        def _(i):
            row = pl.multiple_of(i * WG_ROWS, WG_ROWS)
            for column in range(0, self.head_dim, 64):  # few registers are left to the producer
                part = v.at[pl.ds(row, WG_ROWS), pl.ds(column, 64)]
                value = plgpu.load(part, layout=WGMMA)
                token = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=WGMMA) + begin + row
                part[...] = jnp.where(token < kv_len, value, jnp.zeros_like(value))

        plgpu.commit_smem()

    def drain(self, buffers: PrefillBuffers, blocks, tiles):
        """Sees the last releases, so that no barrier ends with an unseen one."""

        @pl.loop(jnp.maximum(blocks - self.tiles.stages, 0), blocks)
        def _(i):
            slot = lax.rem(i, i32(self.tiles.stages))
            plgpu.barrier_wait(buffers.k_free.at[slot])
            plgpu.barrier_wait(buffers.v_free.at[slot])

        pl.when(tiles > 0)(partial(plgpu.barrier_wait, buffers.q_free))
