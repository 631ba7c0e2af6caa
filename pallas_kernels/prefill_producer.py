"""The memory side of `paged_prefill`: what lies in shared memory, and the three warps that fill it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic import WG_ROWS, i32, swizzled
from .prefill_work import PrefillWork, Tile, kv_blocks
from .tuning import PrefillTiles

NO_HEAD = -1  # what consumers read in place of a tile's head when there are no more
TILES = 4  # whose fields are kept; a tile's are read until the first block of the next is done
AT_ONCE = 8  # pages whose ids are read together; a producer has few registers
CONSUMERS = 2  # warpgroups of 64 queries


class PrefillBuffers(NamedTuple):
    q: Any  # [2, CONSUMERS, 64, D]
    tiles: Any  # i32 [TILES, 7], whose queries these are and those before: each a Tile and its head
    k: Any  # [stages, block_kv, D]
    v: Any  # [stages, block_kv, D]
    out: Any  # [CONSUMERS, 64, D]
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    v_zeroed: Any
    rows: Any = None  # [CONSUMERS, 64, D], one after the other, and
    p: Any = None  # [CONSUMERS, 64, block_kv], for the interpreter, which has no stores or products from registers


@dataclass(frozen=True)
class PrefillFacts:
    """The kernel's static facts, and what both sides do with them."""

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
        interpreters = [plgpu.SMEM(queries, self.dtype), swizzled((CONSUMERS, WG_ROWS, block), self.dtype)]
        by_consumer = plgpu.Barrier(num_arrivals=CONSUMERS)
        filled = plgpu.Barrier(num_arrivals=self.copies, num_barriers=stages)
        freed = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        tiles = plgpu.SMEM((TILES, len(Tile._fields) + 1), jnp.int32)
        by_tile = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2)
        return [
            *(swizzled((2, *queries), self.dtype), tiles, ring, ring, swizzled(queries, self.dtype)),
            *(by_tile, by_tile, filled, freed, filled, freed, by_consumer),
            *(interpreters if self.interpret else []),
        ]

    def slot(self, blocks):
        """Of a ring, after so many blocks."""
        return lax.rem(blocks, i32(self.tiles.stages))

    def tile(self, buffers: PrefillBuffers, nth) -> tuple[Tile, Any]:
        """The nth tile that the queries' warp has kept, and its head."""
        *tile, head = (buffers.tiles[nth & (TILES - 1), field] for field in range(len(Tile._fields) + 1))
        return Tile(*tile), head


class PrefillProducer(PrefillFacts):
    """The warps' work; `walk` is `for_each_tile` of this CTA."""

    def copy_queries(self, q_ref, buffers: PrefillBuffers, walk):
        """Every tile's queries, and its fields beside them; in the end a word to the consumers that no tile follows."""

        def copy(tile: Tile, head, nth):
            slot = lax.rem(nth, i32(2))
            plgpu.barrier_wait(buffers.q_free.at[slot])
            self.keep_tile(buffers, nth, tile, head)
            for consumer in range(CONSUMERS):
                rows = pl.ds(tile.row + consumer * WG_ROWS, WG_ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[rows, head], buffers.q.at[slot, consumer], buffers.q_full.at[slot])
            return nth + 1

        none = Tile(*(i32(0),) * len(Tile._fields))  # no rows
        self.keep_tile(buffers, i32(-1), none, i32(0))  # so that nothing is stored when the first tile begins
        nth = walk(copy, i32(0))
        slot = lax.rem(nth, i32(2))
        plgpu.barrier_wait(buffers.q_free.at[slot])
        self.keep_tile(buffers, nth, none, i32(NO_HEAD))
        for _ in range(CONSUMERS):  # as two copies would arrive
            plgpu.barrier_arrive(buffers.q_full.at[slot])
        self.see_releases(buffers.q_free, [1 - slot])

    def keep_tile(self, buffers: PrefillBuffers, nth, tile: Tile, head):
        for field, value in enumerate((*tile, head)):
            buffers.tiles[nth & (TILES - 1), field] = value

    def copy_kv(self, kv_ref, table_ref, buffers: PrefillBuffers, which: int, walk):
        """Every tile's blocks of K (`which` 0) or of V (1)."""
        ring = (buffers.k, buffers.v)[which]
        filled, freed = ((buffers.k_full, buffers.k_free), (buffers.v_full, buffers.v_free))[which]

        def copy(tile: Tile, head, blocks):
            kv_head = lax.div(head, i32(self.work.group))
            last_page = lax.div(tile.kv_len - 1, i32(self.page_size))

            def copy_block(i, blocks):
                first = lax.div(i * self.tiles.block_kv, i32(self.page_size))
                offset = (i & (self.page_size // self.copy_rows - 1)) * self.copy_rows  # a page may be two blocks
                slot = self.slot(blocks)
                for begin in range(0, self.copies, AT_ONCE):
                    copies = range(begin, min(begin + AT_ONCE, self.copies))
                    # In place of a page past the end comes the last one again: nothing of it counts.
                    pages = [table_ref[tile.seq, jnp.minimum(first + j, last_page)] for j in copies]
                    if begin == 0:
                        plgpu.barrier_wait(freed.at[slot])
                    for j, page in zip(copies, pages, strict=True):
                        source = kv_ref.at[page, which, kv_head, pl.ds(offset, self.copy_rows)]
                        target = ring.at[slot, pl.ds(j * self.copy_rows, self.copy_rows)]
                        plgpu.copy_gmem_to_smem(source, target, filled.at[slot])
                return blocks + 1

            return lax.fori_loop(*kv_blocks(self.work, tile), copy_block, blocks)

        walk(copy, i32(0))
        self.see_releases(freed, range(self.tiles.stages))

    def see_releases(self, freed, slots):
        """For the interpreter, which wants every barrier's last completion seen."""
        if self.interpret:
            for slot in slots:
                plgpu.barrier_wait(freed.at[slot])
