"""How fast are a decode step's products, joined with what stands between them, and with which tiles?

Question: microseconds of a layer's attention pair (norm, QKV; output product, residual sum) and MLP pair (norm, gate
and up, activation; down product, residual sum) through XLA and through `pallas_kernels.linear`, beside what their
weights take at the copy rate. Varied: shape, rows; with --tune the tiles of one product at a time. Held: bfloat16,
random weights of several layers, more than the L2 cache holds, one after the other in one jit; the time that kernels
run, read off a profile, since the host is slower than such small kernels. Expected: XLA loses some microseconds a
kernel, 5 to 7 of them; the kernels stay within 1.2 of the copy rate's time.

    python -m experiments.linear [--shape llama3.2-1b llama3-8b llama2-7b] [--rows 16 64] [--tune]

Rows go to `results/linear.jsonl`. Both paths' results are compared with float32 before they are timed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from pagedjax.bench import package_data
from pagedjax.models.config import LlamaConfig
from pagedjax.models.load import open_checkpoint, read_config
from pagedjax.pallas_kernels.linear import add_mosaic, end_stream, project_mosaic, start_stream
from pagedjax.pallas_kernels.tuning import LinearTiles, linear_tiles

from .common import conditions, record
from .timeline import device_events

EPS, BYTES, TOLERANCE = 1e-5, 320 << 20, 2e-2
RUNS, PAUSE = 7, 0.03  # of each variant; seconds between variants, by which a profile is taken apart
CANDIDATES = [LinearTiles(n, k, 8) for n, k in ((64, 128), (64, 64), (32, 128), (128, 64))]
PROJECT = jax.jit(project_mosaic, static_argnames=("eps", "tiles"))  # or each layer would lower its own
ADD = jax.jit(add_mosaic, static_argnames=("tiles",))
Weights = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # norm [H], first [H, G, N], second [K, H], next norm [H]


def widths(config: LlamaConfig, pair: str) -> tuple[int, int, int]:
    """Columns of the first product, its parts, and rows of the second."""
    if pair == "mlp":
        return config.intermediate_size, 2, config.intermediate_size
    heads = config.num_kv_heads * (config.num_q_heads // config.num_kv_heads + 2)
    return heads * config.head_dim, 1, config.num_q_heads * config.head_dim


def make_weights(config: LlamaConfig, pair: str, layers: int) -> list[Weights]:
    columns, parts, rows = widths(config, pair)
    hidden = config.hidden_size

    def make(key):
        keys = jax.random.split(key, 3)
        norm = 1 + jax.random.normal(keys[0], (hidden,)) / 8
        first = jax.random.normal(keys[1], (hidden, parts, columns)) * hidden**-0.5
        second = jax.random.normal(keys[2], (rows, hidden)) * rows**-0.5
        return tuple(x.astype(jnp.bfloat16) for x in (norm, first, second))

    weights = [jax.jit(make)(key) for key in jax.random.split(jax.random.key(0), layers)]
    return [(*own, after[0]) for own, after in zip(weights, weights[1:] + weights[:1], strict=True)]


def through_xla(x: jax.Array, weights: list[Weights], dtype: Any) -> jax.Array:
    """The pairs as the model has them, in a dtype."""
    x = x.astype(dtype)
    for layer in weights:
        norm, first, second, _ = (w.astype(dtype) for w in layer)
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)).astype(dtype) * norm
        hidden = jnp.einsum("mh,hgn->mgn", y, first)
        hidden = hidden[:, 0] if hidden.shape[1] == 1 else jax.nn.silu(hidden[:, 0]) * hidden[:, 1]
        x = x + hidden[:, : second.shape[0]] @ second
    return x


def through_kernels(x: jax.Array, weights: list[Weights], tiles: dict[str, LinearTiles]) -> jax.Array:
    stream = start_stream(x, weights[0][0])
    for _, first, second, after in weights:
        hidden = PROJECT(stream, first, eps=EPS, tiles=tiles.get("project"))
        stream = ADD(stream, hidden[:, : second.shape[0]], second, after, tiles=tiles.get("add"))
    return end_stream(stream, EPS) * 0 + stream.x  # the last squares count too


def variants(rows: int, columns: dict[str, int], tune: bool) -> dict[str, Callable[..., Any]]:
    """What is timed, by name."""
    found: dict[str, Callable[..., Any]] = {
        "xla": partial(through_xla, dtype=jnp.bfloat16),
        "kernels": partial(through_kernels, tiles={}),
    }
    for op in ("project", "add") if tune else ():
        for tiles in CANDIDATES:
            if tiles != linear_tiles(op, rows, columns[op]):
                found[f"{op} {tuple(tiles)}"] = partial(through_kernels, tiles={op: tiles})
    return found


def busy_us(functions: list[Callable[[], Any]]) -> list[float]:
    """Microseconds that kernels run in a call of each: medians, each function's calls one after the other."""
    for function in functions:
        jax.block_until_ready(function())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for function in functions:
                for _ in range(RUNS):
                    time.sleep(PAUSE)
                    jax.block_until_ready(function())
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = device_events(ProfileData.from_file(str(file)))
    calls: list[float] = []
    until = -np.inf
    for event in events:
        if event.start - until > PAUSE * 5e8:
            calls.append(0.0)
        calls[-1] += (event.end - event.start) / 1e3
        until = event.end
    return [float(x) for x in np.median(np.reshape(calls, (len(functions), RUNS)), axis=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="times products of few rows")
    parser.add_argument("--shape", nargs="+", default=["llama3.2-1b", "llama3-8b", "llama2-7b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "linear.jsonl")
    args = parser.parse_args()
    held = conditions()
    print(f"{held['device']}, copy {held['copy_tb_s']:.2f} TB/s, us a layer (and times the copy rate's)")
    for shape in args.shape:
        config = read_config(open_checkpoint(str(package_data("shapes", shape)))[0])
        for pair in ("attention", "mlp"):
            columns, parts, depth = widths(config, pair)
            size = 2 * config.hidden_size * (columns * parts + depth)
            weights = make_weights(config, pair, -(-BYTES // size))
            needed = size / held["copy_tb_s"] / 1e6
            for rows in args.rows:
                x = jax.random.normal(jax.random.key(1), (rows, config.hidden_size), jnp.bfloat16)
                named = variants(rows, {"project": columns, "add": config.hidden_size}, args.tune)
                with ThreadPoolExecutor(8) as threads:
                    lowered = {name: jax.jit(function).lower(x, weights) for name, function in named.items()}
                    compiled = dict(zip(lowered, threads.map(lambda low: low.compile(), lowered.values()), strict=True))
                expected = jax.jit(partial(through_xla, dtype=jnp.float32))(x, weights)
                times = busy_us([partial(function, x, weights) for function in compiled.values()])
                for (name, function), total in zip(compiled.items(), times, strict=True):
                    error = jnp.linalg.norm(function(x, weights) - expected) / jnp.linalg.norm(expected)
                    us = total / len(weights)
                    row = {"shape": shape, "pair": pair, "rows": rows, "variant": name, "us": us, "needed_us": needed}
                    good = "" if error < TOLERANCE else f"  WRONG: {error:.1e}"
                    print(f"{shape:12} {pair:10} {rows:4} {name:32} {us:7.2f} {us / needed:5.2f}{good}", flush=True)
                    record(args.results, row | held | {"error": float(error)})


if __name__ == "__main__":
    main()
