"""The model trains: log-probabilities of given tokens, their gradients, and what an optimiser makes of these."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import causal_logits, load_tiny

from pagedjax.models.llama import Llama
from pagedjax.models.training import token_logprobs

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 128, (3, 12)), jnp.int32)


def loss(model, params, tokens, **options):
    return -token_logprobs(model, params, tokens, **options)[:, 1:].mean()


def norm(tree) -> float:
    return float(optax.tree.norm(tree))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_token_s_logprob_is_that_of_the_logits_before_it(temperature: float):
    model, params = load_tiny("gqa")
    found = jax.jit(lambda tokens: token_logprobs(model, params, tokens, temperature=temperature))(TOKENS)
    for row, tokens in zip(found, TOKENS, strict=True):
        logprobs = jax.nn.log_softmax(causal_logits(model, params, tokens.tolist()) / temperature)
        expected = logprobs[jnp.arange(11), tokens[1:]]
        np.testing.assert_allclose(row[1:], expected, atol=1e-5)
    assert found.dtype == jnp.float32 and not found[:, 0].any()


@pytest.mark.slow
def test_padding_behind_a_row_changes_nothing_before_it():
    model, params = load_tiny("gqa")
    padded = jnp.pad(TOKENS, ((0, 0), (0, 5)), constant_values=7)
    found = token_logprobs(model, params, padded)[:, :12]
    np.testing.assert_allclose(found, token_logprobs(model, params, TOKENS), atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_finite_differences(fused: bool):
    model, params = load_tiny("gqa", fused)
    value = jax.jit(lambda p: loss(model, p, TOKENS))
    gradient = jax.jit(jax.grad(value))(params)
    keys = jax.random.split(jax.random.key(0), len(params))
    for key, name in zip(keys, params, strict=True):
        direction = jax.random.normal(key, params[name].shape)
        direction *= 1e-2 * jnp.linalg.norm(params[name]) / jnp.linalg.norm(direction)
        up, down = (value(params | {name: params[name] + sign * direction}) for sign in (1, -1))
        slope = float((gradient[name] * direction).sum())
        assert float(up - down) / 2 == pytest.approx(slope, rel=0.05, abs=2e-5), name


def test_layers_computed_again_give_the_same_gradients():
    model, params = load_tiny("gqa")
    plain, again = (jax.jit(jax.grad(lambda p, r=r: loss(model, p, TOKENS, remat=r)))(params) for r in (False, True))
    apart = jax.tree.map(lambda a, b: a - b, plain, again)
    assert norm(apart) < 1e-5 * norm(plain) and norm(plain) > 0


@pytest.mark.slow
def test_layers_computed_again_keep_less():
    model, params = load_tiny("gqa")
    deep = Llama(replace(model.config, num_layers=8))
    params, tokens = deep.init(0), jnp.zeros((4, 64), jnp.int32)

    def kept(remat: bool) -> int:
        gradient = jax.jit(jax.grad(lambda p: loss(deep, p, tokens, remat=remat)))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert kept(True) < 0.5 * kept(False)


def test_optax_lowers_the_loss():
    config = load_tiny("gqa")[0].config
    model = Llama(config)
    params, optimizer = model.init(0), optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(lambda p: loss(model, p, TOKENS, remat=True))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 0.9 * np.log(config.vocab_size) and losses[-1] < 0.5 * losses[0]
