"""The definition of attention over pages, in float32. The oracle of the tests and nothing else.

Slots at or past `kv_lens` are dead: whatever they hold, NaN included, never reaches an output. A NaN in a live slot
does.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def paged_decode_reference(
    q: Float[Array, "B Hq D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "B Hq D"]:
    """softmax(cap(scale q k)) v over the live slots; the query is at position kv_lens - 1."""
    group = q.shape[1] // kv.shape[2]
    pages = kv[page_table].astype(jnp.float32)  # [B, pages_per_seq, 2, Hkv, page_size, D]
    slots = jnp.moveaxis(pages, 2, 0).swapaxes(3, 4)  # [2, B, pages_per_seq, page_size, Hkv, D]
    k, v = jnp.repeat(slots.reshape(2, q.shape[0], -1, *slots.shape[4:]), group, axis=3)  # [B, S, Hq, D]
    position = jnp.arange(k.shape[1])
    live = position < kv_lens[:, None]
    if sliding_window is not None:
        live &= position >= kv_lens[:, None] - sliding_window
    scores = jnp.einsum("bhd,bshd->bhs", q.astype(jnp.float32), k, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(live[:, None], scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(kv_lens[:, None, None] > 0, highest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = jnp.where(kv_lens[:, None, None] > 0, weights / total, 0.0)
    v = jnp.where(live[:, :, None, None], v, 0.0)
    return jnp.einsum("bhs,bshd->bhd", weights, v, precision="highest").astype(q.dtype)


def paged_prefill_reference(
    q: Float[Array, "T Hq D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    cu_q_lens: Int[Array, "B1"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "T Hq D"]:
    """Every query is a decode query of its own, over the slots up to its position."""
    token = jnp.arange(q.shape[0])
    seq = (token[:, None] >= cu_q_lens[1:]).sum(axis=1).clip(max=kv_lens.size - 1)
    inside = (token >= cu_q_lens[0]) & (token < cu_q_lens[-1])
    lens = jnp.where(inside, kv_lens[seq] - cu_q_lens[seq + 1] + token + 1, 0)
    return paged_decode_reference(
        q, kv, page_table[seq], lens, scale=scale, soft_cap=soft_cap, sliding_window=sliding_window
    )


def kv_write_reference(
    kv: Float[Array, "P 2 Hkv page_size D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
) -> Float[Array, "P 2 Hkv page_size D"]:
    """One token after the other."""

    def write(token, kv):
        page, offset = slots[token] // kv.shape[3], slots[token] % kv.shape[3]
        kv = kv.at[page, 0, :, offset].set(k[token].astype(kv.dtype))
        return kv.at[page, 1, :, offset].set(v[token].astype(kv.dtype))

    return lax.fori_loop(0, slots.size, write, kv)


def copy_pages_reference(
    kv: Float[Array, "P 2 Hkv page_size D"], sources: Int[Array, "C"], targets: Int[Array, "C"]
) -> Float[Array, "P 2 Hkv page_size D"]:
    """One page after the other."""
    return lax.fori_loop(0, sources.size, lambda i, kv: kv.at[targets[i]].set(kv[sources[i]]), kv)


def rotate_reference(x: Float[Array, "T H D"], rotation: Float[Array, "2 T half"]) -> Float[Array, "T H D"]:
    """x with its pairs (i, i + D / 2) turned by angles of these cosines and sines, in float32."""
    cos, sin = rotation[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
