"""A layer's decode step on packed projections: the write of K and V, then attention.

A QKV product gives each KV head's queries, its key and its value side by side. The Mosaic kernels take their parts of
that array themselves, by TMA, where separate arrays would be a kernel of XLA's each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .kv_write import MAX_CTAS, kv_write_packed_mosaic
from .paged_attention_reference import kv_write_reference, paged_decode_reference
from .paged_attention_xla import kv_write_xla, paged_decode_xla
from .paged_decode import TILE, decode_packed_mosaic

Stepped = tuple[jax.Array, jax.Array]


def decode_step_mosaic(
    qkv: Float[Array, "B Hkv R D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    max_ctas: int = MAX_CTAS,
    interpret: Any = None,
    **options: Any,
) -> Stepped:
    """`dispatch.decode_step`; `max_ctas` are the write's."""
    rows = qkv.shape[2]
    group = rows - 2
    if rows > TILE:  # whole tiles, by the same fusion of XLA's that makes the array
        qkv = jnp.pad(qkv, ((0, 0), (0, 0), (0, -rows % TILE), (0, 0)))
    kv = kv_write_packed_mosaic(kv, qkv, group, slots, max_ctas=max_ctas, interpret=interpret)
    return decode_packed_mosaic(qkv, group, kv, page_table, kv_lens, interpret=interpret, **options), kv


def decode_joined_mosaic(qkv, kv, page_table, kv_lens, **options: Any) -> jax.Array:
    """`dispatch.LinearOps.decode`."""
    return decode_packed_mosaic(qkv, qkv.shape[2] - 2, kv, page_table, kv_lens, **options)


def decode_step_xla(qkv, kv, page_table, kv_lens, slots, **options: Any) -> Stepped:
    """`dispatch.decode_step` by slices."""
    q, k, v = unpack_qkv(qkv)
    kv = kv_write_xla(kv, k, v, slots)
    return paged_decode_xla(q, kv, page_table, kv_lens, **options), kv


def decode_step_reference(qkv, kv, page_table, kv_lens, slots, **options: Any) -> Stepped:
    """`dispatch.decode_step` by definition."""
    q, k, v = unpack_qkv(qkv)
    kv = kv_write_reference(kv, k, v, slots)
    return paged_decode_reference(q, kv, page_table, kv_lens, **options), kv


def unpack_qkv(qkv: Float[Array, "T Hkv R D"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    return qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[3]), qkv[:, :, -2], qkv[:, :, -1]
