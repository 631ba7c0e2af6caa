"""The step's new K and V into their slots, as a Mosaic GPU kernel, in place.

What one program does. A warpgroup takes every `num_ctas`-th token: one TMA copy brings its K, all heads, one its V,
into one of two buffers; one strided TMA store puts both in the token's slot, `kv[page, :, :, offset]`. Two tokens are
on their way at a time. TMA takes coordinates, not addresses, so a pool may have more than 2^31 elements.

What bounds it: latency at decoding's sizes (a few hundred tokens of a few KB), bandwidth at a long prompt's.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .mosaic import i32

BUFFERS = 2
MAX_CTAS = 264


def kv_write_mosaic(
    kv: Float[Array, "P 2 Hkv page_size D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
    *,
    max_ctas: int = MAX_CTAS,
    interpret: Any = None,
) -> Float[Array, "P 2 Hkv page_size D"]:
    """`dispatch.kv_write`; in place where `kv` is donated. Of tokens with equal slots, any one may win."""
    num_tokens, page_size = k.shape[0], kv.shape[3]
    num_ctas = min(max_ctas, num_tokens)
    if num_ctas == 0:
        return kv

    def kv_write(k_ref, v_ref, slots_ref, kv_ref, tokens, arrived):
        cta = lax.axis_index("cta")
        count = lax.div(num_tokens - cta + num_ctas - 1, i32(num_ctas))

        def fetch(i):
            token, at = cta + i * num_ctas, lax.rem(i, i32(BUFFERS))
            for which, ref in enumerate((k_ref, v_ref)):
                plgpu.copy_gmem_to_smem(ref.at[token], tokens.at[at, which], arrived.at[at])

        fetch(i32(0))

        @pl.loop(0, count)
        def _(i):
            at = lax.rem(i, i32(BUFFERS))
            slot = slots_ref[cta + i * num_ctas]

            @pl.when(i + 1 < count)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the other buffer's store
                fetch(i + 1)

            plgpu.barrier_wait(arrived.at[at])
            page, offset = lax.div(slot, i32(page_size)), lax.rem(slot, i32(page_size))
            plgpu.copy_smem_to_gmem(tokens.at[at], kv_ref.at[page, :, :, offset])

        plgpu.wait_smem_to_gmem(0)

    write = plgpu.kernel(
        kv_write,
        out_type=(),
        scratch_types=[
            plgpu.SMEM((BUFFERS, 2, kv.shape[2], kv.shape[4]), kv.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        ],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    kv_ref = jax.new_ref(kv)
    write(k.astype(kv.dtype), v.astype(kv.dtype), slots.astype(jnp.int32), kv_ref)
    return jax.freeze(kv_ref)
