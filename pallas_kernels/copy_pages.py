"""Page to page, for copy-on-write, as a Mosaic GPU kernel, in place.

What one program does. A warpgroup takes one K or V of one head of one copied page, `[page_size, D]`, through shared
memory: one TMA copy in, one TMA store out. Bound by latency: copies are few.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def copy_pages_mosaic(
    kv: Float[Array, "P 2 Hkv page_size D"],
    sources: Int[Array, "C"],
    targets: Int[Array, "C"],
    *,
    interpret: Any = None,
) -> Float[Array, "P 2 Hkv page_size D"]:
    """`dispatch.copy_pages`; in place where `kv` is donated."""
    if sources.size == 0:
        return kv

    def copy_pages(sources_ref, targets_ref, kv_ref, tile, arrived):
        copy, which, head = lax.axis_index("copy"), lax.axis_index("which"), lax.axis_index("head")
        plgpu.copy_gmem_to_smem(kv_ref.at[sources_ref[copy], which, head], tile, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.copy_smem_to_gmem(tile, kv_ref.at[targets_ref[copy], which, head])
        plgpu.wait_smem_to_gmem(0)

    copy = plgpu.kernel(
        copy_pages,
        out_type=(),
        scratch_types=[plgpu.SMEM(kv.shape[3:], kv.dtype), plgpu.Barrier()],
        grid=(sources.size, 2, kv.shape[2]),
        grid_names=("copy", "which", "head"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
    )
    kv_ref = jax.new_ref(kv)
    copy(sources.astype(jnp.int32), targets.astype(jnp.int32), kv_ref)
    return jax.freeze(kv_ref)
