"""The kernel that only reads: every layout, through the interpreter."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from experiments.read_rate import LAYOUTS, Variant, read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_read_to_its_end_without_races(layout):
    variant = Variant(layout, columns=64, chunk=64, stages=2, num_ctas=2, skewed=True)
    weight = jnp.zeros(variant.shape(192, 128), jnp.bfloat16)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out = read(weight, jnp.full(1, 7, jnp.int32), variant=variant, columns=192, interpret=interpret)
    assert out[0] == 7
