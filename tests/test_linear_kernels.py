"""The Mosaic kernels that join products with what stands around them, in Pallas' interpreter."""

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from paged_helpers import MAX_ERROR, pairs_of_products, qkv_projection, relative_error

from pagedjax.pallas_kernels.dispatch import LINEAR
from pagedjax.pallas_kernels.linear import Stream, add_mosaic, project_mosaic
from pagedjax.pallas_kernels.project_qkv import project_qkv_mosaic
from pagedjax.pallas_kernels.tuning import LinearTiles

INTERPRET = plgpu.InterpretGPUParams()
races = pytest.param(plgpu.InterpretGPUParams(detect_races=True), marks=pytest.mark.slow, id="races")
slow = pytest.mark.slow


@pytest.mark.parametrize("interpret", [INTERPRET, races])
@pytest.mark.parametrize(
    ("rows", "parts", "block_n"),
    [(8, 1, 64), pytest.param(16, 2, 32, marks=slow), pytest.param(128, 2, 64, marks=slow)],
)
def test_joined_products_equal_the_reference(rows, parts, block_n, interpret):
    """Several tiles a program, more chunks than the ring has slots, and fewer rows than a warpgroup's."""
    tiles = LinearTiles(block_n, 64, 2)
    out, expected = pairs_of_products(
        jax.random.key(0),
        (rows, 192, 128, 128, parts),
        partial(add_mosaic, tiles=tiles, interpret=interpret),
        partial(project_mosaic, tiles=tiles, interpret=interpret),
    )
    for name, value in out.items():
        assert relative_error(value, expected[name]) < MAX_ERROR["bfloat16"], name


@pytest.mark.parametrize("interpret", [INTERPRET, races])
@pytest.mark.parametrize(
    ("rows", "head_dim"), [(8, 64), pytest.param(16, 128, marks=slow), pytest.param(128, 64, marks=slow)]
)
def test_a_joined_qkv_projection_equals_the_reference(rows, head_dim, interpret):
    out, expected = qkv_projection(
        jax.random.key(0),
        (rows, 128, 2, 2, head_dim),
        partial(project_qkv_mosaic, tiles=LinearTiles(64, 64, 2), interpret=interpret),
    )
    for name, value in out.items():
        assert relative_error(value, expected[name]) < MAX_ERROR["bfloat16"], name


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("rows", "y", "weight", "norm", "name"),
    [
        (zeros(12, 64), zeros(12, 64), zeros(64, 64), zeros(64), "x=bfloat16"),
        (zeros(72, 64), zeros(72, 64), zeros(64, 64), zeros(64), "x=bfloat16"),
        (zeros(8, 64, dtype=jnp.float16), zeros(8, 64), zeros(64, 64), zeros(64), "x=float16"),
        (zeros(8, 64), zeros(16, 64), zeros(64, 64), zeros(64), "y="),
        (zeros(8, 64), zeros(8, 64), zeros(128, 64), zeros(64), "weight="),
        (zeros(8, 96), zeros(8, 64), zeros(64, 96), zeros(96), "weight="),
        (zeros(8, 64), zeros(8, 64), zeros(64, 64), zeros(32), "norm_weight="),
    ],
)
def test_sums_that_do_not_fit_are_refused_before_any_launch(rows, y, weight, norm, name):
    with pytest.raises(ValueError, match=name):
        LINEAR.add(Stream(rows, rows, zeros(1, 64, dtype=jnp.float32)), y, weight, norm)


@pytest.mark.parametrize("weight", [zeros(128, 1, 64), zeros(64, 3, 64), zeros(64, 64), zeros(64, 1, 96)])
def test_projections_that_do_not_fit_are_refused_before_any_launch(weight):
    with pytest.raises(ValueError, match="weight="):
        LINEAR.project(Stream(zeros(8, 64), zeros(8, 64), zeros(1, 64, dtype=jnp.float32)), weight, eps=1e-5)
