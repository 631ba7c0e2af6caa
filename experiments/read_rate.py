"""How fast can a kernel read a weight, and what decides it?

Question: terabytes a second of TMA copies into shared memory alone, with nothing multiplied. Varied: the weight's
layout in memory (rows of all columns; each tile's columns in one piece; transposed, a column's weights side by side),
columns of a tile, rows of a copy, copies on their way, how many programs, and whether these begin at different rows.
Held: a weight of 512 MB, tiles dealt out in turns, one warp that copies, one warpgroup that frees. Expected on an H200:
the copy rate or above it, from some 100 KB on their way in each SM, if what lies side by side is read at about one
time.

    python -m experiments.read_rate [--mib 512] [--small]

Rows go to `results/read_rate.jsonl`. `--small` runs one copy of each layout through the interpreter.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pagedjax.pallas_kernels.mosaic import i32, swizzled

from .common import Parser, conditions, record

DEPTH, RUNS, CALLS = 4096, 5, 8  # rows of the weight; times and calls in each
LAYOUTS = "rows", "pieces", "transposed"


class Variant(NamedTuple):
    layout: str = "rows"
    columns: int = 64  # of a tile
    chunk: int = 128  # rows of a copy
    stages: int = 12
    num_ctas: int = 132
    skewed: bool = False

    def shape(self, columns: int, depth: int) -> tuple[int, ...]:
        """Of the whole weight."""
        return {
            "rows": (depth, columns),
            "pieces": (columns // self.columns, depth, self.columns),
            "transposed": (columns, depth),
        }[self.layout]

    def piece(self, weight_ref: Any, tile: Any, chunk: Any) -> Any:
        """What one copy takes."""
        rows, columns = pl.ds(chunk * self.chunk, self.chunk), pl.ds(tile * self.columns, self.columns)
        if self.layout == "rows":
            return weight_ref.at[rows, columns]
        return weight_ref.at[tile, rows] if self.layout == "pieces" else weight_ref.at[columns, rows]

    @property
    def slot(self) -> tuple[int, int]:
        return (self.columns, self.chunk) if self.layout == "transposed" else (self.chunk, self.columns)


BASE = Variant()
VARIANTS = [
    *(BASE._replace(layout=layout, skewed=skewed) for layout in LAYOUTS for skewed in (False, True)),
    *(BASE._replace(stages=stages) for stages in (3, 6, 9)),
    *(BASE._replace(layout=layout, columns=128, stages=6) for layout in LAYOUTS[:2]),
    BASE._replace(columns=256, chunk=64, stages=6),
    *(BASE._replace(layout="transposed", columns=n, chunk=8192 // n) for n in (16, 32, 128)),
    *(BASE._replace(num_ctas=count) for count in (66, 88, 110)),
    BASE._replace(num_ctas=264, stages=6),
    BASE._replace(layout="pieces", num_ctas=264, stages=6),
    *(BASE._replace(num_ctas=1024, stages=stages) for stages in (6, 4, 3)),
    *(BASE._replace(columns=32, chunk=chunk) for chunk in (128, 256)),
    BASE._replace(columns=32, num_ctas=2048, stages=6),
]


def read(weight: jax.Array, before: jax.Array, *, variant: Variant, columns: int, interpret: Any = None) -> jax.Array:
    """Reads all of a weight of so many columns; the result is `before`, so that calls follow each other."""
    num_tiles, num_chunks, stages = columns // variant.columns, weight.size // columns // variant.chunk, variant.stages
    num_ctas = min(variant.num_ctas, num_tiles)

    def read_rate(weight_ref, before_ref, out_ref, ring, filled, freed):
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        count = lax.div(num_tiles - cta + num_ctas - 1, i32(num_ctas)) * num_chunks

        @pl.when(warpgroup == 0)
        def _():
            for slot in range(stages):
                plgpu.barrier_arrive(freed.at[slot])

            @pl.loop(0, count)
            def _(i):
                slot = lax.rem(i, i32(stages))
                plgpu.barrier_wait(filled.at[slot])
                plgpu.barrier_arrive(freed.at[slot])

            @pl.when(cta == 0)
            def _():
                out_ref[0] = before_ref[0]

        @pl.when(warpgroup == 1)
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    first = lax.div(cta * num_chunks, i32(num_ctas)) if variant.skewed else i32(0)

                    @pl.loop(0, count)
                    def _(i):
                        slot, tile = lax.rem(i, i32(stages)), cta + lax.div(i, i32(num_chunks)) * num_ctas
                        plgpu.barrier_wait(freed.at[slot])
                        source = variant.piece(weight_ref, tile, lax.rem(i + first, i32(num_chunks)))
                        plgpu.copy_gmem_to_smem(source, ring.at[slot], filled.at[slot])

                    for slot in range(stages):
                        plgpu.barrier_wait(freed.at[slot])

    scratch = [
        swizzled((stages, *variant.slot), weight.dtype, min(variant.slot[1], 64)),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    return plgpu.kernel(
        read_rate,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        scratch_types=scratch,
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
    )(weight, before)


def seconds(run: Callable[[], jax.Array]) -> float:
    """Of one call, the median of some times."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        outs = [run() for _ in range(CALLS)]
        outs[-1].block_until_ready()
        times.append((time.perf_counter() - start) / CALLS)
    return float(np.median(times[1:]))


def main() -> None:
    parser = Parser("read_rate", __doc__)
    parser.add_argument("--mib", type=int, default=512)
    args = parser.parse_args()
    before = jnp.zeros(1, jnp.int32)
    if args.small:
        for layout in LAYOUTS:
            variant = Variant(layout, chunk=64, stages=2, num_ctas=2, skewed=True)
            weight = jnp.zeros(variant.shape(256, 128), jnp.bfloat16)
            read(weight, before, variant=variant, columns=256, interpret=plgpu.InterpretGPUParams())
            print(f"{layout}: read")
        return
    held = conditions()
    columns = (args.mib << 20) // (2 * DEPTH)
    weight = jnp.full((DEPTH, columns), 0.01, jnp.bfloat16)
    jitted = jax.jit(read, static_argnames=("variant", "columns"))
    weights = {shape: weight.reshape(shape) for shape in {v.shape(columns, DEPTH) for v in VARIANTS}}
    run = {v: partial(jitted, weights[v.shape(columns, DEPTH)], before, variant=v, columns=columns) for v in VARIANTS}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda call: call().block_until_ready(), run.values()))
    print(f"{held['device']}, copy {held['copy_tb_s']:.2f} TB/s, {args.mib} MiB; TB/s of reads")
    for variant in VARIANTS:
        rate = weight.nbytes / seconds(run[variant]) / 1e12
        text = ", ".join(f"{name} {value}" for name, value in variant._asdict().items())
        print(f"{rate:6.2f}  {text}", flush=True)
        record(args.results, {**variant._asdict(), "mib": args.mib, "tb_s": rate, **held})


if __name__ == "__main__":
    main()
