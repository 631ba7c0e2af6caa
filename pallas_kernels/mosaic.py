"""What the Mosaic GPU kernels share: layouts, swizzled buffers, and operations that Pallas lacks."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.fuser  # imported here once: a later import would change jit's cache key
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu.utils import getelementptr, inline_ptx, memref_ptr, memref_slice
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

LOG2E = math.log2(math.e)
MASKED = -1e30  # a score that weighs nothing, and no infinity, whose differences would be NaN
WGMMA = plgpu.Layout.WGMMA  # how a warpgroup holds a product of its tensor cores
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
WG_ROWS = 64  # rows of one warpgroup's product


def i32(value: int) -> jax.Array:
    return jnp.int32(value)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def swizzled(shape: tuple[int, ...], dtype: DTypeLike, columns: int | None = None):
    """Shared memory as tensor cores and TMA want it: tiles of 8 rows by 128 bytes, or fewer `columns`, swizzled."""
    itemsize = jnp.dtype(dtype).itemsize
    columns = columns or 128 // itemsize
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    transforms = tiling, plgpu.SwizzleTransform(columns * itemsize)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def full(shape: tuple[int, ...], value: float | int, dtype: DTypeLike, layout: Any = WGMMA) -> jax.Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def product(a, b) -> jax.Array:
    """a [M, K] b [K, N] from shared memory, in float32 registers."""

    def run(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def scale_rows(x: jax.Array, factor: jax.Array, *, interpret: bool) -> jax.Array:
    """x [64, N] times factor [64], in registers. A warp whose factors are all 1 skips the work."""
    if interpret:  # it does not know Mosaic's own operations
        return x * lax.broadcast_in_dim(factor, x.shape, [0])

    @plgpu.inline_mgpu(arg_types=(WGMMA, PER_ROW), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA))
    def run(_, x, factor):
        one = mgpu.c(1.0, factor.mlir_dtype)
        values = [vector.extract(register, [], [0]) for register in factor.registers.flat]
        changed = reduce(arith.ori, (arith.cmpf(arith.CmpFPredicate.ONE, value, one) for value in values))
        everyone = mgpu.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
        branch = scf.IfOp(nvvm.vote_sync(everyone, changed, "any"), [r.type for r in x.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = x * factor.broadcast_in_dim(x.shape, (0,), x.layout)
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(x.registers.flat))
        registers = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return run(x, factor)


def fold_columns(op: Callable, x: jax.Array, *, interpret: bool) -> jax.Array:
    """x [64, N], in registers, folded to [64, 8] by `op`: each thread's own values, and no exchange among threads."""

    def tree(parts):
        while len(parts) > 1:
            parts = [op(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    if interpret:
        return tree([x[:, i : i + 8] for i in range(0, x.shape[1], 8)])

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct((64, 8), x.dtype, layout=WGMMA))
    def run(_, x):
        return tree([x[:, i : i + 8] for i in range(0, x.shape[1], 8)])

    return run(x)


def store_rows(ref, x: jax.Array, first, low, high) -> None:
    """Rows [low, high) of x [64, N], in registers, to ref [R, N] in global memory, whose row `first` is for row 0."""
    row = plgpu.broadcasted_iota(jnp.int32, x.shape[:1], 0, layout=PER_ROW)
    scatter_rows(ref, x, jnp.where((low <= row) & (row < high), first + row, -1))


def scatter_rows(ref, x: jax.Array, target: jax.Array, *, interpret: bool = False) -> None:
    """Each row of x [64, N], in registers, to row `target` i32[64] of ref [R, N] in global memory, unless that is
    below 0."""
    if interpret:
        for i in range(x.shape[0]):

            @pl.when(target[i] >= 0)
            def _(i=i):
                ref[target[i]] = x[i]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, PER_ROW))
    def run(_, ref, x, target):
        columns = [column for _, column in x.layout.thread_idxs(x.shape)]  # every other one for each of a thread's rows
        for half, register in enumerate(target.registers.flat):
            row = vector.extract(register, [], [0])
            stored = arith.cmpi(arith.CmpIPredicate.sge, row, mgpu.c(0, row.type))
            with ir.InsertionPoint(scf.IfOp(stored).then_block):
                begin = memref_ptr(memref_slice(ref, (arith.index_cast(ir.IndexType.get(), row),)))
                for pair, column in zip(x.registers.flat[half::2], columns[half::2], strict=True):
                    place = getelementptr(begin, [arith.index_cast(row.type, column)], x.mlir_dtype)
                    llvm.store(pair, place, alignment=4)
                scf.yield_([])

    run(ref, x, target)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool) -> jax.Array:
    """x [64, N], in registers, with its pairs (i, i + N / 2) turned by angles [64, N / 2]."""
    half = x.shape[1] // 2

    def turn(x, cos, sin):
        first, second = x[:, :half], x[:, half:]
        return first * cos - second * sin, second * cos + first * sin

    if interpret:
        return jnp.concatenate(turn(x, cos, sin), axis=1)

    arguments, result = (WGMMA, WGMMA, WGMMA), plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=arguments, return_type=result)
    def run(_, x, cos, sin):
        registers = np.concatenate([part.registers for part in turn(x, cos, sin)], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return run(x, cos, sin)


def larger(a, b):
    """The maximum of arrays of JAX or of Mosaic."""
    return a.max(b) if isinstance(a, mgpu.FragmentedArray) else jnp.maximum(a, b)


def signal(counter_ref) -> None:
    """Adds one to counter_ref i32[1], in global memory, for CTAs that wait to read what this warpgroup has written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, counter):
        mgpu.SemaphoreRef(memref_ptr(counter)).signal(1, memory_scope="gpu")

    run(counter_ref)


def wait_for_signals(counter_ref, count) -> None:
    """Waits until so many have arrived, and takes them off again; TMA copies that follow see what they tell of."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), PER_ROW))
    def run(_, counter, count):
        value = vector.extract(count.registers.flat[0], [], [0])
        mgpu.SemaphoreRef(memref_ptr(counter)).wait(value, memory_scope="gpu")
        inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    run(counter_ref, plgpu.layout_cast(lax.broadcast(count, (WG_ROWS,)), PER_ROW))
