"""A layer's decode step on packed projections: rotation, the write of K and V, then attention.

A QKV product gives each KV head's queries, its key and its value side by side. The Mosaic kernels take their parts of
that array themselves, by TMA, where separate arrays would be a kernel of XLA's each.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from .mosaic import cdiv
from .paged_attention_reference import kv_write_reference, paged_decode_reference, rotate_reference
from .paged_attention_xla import kv_write_xla, paged_decode_xla
from .paged_decode import TILE, decode_packed_mosaic
from .rotate_write import rotate_write_mosaic

Stepped = tuple[jax.Array, jax.Array]


def decode_step_mosaic(
    qkv: Float[Array, "B Hkv R D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    rotation: Float[Array, "2 B half"],
    slots: Int[Array, "B"],
    *,
    interpret: Any = None,
    **options: Any,
) -> Stepped:
    """`dispatch.decode_step`."""
    group = qkv.shape[2] - 2
    width = group if group <= TILE else cdiv(group, TILE) * TILE  # of more rows attention takes whole tiles
    q, kv = rotate_write_mosaic(qkv, kv, rotation, slots, width=width, interpret=interpret)
    return decode_packed_mosaic(q, group, kv, page_table, kv_lens, interpret=interpret, **options), kv


def decode_joined_mosaic(qkv, kv, page_table, kv_lens, **options: Any) -> jax.Array:
    """`dispatch.LinearOps.decode`."""
    return decode_packed_mosaic(qkv, qkv.shape[2] - 2, kv, page_table, kv_lens, **options)


def decode_step_xla(qkv, kv, page_table, kv_lens, rotation, slots, **options: Any) -> Stepped:
    """`dispatch.decode_step` by slices."""
    q, k, v = _rotated(qkv, rotation)
    kv = kv_write_xla(kv, k, v, slots)
    return paged_decode_xla(q, kv, page_table, kv_lens, **options), kv


def decode_step_reference(qkv, kv, page_table, kv_lens, rotation, slots, **options: Any) -> Stepped:
    """`dispatch.decode_step` by definition."""
    q, k, v = _rotated(qkv, rotation)
    kv = kv_write_reference(kv, k, v, slots)
    return paged_decode_reference(q, kv, page_table, kv_lens, **options), kv


def _rotated(qkv: Float[Array, "T Hkv R D"], rotation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    q, k = qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[3]), qkv[:, :, -2]
    return rotate_reference(q, rotation), rotate_reference(k, rotation), qkv[:, :, -1]
