"""A decode step's QKV projection with what follows it, as a Mosaic GPU kernel: rotation, and the write of K and V.

What one program does. As `linear_kernel`'s `project`, with tiles of one head each. A tile's end rotates it if it is of
queries or keys; keys and values go from registers to their slots in the page pool. The angles' cosines and sines, and
the slots, wait in registers from before the first product.

What bounds it: the weight's bytes. What it saves are two kernels, whose launch costs more than their work.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jaxtyping import Array, Float, Int

from .linear_kernel import Buffers, LinearKernel
from .mosaic import PER_ROW, WG_ROWS, WGMMA
from .rotate_write import Heads, padded
from .tuning import LinearTiles, linear_tiles


def project_qkv_mosaic(
    stream: Any,
    weight: Float[Array, "H Hkv R D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    rotation: Float[Array, "2 M half"],
    slots: Int[Array, "M"],
    *,
    eps: float,
    tiles: LinearTiles | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "M Hkv R D"], Float[Array, "P 2 Hkv page_size D"]]:
    """`dispatch.LinearOps.project_qkv`; in place where `kv` is donated."""
    num_rows, (_, num_kv_heads, group_rows, head_dim) = stream.x.shape[0], weight.shape
    flat = weight.reshape(weight.shape[0], 1, -1)
    tiles = (tiles or linear_tiles("project", num_rows, flat.shape[2]))._replace(block_n=head_dim)
    kernel = QkvKernel.make(stream.scaled, flat, tiles, interpret, stream.squares.shape[0], eps)
    kernel = replace(kernel, heads=Heads(num_kv_heads, group_rows, kv.shape[3], bool(interpret)))
    kv_ref = jax.new_ref(kv.reshape(-1, head_dim))  # rows, each a token's K or V of a head
    args = stream.scaled, flat, stream.squares, *padded(rotation, slots, kernel.padded_rows), kv_ref
    (out,) = kernel.launch(kernel.project_qkv, args, [kernel.out_type])
    return out.reshape(num_rows, num_kv_heads, group_rows, head_dim), jax.freeze(kv_ref).reshape(kv.shape)


@dataclass(frozen=True)
class QkvKernel(LinearKernel):
    """Its method's name is the kernel's in a profile."""

    heads: Any = None  # one a tile

    def project_qkv(self, x_ref, weight_ref, squares_ref, rotation_ref, slots_ref, kv_ref, out_ref, *scratch):
        buffers = Buffers(*scratch)
        copy = partial(plgpu.copy_gmem_to_smem, squares_ref, buffers.squares, buffers.squares_filled)

        def prepare(consumer):
            rows = pl.ds(consumer * WG_ROWS, WG_ROWS)
            angles = [plgpu.load(rotation_ref.at[i, rows], layout=WGMMA, optimized=False) for i in (0, 1)]
            slots = plgpu.load(slots_ref.at[rows], layout=PER_ROW, optimized=False)
            known = angles, slots, self.scale(buffers, consumer)
            return lambda tile: partial(self.store_head, buffers, (out_ref, kv_ref), consumer, known, tile)

        self.run((x_ref, weight_ref), buffers, copy, prepare)

    def store_head(self, buffers: Buffers, refs, consumer, known, tile, acc):
        (out_ref, kv_ref), ((cos, sin), slots, scale) = refs, known
        value = acc[0] * lax.broadcast_in_dim(scale, acc[0].shape, [0])
        value = self.heads.turn(tile, value, cos, sin).astype(self.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.store(buffers, 0, out_ref, consumer, tile, value)
        self.heads.write(tile, value, kv_ref, slots)
