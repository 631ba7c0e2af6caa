"""The page pool's arrays: what lies where, and how many bytes it takes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .models.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all pages, one array per layer.

    K and V of one page and one head are a contiguous [page_size, D] tile. The arrays are donated to every step and
    written in place. `scales` is where a quantised cache would keep its own; None otherwise.
    """

    layers: tuple[jax.Array, ...]  # each [num_pages, 2, Hkv, page_size, D]
    scales: tuple[jax.Array, ...] | None = None


def make_kv_cache(config: LlamaConfig, num_pages: int, page_size: int, dtype: Any) -> KVCache:
    """A zeroed pool on the default device."""
    shape = (num_pages, 2, config.num_kv_heads, page_size, config.head_dim)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)))


def bytes_per_page(config: LlamaConfig, page_size: int, dtype: Any) -> int:
    """Bytes of one page in all layers."""
    slots = config.num_layers * 2 * config.num_kv_heads * page_size
    return slots * config.head_dim * jnp.dtype(dtype).itemsize
