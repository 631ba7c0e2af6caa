"""The step's new K and V into their slots, as a Mosaic GPU kernel, in place.

What one program does. A warpgroup takes every `num_ctas`-th token: one TMA copy brings its K, all heads, one its V,
into one of two buffers; one strided TMA store puts both in the token's slot, `kv[page, :, :, offset]`. Two tokens are
on their way at a time. TMA takes coordinates, not addresses, so a pool may have more than 2^31 elements.

What bounds it: latency at decoding's sizes (a few hundred tokens of a few KB), bandwidth at a long prompt's.
"""

from collections.abc import Callable
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

    def rows(refs, token):
        return refs[0].at[token], refs[1].at[token]

    return _write(kv, (k, v), rows, slots, max_ctas, interpret)


def kv_write_packed_mosaic(
    kv: Float[Array, "P 2 Hkv page_size D"],
    qkv: Float[Array, "T Hkv R D"],
    group: int,
    slots: Int[Array, "T"],
    *,
    max_ctas: int = MAX_CTAS,
    interpret: Any = None,
) -> Float[Array, "P 2 Hkv page_size D"]:
    """The same of K and V that stand behind the `group` queries of each KV head."""

    def rows(refs, token):
        return refs[0].at[token, :, group], refs[0].at[token, :, group + 1]

    return _write(kv, (qkv,), rows, slots, max_ctas, interpret)


def _write(kv, sources: tuple[jax.Array, ...], rows: Callable, slots, max_ctas: int, interpret: Any):
    """`rows` gives the K and V [Hkv, D] of a token, of references to `sources`."""
    num_tokens, page_size = sources[0].shape[0], kv.shape[3]
    num_ctas = min(max_ctas, num_tokens)
    if num_ctas == 0:
        return kv

    def kv_write(*refs):
        *source_refs, slots_ref, kv_ref, tokens, arrived = refs
        cta = lax.axis_index("cta")
        count = lax.div(num_tokens - cta + num_ctas - 1, i32(num_ctas))

        def fetch(i):
            token, at = cta + i * num_ctas, lax.rem(i, i32(BUFFERS))
            for which, row in enumerate(rows(source_refs, token)):
                plgpu.copy_gmem_to_smem(row, tokens.at[at, which], arrived.at[at])

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
    write(*(x.astype(kv.dtype) for x in sources), slots.astype(jnp.int32), kv_ref)
    return jax.freeze(kv_ref)
