"""A decode step's products on the kernels that join norms, residual sums and activation to them."""

from typing import Any

import jax

from .models.config import LlamaConfig
from .models.llama import Llama, Products
from .pallas_kernels.dispatch import LinearOps, Stream


class JoinedProducts(Products):
    """`models.llama.Products` through `LinearOps`; the stream is theirs."""

    def __init__(self, ops: LinearOps):
        self._ops = ops

    def start(self, x: jax.Array, norm: Any) -> Stream:
        return self._ops.start(x, norm.weight[...])

    def project(self, stream: Stream, norm: Any, *linears: Any) -> Any:
        outs = []
        for linear in linears:
            weight = linear.weight[...]
            out = self._ops.project(stream, weight.reshape(weight.shape[0], 1, -1), eps=norm.eps)
            outs.append(out.reshape(out.shape[0], *weight.shape[1:]))
        return outs[0] if len(outs) == 1 else outs

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
