"""Products of few rows with large weights, joined with the norms, residual sums and activations between them.

A decode step multiplies 1 to some hundred rows with every weight of the model: what counts is that weights come from
memory without a pause. Between the products stand norms, residual sums and activations, small kernels whose launch
costs as much as their work. Here they ride along:

    project   silu(norm(x) @ gate) * (norm(x) @ up), or norm(x) @ weight
    add       x + y @ weight, and what the norm after it needs

The norm is in two halves, since no program sees a whole row. `add` gives the rows times the norm's weight, not yet
normalised, and each tile's share of their sums of squares; `project` multiplies with those rows, adds the shares up,
and scales its result: (x * w / rms) @ W = (x * w) @ W / rms.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .linear_kernel import LinearKernel
from .mosaic import WG_ROWS
from .tuning import LinearTiles, linear_tiles

JOINED_ROWS = 128  # up to which these pay: each tile of a weight reads all rows of x
# Up to which all are kernels. For more rows cuBLAS splits K of `add` and so wins what sums and norm cost apart, and has
# larger tiles for weights of many columns.
ALL_ROWS = 64


class Stream(NamedTuple):
    """What layers hand on: the rows, the rows times the next norm's weight, and shares of their sums of squares."""

    x: jax.Array  # [M, H]
    scaled: jax.Array  # [M, H]
    squares: jax.Array  # f32 [shares, M up to whole warpgroups]


def joins_rows(num_rows: int) -> bool:
    """Whether joined products take so many rows, and pay: multiples of 8, beyond 64 whole warpgroups."""
    return 0 < num_rows <= JOINED_ROWS and num_rows % (8 if num_rows <= WG_ROWS else WG_ROWS) == 0


def takes(dtype: Any, *widths: int) -> bool:
    """Whether the kernels take weights of that dtype with rows and columns of such counts. float16 has no room for rows
    that are not normalised."""
    return jnp.dtype(dtype) == jnp.bfloat16 and all(width % WG_ROWS == 0 for width in widths)


def start_stream(x: Float[Array, "M H"], norm_weight: Float[Array, "H"]) -> Stream:
    """A stream's first rows, which no `add` has made."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=1)
    return Stream(x, x * norm_weight, jnp.pad(squares, (0, -x.shape[0] % WG_ROWS))[None])


def end_stream(stream: Stream, eps: float) -> Float[Array, "M H"]:
    """Its rows, normalised."""
    num_rows, width = stream.x.shape
    scale = lax.rsqrt(stream.squares.sum(axis=0)[:num_rows] / width + eps)
    return (stream.scaled * scale[:, None]).astype(stream.x.dtype)


def project_mosaic(
    stream: Stream,
    weight: Float[Array, "H G N"],
    *,
    eps: float,
    tiles: LinearTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """norm(x) @ weight; with a G of 2, silu(norm(x) @ weight[:, 0]) * (norm(x) @ weight[:, 1])."""
    tiles = tiles or linear_tiles("project", stream.x.shape[0], weight.shape[2])
    kernel = LinearKernel.make(stream.scaled, weight, tiles, interpret, stream.squares.shape[0], eps)
    (out,) = kernel.launch(kernel.project, (stream.scaled, weight, stream.squares), [kernel.out_type])
    return out


def project_xla(stream: Stream, weight: jax.Array, *, eps: float) -> jax.Array:
    """`project_mosaic` by XLA's means."""
    out = jnp.einsum("mh,hgn->mgn", end_stream(stream, eps), weight)
    return out[:, 0] if weight.shape[1] == 1 else jax.nn.silu(out[:, 0]) * out[:, 1]


def add_xla(stream: Stream, y: jax.Array, weight: jax.Array, norm_weight: jax.Array) -> Stream:
    """`add_mosaic` by XLA's means."""
    return start_stream(stream.x + y @ weight, norm_weight)


def add_mosaic(
    stream: Stream,
    y: Float[Array, "M K"],
    weight: Float[Array, "K H"],
    norm_weight: Float[Array, "H"],
    *,
    tiles: LinearTiles | None = None,
    interpret: Any = None,
) -> Stream:
    """The stream of x + y @ weight, on its way to the norm that has `norm_weight`."""
    weight = weight[:, None]
    kernel = LinearKernel.make(y, weight, tiles or linear_tiles("add", y.shape[0], weight.shape[2]), interpret)
    squares = jax.ShapeDtypeStruct((kernel.num_tiles, kernel.padded_rows), jnp.float32)
    outs = [kernel.out_type, kernel.out_type, squares]
    return Stream(*kernel.launch(kernel.add, (y, weight, stream.x, norm_weight), outs))
