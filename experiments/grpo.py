"""Group-relative policy optimisation (GRPO, https://arxiv.org/abs/2402.03300): advantages, objective, training step.

The objective is PPO's clipped one (https://arxiv.org/abs/1707.06347), averaged over a completion's tokens, then over
completions; the penalty is the KL divergence from a reference model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pagedjax.models.llama import Llama, Params
from pagedjax.models.training import token_logprobs

Metrics = dict[str, jax.Array]


class Experience(NamedTuple):
    """What a step learns from: completions, how good they were, and what two policies made of their tokens."""

    tokens: Any  # i32 [N, L]
    mask: Any  # bool [N, L], where a sampled token stands
    old: Any  # f32 [N, L], the sampler's log-probabilities
    reference: Any  # f32 [N, L], the reference model's
    advantages: Any  # f32 [N]


def group_advantages(rewards: Float[np.ndarray, "P n"]) -> Float[np.ndarray, "P n"]:
    """Of n completions a prompt: by how many standard deviations each is better than its group; 0 if all are equal."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)


def kl_estimate(
    logprobs: Float[Array, "N L"], reference: Float[Array, "N L"], mask: Bool[Array, "N L"]
) -> Float[Array, "N L"]:
    """Of each sampled token, an unbiased estimate of KL(policy || reference) that is never negative: r - 1 - log r with
    r = reference / policy, which is called k3 (http://joschu.net/blog/kl-approx.html). 0 elsewhere."""
    log_ratio = jnp.where(mask, reference - logprobs, 0)
    return jnp.expm1(log_ratio) - log_ratio


def objective(
    logprobs: Float[Array, "N L"], experience: Experience, clip: float, kl_weight: float
) -> tuple[Float[Array, ""], Metrics]:
    """GRPO's loss under a policy's log-probabilities, and what there is to see in it. Tokens that were not sampled do
    not enter, whatever stands there."""
    mask, advantages = experience.mask, experience.advantages[:, None]
    lens = jnp.maximum(mask.sum(1), 1)

    def mean(values: Float[Array, "N L"]) -> Float[Array, ""]:
        return (jnp.where(mask, values, 0).sum(1) / lens).mean()

    ratio = jnp.exp(jnp.where(mask, logprobs - experience.old, 0))
    gain, clipped = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    kl = mean(kl_estimate(logprobs, experience.reference, mask))
    loss = kl_weight * kl - mean(jnp.minimum(gain, clipped))
    return loss, {"loss": loss, "clip_fraction": mean((clipped < gain).astype(jnp.float32)), "kl_in_step": kl}


def make_train_step(
    model: Llama, optimizer: optax.GradientTransformation, clip: float, kl_weight: float, temperature: float
) -> Callable[..., tuple[Params, Any, Metrics]]:
    """A compiled `(params, state, experience, order [steps, rows]) -> (params, state, metrics)`: an optimiser's step on
    the rows that each line of `order` names, metrics being means over these."""

    def loss(params: Params, part: Experience) -> tuple[jax.Array, Metrics]:
        logprobs = token_logprobs(model, params, part.tokens, temperature=temperature)
        return objective(logprobs, part, clip, kl_weight)

    def train(
        params: Params, state: Any, experience: Experience, order: Int[Array, "steps rows"]
    ) -> tuple[Params, Any, Metrics]:
        def one(carry: tuple[Params, Any], rows: Int[Array, "rows"]) -> tuple[tuple[Params, Any], Metrics]:
            params, state = carry
            gradient, metrics = jax.grad(loss, has_aux=True)(params, jax.tree.map(lambda x: x[rows], experience))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), metrics  # pyright: ignore (optax's trees)

        (params, state), metrics = jax.lax.scan(one, (params, state), order)
        return params, state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(train)
