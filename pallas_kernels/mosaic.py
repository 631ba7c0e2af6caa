"""What the Mosaic GPU kernels share: layouts, swizzled buffers, small integers."""

import math
from typing import Any

import jax
import jax.experimental.pallas.fuser  # imported here once: a later import would change jit's cache key
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

LOG2E = math.log2(math.e)
MASKED = -1e30  # a score that weighs nothing, and no infinity, whose differences would be NaN
WGMMA = plgpu.Layout.WGMMA  # how a warpgroup holds a product of its tensor cores
WG_ROWS = 64  # rows of one warpgroup's product


def i32(value: int) -> jax.Array:
    return jnp.int32(value)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def swizzled(shape: tuple[int, ...], dtype: DTypeLike):
    """Shared memory as tensor cores and TMA want it: tiles of 8 rows by 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    transforms = tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def full(shape: tuple[int, ...], value: float | int, dtype: DTypeLike, layout: Any = WGMMA) -> jax.Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)
