"""A decode step's products on the kernels that join norms, residual sums and activation to them."""

from collections.abc import Callable
from typing import Any

import jax

from .models.config import LlamaConfig
from .models.llama import Llama, Products
from .pallas_kernels.dispatch import LinearOps, Stream


class JoinedProducts(Products):
    """`models.llama.Products` through `LinearOps`; the stream is theirs.

    `decode(qkv, layer_kv)` attends once K and V are written: to these `slots`, after `rotation`.
    """

    def __init__(self, ops: LinearOps, decode: Callable[..., jax.Array], rotation: jax.Array, slots: jax.Array):
        self._ops, self._decode, self._rotation, self._slots = ops, decode, rotation, slots

    def start(self, x: jax.Array, norm: Any) -> Stream:
        return self._ops.start(x, norm.weight[...])

    def attend(
        self, stream: Stream, norm: Any, attention: Any, positions: Any, layer_kv: Any, attend: Any, layer: int
    ) -> tuple[jax.Array, Any]:
        weight = attention.qkv_proj.weight[...]
        qkv, kv = self._ops.project_qkv(stream, weight, layer_kv, self._rotation, self._slots, eps=norm.eps)
        out = self._decode(qkv, kv)
        return out.reshape(out.shape[0], -1), kv

    def gated(self, stream: Stream, norm: Any, gate_up: Any, act: str) -> jax.Array:
        return self._ops.project(stream, gate_up.weight[...], eps=norm.eps)

    def add(self, stream: Stream, x: jax.Array, linear: Any, norm: Any) -> Stream:
        return self._ops.add(stream, x, linear.weight[...], norm.weight[...])

    def end(self, stream: Stream, norm: Any) -> jax.Array:
        return self._ops.end(stream, norm.eps)


def joins(model: Llama, ops: LinearOps) -> bool:
    """Whether the kernels take this model's products; else XLA's do."""
    config: LlamaConfig = model.config
    plain = config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias
    heads, group = config.num_kv_heads, config.num_q_heads // config.num_kv_heads
    widths = config.hidden_size, config.num_q_heads * config.head_dim, config.intermediate_size
    return model.fused and plain and ops.takes(model.dtype, *widths, heads * (group + 2) * config.head_dim)
