"""The sampling parameters of a step's rows, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from .batch import SAMPLING_FLOATS, SAMPLING_INTS


class Sampling(NamedTuple):
    """Sampling parameters by row."""

    temperature: jax.Array  # f32 [S]
    top_p: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array
    top_k: jax.Array  # i32 [S], 0 is off
    seed_high: jax.Array
    seed_low: jax.Array
    adjusted: jax.Array  # i32 [S], whether the row has bias, bans or penalties


def unpack_sampling(packed: Int[Array, "S num_sampling"]) -> Sampling:
    """The inverse of `batch.pack_sampling`, for all rows."""
    columns = dict(zip((*SAMPLING_FLOATS, *SAMPLING_INTS), packed.T, strict=True))
    floats = {name: lax.bitcast_convert_type(columns[name], jnp.float32) for name in SAMPLING_FLOATS}
    return Sampling(**{**columns, **floats})
