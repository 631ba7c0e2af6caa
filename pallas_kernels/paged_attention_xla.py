"""Attention over pages in plain XLA: the path of CPUs and of GPUs without a kernel.

Work is cut in query blocks of one sequence each. A loop takes `blocks_per_iteration` of them at a time, gathers
`block_kv` tokens of their pages, and folds them into a running softmax (arXiv 1805.02867) until the longest of them
is done: both trip counts follow the live lengths, so a long page table costs nothing and needs no bucket.

On a CPU one block an iteration is best: its pages stay in cache between the gather and the products, where gathering
for the whole batch first goes through memory twice. On a GPU a loop whose length depends on data makes the host wait
at every iteration, so an iteration takes many blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .tuning import xla_tiles

MASKED = -1e30


class _Blocks(NamedTuple):
    """N query blocks of `block_q` tokens, each of one sequence."""

    q: jax.Array  # [N, block_q, Hq, D]
    positions: jax.Array  # [N, block_q], of each query in its sequence
    page_table: jax.Array  # [N, pages_per_seq]
    kv_lens: jax.Array  # [N]


def paged_decode_xla(
    q: Float[Array, "B Hq D"],
    kv: Float[Array, "P 2 Hkv page_size D"],
    page_table: Int[Array, "B pages_per_seq"],
    kv_lens: Int[Array, "B"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "B Hq D"]:
    """`dispatch.paged_decode` by gathering pages."""
    tiles = xla_tiles(jax.default_backend())
    attend = partial(_attend, scale=scale, soft_cap=soft_cap, sliding_window=sliding_window, block_kv=tiles.block_kv)
    step = min(tiles.decode_blocks, q.shape[0])
    padding = -q.shape[0] % step
    q_padded, table, lens = (jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in (q, page_table, kv_lens))

    def rows(start):
        cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=step)
        live = cut(lens)
        return attend(_Blocks(cut(q_padded)[:, None], live[:, None] - 1, cut(table), live), kv)[:, 0]

    if step == q.shape[0]:
        return rows(0)

    def body(i, out):
        return lax.dynamic_update_slice_in_dim(out, rows(i * step), i * step, axis=0)

    # Live rows come first, so the loop ends with them.
    last = jnp.max(jnp.where(lens > 0, jnp.arange(lens.size) + 1, 0))
    out = lax.fori_loop(0, (last + step - 1) // step, body, jnp.zeros_like(q_padded))
    return out[: q.shape[0]]


def paged_prefill_xla(
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
    """`dispatch.paged_prefill` by gathering pages."""
    tiles = xla_tiles(jax.default_backend())
    attend = partial(_attend, scale=scale, soft_cap=soft_cap, sliding_window=sliding_window, block_kv=tiles.block_kv)
    block_q, step = min(tiles.block_q, q.shape[0]), tiles.prefill_blocks
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    ends = jnp.cumsum((q_lens + block_q - 1) // block_q)  # of each sequence's query blocks

    def body(i, out):
        block = i * step + jnp.arange(step)
        seq = jnp.minimum((block[:, None] >= ends).sum(axis=1), ends.size - 1)
        nth = block - (ends - (q_lens + block_q - 1) // block_q)[seq]
        offset = nth[:, None] * block_q + jnp.arange(block_q)  # within the sequence's queries
        live = (block < ends[-1])[:, None] & (offset < q_lens[seq][:, None])
        token = jnp.where(live, cu_q_lens[seq][:, None] + offset, q.shape[0])
        positions = jnp.where(live, (kv_lens - q_lens)[seq][:, None] + offset, -1)
        lens = positions.max(axis=1) + 1
        gathered = q.at[token].get(mode="fill", fill_value=0)
        blocks = _Blocks(gathered, positions, page_table[seq], lens)
        return out.at[token].set(attend(blocks, kv), mode="drop")

    return lax.fori_loop(0, (ends[-1] + step - 1) // step, body, jnp.zeros_like(q))


def kv_write_xla(
    kv: Float[Array, "P 2 Hkv page_size D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
) -> Float[Array, "P 2 Hkv page_size D"]:
    """`dispatch.kv_write` as a scatter, in place where `kv` is donated."""
    tokens = jnp.stack([k, v], axis=1).astype(kv.dtype)  # [T, 2, Hkv, D]
    kv = kv.at[slots // kv.shape[3], :, :, slots % kv.shape[3]].set(tokens, mode="promise_in_bounds")
    # Else XLA may fuse the write of one token into the gather that follows, and copy the pool to do so.
    return lax.optimization_barrier(kv)


def copy_pages_xla(
    kv: Float[Array, "P 2 Hkv page_size D"], sources: Int[Array, "C"], targets: Int[Array, "C"]
) -> Float[Array, "P 2 Hkv page_size D"]:
    """`dispatch.copy_pages`: the pages are gathered before the first is written, in place where `kv` is donated."""
    pages = lax.optimization_barrier(kv[sources])
    return kv.at[targets].set(pages, mode="promise_in_bounds")


def _attend(
    blocks: _Blocks,
    kv: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    sliding_window: int | None,
    block_kv: int,
) -> jax.Array:
    """Attention of N query blocks, [N, block_q, Hq, D]; a query at position -1 gets zeros."""
    n, block_q, num_q_heads, head_dim = blocks.q.shape
    num_kv_heads, page_size = kv.shape[2], kv.shape[3]
    pages_per_block = min(max(1, block_kv // page_size), blocks.page_table.shape[1])
    width = pages_per_block * page_size
    padding = -blocks.page_table.shape[1] % pages_per_block
    table = jnp.pad(blocks.page_table, ((0, 0), (0, padding)))  # with the null page
    q = blocks.q.reshape(n, block_q, num_kv_heads, -1, head_dim)
    positions = blocks.positions[:, None, None, :, None]  # [N, 1, 1, block_q, 1]

    def fold(i, carry):
        acc, top, total = carry  # [N, Hkv, G, block_q, D], and twice without D
        pages = kv[lax.dynamic_slice_in_dim(table, i * pages_per_block, pages_per_block, axis=1)]
        k, v = (pages[:, :, j].swapaxes(1, 2).reshape(n, num_kv_heads, width, head_dim) for j in (0, 1))
        slot = i * width + jnp.arange(width)
        v = jnp.where((slot < blocks.kv_lens[:, None])[:, None, :, None], v, 0)  # 0 x NaN would be NaN
        scores = jnp.einsum("nqhgd,nhsd->nhgqs", q, k, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = slot <= positions
        if sliding_window is not None:
            visible &= slot > positions - sliding_window
        scores = jnp.where(visible, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        part = jnp.einsum("nhgqs,nhsd->nhgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return acc * keep[..., None] + part, new_top, total * keep + weights.sum(axis=-1)

    shape = (n, num_kv_heads, num_q_heads // num_kv_heads, block_q)
    start = jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, MASKED), jnp.zeros(shape)
    trips = (blocks.kv_lens.max() + width - 1) // width
    acc, _, total = lax.fori_loop(0, trips, fold, start)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(blocks.q.shape).astype(blocks.q.dtype)
