"""The LLaMA family (arXiv 2302.13971, 2307.09288, 2407.21783) as Flax NNX modules that are pure when called.

The modules know nothing of caches or pages. They hand `q`, `k` and `v`, before rotation, to an `attend` function:

    attend(q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], positions [T], layer_kv, layer) -> (out [T, Hq, D], layer_kv)

which rotates, stores and attends. So the same modules serve the paged engine, a dense KV cache and training.

Modules and parameters have Hugging Face's names; a weight matrix is stored [in, out], the transpose of Hugging Face's.
Fused projections (`qkv_proj`, `gate_up_proj`) keep KV heads, or the two halves, as axes of their own, so that they can
be sharded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from .config import LlamaConfig

Attend = Callable[..., tuple[jax.Array, Any]]
Params = dict[str, jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """`x @ weight + bias`; `weight` is [in, *out]."""

    def __init__(self, shape: tuple[int, ...], bias: bool, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(config.initializer_range)
        self.weight = nnx.Param(normal(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype)) if bias else None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T ..."]:
        y = lax.dot_general(x, self.weight[...], (((x.ndim - 1,), (0,)), ((), ())))
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root mean square normalisation (arXiv 1910.07467); the statistics are float32."""

    def __init__(self, config: LlamaConfig, dtype: Any):
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...]


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, fused: bool, dtype: Any, rngs: nnx.Rngs):
        hq, hkv, d = config.num_q_heads, config.num_kv_heads, config.head_dim
        self.heads, self.fused = (hq, hkv, d), fused

        def linear(*shape: int) -> Linear:
            return Linear(shape, config.attention_bias, config, dtype, rngs)

        if fused:
            self.qkv_proj = linear(config.hidden_size, hkv, hq // hkv + 2, d)
        else:
            self.q_proj = linear(config.hidden_size, hq * d)
            self.k_proj = linear(config.hidden_size, hkv * d)
            self.v_proj = linear(config.hidden_size, hkv * d)
        self.o_proj = linear(hq * d, config.hidden_size)

    def project(self, products: Any, stream: Any, norm: RMSNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [T, Hq, D], k and v [T, Hkv, D]."""
        hq, hkv, d = self.heads
        if self.fused:
            qkv = products.project(stream, norm, self.qkv_proj)  # [T, Hkv, G + 2, D]
            return qkv[:, :, :-2].reshape(-1, hq, d), qkv[:, :, -2], qkv[:, :, -1]
        q, k, v = products.project(stream, norm, self.q_proj, self.k_proj, self.v_proj)
        return q.reshape(-1, hq, d), k.reshape(-1, hkv, d), v.reshape(-1, hkv, d)


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, fused: bool, dtype: Any, rngs: nnx.Rngs):
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.act, self.fused = config.hidden_act, fused

        def linear(*shape: int) -> Linear:
            return Linear(shape, config.mlp_bias, config, dtype, rngs)

        if fused:
            self.gate_up_proj = linear(hidden, 2, intermediate)
        else:
            self.gate_proj, self.up_proj = linear(hidden, intermediate), linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)

    def project(self, products: Any, stream: Any, norm: RMSNorm) -> Float[Array, "T I"]:
        """What `down_proj` takes."""
        if self.fused:
            return products.gated(stream, norm, self.gate_up_proj, self.act)
        gate, up = products.project(stream, norm, self.gate_proj, self.up_proj)
        return ACTIVATIONS[self.act](gate) * up


class DecoderLayer(nnx.Module):
    def __init__(self, config: LlamaConfig, fused: bool, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, fused, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, fused, dtype, rngs)

    def __call__(
        self,
        stream: Any,
        positions: Int[Array, "T"],
        layer_kv: Any,
        attend: Attend,
        layer: int,
        next_norm: RMSNorm,
        products: Any,
    ) -> tuple[Any, Any]:
        attended = products.attend(stream, self.input_layernorm, self.self_attn, positions, layer_kv, attend, layer)
        out, layer_kv = attended
        stream = products.add(stream, out, self.self_attn.o_proj, self.post_attention_layernorm)
        hidden = self.mlp.project(products, stream, self.post_attention_layernorm)
        return products.add(stream, hidden, self.mlp.down_proj, next_norm), layer_kv


class Products:
    """A layer's products with what stands between them, as XLA sees fit; kernels that join them have the same methods.

    Between layers goes a `stream`, which only these methods look into: here the rows themselves.
    """

    def start(self, x: Float[Array, "T H"], norm: RMSNorm) -> Any:
        """The stream of a model's first rows; `norm` is the one that comes next, here and in `add`."""
        return x

    def attend(
        self,
        stream: Any,
        norm: RMSNorm,
        attention: Attention,
        positions: Int[Array, "T"],
        layer_kv: Any,
        attend: Attend,
        layer: int,
    ) -> tuple[Float[Array, "T A"], Any]:
        """What `o_proj` takes, and the layer's new cache."""
        q, k, v = attention.project(self, stream, norm)
        out, layer_kv = attend(q, k, v, positions, layer_kv, layer)
        return out.reshape(out.shape[0], -1), layer_kv

    def project(self, stream: Any, norm: RMSNorm, *linears: Linear) -> Any:
        """The normalised rows through each of `linears`; an array if there is one."""
        x = norm(stream)
        outs = [linear(x) for linear in linears]
        return outs[0] if len(outs) == 1 else outs

    def gated(self, stream: Any, norm: RMSNorm, gate_up: Linear, act: str) -> Float[Array, "T I"]:
        """act(gate) * up of the normalised rows."""
        gate_up_rows = gate_up(norm(stream))  # [T, 2, I]
        return ACTIVATIONS[act](gate_up_rows[:, 0]) * gate_up_rows[:, 1]

    def add(self, stream: Any, x: Float[Array, "T K"], linear: Linear, norm: RMSNorm) -> Any:
        """The stream with `linear(x)` added."""
        return stream + linear(x)

    def end(self, stream: Any, norm: RMSNorm) -> Float[Array, "T H"]:
        """The last rows, normalised."""
        return norm(stream)


PRODUCTS = Products()


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(config.initializer_range)
        self.weight = nnx.Param(normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype))


class Decoder(nnx.Module):
    def __init__(self, config: LlamaConfig, fused: bool, dtype: Any, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, dtype, rngs)
        self.layers = nnx.List([DecoderLayer(config, fused, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config, dtype)


class LlamaForCausalLM(nnx.Module):
    """The module itself; engines and trainers use it through `Llama`, which keeps its parameters outside."""

    def __init__(self, config: LlamaConfig, *, fused: bool = False, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.model = Decoder(config, fused, dtype, rngs)
        shape = (config.hidden_size, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(shape, False, config, dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "T"],
        positions: Int[Array, "T"],
        kv: tuple[Any, ...],
        attend: Attend,
        products: Any = PRODUCTS,
        remat: bool = False,
    ) -> tuple[Float[Array, "T H"], tuple[Any, ...]]:
        modules, layers = list(self.model.layers), []
        norms = [*(module.input_layernorm for module in modules), self.model.norm]
        stream = products.start(self.model.embed_tokens.weight[...][tokens], norms[0])
        for layer, module in enumerate(modules):
            run = partial(module, attend=attend, layer=layer, next_norm=norms[layer + 1], products=products)
            stream, layer_kv = (jax.checkpoint(run) if remat else run)(stream, positions, kv[layer])
            layers.append(layer_kv)
        return products.end(stream, self.model.norm), tuple(layers)

    def logits(self, hidden: Float[Array, "N H"]) -> Float[Array, "N V"]:
        """Logits of the rows given, accumulated and returned in float32."""
        if self.lm_head is None:
            weight, contract = self.model.embed_tokens.weight[...], 1
        else:
            weight, contract = self.lm_head.weight[...], 0
        dims = (((1,), (contract,)), ((), ()))
        return lax.dot_general(hidden, weight, dims, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Llama:
    """A LLaMA as pure functions of `params`, a flat dict from Hugging Face names to arrays.

    `fused` joins QKV and gate-up into one product each; it changes names and shapes of parameters, not results.
    """

    config: LlamaConfig
    fused: bool = False
    dtype: Any = jnp.float32

    def init(self, seed: int) -> Params:
        """Random parameters as a trainer would start from (normal, `initializer_range`)."""
        module = LlamaForCausalLM(self.config, fused=self.fused, dtype=self.dtype, rngs=nnx.Rngs(seed))
        return {_name(path): value[...] for path, value in nnx.to_flat_state(nnx.state(module))}

    @cached_property
    def _split(self) -> tuple[Any, list[tuple[Any, Any]]]:
        module = nnx.eval_shape(
            lambda: LlamaForCausalLM(self.config, fused=self.fused, dtype=self.dtype, rngs=nnx.Rngs(0))
        )
        graphdef, state = nnx.split(module)
        return graphdef, list(nnx.to_flat_state(state))

    @cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name, shape and dtype of every parameter, in the order `forward` flattens them."""
        return {_name(path): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in self._split[1]}

    def _module(self, params: Params) -> LlamaForCausalLM:
        graphdef, flat = self._split
        state = nnx.from_flat_state([(path, variable.replace(params[_name(path)])) for path, variable in flat])
        return nnx.merge(graphdef, state)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "T"],
        positions: Int[Array, "T"],
        kv: tuple[Any, ...],
        attend: Attend,
        products: Any = PRODUCTS,
        remat: bool = False,
    ) -> tuple[Float[Array, "T H"], tuple[Any, ...]]:
        """Final hidden states (after the last norm) of every token, and the layers' new caches. `remat`: gradients
        compute every layer again, so that only what goes between layers is kept (arXiv 1604.06174)."""
        return self._module(params)(tokens, positions, kv, attend, products, remat)

    def logits(self, params: Params, hidden: Float[Array, "N H"]) -> Float[Array, "N V"]:
        """Float32 logits of the hidden states given: pass only the rows wanted."""
        return self._module(params).logits(hidden)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
