"""What follows a decode step's QKV projection, as a Mosaic GPU kernel: rotation, and the write of K and V.

What one program does. It takes one head of 64 rows: queries are rotated and stored, keys are rotated and go from
registers to their slots in the page pool, values go there as they are. Angles come while TMA copies the rows.

What bounds it: latency; at a few hundred rows it moves some MB. `project_qkv` does the same at the end of its product,
for as few rows as that pays.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .mosaic import PER_ROW, WG_ROWS, WGMMA, cdiv, i32, rotate_halves, scatter_rows, swizzled


@dataclass(frozen=True)
class Heads:
    """The heads of a packed projection: of each KV head its queries, K and V. What ends one, for 64 rows."""

    num_kv_heads: int
    group_rows: int  # the group's queries, K and V
    page_size: int
    interpret: bool

    @property
    def group(self) -> int:
        return self.group_rows - 2

    def place(self, head):
        """Its KV head, and which of its rows it is."""
        return lax.div(head, i32(self.group_rows)), lax.rem(head, i32(self.group_rows))

    def turn(self, head, value, cos, sin):
        """value f32[64, D], rotated unless it is V."""
        _, place = self.place(head)
        turned = jnp.where(place < self.group_rows - 1, 1.0, 0.0)
        return rotate_halves(value, 1 + (cos - 1) * turned, sin * turned, interpret=self.interpret)

    def write(self, head, value, kv_ref, slots):
        """value [64, D] to slots i32[64] of kv [rows, D] if it is K or V; slots below 0 are none."""
        kv_head, place = self.place(head)
        which = place - self.group

        @pl.when(which >= 0)
        def _():
            page, offset = lax.div(slots, i32(self.page_size)), lax.rem(slots, i32(self.page_size))
            row = ((page * 2 + which) * self.num_kv_heads + kv_head) * self.page_size + offset
            scatter_rows(kv_ref, value, jnp.where(slots >= 0, row, -1), interpret=self.interpret)


def padded(rotation: jax.Array, slots: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Both for `num_rows` rows, of which those beyond their own have no slot."""
    padding = num_rows - slots.shape[0]
    rotation = jnp.pad(rotation.astype(jnp.float32), ((0, 0), (0, padding), (0, 0)))
    return rotation, jnp.pad(slots.astype(jnp.int32), (0, padding), constant_values=-1)


def rotate_write_mosaic(
    qkv: Float[Array, "B Hkv R D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    rotation: Float[Array, "2 B half"],
    slots: Int[Array, "B"],
    *,
    width: int | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B Hkv W D"], Float[Array, "P 2 Hkv page_size D"]]:
    """The rotated queries, of each KV head the first of `width` rows (others hold anything), and the pool, in place
    where `kv` is donated."""
    batch, num_kv_heads, group_rows, head_dim = qkv.shape
    width = width or group_rows - 2
    tile = 8 if batch <= WG_ROWS else WG_ROWS
    x = jnp.pad(qkv.reshape(batch, -1), ((0, -batch % tile), (0, 0)))
    count = min(x.shape[0], WG_ROWS)
    blocks = cdiv(x.shape[0], WG_ROWS)
    heads = Heads(num_kv_heads, group_rows, kv.shape[3], bool(interpret))

    def rotate_write(x_ref, rotation_ref, slots_ref, kv_ref, out_ref, value_ref, arrived):
        head, block = lax.axis_index("head"), lax.axis_index("block")
        some, rows = pl.ds(block * WG_ROWS, count), pl.ds(block * WG_ROWS, WG_ROWS)
        held = value_ref.at[pl.ds(0, count)]
        plgpu.copy_gmem_to_smem(x_ref.at[some, pl.ds(head * head_dim, head_dim)], held, arrived)
        cos, sin = (plgpu.load(rotation_ref.at[i, rows], layout=WGMMA, optimized=False) for i in (0, 1))
        row_slots = plgpu.load(slots_ref.at[rows], layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(arrived)
        value = plgpu.load(value_ref, layout=WGMMA).astype(jnp.float32)
        value = heads.turn(head, value, cos, sin).astype(kv.dtype)
        heads.write(head, value, kv_ref, row_slots)
        kv_head, place = heads.place(head)

        @pl.when(place < heads.group)
        def _():
            value_ref[...] = value
            plgpu.commit_smem()
            to = pl.ds((kv_head * width + place) * head_dim, head_dim)
            plgpu.copy_smem_to_gmem(held, out_ref.at[some, to])
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        rotate_write,
        out_type=[jax.ShapeDtypeStruct((x.shape[0], num_kv_heads * width * head_dim), kv.dtype)],
        scratch_types=[swizzled((WG_ROWS, head_dim), kv.dtype), plgpu.Barrier()],
        grid=(num_kv_heads * group_rows, blocks),
        grid_names=("head", "block"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    kv_ref = jax.new_ref(kv.reshape(-1, head_dim))  # rows, each a token's K or V of a head
    (out,) = kernel(x, *padded(rotation, slots, blocks * WG_ROWS), kv_ref)
    return out[:batch].reshape(batch, num_kv_heads, width, head_dim), jax.freeze(kv_ref).reshape(kv.shape)
