"""Rotary position embedding (arXiv 2104.09864), with the stretched frequencies of longer contexts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import LlamaConfig


def rope_frequencies(config: LlamaConfig, max_model_len: int) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [head_dim / 2].

    `dynamic` (NTK-aware) frequencies follow the context length. Here that is the engine's `max_model_len`, constant
    for its life, so that keys already in the cache stay valid: up to the original length they are the plain ones.
    """
    rope, half = config.rope, config.head_dim // 2
    theta = rope.theta
    if rope.rope_type == "dynamic" and max_model_len > rope.original_max_position_embeddings:
        stretch = rope.factor * max_model_len / rope.original_max_position_embeddings - (rope.factor - 1)
        theta *= stretch ** (config.head_dim / (config.head_dim - 2))
    frequencies = theta ** -(np.arange(half, dtype=np.float64) / half)
    if rope.rope_type == "linear":
        frequencies /= rope.factor
    if rope.rope_type == "llama3":
        frequencies = _llama3(frequencies, config)
    if rope.freq_factors:
        frequencies /= np.asarray(rope.freq_factors)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths slow down by `factor`, short ones stay, a ramp joins them."""
    rope = config.rope
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def rotation(positions: Int[Array, "T"], frequencies: Float[np.ndarray, "half"]) -> Float[Array, "2 T half"]:
    """Cosines and sines of the angles at these positions."""
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def apply_rope(
    x: Float[Array, "T H D"], positions: Int[Array, "T"], frequencies: Float[np.ndarray, "half"]
) -> Float[Array, "T H D"]:
    """Rotates pair (i, i + D/2) of every head by `positions * frequencies[i]`, in float32."""
    cos, sin = rotation(positions, frequencies)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
