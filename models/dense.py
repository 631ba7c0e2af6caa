"""`attend` functions without pages: plain causal attention for training, and a dense KV cache, the baseline of
paging."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .config import LlamaConfig
from .llama import Attend
from .rope import apply_rope, rope_frequencies

DenseKV = tuple[jax.Array, jax.Array]  # k and v, each [B, Hkv, S, D]


def causal_attend(config: LlamaConfig) -> Attend:
    """Attention of one sequence over itself, no cache (`layer_kv` is None). Batch it with `jax.vmap`."""
    frequencies = rope_frequencies(config, config.max_position_embeddings)

    def attend(q, k, v, positions, layer_kv, layer):
        q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
        visible = positions[:, None] >= positions
        out = attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1), visible)
        return out, layer_kv

    return attend


def make_dense_kv(config: LlamaConfig, batch: int, max_len: int, dtype) -> tuple[DenseKV, ...]:
    """An empty cache of `max_len` tokens for every sequence, per layer (k, v), each [batch, Hkv, max_len, D]."""
    shape = (batch, config.num_kv_heads, max_len, config.head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def dense_attend(config: LlamaConfig, batch: int, max_len: int) -> Attend:
    """Attention over a dense cache: the T tokens are `batch` sequences of T / batch consecutive tokens each."""
    frequencies = rope_frequencies(config, max_len)

    def attend(q, k, v, positions, layer_kv: DenseKV, layer):
        q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
        q, k, v = (x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v))
        positions = positions.reshape(batch, -1)
        caches = tuple(
            jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(cache, x.swapaxes(1, 2), positions[:, 0])
            for cache, x in zip(layer_kv, (k, v), strict=True)
        )
        visible = positions[:, :, None] >= jnp.arange(max_len)
        out = jax.vmap(attention)(q, *caches, visible)
        return out.reshape(-1, *out.shape[2:]), caches

    return attend


def attention(
    q: Float[Array, "T Hq D"],
    k: Float[Array, "Hkv S D"],
    v: Float[Array, "Hkv S D"],
    visible: Bool[Array, "T S"],
) -> Float[Array, "T Hq D"]:
    """Softmax attention of grouped queries; scores and softmax in float32."""
    num_tokens, num_q_heads, head_dim = q.shape
    grouped = q.reshape(num_tokens, k.shape[0], -1, head_dim)
    scores = jnp.einsum("thgd,hsd->hgts", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    out = jnp.einsum("hgts,hsd->thgd", weights.astype(v.dtype), v)
    return out.reshape(num_tokens, num_q_heads, head_dim)
