"""Attention over a dense KV cache, as XLA and as cuDNN have it, and which of them is faster here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pagedjax.models.config import LlamaConfig
from pagedjax.models.dense import attention

from .kernel_trials import median_seconds

Times = dict[str, dict[int, float | str]]  # by name and size: seconds, or why it does not run


@dataclass(frozen=True)
class Decode:
    """`attend(q [B, Hq, D], k, v, kv_lens [B])` for one token a row, and the cache that it reads.

    `heads_first`: [B, Hkv, S, D], else [B, S, Hkv, D]. `cut`: it gets the first tokens of every row, as many as the
    longest has; else whole rows, since a kernel of a library takes no slices without a copy and skips by itself.
    """

    attend: Callable[..., jax.Array]
    heads_first: bool
    cut: bool

    def cache_shape(self, config: LlamaConfig, batch: int, max_len: int) -> tuple[int, ...]:
        heads, head_dim = config.num_kv_heads, config.head_dim
        return (batch, heads, max_len, head_dim) if self.heads_first else (batch, max_len, heads, head_dim)

    def write_tokens(
        self, cache: Float[Array, "B a b D"], x: Float[Array, "B Hkv D"], positions: Int[Array, "B"]
    ) -> Float[Array, "B a b D"]:
        """A token of every row."""
        rows = jnp.arange(x.shape[0])
        at = cache.at[rows, :, positions] if self.heads_first else cache.at[rows, positions]
        return at.set(x, unique_indices=True, mode="promise_in_bounds")

    def write_prompt(
        self, cache: Float[Array, "B a b D"], x: Float[Array, "T Hkv D"], row: Int[Array, ""]
    ) -> Float[Array, "B a b D"]:
        """The first tokens of one row."""
        x = x.swapaxes(0, 1) if self.heads_first else x
        return jax.lax.dynamic_update_slice(cache, x[None], (row, 0, 0, 0))

    def first(self, cache: Float[Array, "B a b D"], length: int) -> Float[Array, "B c d D"]:
        """What it reads if no row is longer than `length`."""
        return jax.lax.slice_in_dim(cache, 0, length, axis=2 if self.heads_first else 1) if self.cut else cache


def _xla(q, k, v, kv_lens):
    """As products, batched over rows and heads."""
    visible = jnp.arange(k.shape[2]) < kv_lens[:, None, None]
    return jax.vmap(attention)(q[:, None], k, v, visible)[:, 0]


def _xla_sums(q, k, v, kv_lens):
    """As sums, into which XLA fuses cut and mask: a product of one row has no work for tensor cores."""
    batch, num_kv_heads, length, head_dim = k.shape
    grouped = q.reshape(batch, num_kv_heads, -1, 1, head_dim).astype(jnp.float32)
    k, v = (x[:, :, None].astype(jnp.float32) for x in (k, v))
    scores = (grouped * k).sum(-1) * head_dim**-0.5  # [B, Hkv, G, S]
    visible = jnp.arange(length) < kv_lens[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    return (weights[..., None] * v).sum(3).reshape(q.shape).astype(q.dtype)


def _cudnn(q, k, v, kv_lens):
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q[:, None], k, v, key_value_seq_lengths=kv_lens)[:, 0]


DECODE = {
    "xla": Decode(_xla, heads_first=True, cut=True),
    "xla sums": Decode(_xla_sums, heads_first=True, cut=True),
    "cudnn": Decode(_cudnn, heads_first=False, cut=False),
}


def _xla_causal(q, k, v):
    visible = jnp.tri(q.shape[1], dtype=bool)
    return jax.vmap(attention, (0, 0, 0, None))(q, k.swapaxes(1, 2), v.swapaxes(1, 2), visible)


# Of prompts (q [N, T, Hq, D], k, v [N, T, Hkv, D]) over themselves. Padding comes last, where no token sees it.
PREFILL: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla_causal,
    "cudnn": partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True),
}


@dataclass(frozen=True)
class Choice:
    """What is used, and the seconds that it was chosen by: of one layer, by the longest row and by prompt length."""

    decode: Decode
    decode_name: str
    prefill: dict[int, str]
    decode_s: Times
    prefill_s: Times

    def row(self) -> dict[str, Any]:
        """As a result's row keeps it."""
        prefill = {str(length): name for length, name in self.prefill.items()}
        times = {"decode_s": self.decode_s, "prefill_s": self.prefill_s}
        return {"decode": self.decode_name, "prefill": prefill, **times}


def choose(
    config: LlamaConfig, dtype: Any, batch: int, max_len: int, cuts: Sequence[int], prompts: Sequence[int]
) -> Choice:
    """Times all there is, at the first, the middle and the last of `cuts` and at every length of a prompt."""
    few = sorted({cuts[0], cuts[len(cuts) // 2], cuts[-1]})
    decode_s: Times = {
        name: {cut: _seconds(partial(_time_decode, decode, config, dtype, batch, max_len, cut)) for cut in few}
        for name, decode in DECODE.items()
    }
    prefill_s: Times = {
        name: {length: _seconds(partial(_time_prefill, attend, config, dtype, length)) for length in prompts}
        for name, attend in PREFILL.items()
    }
    name = min(decode_s, key=lambda name: sum(map(_finite, decode_s[name].values())))
    prefill = {length: min(prefill_s, key=lambda name: _finite(prefill_s[name][length])) for length in prompts}
    return Choice(DECODE[name], name, prefill, decode_s, prefill_s)


def _finite(seconds: float | str) -> float:
    return seconds if isinstance(seconds, float) else float("inf")


def _seconds(measure: Callable[[], float]) -> float | str:
    """What `measure` returns, or why there is nothing: cuDNN is not everywhere, and takes some shapes only."""
    try:
        return measure()
    except Exception as error:  # of many kinds: XLA's, cuDNN's, JAX's checks
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _time_decode(decode: Decode, config: LlamaConfig, dtype: Any, batch: int, max_len: int, cut: int) -> float:
    """Rows are of all lengths up to `cut`, and one has it."""
    k, v = (jnp.ones(decode.cache_shape(config, batch, max_len), dtype) for _ in range(2))
    q = jnp.ones((batch, config.num_q_heads, config.head_dim), dtype)
    kv_lens = jnp.asarray(np.linspace(1, cut, batch + 1)[1:], jnp.int32)
    run = jax.jit(lambda q, k, v, n: decode.attend(q, decode.first(k, cut), decode.first(v, cut), n))
    return median_seconds(lambda: run(q, k, v, kv_lens), jax.block_until_ready)


def _time_prefill(attend: Callable[..., jax.Array], config: LlamaConfig, dtype: Any, length: int) -> float:
    q = jnp.ones((1, length, config.num_q_heads, config.head_dim), dtype)
    k, v = (jnp.ones((1, length, config.num_kv_heads, config.head_dim), dtype) for _ in range(2))
    run = jax.jit(attend)
    return median_seconds(lambda: run(q, k, v), jax.block_until_ready)
