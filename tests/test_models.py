"""The model against transformers' golden values, its caches against each other, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import causal_logits, dense_greedy, golden, load_tiny

from pagedjax.models.config import LlamaConfig
from pagedjax.models.dense import causal_attend, dense_attend, make_dense_kv
from pagedjax.models.llama import Llama
from pagedjax.models.rope import rope_frequencies

MODELS = ["mha", "gqa", "mqa", "tied", "llama3_rope", "linear_rope", "dynamic_rope", "bias", "explicit_head_dim"]
MINIMAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, False) for name in [*MODELS, "gqa_bf16"]] + [("mha", True), ("mqa", True), ("bias", True)],
)
def test_logits_equal_transformers(name, fused):
    model, params = load_tiny(name, fused)
    for prompt in golden(name)["prompts"]:
        logits = causal_logits(model, params, prompt["prompt_ids"])[-1]
        np.testing.assert_allclose(logits, prompt["logits"], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_over_a_dense_cache_equal_transformers(name):
    model, params = load_tiny(name)
    for prompt in golden(name)["prompts"]:
        max_len = model.config.max_position_embeddings if name == "dynamic_rope" else 96
        tokens, _ = dense_greedy(model, params, prompt["prompt_ids"], len(prompt["tokens"]), max_len)
        assert tokens == prompt["tokens"]


def test_a_sharded_checkpoint_equals_the_single_file():
    _, single = load_tiny("gqa")
    _, sharded = load_tiny("gqa_sharded")
    assert single.keys() == sharded.keys()
    for name, value in single.items():
        np.testing.assert_array_equal(sharded[name], value)


@pytest.mark.slow
def test_a_batched_dense_cache_equals_plain_causal_attention():
    model, params = load_tiny("gqa")
    tokens = np.random.default_rng(0).integers(0, 128, (3, 12)).astype(np.int32)
    expected = [causal_logits(model, params, row.tolist()) for row in tokens]
    kv = make_dense_kv(model.config, 3, 16, jnp.float32)
    attend = dense_attend(model.config, 3, 16)
    for start, end in ((0, 5), (5, 6), (6, 12)):  # a prefill, a decode step, a chunk
        positions = np.tile(np.arange(start, end, dtype=np.int32), 3)
        chunk = jnp.asarray(tokens[:, start:end].ravel())
        hidden, kv = model.hidden(params, chunk, jnp.asarray(positions), kv, attend)
        logits = model.logits(params, hidden).reshape(3, end - start, -1)
        for row in range(3):
            np.testing.assert_allclose(logits[row], expected[row][start:end], atol=2e-4)


def test_gradients_train_the_model_without_a_cache():
    config = LlamaConfig.from_hf(MINIMAL)
    model = Llama(config)
    params = model.init(0)
    attend = causal_attend(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 17)), jnp.int32)

    def loss(params):
        def logits(row):
            hidden, _ = model.hidden(params, row[:-1], jnp.arange(16), (None,) * 2, attend)
            return model.logits(params, hidden)

        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(logits)(tokens), tokens[:, 1:]).mean()

    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return value, gradients, optax.apply_updates(params, updates), state

    first, gradients, params, state = update(params, state)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradients.values())
    for _ in range(60):
        last, _, params, state = update(params, state)
    assert first == pytest.approx(np.log(64), abs=0.1) and last < 0.2


def test_parameters_have_hugging_face_names_and_fusing_is_a_layout_choice():
    plain, fused = Llama(LlamaConfig.from_hf(MINIMAL)), Llama(LlamaConfig.from_hf(MINIMAL), fused=True)
    assert plain.shapes["model.layers.1.self_attn.k_proj.weight"].shape == (32, 16)
    assert fused.shapes["model.layers.1.self_attn.qkv_proj.weight"].shape == (32, 2, 4, 8)
    assert fused.shapes["model.layers.1.mlp.gate_up_proj.weight"].shape == (32, 2, 48)
    assert sum(np.prod(s.shape) for s in plain.shapes.values()) == sum(np.prod(s.shape) for s in fused.shapes.values())
    assert plain.init(0).keys() == plain.shapes.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
        ({"hidden_act": "swish2"}, "hidden_act='swish2'"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"head_dim": 7}, "head_dim=7"),
    ],
)
def test_a_configuration_that_is_no_llama_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({**MINIMAL, **change})


def test_rope_settings_are_read_in_both_spellings():
    old = LlamaConfig.from_hf({**MINIMAL, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = LlamaConfig.from_hf({**MINIMAL, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})
    assert old == new and old.rope.theta == 5e5 and old.rope.factor == 4.0


def test_dynamic_frequencies_are_plain_up_to_the_original_length_and_slower_beyond():
    config = LlamaConfig.from_hf({**MINIMAL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    plain = rope_frequencies(LlamaConfig.from_hf(MINIMAL), 1)
    np.testing.assert_array_equal(rope_frequencies(config, config.max_position_embeddings), plain)
    longer = rope_frequencies(config, 2 * config.max_position_embeddings)
    # transformers' formula at this length: theta * (factor * L / original - (factor - 1)) ** (D / (D - 2))
    expected = (10000.0 * 3.0 ** (8 / 6)) ** -(np.arange(4) / 4)
    np.testing.assert_allclose(longer, expected, rtol=1e-6)


def test_frequency_factors_of_gguf_equal_llama3_parameters():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig.from_hf({**MINIMAL, "rope_scaling": {"rope_type": "llama3", **rope}})
    plain, scaled = rope_frequencies(LlamaConfig.from_hf(MINIMAL), 1), rope_frequencies(config, 1)
    factors = {"rope_type": "freq_factors", "freq_factors": (plain / scaled).tolist()}
    explicit = LlamaConfig.from_hf({**MINIMAL, "rope_scaling": factors})
    np.testing.assert_allclose(rope_frequencies(explicit, 1), scaled, rtol=1e-6)
    with pytest.raises(ValueError, match="freq_factors has 3 entries, not 4"):
        dataclasses.replace(explicit, rope=dataclasses.replace(explicit.rope, freq_factors=(1.0, 1.0, 1.0)))
