"""What a trainer needs of the model: log-probabilities of given tokens, which it can differentiate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .dense import causal_attend
from .llama import Llama, Params


def token_logprobs(
    model: Llama, params: Params, tokens: Int[Array, "B L"], *, temperature: float = 1.0, remat: bool = False
) -> Float[Array, "B L"]:
    """Log-probability of every token after those before it in its row, float32; 0 for the first, which none predicts.

    Rows begin at position 0, and padding goes behind, where no real token sees it. `temperature` divides logits as
    sampling does. `remat`: gradients compute layers and logits again rather than keep them.
    """
    attend, kv = causal_attend(model.config), (None,) * model.config.num_layers
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)

    def chosen(hidden: Float[Array, "N H"], targets: Int[Array, "N"]) -> Float[Array, "N"]:
        logits = model.logits(params, hidden) / temperature
        return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    def of_row(row: Int[Array, "L"]) -> Float[Array, "L"]:
        hidden, _ = model.hidden(params, row, positions, kv, attend, remat=remat)
        return jnp.pad((jax.checkpoint(chosen) if remat else chosen)(hidden[:-1], row[1:]), (1, 0))

    return jax.vmap(of_row)(tokens)
